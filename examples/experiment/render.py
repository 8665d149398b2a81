# SPDX-License-Identifier: Apache-2.0
"""Renders docs/quality.md and its plots from what experiment.py found. No number is typed by hand.

    python examples/experiment/render.py run/short/results.jsonl run/long/results.jsonl

Results are copied to bench/results/training/<experiment>.jsonl, from which, without arguments, the
page is rendered again. --check fails if the page is not what would be written.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "training"
PAGE = ROOT / "docs" / "quality.md"
#: Rows of the plots: the rest is in the tables.
PLOTTED = (
    "sparse",
    "sla_main",
    "sla",
    "sla2",
    "linear_plus_sparse",
    "vsa",
    "vmoba",
    "sla2_fine_router",
)

#: SLA's and SLA2's way to put the branches together, as forms.py calls them.
PUBLISHED_FORMS = ("o_s + o_l Wᵀ + b", "α o_s + (1 − α) o_l, α of a head and query block")

HEAD = """\
# Quality after fine-tuning

Measured by `examples/experiment/experiment.py`, rendered by `examples/experiment/render.py` from
`bench/results/training`. Not edited by hand. How to read it:

- **Every trained row** starts from one dense model and sees the same clips with the same noise for
  the same steps; dense is trained on likewise. Rows under *no training* run on that dense model.
  Where the dense model to start from was itself trained again, a row counts as another run, and is
  compared with dense from its own start.
- **held-out loss** is the flow-matching loss of the averaged weights on fixed held-out clips with
  fixed noise and evenly spaced noise levels; **Δ dense** is the mean of the paired differences to
  dense of the same seed, in percent of dense, ± the standard error of that mean over clips; where
  there are several runs (seeds, or starts), a range over them follows. Without ±: of the run only
  the losses were kept, as its log has them, and its distances are not compared with chance.
- **gap closed**: the share of sparse-only's Δ, at the same ratio and seed, that is not left.
- **density** is the share of score elements (of tiles, for in-loop methods) that enter the softmax,
  as achieved, mean over layers.
- **PSNR, SSIM**: clips from noise, and over held-out clips, against those of dense from the same
  noise; of the runs whose clips were compared. **attention** is the relative L1 error against dense
  attention on the model's own q, k, v, in the first run that was looked at.
- **ms** is a training step, where the run had its GPU to itself, or of 60 steps timed apart;
  **GiB** the peak of memory allocated in training. Neither is told of five runs whose blocks ran
  eagerly, behind torch's limit of recompilations: a process trains any number of rows since.

A row, ratio or seed of the experiment's configuration that is in no table has not been run yet.
"""

Result = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("results", nargs="*", type=Path, help="results.jsonl of experiment.py")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--store", type=Path, default=RESULTS)
    args = parser.parse_args()
    for path in args.results:
        results = read(path)
        if not rows_of(results):
            print(f"render: {path} holds no finished piece yet; nothing was changed.")
            return 1
        args.store.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, args.store / f"{results[0]['experiment']}.jsonl")
    experiments = {path.stem: read(path) for path in sorted(args.store.glob("*.jsonl"))}
    order = sorted(experiments, key=lambda name: (experiments[name][0]["num_tokens"], name))
    experiments = {name: experiments[name] for name in order}
    forms = args.store / "forms.json"
    told = json.loads(forms.read_text()) if forms.is_file() else None
    if args.check:
        # The plots are left out: their pixels depend on the version of matplotlib.
        text = page(experiments, told)
        if args.page.read_text() == text:
            return 0
        print(f"{args.page} is not what its results give; run {Path(__file__).name}")
        return 1
    for name, results in experiments.items():
        plot(args.page.parent / f"quality-{name}.png", rows_of(results))
    args.page.write_text(page(experiments, told))
    print(f"wrote {args.page}")
    return 0


def read(path: Path) -> list[Result]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# The page ---------------------------------------------------------------------------------------


def page(experiments: dict[str, list[Result]], forms: dict[str, Any] | None = None) -> str:
    parts = [HEAD]
    for name, everything in experiments.items():
        results = rows_of(everything)
        first = next((r for r in results if not r["is_free"]), results[0])
        devices = ", ".join(sorted({r["device"] for r in results}))
        clips = "" if first["data"] == "scenes" else f", {first['data']}"
        parts.append(
            f"## {first['num_tokens']:,} tokens, {first['steps']} steps".replace(",", " ", 1)
            + f"{clips}\n\nBatches of {first['batch']}, {first['data']}, on {devices}, torch "
            f"{first['torch']}.\n\n![Losses](quality-{name}.png)\n"
        )
        ratios = sorted({r["ratio"] for r in results if r["ratio"] is not None}, reverse=True)
        without = [r for r in results if r["ratio"] is None]
        parts.append(table(without, results))
        for ratio in ratios:
            at_ratio = [r for r in results if r["ratio"] == ratio]
            parts.append(f"### {100 * (1 - ratio):g} % sparsity\n\n" + table(at_ratio, results))
        parts.append(
            "### By noise level\n\nΔ dense in percent of dense at that level, first run.\n"
        )
        parts += [levels_table(ratio, results) for ratio in ratios]
        parts.append(steps_table(results))
        parts += [router_table(r) for r in everything if r["kind"] == "router"]
    if forms is not None:
        parts += forms_tables(forms)
    return "\n".join(parts)


FORMS_HEAD = """\
## What a form of the two branches can give

