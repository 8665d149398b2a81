# SPDX-License-Identifier: Apache-2.0
"""Attention errors and in-loop skipping on q, k, v of the bundled model, by layer and noise level,
on a clip that its training never saw.

    python bench/captured.py [--device cuda] [--grids 8x32x32,16x48x48] [--layers 0,3,7]
                             [--settings N] [--out FILE]

The clip is noised to each level and run once through the dense model; each layer's q, k, v are
measured as they pass and dropped (``sparline.inspect``). The model was trained on grids of
8x32x32; larger clips run, but it never saw any. Writes bench/results/captured.json, which
``bench/report.py`` renders, and draws docs/captured.png. On a CPU everything is float32; a GPU
attends in bfloat16, against dense attention in float32 on the same rounded q, k, v.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from inputs import run_clip

import sparline
from sparline import demo
from sparline.bench import describe_machine
from sparline.inspect.capture import Sample
from sparline.inspect.measure import block_mass, measure_errors
from sparline.methods import BLASST, SLA, Dense, DynSparse

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench" / "results" / "captured.json"
PLOT = ROOT / "docs" / "captured.png"
LEVELS = (0.2, 0.5, 0.8)
KEEP_RATIOS = (0.10, 0.05)
RECALLS = (0.90, 0.95, 0.98, 0.99)
#: Options of both in-loop methods beside their threshold.
IN_LOOP: tuple[dict[str, Any], ...] = (
    {},
    {"decide_rows": 16},
    {"tile_order": "diagonal_first"},
    {"tile_order": "diagonal_first", "token_order": "cubes"},
)
#: ``sla`` with its projection untrained is ``sparse``: only what it adds would differ.
METHODS = ("dense", "sparse", "top_p", "sla", "sla2", "vsa", "vmoba", "dynsparse", "blasst")
#: Of BLASST, against the running maximum.
THRESHOLDS = (*(0.5 * n for n in range(-18, -6)), *(0.25 * n for n in range(-12, 0)), -0.1)
#: Of DynSparse, above a tile's fair share of the softmax, ln(block_k / N).
BUDGETS = (-6.0, -4.0, -3.0, -2.0, -1.5, *(0.125 * n for n in range(-8, 17)), 2.5, 3.0, 4.0)

Curve = list[tuple[float, float]]  # (recall, share of tiles skipped), by rising threshold


@dataclasses.dataclass(frozen=True)
class Skips:
    """What one call's tiles allow: for each head, by setting and method; and the best there is."""

    curves: dict[str, dict[str, list[Curve]]]  # of each setting and method, a curve for each head
    best: list[Curve]  # of whole tiles chosen by their true mass


# Samples ----------------------------------------------------------------------------------------


@torch.no_grad()
def measure_grid(grid: tuple[int, int, int], args: argparse.Namespace) -> dict[str, Any]:
    """Everything about one size of clip."""
    device = torch.device(args.device)
    samples: list[dict[str, Any]] = []
    skips: list[Skips] = []
    begin = time.perf_counter()

    def on_sample(level: float, sample: Sample) -> None:
        if device.type == "cuda":
            sample = dataclasses.replace(
                sample, **{name: getattr(sample, name).bfloat16() for name in "qkv"}
            )
        skips.append(measure_skips(sample, IN_LOOP[: args.settings]))
        errors = []
        for ratio in KEEP_RATIOS:
            for error in measure_errors(sample, METHODS, ratio):
                told = dataclasses.asdict(error)
                for name in ("relative_l1", "cosine"):
                    told[name] = round(statistics.fmean(told[name]), 6)
                told["density"], told["flops"] = round(error.density, 5), round(error.flops, 5)
                errors.append({"keep_ratio": ratio, **told})
        samples.append({"layer": sample.layer, "level": level, "errors": errors})
        passed = time.perf_counter() - begin
        print(f"{grid} level {level:g} layer {sample.layer}: {passed:.0f} s", flush=True)

    layers = run_clip(args.clip, grid, LEVELS, device, on_sample, args.layers or ())
    return {
        "grid": list(grid),
        "tokens": grid[0] * grid[1] * grid[2],
        "layers": layers,
        "levels": list(LEVELS),
        "samples": samples,
        **sum_up(skips),
    }


