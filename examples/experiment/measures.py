# SPDX-License-Identifier: Apache-2.0
"""What experiment.py measures of a model beside its loss: attention against dense attention, and
clips against those of the dense model.
"""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler

import sparline
from sparline import density, train, video
from sparline.demo.data import ClipSource, load_scenes
from sparline.demo.pipeline import DemoPipeline
from sparline.integrations.probe import achieved_sparsity
from sparline.tokens import Grid
from sparline.train import data, layerwise, objective, setup

#: Of the bundled model's scheduler.
SHIFT = 2.0
#: Noise levels at which attention is looked at.
LEVELS = (0.2, 0.5, 0.8)
#: What clips are made from.
KINDS = ("noise", "clip")


@dataclasses.dataclass(frozen=True)
class Captured:
    """What ``sparline.density`` looks at."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grid: Grid
    layer: int


def held_out_at(source: Any, level: float, device: torch.device) -> objective.Noised:
    """One held-out clip, the same every time, at a noise level."""
    drawn = data.draws(objective.HELD_OUT_SEED, 0, 1)
    batch = data.collate([source.load(drawn[0])], device)
    return objective.noised_at(batch, torch.tensor([level], device=device), drawn)


def capture(config: train.Config, grid: Grid, device: torch.device) -> list[Captured]:
    """q, k and v of a few layers of the dense model on one held-out clip, each of another
    noise level."""
    model = setup.load_transformer(config.model).to(device).eval()
    sparline.apply(model, sparline.Dense())
    _, held_out = setup.make_sources(config, model, device)
    layers = {x: n * len(model.blocks) // len(LEVELS) for n, x in enumerate(LEVELS)}
    found: list[Captured] = []

    def on_call(layer: int, call: layerwise.Call) -> None:
        if layer == layers[level]:
            found.append(Captured(call.q, call.k, call.v, grid, layer))

    with torch.no_grad(), layerwise.tapped(model, on_call):
        for level in LEVELS:
            noised = held_out_at(held_out, level, device)
            objective.predict(model, noised, config.training.mixed_precision)
    return found


@torch.no_grad()
def look_at(
    model: Any, held_out: Any, config: train.Config, grid: Grid, device: torch.device
) -> dict[str, Any]:
    """Attention against dense attention on the model's own q, k, v: mean over layers, by noise
    level; and the density that is achieved."""
    modules = layerwise.attentions(model)
    if not modules:
        return {"density": 1.0}
    errors: dict[float, list[tuple[float, float]]] = {level: [] for level in LEVELS}
    densities: list[float] = []
    level = LEVELS[0]

    def on_call(layer: int, call: layerwise.Call) -> None:
        module, inputs = modules[layer], (call.q, call.k, call.v)
        o, dense = module(*inputs, **call.options).float(), call.o.float()
        cosine = F.cosine_similarity(o.flatten(), dense.flatten(), dim=0).item()
        relative_l1 = ((o - dense).abs().sum() / dense.abs().sum()).item()
        errors[level].append((relative_l1, cosine))
        if isinstance(module.method, sparline.VMoBA):  # whose rows choose one by one
            seen = Captured(*inputs, grid, layer)
            densities.append(density.kept_share(module.method, seen))
        else:
            densities.append(1.0 - achieved_sparsity(module, inputs, call.options))

    was_training = model.training
    model.eval()
    with layerwise.tapped(model, on_call):
        for level in LEVELS:
            noised = held_out_at(held_out, level, device)
            objective.predict(model, noised, config.training.mixed_precision)
    model.train(was_training)
    return {
        "density": statistics.fmean(densities),
        "attention_relative_l1": {
            f"{x:g}": statistics.fmean(e[0] for e in errors[x]) for x in LEVELS
        },
        "attention_cosine": {f"{x:g}": statistics.fmean(e[1] for e in errors[x]) for x in LEVELS},
    }


@torch.no_grad()
def generate(
    model: Any, config: train.Config, scenes: Path, wanted: dict[str, Any], device: torch.device
) -> dict[str, np.ndarray[Any, Any]]:
    """Clips (frames, height, width, 3), uint8, from noise and over held-out clips, by
    "kind|prompt|seed". ``wanted``: the configuration's ``evaluation``."""
    size = config.data
    source = ClipSource(
        "val", size.num_frames, size.height, scenes=load_scenes(scenes), device=device
    )
    prompts = [p for p in wanted["prompts"] if p in source.names] or list(source.names)[:2]
    pipeline = DemoPipeline(model, FlowMatchEulerDiscreteScheduler(shift=SHIFT), list(source.names))
    pipeline.set_progress_bar_config(disable=True)
    was_training = model.training
    model.eval()
    clips: dict[str, np.ndarray[Any, Any]] = {}
    is_16_bit = config.training.mixed_precision == "bf16"
    with torch.autocast(device.type, torch.bfloat16, enabled=is_16_bit):
        for prompt in prompts:
            for seed in range(wanted["seeds"]):
                for kind in KINDS:
                    extra: dict[str, Any] = {}
                    if kind == "clip":
                        extra = {
                            "video": source.held_out_clip(prompt),
                            "strength": wanted["strength"],
                        }
                    frames = pipeline(
                        prompt,
                        num_frames=size.num_frames,
                        height=size.height,
                        width=size.width,
                        num_inference_steps=wanted["steps"],
                        guidance_scale=wanted["guidance"],
                        generator=torch.Generator().manual_seed(seed),
                        **extra,
                    ).frames[0]
                    pixels = (np.asarray(frames).clip(0.0, 1.0) * 255.0).round().astype(np.uint8)
                    clips[f"{kind}|{prompt}|{seed}"] = pixels
    model.train(was_training)
    return clips


def alike(clips: Path, against: Path) -> dict[str, float]:
    """PSNR and SSIM of a file of clips against another one's, means by kind."""
    told = {}
    with np.load(against) as dense, np.load(clips) as made:
        for kind in KINDS:
            pairs = [(made[name], dense[name]) for name in dense if name.startswith(kind)]
            told[f"{kind}_psnr_db"] = statistics.fmean(video.psnr(a, b) for a, b in pairs)
            told[f"{kind}_ssim"] = statistics.fmean(video.ssim(a, b) for a, b in pairs)
    return told
