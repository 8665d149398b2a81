# SPDX-License-Identifier: Apache-2.0
"""The command line: ``sparline generate | train | convert | inspect | doctor | explain | bench``.

Wrong input ends in one line on stderr and exit code 2; a traceback is a bug.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.table import Table
except ImportError as missing:
    print(f"sparline: {missing}. Run: pip install 'sparline[demo]'", file=sys.stderr)
    raise SystemExit(2) from missing

app = typer.Typer(
    name="sparline",
    help="Sparse-linear attention for video diffusion.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()


@contextmanager
def _one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turns errors that carry a sentence for the user into one line and exit code 2."""
    try:
        yield
    except kinds as error:
        print(f"sparline: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(2) from error


@app.command()
def generate(
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of a diffusers pipeline; the bundled model if not given."
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="Attention method; 'original' is the model's own.")
    ] = "sla",
    compare: Annotated[
        str | None,
        typer.Option(
            help="Methods to run at equal seeds, against the first: dense,sla or sla:keep_ratio=0.1"
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="Option of the methods, such as keep_ratio=0.1; repeatable."),
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="Learned tensors of the method (sparline.save_state).")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What to show; the bundled model takes a class name.")
    ] = None,
    init_video: Annotated[
        Path | None, typer.Option(help="Regenerate this clip instead of starting from noise.")
    ] = None,
    strength: Annotated[float, typer.Option(help="Share of the clip to replace, in (0, 1].")] = 0.6,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is off.")] = 2.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Of the clip; the model's own if not given.")
    ] = None,
    height: Annotated[
        int | None, typer.Option(min=1, help="Of the clip; the model's own if not given.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="Of the clip; the model's own if not given.")
    ] = None,
    dense_steps: Annotated[
        int, typer.Option(min=0, help="First steps that keep the model's own attention.")
    ] = 0,
    dense_layers: Annotated[
        str, typer.Option(help="Layers that keep the model's own attention: 0,1,-1")
    ] = "",
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("outputs/generate"),
    gif: Annotated[bool, typer.Option("--gif", help="Write .gif instead of .mp4.")] = False,
) -> None:
    """Generate a clip with a video model, its attention replaced; or compare several methods."""
    with _one_line_errors(ImportError):
        from sparline import generate as job_module
        from sparline.generate import InputError, Job, Result
    _quiet_host_libraries()
    with _one_line_errors(InputError, ImportError):
        variants = job_module.parse_variants(compare or method, option or [], state)
        layers = job_module.parse_layers(dense_layers)
        job_module.check_output(out)
        pipeline = job_module.load_pipeline(model)
        sizes = job_module.default_size(pipeline)
        job = Job(
            prompt=prompt if prompt is not None else job_module.default_prompt(pipeline),
            num_frames=frames or sizes[0],
            height=height or sizes[1],
            width=width or sizes[2],
            steps=steps,
            guidance=guidance,
            seed=seed,
            init_video=init_video,
            strength=strength,
            dense_steps=dense_steps,
            dense_layers=layers,
        )
        job_module.check_job(pipeline, job)
        if init_video is not None:
            job_module.read_init_video(job)
            pipeline = job_module.for_init_video(pipeline)
        for variant in variants:  # every method is tried on the model before the first long run
            job_module.check_variant(pipeline, variant, job)

        results: list[Result] = []
        total = job_module.num_steps(job)
        with _progress() as progress:
            for variant in variants:
                bar = partial(_show, progress, progress.add_task(variant.label, total=total))
                results += [job_module.generate(pipeline, variant, job, bar)]
    job_module.compare(results)
    written = job_module.write_results(out, job, results, ".gif" if gif else ".mp4")
    console.print(_results_table(results))
    for path in written:
        console.print(f"  {path}", highlight=False)


