# SPDX-License-Identifier: Apache-2.0
"""Train the demo model a few hundred steps with torch's attention and with sparline's, and compare.

    python examples/train_demo_cuda.py --out run [--data scenes.npz] [--steps 300]

Every run sees the same clips, noise and noise levels, step for step. Those that begin from the same
weights must then fall alike: Dense and SLA at density 1 compute what torch's attention computes and
differ by rounding alone. Rounding grows with the steps, as it does between torch's own kernels, so
the measure is the seed: losses smoothed over a tenth of the steps may be no further from torch's
than those of torch are from each other where only the initial weights differ. SLA at 10 % is
another model, whose loss must fall too. Writes curves.json and curves.png; exits with 1 if a curve
is out of line.

Without --data the clips are filmed over generated textures, so that no file is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import statistics
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_demo_model import flow_loss, schedule, seeded

import sparline
from sparline import SLA, SLA2, Dense
from sparline.demo.data import ClipSource, Scene, load_scenes
from sparline.demo.pipeline import TRANSFORMER_CONFIG, class_embeddings
from sparline.integrations.diffusers import learned_parameters
from sparline.methods import Method

#: Steps before rounding has had time to grow, in which losses agree to this share.
FIRST_STEPS, FIRST_TOLERANCE = 10, 0.01
BLOCKS: dict[str, Any] = {"block_q": 128, "block_k": 64}


@dataclass(frozen=True)
class Run:
    """One training: which attention, from which initial weights."""

    name: str
    method: Method | None = None  # None: the model's own, which is torch's
    seed: int = 0
    backends: tuple[SDPBackend, ...] = ()  # of torch's attention, the first that fits
    is_same_function: bool = False  # as torch's attention: what it adds stays zero


RUNS = [
    Run("torch"),
    Run("torch, other kernel", backends=(SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)),
    Run("torch, seed 1", seed=1),
    Run("torch, seed 2", seed=2),
    Run("sparline dense", Dense(), is_same_function=True),
    Run("sparline SLA, density 1", SLA.sla1(keep_ratio=1.0, **BLOCKS), is_same_function=True),
    Run("sparline SLA, density 0.1", SLA.sla1(keep_ratio=0.1, **BLOCKS)),
    Run("sparline SLA2, density 0.1", SLA2(keep_ratio=0.1, **BLOCKS)),
]


def main() -> int:
    args = parse_args()
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    scenes = generated_scenes(args.size) if args.data is None else load_scenes(args.data)
    source = ClipSource("train", args.frames, args.size, scenes=scenes, device=device)
    tokens = args.frames * (args.size // 2) ** 2
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "tokens": tokens,
        "steps": args.steps,
        "batch": args.batch,
        "data": "generated textures" if args.data is None else Path(args.data).name,
        "curves": {},
    }
    print(
        f"{report['device']}, {tokens} tokens, batch {args.batch}, {args.steps} steps", flush=True
    )
    for run in RUNS:
        if device.type != "cuda" and run.backends:
            continue
        try:
            report["curves"][run.name] = train(run, args, source, device)
        except Exception as error:
            report["curves"][run.name] = {"error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        write(args.out / "curves.json", report)  # what is known so far
    report["verdict"] = judge(report["curves"], args.steps)
    write(args.out / "curves.json", report)
    with contextlib.suppress(ImportError):
        plot(args.out / "curves.png", report)
    for line in report["verdict"]["lines"]:
        print(line)
    return 0 if report["verdict"]["ok"] else 1


# Training ---------------------------------------------------------------------------------------


def train(
    run: Run, args: argparse.Namespace, source: ClipSource, device: torch.device
) -> dict[str, Any]:
    """The loss of every step, and the time of one."""
    torch.manual_seed(run.seed)
    config = {**TRANSFORMER_CONFIG, "num_layers": args.layers}
    model = WanTransformer3DModel(**config).to(device)
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    if run.method is not None:
        sparline.apply(model, run.method)
        if run.is_same_function:
            for _, parameter in learned_parameters(model):
                parameter.requires_grad_(False)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.99))
    table = class_embeddings(torch.arange(-1, len(source.names)), model.config.text_dim).to(device)
    losses: list[Tensor] = []
    warm = min(5, args.steps - 1)
    begin = time.perf_counter()
    kernels = sdpa_kernel(list(run.backends), set_priority=True)
    with kernels if run.backends else contextlib.nullcontext():
        for step in range(args.steps):
            if step == warm:
                wait(device)
                begin = time.perf_counter()
            losses.append(take_step(model, parameters, optimizer, source, table, step, args))
        wait(device)
    spent_ms = 1e3 * (time.perf_counter() - begin) / (args.steps - warm)
    values: list[float] = torch.stack(losses).tolist()
    print(
        f"{run.name:<28} loss {statistics.mean(values[:5]):.4f} -> "
        f"{statistics.mean(values[-20:]):.4f}   {spent_ms:6.1f} ms a step",
        flush=True,
    )
    return {"loss": [round(x, 6) for x in values], "ms": round(spent_ms, 2), "seed": run.seed}


def take_step(
    model: WanTransformer3DModel,
    parameters: list[Tensor],
    optimizer: torch.optim.Optimizer,
    source: ClipSource,
    table: Tensor,
    step: int,
    args: argparse.Namespace,
) -> Tensor:
    """One step on the clips, noise and levels of this step, the same for every run."""
    for group in optimizer.param_groups:
        group["lr"] = args.learning_rate * schedule(step, args.warmup, args.steps)
    clips, class_ids = source.batch(args.batch, seeded("cpu", 0, step, 0))
    rng = seeded(clips.device, 0, step, 1)
    noise = torch.randn(clips.shape, generator=rng, device=clips.device)
    sigma = torch.sigmoid(0.2 + 1.2 * torch.randn(len(clips), generator=rng, device=clips.device))
    loss = flow_loss(model, clips, noise, sigma, table[class_ids + 1]).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def generated_scenes(size: int, count: int = 6) -> tuple[Scene, ...]:
    """Textures of several octaves, each with colours of its own, as photographs to film."""
    rng = torch.Generator().manual_seed(0)
    scenes = []
    for n in range(count):
        height, width = 2 * size, 3 * size
        picture = torch.zeros(3, height, width)
        for octave in range(2, 7):
            side = 2**octave
            waves = torch.randn(1, 3, side, side * 3 // 2, generator=rng) / 1.6**octave
            picture += torch.nn.functional.interpolate(waves, size=(height, width), mode="bicubic")[
                0
            ]
        mixing = torch.randn(3, 3, generator=rng)
        picture = torch.einsum("ij,jhw->ihw", mixing, picture)
        pixels = (127.5 + 127.5 * (2.5 * picture).tanh()).round().to(torch.uint8)
        scenes.append(Scene(f"texture {n}", "photo", pixels[None]))
    return tuple(scenes)


# Judgement --------------------------------------------------------------------------------------


def smooth(values: list[float], window: int) -> list[float]:
    """Means of the ``window`` steps before each."""
    sums = [0.0, *itertools.accumulate(values)]
    return [(sums[n] - sums[n - window]) / window for n in range(window, len(sums))]


def distance(a: list[float], b: list[float]) -> float:
    """Root mean square of the difference over the second half."""
    half = len(a) // 2
    pairs = zip(a[half:], b[half:], strict=True)
    return math.sqrt(statistics.fmean((x - y) ** 2 for x, y in pairs))


def judge(curves: dict[str, Any], steps: int) -> dict[str, Any]:
    """Whether curves that must agree do, and whether all fall."""
    lines: list[str] = []
    ok = True

    def hold(words: str, is_right: bool) -> None:
        nonlocal ok
        ok = ok and is_right
        lines.append(f"{'ok    ' if is_right else 'WRONG '} {words}")

    broken = [name for name, curve in curves.items() if "error" in curve]
    for name in broken:
        hold(f"{name}: {curves[name]['error']}", False)
    good = {name: curve["loss"] for name, curve in curves.items() if "error" not in curve}
    for name, losses in good.items():
        last = statistics.fmean(losses[-max(1, steps // 10) :])
        falls = all(map(math.isfinite, losses)) and last < 0.8 * statistics.fmean(losses[:5])
        hold(f"{name}: the loss falls, to {last:.4f}", falls)
    if "torch" not in good:
        return {"ok": False, "lines": lines}
    window = max(1, steps // 10)
    smoothed = {name: smooth(losses, window) for name, losses in good.items()}
    seeds = [smoothed[run.name] for run in RUNS
             if run.method is None and not run.backends and run.name in good]  # fmt: skip
    spread = statistics.fmean(distance(a, b) for a, b in itertools.combinations(seeds, 2))
    lines.append(f"       from seed to seed: {spread:.5f} (root mean square, second half)")
    distances: dict[str, float] = {}
    for run in RUNS:
        if run.name not in good or run.seed != 0 or run.name == "torch":
            continue
        distances[run.name] = distance(smoothed[run.name], smoothed["torch"])
        words = f"{run.name}: {distances[run.name]:.5f} from torch"
        if run.is_same_function:
            hold(f"{words}, at most {spread:.5f}", distances[run.name] <= spread)
            pairs = zip(good[run.name][:FIRST_STEPS], good["torch"][:FIRST_STEPS], strict=True)
            worst = max(abs(a - b) / b for a, b in pairs)
            words = f"{run.name}: first {FIRST_STEPS} steps within {worst:.2%}"
            hold(f"{words}, at most {FIRST_TOLERANCE:.0%}", worst <= FIRST_TOLERANCE)
        else:
            lines.append(f"       {words}")
    return {"ok": ok, "lines": lines, "spread": spread, "window": window, "distances": distances}


def plot(path: Path, report: dict[str, Any]) -> None:
    """Smoothed losses, and below them their differences to torch's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = {name: c for name, c in report["curves"].items() if "error" not in c}
    if "torch" not in good:
        return
    window = max(1, report["steps"] // 10)
    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(9, 8), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    base = smooth(good["torch"]["loss"], window)
    steps = range(window, window + len(base))
    for name, curve in good.items():
        values = smooth(curve["loss"], window)
        is_ours = name.startswith("sparline")
        style = {"lw": 1.8 if is_ours else 1.0, "ls": "-" if is_ours else "--"}
        (line,) = top.plot(steps, values, label=name, **style)
        if name != "torch":
            difference = [x - y for x, y in zip(values, base, strict=True)]
            bottom.plot(steps, difference, color=line.get_color(), **style)
    top.set_yscale("log")
    top.set_ylabel(f"loss, mean of {window} steps")
    top.set_title(
        f"The demo model from scratch, {report['tokens']} tokens, batch {report['batch']}, "
        f"{report['device']}"
    )
    top.legend(fontsize=8)
    bottom.axhline(0.0, color="black", lw=0.6)
    bottom.set_ylabel("minus that of torch")
    bottom.set_xlabel("step")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo-cuda"), help="curves.json and curves.png")
    add("--data", type=Path, metavar="FILE", help="scenes of train_demo_model.py --prepare")
    add("--steps", type=int, default=300)
    add("--batch", type=int, default=2)
    add("--learning-rate", type=float, default=1e-3)
    add("--warmup", type=int, default=50, help="steps of linear warm-up")
    add("--frames", type=int, default=8)
    add("--size", type=int, default=64, help="height and width, pixels")
    add("--layers", type=int, default=TRANSFORMER_CONFIG["num_layers"])
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