# In-loop skipping -------------------------------------------------------------------------------


def measure_skips(sample: Sample, settings: Sequence[dict[str, Any]]) -> Skips:
    q, k, v = sample.q, sample.k, sample.v
    given: dict[str, Any] = {"layout": "bnhd", "grid": sample.grid}
    _, full = sparline.attention(q, k, v, method=Dense(), layout="bnhd", return_lse=True)
    fair = math.log(SLA.sparse_only().block_k / k.shape[1])  # 64, as of the in-loop methods
    thresholds = {
        DynSparse: [fair + x for x in BUDGETS if fair + x < 0.0],
        BLASST: THRESHOLDS,
    }
    curves: dict[str, dict[str, list[Curve]]] = {}
    for options in settings:
        found: dict[str, list[Curve]] = {}
        for cls, values in thresholds.items():
            heads: list[Curve] = [[] for _ in range(q.shape[2])]
            for threshold in values:
                told = sparline.tile_statistics(q, k, v, method=cls(threshold, **options), **given)
                kept = (told.lse - full).exp().mean(dim=-1)[0].tolist()  # (H,)
                skipped = (told.skipped / told.visited)[0].tolist()
                for curve, point in zip(heads, zip(kept, skipped, strict=True), strict=True):
                    curve.append(point)
            found[cls.name] = heads
        curves[words_of(options)] = found
    return Skips(curves, best_curves(sample))