def _results_table(results: list[Any]) -> Table:
    table = Table(caption_justify="left")
    table.add_column("method", overflow="fold")
    for name in ("s / step", "faster", "attention", "sparsity", "PSNR dB", "SSIM"):
        table.add_column(name, justify="right")
    for r in results:
        alike = ("-", "-") if r.psnr_db is None else (f"{r.psnr_db:.1f}", f"{r.ssim:.3f}")
        table.add_row(
            r.label,
            f"{r.step_s:.2f}",
            f"{results[0].step_s / r.step_s:.2f}x",
            f"{r.attention_share:.0%}",
            f"{r.sparsity:.1%}",
            *alike,
        )
    table.caption = (
        "attention: share of a step's time; sparsity: blocks not attended, mean over all calls"
    )
    if len(results) > 1:
        table.caption += f"; PSNR and SSIM: against {results[0].label}, at an equal seed"
    return table


def _show(progress: Progress, task: TaskID, done: int) -> None:
    progress.update(task, completed=done)


def _progress(disable: bool = False) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=disable,
    )


def _quiet_host_libraries() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    with _one_line_errors(ImportError):
        import diffusers
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="Configuration, .yaml or .json.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Dotted keys: method.keep_ratio=0.05 seed=1 ...")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; a GPU where there is one, if not given.")
    ] = None,
) -> None:
    """Fine-tune a video model with an attention method; resumes. Many GPUs: under torchrun."""
    with _one_line_errors(ImportError):
        from sparline import train as train_module
    _quiet_host_libraries()
    with _one_line_errors(ValueError, NotImplementedError, ImportError):
        loaded = train_module.load_config(config, overrides or [])
        # Other processes of torchrun are silent, but for errors.
        is_main = int(os.environ.get("RANK", "0")) == 0
        with _progress(disable=not is_main) as progress:
            task = progress.add_task("starting", total=None)

            def show(done: int, total: int, words: str) -> None:
                progress.update(task, description=words, completed=done, total=total)

            summary = train_module.run(loaded, show, device=device)
    if is_main:
        console.print("\n".join(summary.words()), highlight=False, markup=False)


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="A checkpoint or export of a run, a state file, or a public one.")
    ],
    target: Annotated[Path, typer.Argument(help="File or folder to write.")],
    to: Annotated[str, typer.Option(help="diffusers or turbodiffusion.")] = "diffusers",
    method: Annotated[
        str | None,
        typer.Option(help="Of a public checkpoint, which does not say: sla_main:keep_ratio=0.1"),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Transformer whose weights go along with a state file.")
    ] = None,
    component: Annotated[
        str, typer.Option(help="Of Wan 2.2: transformer or transformer_2.")
    ] = "transformer",
) -> None:
    """Convert trained weights between diffusers' names and TurboDiffusion's."""
    with _one_line_errors(ImportError):
        from sparline import generate as job_module
        from sparline import train as train_module
        from sparline.train import export
    _quiet_host_libraries()
    with _one_line_errors(train_module.TrainError, job_module.InputError, ImportError):
        variant = None if method is None else job_module.parse_variants(method, [])[0]
        if variant is not None and variant.method is None:
            raise job_module.InputError(
                f"--method: it must be a method with its options, got {method}. Try "
                "sla_main:keep_ratio=0.1."
            )
        chosen = None if variant is None else variant.method
        words = export.convert(source, target, to, chosen, model, component)
    console.print(words, highlight=False, markup=False)


@app.command()
def doctor() -> None:
    """Say what was compiled, what this machine has, and what would run for typical calls."""
    from sparline import doctor as doctor_module

    ok = doctor_module.report(console)
    raise typer.Exit(0 if ok else 1)


