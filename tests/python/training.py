# SPDX-License-Identifier: Apache-2.0
"""A toy to train in tests: a Wan transformer of a few thousand weights and a few scenes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch

from sparline import train
from sparline.demo import data
from sparline.demo.data import Scene

HEADS, HEAD_DIM, LAYERS = 2, 16, 2
#: 4 frames of 16 x 16 pixels: 256 tokens, 16 blocks of 16.
SIZE = {"num_frames": 4, "height": 16, "width": 16}
METHOD = {"name": "sla2", "keep_ratio": 0.25, "block_q": 16, "block_k": 16, "num_alphas": 16}


def save_model(folder: Path, channels: int = 3, text_dim: int = 32) -> Path:
    """An untrained transformer, over pixels if ``channels`` is 3."""
    torch.manual_seed(0)
    diffusers.WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=channels,
        out_channels=channels,
        text_dim=text_dim,
        freq_dim=32,
        ffn_dim=32,
        num_layers=LAYERS,
        rope_max_seq_len=64,
    ).save_pretrained(folder)
    return folder


def save_scenes(path: Path) -> Path:
    pixels = torch.randint(0, 256, (60, 3, 24, 24), generator=torch.Generator().manual_seed(0))
    made = [Scene("photo", "photo", pixels[:1].byte())]
    made += [Scene(name, "clip", pixels.byte()) for name in ("one", "two")]
    data.save_scenes(path, made)
    return path


def make_config(folder: Path, **sections: Any) -> train.Config:
    """A run in ``folder``, with the toy's files beside it."""
    model = folder.parent / "model"
    scenes = folder.parent / "scenes.npz"
    base: dict[str, Any] = {
        "output_dir": str(folder),
        "model": {"path": str(model if model.exists() else save_model(model))},
        "method": METHOD,
        "data": {
            "path": str(scenes if scenes.exists() else save_scenes(scenes)),
            "train_batch_size": 2,
            **SIZE,
        },
        "optimizer": {"learning_rate": 1e-2},
        "training": {"max_train_steps": 4, "ema_decay": 0.9},
        "logging": {"report_to": "none", "logging_steps": 1},
    }
    for section, values in sections.items():
        if section == "method":
            base[section] = values
        elif isinstance(values, dict):
            base[section] = {**base.get(section, {}), **values}
        else:
            base[section] = values
    return train.from_dict(base)


def lines(folder: Path, key: str = "loss") -> list[dict[str, Any]]:
    """The lines of a log that have ``key``, without times."""
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k != "ms"} for x in found if key in x]
