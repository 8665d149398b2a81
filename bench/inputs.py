# SPDX-License-Identifier: Apache-2.0
"""What benchmarks attend over: random tensors, and those of the bundled model on a clip that its
training never saw."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from clock import DTYPE
from torch import Tensor

from sparline import demo, video
from sparline.bench import Workload
from sparline.demo.pipeline import class_embeddings
from sparline.inspect.capture import Capture, Sample
from sparline.train import data, objective

SEED = 1
#: Noise level of captured inputs.
LEVEL = 0.5


def make_inputs(
    workload: Workload,
    kind: str,
    device: torch.device,
    seed: int,
    clip: Path = demo.HELD_OUT_VIDEO,
) -> list[Tensor]:
    """q, k and v (1, H, N, D), made on the device: "gaussian" and "video" as by
    ``sparline.bench.make_inputs``; "captured" is what layer ``seed`` of the bundled model attends
    over, on a clip of the workload's size."""
    if kind == "captured":
        layers = captured_layers(workload.grid, str(device), clip)
        return layers[seed % len(layers)]
    heads, length, head_dim = workload.heads, workload.length, workload.head_dim
    rng = torch.Generator(device).manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device=device)

    shape = (heads, length, head_dim)
    if kind == "gaussian":
        return [noise(*shape).to(DTYPE)[None] for _ in range(3)]
    axes = [torch.linspace(0.0, 1.0, size, device=device) for size in workload.grid]
    place = torch.cartesian_prod(*axes)  # (T H W, 3), w fastest
    frequency = 8.0 * noise(heads, 3, head_dim)
    phase = 2 * torch.pi * torch.rand(heads, 1, head_dim, generator=rng, device=device)
    field = 2**0.5 * torch.cos(place @ frequency + phase)  # (H, T H W, D)
    if workload.text:
        text = noise(heads, workload.text, head_dim)
        parts = [text, field] if workload.text_at == "start" else [field, text]
        field = torch.cat(parts, dim=1)
    q = 1.3 * field + 0.3 * noise(*shape)
    k = 1.3 * field + noise(heads, 1, head_dim) + 0.3 * noise(*shape)
    v = field.roll(1, dims=-1) + 0.3 * noise(*shape)
    return [x.to(DTYPE)[None] for x in (q, k, v)]


# The bundled model ------------------------------------------------------------------------------


def read_clip(path: Path, frames: int, height: int, width: int) -> Tensor:
    """(1, 3, T, H, W) in [-1, 1]; ``path`` is a video, or frames of that size as .npy."""
    if path.suffix == ".npy":
        pixels = np.load(path)
    else:
        pixels = video.read_window(path, frames, height, width)
    if pixels.shape != (frames, height, width, 3):
        raise SystemExit(
            f"--clip: {path} must hold {frames} frames of {height} x {width} x 3, got an array of "
            f"{' x '.join(map(str, pixels.shape))}. Pass a video, which is cut and scaled to size."
        )
    return torch.from_numpy(pixels).permute(3, 0, 1, 2).float().div(127.5).sub(1.0)[None]


@torch.no_grad()
def run_clip(
    path: Path,
    grid: Sequence[int],
    levels: Sequence[float],
    device: torch.device,
    on_sample: Callable[[float, Sample], None],
    layers: Sequence[int] = (),
) -> list[int]:
    """The clip at each noise level once through the dense model; ``on_sample`` gets the level and
    what each of its layers, or of ``layers``, attends over. The layers."""
    pipeline = demo.load_pipeline()
    model = pipeline.transformer.to(device).eval()
    chosen = sorted({n % len(model.blocks) for n in layers or range(len(model.blocks))})
    clip = read_clip(path, grid[0], 2 * grid[1], 2 * grid[2]).to(device)
    class_id = pipeline.class_names.index(demo.HELD_OUT_CLASS)
    text = class_embeddings(torch.tensor([class_id], device=device), model.config.text_dim)
    level = levels[0]

    def tell(sample: Sample) -> None:
        on_sample(level, sample)

    with Capture({"transformer": model}, range(len(levels)), chosen, tell) as capture:
        for n, level in enumerate(levels):
            sigma = torch.tensor([level], device=device)
            noised = objective.noised_at(data.Batch(clip, text), sigma, data.draws(SEED, 0, 1))
            objective.predict(model, noised)
            capture.end_step(n + 1)
    return chosen


@functools.cache
def captured_layers(grid: tuple[int, int, int], device: str, clip: Path) -> list[list[Tensor]]:
    """q, k and v (1, H, N, D) of each layer of the bundled model."""
    found: list[list[Tensor]] = []

    def on_sample(level: float, sample: Sample) -> None:
        tensors = (sample.q, sample.k, sample.v)  # (1, N, H, D)
        found.append([x.to(DTYPE).transpose(1, 2).contiguous() for x in tensors])

    run_clip(clip, grid, [LEVEL], torch.device(device), on_sample)
    return found