@app.command()
def explain(
    method: Annotated[str, typer.Argument(help="Attention method: sla, sla2, dynsparse, ...")],
    shape: Annotated[
        str, typer.Option(help="B,H,N,D of q; k has the same unless --keys says otherwise.")
    ] = "1,4,8192,64",
    keys: Annotated[int | None, typer.Option(min=1, help="N of k and v.")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Heads of k and v.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    grid: Annotated[
        str | None, typer.Option(help="T,H,W of the tokens, for methods that order them.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, or a kind of CUDA device: sm_80, sm_90, ...")
    ] = "cpu",
    option: Annotated[list[str] | None, typer.Option("--set", help="Option, key=value.")] = None,
) -> None:
    """Explain a method: its maths, its options and learned tensors, its cost, and its plan here."""
    from sparline import describe
    from sparline.generate import InputError

    with _one_line_errors(InputError, ImportError, ValueError, TypeError, RuntimeError):
        text = describe.explain(method, option or [], shape, keys, kv_heads, dtype, grid, device)
    console.print(text, highlight=False, markup=False)


@app.command()
def bench(
    workload: Annotated[list[str] | None, typer.Option(help="By name; repeatable.")] = None,
    suite: Annotated[str, typer.Option(help="cpu, or quick for a minute's look.")] = "cpu",
    repetitions: Annotated[int, typer.Option(min=1, help="Timed runs a row.")] = 20,
    check: Annotated[bool, typer.Option(help="Compare with the reference first.")] = True,
    out: Annotated[Path | None, typer.Option(help="JSON lines file to append to.")] = None,
) -> None:
    """Time whole operators against torch's attention, in the same run, on the same inputs."""
    from sparline import bench as bench_module

    with _one_line_errors(bench_module.BenchError, ImportError):
        bench_module.run(
            suite=suite,
            workloads=workload,
            repetitions=repetitions,
            check=check,
            out=out,
            report=lambda line: console.print(line, highlight=False),
        )


@app.command("inspect")
def inspect_command(
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of a diffusers pipeline; the bundled model if not given."
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What to show; the bundled model takes a class name.")
    ] = None,
    init_video: Annotated[
        Path | None, typer.Option(help="Regenerate this clip instead of starting from noise.")
    ] = None,
    strength: Annotated[float, typer.Option(help="Share of the clip to replace, in (0, 1].")] = 0.6,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 4,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is off.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Of the clip; the model's own if not given.")
    ] = None,
    height: Annotated[
        int | None, typer.Option(min=1, help="Of the clip; the model's own if not given.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="Of the clip; the model's own if not given.")
    ] = None,
    at_steps: Annotated[
        str, typer.Option(help="Steps to look at: 0,2,-1; first, middle and last if not given.")
    ] = "",
    layers: Annotated[
        str, typer.Option(help="Layers to look at: 0,1,-1; first, middle and last if not given.")
    ] = "",
    methods: Annotated[
        str | None, typer.Option(help="Methods to compare: sla,vsa; all if not given.")
    ] = None,
    keep_ratio: Annotated[
        float, typer.Option(help="Share of the blocks at which methods are compared.")
    ] = 0.1,
    save_qkv: Annotated[
        bool, typer.Option("--save-qkv", help="Also write q, k and v, to the folder qkv in --out.")
    ] = False,
    from_qkv: Annotated[
        Path | None, typer.Option(help="Measure what --save-qkv wrote to this folder; no model.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("outputs/inspect"),
) -> None:
    """Watch a model's attention: its maps, recall, errors of every method; one HTML report."""
    with _one_line_errors(ImportError):
        from sparline import generate as job_module
        from sparline import inspect as inspect_module
        from sparline.generate import InputError, Job
    _quiet_host_libraries()
    with _one_line_errors(InputError, ImportError):
        settings = inspect_module.Settings.parse(
            out, methods, keep_ratio, at_steps, layers, save_qkv
        )
        job_module.check_output(out)
        with _progress() as progress:
            task = progress.add_task("loading", total=None)

            def show(what: str, done: int, total: int) -> None:
                progress.update(task, description=what, completed=done, total=total)

            if from_qkv is not None:
                written = inspect_module.inspect_folder(from_qkv, settings, show)
            else:
                pipeline = job_module.load_pipeline(model)
                sizes = job_module.default_size(pipeline)
                job = Job(
                    prompt=prompt if prompt is not None else job_module.default_prompt(pipeline),
                    num_frames=frames or sizes[0],
                    height=height or sizes[1],
                    width=width or sizes[2],
                    steps=steps,
                    guidance=guidance,
                    seed=seed,
                    init_video=init_video,
                    strength=strength,
                )
                job_module.check_job(pipeline, job)
                if init_video is not None:
                    job_module.read_init_video(job)
                    pipeline = job_module.for_init_video(pipeline)
                name = model or "the bundled demo model"
                written = inspect_module.inspect_pipeline(pipeline, name, job, settings, show)
    for path in written[:2]:
        console.print(f"  {path}", highlight=False)
    console.print(f"  {written[2].parent}: {len(written) - 2} plots", highlight=False)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