By `examples/experiment/forms.py`, commit {commit}, on q, k, v of the dense model, {tokens} tokens,
nothing trained: o_s is the sparse branch's output, o_l the linear branch's, m the share of the
softmax on critical blocks. The numbers of a form (α; W and b, of all heads together) are
fitted to the dense o for each layer, on {fit_clips} training clips; the table is the mean of
|form − o|² / |o|² over layers on {held_out_clips} held-out clips. Projections are regularised, by
what is best on these. SLA's form is o_s + o_l Wᵀ + b, SLA2's α o_s + (1 − α) o_l.
"""


def forms_tables(report: dict[str, Any]) -> list[str]:
    """Every form with the first branch, then what other branches do for the published ones."""
    rows, ratios = report["rows"], sorted({r["keep_ratio"] for r in report["rows"]}, reverse=True)
    errors = {(r["branch"], r["form"], r["keep_ratio"]): r["error"] for r in rows}
    branches, forms = (list(dict.fromkeys(r[key] for r in rows)) for key in ("branch", "form"))
    columns = "".join(f" {1 - ratio:.0%} |" for ratio in ratios)

    def cells(branch: str, form: str) -> str:
        return "".join(f" {errors[branch, form, ratio]:.3f} |" for ratio in ratios)

    told = {**report, "tokens": f"{report['tokens']:,}".replace(",", " ")}
    return [
        FORMS_HEAD.format(**told, commit=report["machine"]["commit"]),
        f"| form, feature map {branches[0]} |{columns}\n|---|" + "---:|" * len(ratios),
        *(f"| {form} |{cells(branches[0], form)}" for form in forms),
        "",
        f"| linear branch | form |{columns}\n|---|---|" + "---:|" * len(ratios),
        *(
            f"| {branch} | {form} |{cells(branch, form)}"
            for form in PUBLISHED_FORMS
            for branch in branches
        ),
        "",
    ]


def rows_of(everything: list[Result]) -> list[Result]:
    """The results of rows, with the times of their steps at the ratio where they were timed: not of
    the continuation before them, nor of the router."""
    timed = {(r["row"], r["ratio"]): r for r in everything if r["kind"] == "time"}
    rows = [r for r in everything if r["kind"] in ("train", "free")]
    return [
        {**r, **{n: x for n, x in timed[at].items() if n in ("ms", "peak_bytes")}}
        if (at := (r["row"], r["ratio"])) in timed and r["kind"] == "train"
        else r
        for r in rows
    ]


def router_table(result: Result) -> str:
    """What stage 1 made of the router, by ratio."""
    start = f", start at {result['start_loss']:.4f}" if "start_loss" in result else ""
    lines = [
        f"### The router, {result['router']}{start}\n\n"
        "Relative square error of SLA2's attention, hard router, held-out clips, mean over layers: "
        "before its training (begun from what the ratio before left, with α fitted anew), after "
        "it, with α fitted once more behind it, and of what was kept, the best of these.\n\n"
        "| sparsity | before | trained | α fitted | kept |\n|---:|---:|---:|---:|---:|\n"
    ]
    for ratio, errors in result["errors"].items():
        words = " | ".join(f"{error:.4f}" for error in errors)
        lines.append(f"| {100 * (1 - float(ratio)):g} % | {words} |\n")
    return "".join(lines)


def table(rows: list[Result], results: list[Result]) -> str:
    head = (
        "| | runs | density | held-out loss | Δ dense | gap closed | from noise: PSNR, SSIM "
        "| over a clip: PSNR, SSIM | attention | ms | GiB |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n"
    )
    lines = []
    for is_free in (False, True):
        group = [r for r in rows if r["is_free"] == is_free]
        if is_free and group:
            lines.append("| *no training* | | | | | | | | | | |\n")
        lines += ["| " + " | ".join(cells(same, results)) + " |\n" for same in by_row(group)]
    return head + "".join(lines)


def cells(same: list[Result], results: list[Result]) -> list[str]:
    """A line of the table, of one row's runs."""
    first = same[0]
    deltas = [d for r in same if (d := delta(r, results)) is not None]
    closed = [c for r in same if (c := gap_closed(r, results)) is not None]
    looked_at = next((r for r in same if "attention_relative_l1" in r), None)
    errors = () if looked_at is None else looked_at["attention_relative_l1"].values()
    times = [r["ms"] for r in same if "ms" in r]  # of runs that had their GPU to themselves
    peaks = [r["peak_bytes"] for r in same if "peak_bytes" in r]
    return [
        first["words"],
        str(len(same)),
        f"{first['density']:.1%}",
        f"{statistics.fmean(r['held_out_loss'] for r in same):.4f}",
        "" if not deltas else delta_words(deltas),
        "" if not closed else spread([100 * c for c in closed], "{:.0f} %"),
        pair(same, "noise"),
        pair(same, "clip"),
        f"{statistics.fmean(errors):.3f}" if errors else "",
        f"{statistics.fmean(times):.0f}" if times else "",
        f"{max(peaks) / 2**30:.1f}" if peaks else "",
    ]


