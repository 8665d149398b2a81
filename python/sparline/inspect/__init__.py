# SPDX-License-Identifier: Apache-2.0
"""``sparline inspect``: what a model's attention looks like, and what each method makes of it.

A pipeline runs with its own dense attention. For chosen layers and steps the inputs of its
self-attention are measured as they pass (``capture``, ``measure``, ``density``) and dropped, so
memory does not grow with their number; ``report`` writes what was found.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sparline
from sparline import bench, generate
from sparline.generate import InputError, Job
from sparline.machine import describe_device

from .capture import Capture, Sample, load_sample, save_sample
from .measure import STAGES, Measurement, measure_sample
from .report import write_report

__all__ = [
    "Capture",
    "Measurement",
    "Sample",
    "Settings",
    "inspect_folder",
    "inspect_pipeline",
    "load_sample",
    "measure_sample",
    "save_sample",
    "write_report",
]

#: ``on_progress(what, done, total)``
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """What to measure, and where to write it."""

    out: Path
    methods: tuple[str, ...] = tuple(sparline.METHODS)
    keep_ratio: float = 0.1
    at_steps: tuple[int, ...] = ()  # (): the first, the middle and the last
    layers: tuple[int, ...] = ()  # likewise
    save_qkv: bool = False

    @staticmethod
    def parse(
        out: Path, methods: str | None, keep_ratio: float, at_steps: str, layers: str, save: bool
    ) -> Settings:
        """Settings from the command line: lists are written ``0,1,-1`` and ``sla,vsa``."""
        names = tuple(sparline.METHODS) if methods is None else tuple(_parts(methods))
        if not 0.0 < keep_ratio <= 1.0:
            raise InputError(f"--keep-ratio: it must lie in (0, 1], got {keep_ratio}.")
        if not names or not set(names) <= set(sparline.METHODS):
            raise InputError(
                f"--methods: name some of {', '.join(sparline.METHODS)}, got {methods!r}."
            )
        chosen_steps, chosen_layers = _numbers("--at-steps", at_steps), _numbers("--layers", layers)
        return Settings(out, names, keep_ratio, chosen_steps, chosen_layers, save)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _parts(text))
    except ValueError as error:
        raise InputError(f"{option}: it reads 0,1,-1, got {text!r}.") from error


def inspect_pipeline(
    pipeline: Any, name: str, job: Job, settings: Settings, on_progress: Progress
) -> list[Path]:
    """Generates ``job`` and measures attention on the way; returns the files written. ``name`` is
    what the report calls the model.

    Raises InputError, before the long work, for what the caller can mend.
    """
    started = time.perf_counter()
    num_steps = generate.num_steps(job)
    components = ("transformer", "transformer_2")
    transformers = {n: m for n in components if (m := getattr(pipeline, n, None)) is not None}
    num_layers = min(len(module.blocks) for module in transformers.values())
    steps = _chosen("--at-steps", settings.at_steps, num_steps)
    layers = _chosen("--layers", settings.layers, num_layers)
    qkv = _qkv_folder(settings)
    stages = len(STAGES) + len(settings.methods)
    total = num_steps + len(steps) * len(layers) * stages
    done = itertools.count()
    measurements: list[Measurement] = []

    def advance(what: str) -> None:
        on_progress(what, next(done), total)

    def on_sample(sample: Sample) -> None:
        if qkv is not None:
            save_sample(sample, qkv)
        measurements.append(_measure(sample, settings, advance))

    capture = Capture(transformers, steps, layers, on_sample)

    def on_step(step: int) -> None:
        capture.end_step(step)
        advance(f"step {step} of {num_steps}")

    with capture:
        result = generate.generate(
            pipeline, generate.Variant(generate.ORIGINAL, None), job, on_step
        )
    run = {
        "model": name,
        "prompt": job.prompt,
        "clip": f"{job.num_frames} frames of {job.height} x {job.width}",
        "steps": f"{num_steps}, guidance {job.guidance:g}, seed {job.seed}",
    }
    if job.init_video is not None:
        run["initial clip"] = f"{job.init_video.name}, strength {job.strength:g}"
    return _write(settings, measurements, run, started, on_progress, total, result.clip)


def inspect_folder(folder: Path, settings: Settings, on_progress: Progress) -> list[Path]:
    """Measures tensors that ``--save-qkv`` wrote, without a model; returns the files written."""
    started = time.perf_counter()
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise InputError(
            f"--from-qkv: {folder} holds no .safetensors. Write some with --save-qkv; they are in "
            "the folder qkv of its --out."
        )
    total = len(paths) * (len(STAGES) + len(settings.methods))
    done = itertools.count()
    measurements: list[Measurement] = []

    def advance(what: str) -> None:
        on_progress(what, next(done), total)

    for path in paths:
        try:
            sample = load_sample(path)
        except ValueError as error:
            raise InputError(f"--from-qkv: {error}") from error
        measurements.append(_measure(sample, settings, advance))
    measurements.sort(key=lambda m: (m.step, m.layer))
    run = {"model": "saved tensors", "folder": str(folder)}
    return _write(settings, measurements, run, started, on_progress, total, None)


def _measure(sample: Sample, settings: Settings, advance: Callable[[str], None]) -> Measurement:
    where = f"step {sample.step}, layer {sample.layer}"
    return measure_sample(
        sample,
        settings.methods,
        settings.keep_ratio,
        lambda stage: advance(f"{where}: {stage}"),
    )


def _write(
    settings: Settings,
    measurements: Sequence[Measurement],
    run: dict[str, Any],
    started: float,
    on_progress: Progress,
    total: int,
    clip: Any,
) -> list[Path]:
    on_progress("report", total, total)
    machine = bench.describe_machine()
    run |= {
        "device": describe_device(),
        "versions": f"sparline {sparline.__version__}, torch {torch.__version__}, diffusers "
        f"{importlib.metadata.version('diffusers')}",
        "commit": machine["commit"] or "not a checkout",
        "date": f"{machine['date']} UTC",
        "took": f"{time.perf_counter() - started:.0f} s",
    }
    return write_report(settings.out, measurements, run, settings.keep_ratio, clip)


def _qkv_folder(settings: Settings) -> Path | None:
    if not settings.save_qkv:
        return None
    folder = settings.out / "qkv"
    folder.mkdir(exist_ok=True)
    return folder


def _chosen(option: str, wanted: Iterable[int], total: int) -> list[int]:
    """Indices below ``total``, negative ones from the end; first, middle and last if none are
    given."""
    indices = list(wanted) or [0, total // 2, total - 1]
    for index in indices:
        if not -total <= index < total:
            raise InputError(
                f"{option}: there are {total}, counted from 0 or from -1 at the end, got {index}."
            )
    return sorted({index % total for index in indices})
