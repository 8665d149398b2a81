# SPDX-License-Identifier: Apache-2.0
"""The main job: load a video model, apply attention methods, generate at equal seeds, compare.

Everything here raises ``InputError`` for what the caller can mend, in one sentence.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

import sparline
from sparline import demo, video
from sparline.machine import describe_device
from sparline.methods import METHODS, Method, options_of

#: The model as it came, with its own attention; no method of ours.
ORIGINAL = "original"


class InputError(ValueError):
    """Something that the caller gave is wrong; the message says what and the way out."""


@dataclass(frozen=True)
class Variant:
    """A column of the comparison: a label and what to apply; if nothing, the model as it came."""

    label: str
    method: Method | None = None
    state: Path | None = None  # learned tensors
    tuned: Path | None = None  # folder of a fine-tuned model, which brings its own method


@dataclass(frozen=True)
class Job:
    """One generation. ``init_video`` with ``strength`` regenerates a clip instead of starting from
    noise."""

    prompt: str
    num_frames: int
    height: int
    width: int
    steps: int
    guidance: float
    seed: int
    init_video: Path | None = None
    strength: float = 0.6
    dense_steps: int = 0
    dense_layers: tuple[int, ...] = ()


@dataclass
class Result:
    """What one variant gave. Times are medians over the steps after the first."""

    label: str
    clip: video.Clip = field(repr=False)
    step_s: float
    attention_share: float
    sparsity: float
    psnr_db: float | None = None  # against the first variant
    ssim: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "clip"}


def parse_variants(spec: str, options: Sequence[str], state: Path | None = None) -> list[Variant]:
    """Variants from the command line: ``dense,sla:keep_ratio=0.05`` and common ``key=value``
    options; beside methods the names of ``demo.TUNED`` and folders that ``sparline train`` wrote.

    A common option goes to every method that has it; one that no method has is an error.
    """
    common = dict(_parse_option(option) for option in options)
    unused = set(common)
    variants = []
    for item in filter(None, (part.strip() for part in spec.split(","))):
        if item in demo.TUNED or "/" in item:
            if state is not None:
                raise InputError(
                    f"--state: {item} brings what it learned, got {state}. Leave the option out."
                )
            variants.append(Variant(item.rstrip("/"), tuned=demo.TUNED.get(item, Path(item))))
            continue
        name, *own = item.split(":")
        if name == ORIGINAL:
            variants.append(Variant(item))
            continue
        if name not in METHODS:
            raise InputError(
                f"method: it must be one of {ORIGINAL}, {', '.join(METHODS)}, a fine-tuned model "
                f"({', '.join(demo.TUNED)}) or a folder of one, ./run/final, got {name!r}."
            )
        known = set(options_of(METHODS[name]))
        chosen = {key: value for key, value in common.items() if key in known}
        unused -= set(chosen)
        chosen.update(_parse_option(option) for option in own)
        try:
            method = sparline.method(name, **chosen)
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error
        has_state = isinstance(method, (sparline.SLA, sparline.SLA2, sparline.VSA))
        variants.append(Variant(item, method, state if has_state else None))
    if unused:
        names = ", ".join(sorted(unused))
        raise InputError(f"--set: no method of {spec!r} has the option {names}.")
    if not variants:
        raise InputError(f"--compare: name at least one method, got {spec!r}. Try dense,sla.")
    return variants


def _parse_option(option: str) -> tuple[str, Any]:
    key, equals, text = option.partition("=")
    if not equals or not key:
        raise InputError(f"--set: options read key=value, got {option!r}. Try keep_ratio=0.1.")
    if text in ("true", "false"):
        return key, text == "true"
    if re.fullmatch(r"\d+(x\d+)+", text):  # a size, such as cube=4x4x4
        return key, tuple(int(part) for part in text.split("x"))
    try:
        return key, ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return key, text  # a word, such as a feature map


def parse_layers(text: str) -> tuple[int, ...]:
    """``0,1,-1`` as numbers."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise InputError(f"--dense-layers: it reads 0,1,-1, got {text!r}.") from error