def pair(same: list[Result], kind: str) -> str:
    compared = [r for r in same if f"{kind}_psnr_db" in r]
    if not compared:
        return ""
    psnr = statistics.fmean(r[f"{kind}_psnr_db"] for r in compared)
    ssim = statistics.fmean(r[f"{kind}_ssim"] for r in compared)
    return f"{psnr:.1f} dB, {ssim:.3f}"


def levels_table(ratio: float, results: list[Result]) -> str:
    """Δ dense by noise level, first run."""
    lines = [
        f"| σ, {100 * (1 - ratio):g} % sparsity | 0–0.2 | 0.2–0.4 | 0.4–0.6 | 0.6–0.8 | 0.8–1 |\n"
        "|---|---:|---:|---:|---:|---:|\n"
    ]
    for r, *_ in by_row(r for r in results if r["seed"] == 0 and r["ratio"] in (ratio, None)):
        dense = partner(r, results)
        if dense is not None and r is not dense and "held_out" in r:
            fifths = [100 * (a / b - 1) for a, b in zip(by_level(r), by_level(dense), strict=True)]
            words = r["words"] + (", no training" if r["is_free"] else "")
            lines.append(f"| {words} | " + " | ".join(f"{x:+.1f}" for x in fifths) + " |\n")
    return "".join(lines)


def steps_table(results: list[Result]) -> str:
    """What share of sparse-only's distance to dense is gone after so many steps, first run whose
    sparse-only and dense rows have the same start."""
    steps = [step for step, _ in next(r for r in results if r["row"] == "dense")["held_out_curve"]]
    lines = [
        "### By steps\n\nGap closed after so many steps, on the validation clips of training.\n\n"
        "| | sparsity | " + " | ".join(map(str, steps)) + " |\n"
        "|---|---:|" + "---:|" * len(steps) + "\n"
    ]
    others = [r for r in results if r["ratio"] is not None and r["row"] != "sparse"]
    for same in by_row(sorted(others, key=lambda r: -r["ratio"])):
        for r in same:
            curves = [curve(x) for x in (r, partner(r, results), partner(r, results, "sparse"))]
            starts = {x.get("start_loss") for x in (r, partner(r, results, "sparse")) if x}
            if len(starts) > 1 or not all(set(steps) <= set(c) for c in curves):
                continue
            own, dense, sparse = curves
            shares = [(sparse[n] - own[n]) / (sparse[n] - dense[n]) for n in steps]
            words = " | ".join(f"{100 * share:.0f} %" for share in shares)
            lines.append(f"| {r['words']} | {100 * (1 - r['ratio']):g} % | {words} |\n")
            break
    return "".join(lines)


def curve(result: Result | None) -> dict[int, float]:
    """Held-out loss by step; of a row without training there is none."""
    return {} if result is None else dict(result.get("held_out_curve", ()))


def by_level(result: Result) -> list[float]:
    """Mean loss in each fifth of the noise levels; NaN where there is no clip."""
    found = []
    for n in range(5):
        part = [loss for sigma, loss in result["held_out"] if n <= 5 * sigma < n + 1]
        found.append(statistics.fmean(part) if part else math.nan)
    return found


# What follows from results ----------------------------------------------------------------------