def best_curves(sample: Sample) -> list[Curve]:
    """Recall and share of tiles where whole tiles go by their true mass, the least first: what no
    rule can exceed in raster order, let alone one that has not seen the tiles to come."""
    mass, _ = block_mass(sample, SLA.sparse_only())  # 128 x 64, as the in-loop methods
    found = []
    for head in mass.flatten(1).sort(dim=-1).values.cpu().double():
        lost = head.cumsum(0) / mass.shape[1]
        step = max(1, len(head) // 2000)
        points = zip(
            (1.0 - lost[step - 1 :: step]).tolist(),
            (torch.arange(step, len(head) + 1, step) / len(head)).tolist(),
            strict=True,
        )
        found.append([(1.0, 0.0), *points])
    return found


def words_of(options: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in options.items())


def pooled(curves: Sequence[Curve]) -> Curve:
    """One threshold for all: the mean at each."""
    return [
        (statistics.fmean(r for r, _ in points), statistics.fmean(s for _, s in points))
        for points in zip(*curves, strict=True)
    ]


def sparsity_at(recall: float, points: list[tuple[float, float]]) -> float:
    """Linear interpolation of the sparsity where a falling curve of recall crosses a value."""
    for (r0, s0), (r1, s1) in itertools.pairwise(points):
        if r1 <= recall <= r0:
            return s1 if r0 == r1 else s0 + (s1 - s0) * (r0 - recall) / (r0 - r1)
    return max(s for r, s in points if r >= recall)


def sum_up(skips: Sequence[Skips]) -> dict[str, Any]:
    """Tiles skipped at equal recall: with one threshold for all calls and heads, and with one for
    each head of each call, which has that recall."""
    rows, plotted = [], {}
    best = [curve for skip in skips for curve in skip.best]
    for setting in skips[0].curves:
        heads = {
            name: [curve for skip in skips for curve in skip.curves[setting][name]]
            for name in skips[0].curves[setting]
        }
        ends = {name: pooled(curves) for name, curves in heads.items()}
        plotted[setting] = ends
        rows += [
            {
                "setting": setting,
                "recall": recall,
                "one": {name: sparsity_at(recall, curve) for name, curve in ends.items()},
                "each": {
                    name: statistics.fmean(sparsity_at(recall, curve) for curve in curves)
                    for name, curves in heads.items()
                },
                "best_each": statistics.fmean(sparsity_at(recall, curve) for curve in best),
            }
            for recall in RECALLS
        ]
    return {"in_loop": rows, "curves": plotted}


# Plot -------------------------------------------------------------------------------------------


def draw(report: dict[str, Any], path: Path) -> None:
    """Left: tiles skipped against recall. Right: errors of the methods, a dot for each layer and
    noise level."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from sparline.inspect.figures import GREEN, SERIES, STYLE, VIOLET

    colours = {"dynsparse": VIOLET, "blasst": GREEN}
    with mpl.rc_context({key: v for key, v in STYLE.items() if not str(v).startswith("#")}):
        figure = Figure(figsize=(10.5, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
        for n, entry in enumerate(report["grids"]):
            for name, curve in entry["curves"][""].items():
                shown = [(100 * r, 100 * s) for r, s in curve if r >= 0.8]
                style = ("o-", "s--", "^:")[n % 3]
                label = f"{'DynSparse' if name == 'dynsparse' else 'BLASST'}, N {entry['tokens']}"
                left.plot(*zip(*shown, strict=True), style, color=colours[name], label=label, ms=3)
        left.set_xlabel("share of the softmax that is kept, %")
        left.set_ylabel("tiles skipped, %")
        left.set_title("In-loop skipping, one threshold for all")
        left.legend()
        entry = report["grids"][0]
        wanted = KEEP_RATIOS[0]
        names = [name for name in METHODS if name not in ("dense", "sla")]
        for y, name in enumerate(names):
            for n, level in enumerate(entry["levels"]):
                x = [
                    error["relative_l1"]
                    for sample in entry["samples"]
                    for error in sample["errors"]
                    if (sample["level"], error["method"], error["keep_ratio"])
                    == (level, name, wanted)
                ]
                label = f"noise {level:g}" if y == 0 else None
                place = [y + 0.22 * (n - 1)] * len(x)
                right.scatter(x, place, s=12, color=SERIES[n], linewidths=0, label=label)
        right.set_yticks(range(len(names)), names)
        right.invert_yaxis()
        right.set_xscale("log")
        right.set_xlabel("relative L1 error, a dot for each layer")
        right.set_title(f"Density {wanted:.0%}, N {entry['tokens']}, nothing trained")
        right.legend()
        figure.savefig(path, dpi=110, facecolor="white")


def grid_of(text: str) -> tuple[int, int, int]:
    frames, height, width = map(int, text.split("x"))
    return frames, height, width


def others(path: Path, report: dict[str, Any], grid: tuple[int, int, int]) -> list[dict[str, Any]]:
    """Other grids that the same code measured on the same device."""
    if not path.exists():
        return []
    before = json.loads(path.read_text())
    same = all(before["machine"][key] == report["machine"][key] for key in ("device", "commit"))
    return [entry for entry in before["grids"] if same and entry["grid"] != list(grid)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--grids", default="8x32x32,16x48x48", help="tokens as frames x height x width")
    add("--layers", type=lambda text: [int(x) for x in text.split(",")], help="all, if not given")
    add("--settings", type=int, default=len(IN_LOOP), help="of the in-loop methods, the first N")
    add(
        "--clip",
        type=Path,
        default=demo.HELD_OUT_VIDEO,
        help="a video, or frames of the size as .npy",
    )
    add("--commit", default=os.environ.get("SPARLINE_COMMIT"), help="where there is no git")
    add("--out", type=Path, default=OUT)
    add("--plot", type=Path, default=PLOT)
    add("--draw", action="store_true", help="draw what is measured already")
    args = parser.parse_args()
    if not args.draw:
        is_cuda = args.device.startswith("cuda")
        machine = describe_machine()
        machine["device"] = torch.cuda.get_device_name() if is_cuda else machine["device"]
        machine["commit"] = args.commit or machine["commit"]
        report = {
            "machine": machine,
            "dtype": "bfloat16" if is_cuda else "float32",
            "sla2_alpha": "output",  # as Tuned.run sets it
        }
        for text in args.grids.split(","):
            grids = [*others(args.out, report, grid_of(text)), measure_grid(grid_of(text), args)]
            grids.sort(key=lambda entry: entry["tokens"])
            args.out.write_text(json.dumps({**report, "grids": grids}) + "\n")
            print(f"wrote {args.out}", flush=True)
    draw(json.loads(args.out.read_text()), args.plot)
    print(f"wrote {args.plot}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