def check_output(folder: Path) -> None:
    """Makes the folder, and makes sure before the long work that files can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"--out: nothing can be written to {folder}: {error.strerror}. Choose another folder."
        ) from error


def load_pipeline(model: str | None) -> Any:
    """The bundled model, or a diffusers pipeline or Wan transformer from a path or hub id."""
    import diffusers

    host: Any = diffusers
    if model is None:
        return demo.load_pipeline()
    folder = Path(model)
    looks_local = folder.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1
    if looks_local and not folder.exists():
        raise InputError(f"--model: there is no folder {model}. Pass a path or a hub id.")
    try:
        if (folder / "config.json").is_file() and not (folder / "model_index.json").is_file():
            from sparline.demo.pipeline import DemoPipeline

            transformer = host.WanTransformer3DModel.from_pretrained(model)
            if transformer.config.in_channels != 3:
                raise InputError(
                    f"--model: {model} is a bare transformer of {transformer.config.in_channels} "
                    "latent channels, which needs its VAE. Pass the folder of the whole pipeline."
                )
            return DemoPipeline(transformer, host.FlowMatchEulerDiscreteScheduler())
        return host.DiffusionPipeline.from_pretrained(model)
    except InputError:
        raise
    except Exception as error:  # whatever the host and the hub's client raise
        raise InputError(f"--model: {model} cannot be loaded: {_first_line(error)}") from error


def default_size(pipeline: Any) -> tuple[int, int, int]:
    """(frames, height, width) that the pipeline generates when told nothing."""
    parameters = inspect.signature(pipeline.__call__).parameters
    sizes = [getattr(parameters.get(n), "default", None) for n in ("num_frames", "height", "width")]
    return cast("tuple[int, int, int]", tuple(s if isinstance(s, int) else 0 for s in sizes))


def default_prompt(pipeline: Any) -> str:
    names = getattr(pipeline, "class_names", ())
    return "chelsea" if "chelsea" in names else names[0] if names else ""


def check_job(pipeline: Any, job: Job) -> None:
    """Raises InputError for what would otherwise fail deep inside the pipeline."""
    try:
        sparline.restore(pipeline)  # changes nothing, but names a model that we cannot take
    except TypeError as error:
        raise InputError(f"--model: {error}") from error
    names = getattr(pipeline, "class_names", None)
    if names is not None and job.prompt not in names:
        raise InputError(f"--prompt: it must be one of {', '.join(names)}, got {job.prompt!r}.")
    if names is None and not job.prompt:
        raise InputError("--prompt: this model needs a text. Pass --prompt 'what to show'.")
    transformer = pipeline.transformer or pipeline.transformer_2  # Wan 2.2 may leave one out
    patch = transformer.config.patch_size
    scale = getattr(pipeline, "vae_scale_factor_spatial", 1)
    for name, value, unit in (
        ("height", job.height, patch[1] * scale),
        ("width", job.width, patch[2] * scale),
    ):
        if value < unit or value % unit:
            raise InputError(f"--{name}: it must be a positive multiple of {unit}, got {value}.")
    if job.init_video is not None and not job.init_video.is_file():
        raise InputError(f"--init-video: there is no file {job.init_video}.")
    if not 0.0 < job.strength <= 1.0:
        raise InputError(
            f"--strength: it must lie in (0, 1], got {job.strength}. 1 replaces the clip "
            "altogether."
        )


def for_init_video(pipeline: Any) -> Any:
    """The pipeline itself if it takes a clip, or the video-to-video pipeline of the same parts."""
    if "video" in inspect.signature(pipeline.__call__).parameters:
        return pipeline
    import diffusers

    if isinstance(pipeline, diffusers.WanPipeline):
        return diffusers.WanVideoToVideoPipeline.from_pipe(pipeline)
    raise InputError(
        f"--init-video: {type(pipeline).__name__} takes no clip. Use a Wan text-to-video pipeline "
        "or the bundled model."
    )


@contextlib.contextmanager
def applied(pipeline: Any, variant: Variant, job: Job) -> Iterator[None]:
    """Within, the pipeline has the variant's method or its fine-tuned transformer. Raises
    InputError if the model cannot take it. A method stays; the transformer is put back."""
    if variant.tuned is None:
        _apply_method(pipeline, variant, job)
        yield
        return
    check_tuned(pipeline, variant.tuned, job)
    own = pipeline.transformer
    tuned = _load_tuned(own, variant.tuned, job)
    try:
        pipeline.register_modules(transformer=tuned)
        yield
    finally:
        pipeline.register_modules(transformer=own)


def check_variant(pipeline: Any, variant: Variant, job: Job) -> None:
    """Raises InputError if the model cannot take the variant, before long work; weights of a
    fine-tuned model are not read for it."""
    if variant.tuned is None:
        _apply_method(pipeline, variant, job)
    else:
        check_tuned(pipeline, variant.tuned, job)


def _apply_method(pipeline: Any, variant: Variant, job: Job) -> None:
    try:
        sparline.restore(pipeline)
        if variant.method is not None:
            sparline.apply(
                pipeline, variant.method, dense_steps=job.dense_steps, dense_layers=job.dense_layers
            )
        if variant.state is not None:
            sparline.load_state(pipeline, variant.state)
    except (TypeError, ValueError, OSError) as error:
        raise InputError(str(error)) from error


def check_tuned(pipeline: Any, folder: Path, job: Job) -> None:
    """Raises InputError if ``folder`` holds no fine-tuned form of the pipeline's transformer."""
    if not (folder / "transformer" / "config.json").is_file():
        raise InputError(
            f"method: {folder} must be a fine-tuned model, a folder with transformer/config.json "
            "as sparline train leaves it in output_dir/final, and it is not."
        )
    if job.dense_layers:
        raise InputError(
            f"--dense-layers: {folder} was tuned with layers of its own, got "
            f"{','.join(map(str, job.dense_layers))}. Leave the option out."
        )
    own = pipeline.transformer
    if own is None or getattr(pipeline, "transformer_2", None) is not None:
        raise InputError(
            f"method: {folder} holds one transformer, and the pipeline has another number of them. "
            "Load it as docs/training.md shows."
        )
    if hasattr(own, "_hf_hook"):
        raise InputError(
            f"method: {folder} cannot take the place of a transformer that accelerate offloads. "
            "Load it into the pipeline first, as docs/training.md shows."
        )
    try:
        found = type(own).load_config(folder / "transformer")
    except Exception as error:  # whatever the host raises for a broken file
        raise InputError(f"method: {folder} cannot be loaded: {_first_line(error)}") from error
    for name in ("in_channels", "out_channels", "patch_size", "text_dim"):
        if _as_list(found.get(name)) != _as_list(own.config.get(name)):
            raise InputError(
                f"method: {folder} must fit the model, whose {name} is {own.config.get(name)}, got "
                f"{found.get(name)}. Pass the --model that it was tuned from."
            )


