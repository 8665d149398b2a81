# SPDX-License-Identifier: Apache-2.0
"""Clips that a model generates while it is trained."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .config import Config, TrainError

Clips = dict[str, NDArray[np.uint8]]


@torch.no_grad()
def generate(pipeline: Any, transformer: Any, config: Config, seed: int = 0) -> Clips:
    """A clip (T, H, W, 3) for each of ``logging.sample_prompts``, all from the same noise."""
    device = next(transformer.parameters()).device
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    prompts = config.logging.sample_prompts or tuple(getattr(pipeline, "class_names", ())[:4])
    if not prompts:
        raise TrainError(
            'train: samples of this model need a text. Set logging.sample_prompts=["..."], or '
            "logging.sample_steps=0."
        )
    was_training = transformer.training
    transformer.eval()
    arguments = {
        "num_frames": config.data.num_frames,
        "height": config.data.height,
        "width": config.data.width,
        "num_inference_steps": config.logging.num_inference_steps,
        "guidance_scale": config.logging.guidance_scale,
        "output_type": "np",
    }
    accepted = inspect.signature(pipeline.__call__).parameters
    arguments = {name: value for name, value in arguments.items() if name in accepted}
    is_16_bit = config.training.mixed_precision == "bf16"
    clips = {}
    with torch.autocast(device.type, torch.bfloat16, enabled=is_16_bit):
        for prompt in prompts:
            rng = torch.Generator("cpu").manual_seed(seed)
            frames = np.asarray(pipeline(prompt=prompt, generator=rng, **arguments).frames[0])
            clips[prompt] = (frames.clip(0.0, 1.0) * 255.0).round().astype(np.uint8)
    transformer.train(was_training)
    return clips


def write_sheet(path: Path, clips: Clips) -> None:
    """A labelled row of frames for each clip, as a PNG."""
    from sparline import video

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.png")
    video.write_sheet(partial, list(clips.values()), list(clips))
    partial.replace(path)
