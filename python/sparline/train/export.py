# SPDX-License-Identifier: Apache-2.0
"""Trained weights for other programs: diffusers' layout, and TurboDiffusion's names.

diffusers: ``transformer/`` as ``save_pretrained`` writes it, ``sparline.safetensors`` with what the
method learned (``sparline.load_state``), and under LoRA ``pytorch_lora_weights.safetensors``.

TurboDiffusion: one file in the names of the original Wan, in which SLA's projection is
``blocks.{i}.self_attn.attn_op.local_attn.proj_l.{weight,bias}``.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import sparline
from sparline.integrations.diffusers import learned_parameters

from . import setup
from .config import Config
from .distributed import World, whole

STATE_FILE = "sparline.safetensors"
TURBO_SUFFIX = "attn_op.local_attn.proj_l"


def write(transformer: Any, folder: Path, config: Config, world: World) -> None:
    """Writes a trained model to ``folder``; every rank has to call it, one writes.

    The folder is written beside and renamed, so that it is whole or the one of before.
    """
    tensors = {name: whole(p.detach()).cpu() for name, p in transformer.named_parameters()}
    if not world.is_main:
        world.wait()
        return
    method = config.method.make()
    # A plain model: sharding, sequence parallelism and compilation stay with the one that trains.
    plain = type(transformer).from_config(transformer.config)
    if method is not None:
        sparline.apply(plain, method, dense_layers=config.model.dense_layers)
    setup.add_lora(plain, config)
    plain.load_state_dict(tensors)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if method is not None and any(True for _ in learned_parameters(plain)):
        sparline.save_state(plain, partial / STATE_FILE)
    if method is not None:
        sparline.restore(plain)
    if config.lora.rank:
        plain.save_lora_adapter(partial)
    else:
        plain.save_pretrained(partial / "transformer")
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
    world.wait()