def _load_tuned(own: Any, folder: Path, job: Job) -> Any:
    """The transformer of ``folder`` with the method it was tuned with, where ``own`` is."""
    from sparline.integrations.state import read_state

    state = folder / "sparline.safetensors"
    try:
        tuned = type(own).from_pretrained(folder / "transformer", torch_dtype=own.dtype)
        if state.is_file():  # else tuned with the model's own attention
            stored = read_state(state)
            sparline.apply(
                tuned,
                stored.method,
                dense_steps=max(job.dense_steps, stored.dense_steps),
                dense_layers=stored.dense_layers,
            )
            sparline.load_state(tuned, state)
        return tuned.to(own.device).eval()
    except Exception as error:  # whatever the host raises for a broken file
        raise InputError(f"method: {folder} cannot be loaded: {_first_line(error)}") from error


def _as_list(value: Any) -> list[Any]:
    """Configurations hold lists where a model in memory has tuples."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def generate(pipeline: Any, variant: Variant, job: Job, on_step: Callable[[int], None]) -> Result:
    """Runs one variant. ``on_step(done)`` is called after each step."""
    from sparline.integrations.probe import AttentionProbe

    pipeline.set_progress_bar_config(disable=True)
    device = pipeline._execution_device
    arguments: dict[str, Any] = {
        "prompt": job.prompt,
        "num_frames": job.num_frames,
        "height": job.height,
        "width": job.width,
        "num_inference_steps": job.steps,
        "guidance_scale": job.guidance,
        "generator": torch.Generator("cpu").manual_seed(job.seed),
        "output_type": "np",
    }
    if job.init_video is not None:
        arguments["video"] = [Image.fromarray(frame) for frame in read_init_video(job)]
        arguments["strength"] = job.strength
    accepted = inspect.signature(pipeline.__call__).parameters
    times, attention = [time.perf_counter()], [0.0]

    with applied(pipeline, variant, job):
        models = (pipeline.transformer, getattr(pipeline, "transformer_2", None))
        with AttentionProbe(*models) as probe:

            def after_step(
                _: Any, step: int, timestep: Any, tensors: dict[str, Any]
            ) -> dict[str, Any]:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times.append(time.perf_counter())
                attention.append(probe.seconds)
                on_step(len(times) - 1)
                return tensors

            arguments["callback_on_step_end"] = after_step
            frames = pipeline(**{k: v for k, v in arguments.items() if k in accepted}).frames[0]
    steps = np.diff(times)[1 if len(times) > 2 else 0 :]
    shares = np.diff(attention)[-len(steps) :] / steps
    return Result(
        label=variant.label,
        clip=(np.asarray(frames).clip(0.0, 1.0) * 255.0).round().astype(np.uint8),
        step_s=float(statistics.median(steps)),
        attention_share=float(statistics.median(shares)),
        sparsity=probe.sparsity,
    )


def num_steps(job: Job) -> int:
    """Steps that will run; regenerating a clip enters the schedule late."""
    return job.steps if job.init_video is None else max(1, round(job.steps * job.strength))


def read_init_video(job: Job) -> video.Clip:
    if job.init_video is None:
        raise ValueError("read_init_video: the job has no init_video.")
    try:
        return video.read_clip(job.init_video, job.num_frames, job.height, job.width)
    except ValueError as error:
        raise InputError(f"--init-video: {error}") from error


def compare(results: Sequence[Result]) -> None:
    """Fills in how alike each clip is to the first."""
    for result in results[1:]:
        result.psnr_db = video.psnr(result.clip, results[0].clip)
        result.ssim = video.ssim(result.clip, results[0].clip)


def write_results(folder: Path, job: Job, results: Sequence[Result], extension: str) -> list[Path]:
    """Writes every clip, a contact sheet, the figures, and for several a side-by-side video."""
    clips, labels = [r.clip for r in results], [r.label for r in results]
    written = []
    for result in results:
        name = "_".join(Path(result.label).parts[-2:]).replace(":", "_").replace("=", "")
        written.append(folder / f"{name}{extension}")
        video.write_clip(written[-1], result.clip)
    if job.init_video is not None:
        clips.insert(0, read_init_video(job))
        labels.insert(0, "given clip")
    if len(clips) > 1:
        written.append(folder / f"compare{extension}")
        video.write_clip(written[-1], video.side_by_side(clips, labels))
    written.append(folder / "sheet.png")
    video.write_sheet(written[-1], clips, labels)
    written.append(folder / "results.json")
    settings = {**asdict(job), "init_video": str(job.init_video) if job.init_video else None}
    report = {
        "job": settings,
        "device": describe_device(),
        "results": [r.to_dict() for r in results],
    }
    text = json.dumps(report, indent=2)
    written[-1].write_text(text + "\n")
    return written