def by_row(results: Iterable[Result]) -> list[list[Result]]:
    """Results of one row and ratio together, in the order of the experiment."""
    groups: dict[tuple[str, Any], list[Result]] = {}
    for r in results:
        groups.setdefault((r["row"], r["ratio"]), []).append(r)
    return list(groups.values())


def partner(result: Result, results: list[Result], row: str = "dense") -> Result | None:
    """The result of ``row`` with the same seed, and the same ratio if it has one: from the same
    start, or for another row than dense from any."""
    found = [
        r
        for r in results
        if r["row"] == row and r["seed"] == result["seed"] and r["ratio"] in (result["ratio"], None)
    ]
    same_start = [r for r in found if r.get("start_loss") == result.get("start_loss")]
    return next(iter(same_start if row == "dense" else same_start + found), None)


def delta(result: Result, results: list[Result]) -> tuple[float, float] | None:
    """Mean paired difference to dense and its standard error, in percent of dense; the error is NaN
    where the losses of single clips were not kept."""
    dense = partner(result, results)
    if dense is None or dense is result:
        return None
    if "held_out" not in result or "held_out" not in dense:
        return 100 * (result["held_out_loss"] / dense["held_out_loss"] - 1), math.nan
    pairs = zip(result["held_out"], dense["held_out"], strict=True)
    differences = [a[1] - b[1] for a, b in pairs]
    base = statistics.fmean(loss for _, loss in dense["held_out"])
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return 100 * statistics.fmean(differences) / base, 100 * error / base


def gap_closed(result: Result, results: list[Result]) -> float | None:
    sparse = partner(result, results, "sparse")
    if sparse is None or result["ratio"] is None or sparse is result or result["is_free"]:
        return None
    own, its = delta(result, results), delta(sparse, results)
    if own is None or its is None or its[0] <= 2.0 * its[1]:  # NaN: taken for a gap
        return None  # no gap that could be told from chance
    return 1.0 - own[0] / its[0]


def delta_words(deltas: Sequence[tuple[float, float]]) -> str:
    mean = statistics.fmean(d[0] for d in deltas)
    errors = [d[1] for d in deltas if not math.isnan(d[1])]
    error = f" ± {statistics.fmean(errors):.2f}" if errors else ""
    words = f"{mean:+.2f}{error} %"
    if len(deltas) > 1:
        values = [d[0] for d in deltas]
        words += f" ({min(values):+.2f} to {max(values):+.2f})"
    return words


def spread(values: list[float], form: str) -> str:
    words = form.format(statistics.fmean(values))
    if len(values) > 1:
        words += f" ({form.format(min(values))} to {form.format(max(values))})"
    return words


# Plots ------------------------------------------------------------------------------------------


def plot(path: Path, results: list[Result]) -> None:
    """Δ dense by kept ratio, by training step and by noise level."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    ratio = next((r["ratio"] for r in results if r["ratio"] is not None), None)
    figure, (by_ratio, by_step, by_sigma) = pyplot.subplots(
        1, 3, figsize=(16, 4.8), layout="constrained"
    )
    for name in PLOTTED:
        own = [r for r in results if r["row"] == name and r["seed"] == 0]
        rows = [first for first, *_ in by_row(own)]
        if not rows:
            continue
        words = rows[0]["words"]
        points = sorted((r["ratio"], d[0]) for r in rows if (d := delta(r, results)) is not None)
        color = None
        if points:
            (line,) = by_ratio.plot(*zip(*points, strict=True), marker="o", label=words)
            color = line.get_color()
        row = next((r for r in rows if r["ratio"] == ratio), None)
        dense = None if row is None else partner(row, results)
        if row is None or dense is None:
            continue
        base = dict(map(tuple, dense["held_out_curve"]))
        curve = [(s, 100 * (x / base[s] - 1)) for s, x in row["held_out_curve"] if s in base]
        if curve:
            by_step.plot(*zip(*curve, strict=True), marker=".", color=color, label=words)
        levels = [100 * (a / b - 1) for a, b in zip(by_level(row), by_level(dense), strict=True)]
        by_sigma.plot([0.1, 0.3, 0.5, 0.7, 0.9], levels, marker=".", color=color, label=words)
    for axes, label in (
        (by_ratio, "kept ratio"),
        (by_step, "training step"),
        (by_sigma, "noise level σ"),
    ):
        axes.axhline(0.0, color="black", lw=0.6)
        axes.set_xlabel(label)
        axes.set_ylabel("held-out loss above dense, %")
    if by_ratio.lines:
        by_ratio.legend(fontsize=8)
        by_ratio.set_xticks(sorted({r["ratio"] for r in results if r["ratio"] is not None}))
    figure.suptitle(f"{results[0]['num_tokens']} tokens, {results[0]['data']}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
