# SPDX-License-Identifier: Apache-2.0
"""The section of docs/performance.md about captured tensors, from what bench/captured.py wrote."""

from __future__ import annotations

import statistics
from typing import Any

#: Points that DynSparse should skip more than BLASST at equal recall.
TARGET = 0.15
#: What SLA2's α was set to: ``fit`` of ``SLA2.alpha_evidence``.
ALPHAS = {
    "mass": "the share of the dense mass that its router keeps (today it is fitted instead)",
    "output": "fitted to each sample's dense output",
}
WORDS = {
    "dense": "dense",
    "sparse": "top-k",
    "top_p": "top-p",
    "sla": "SLA",
    "sla2": "SLA2",
    "vsa": "VSA",
    "vmoba": "VMoBA",
    "dynsparse": "DynSparse",
    "blasst": "BLASST",
}


def render_captured(report: dict[str, Any]) -> str:
    machine, grids = report["machine"], report["grids"]
    lines = [
        "## On captured tensors\n",
        f"By `python bench/captured.py`, {report['dtype']}, commit {machine['commit']}: q, k and v "
        "of the bundled model on a clip that its training never saw, noised to "
        f"{', '.join(f'{x:g}' for x in grids[0]['levels'])}. It was trained on grids of "
        "8 × 32 × 32 tokens; larger ones run, but it never saw any. Nothing else is trained: "
        "SLA's projection is zero, so that SLA is top-k, SLA2's α is "
        f"{ALPHAS[report['sla2_alpha']]}, VSA's coarse gate is zero.\n",
        "![Tiles skipped against recall, and errors by method](captured.png)\n",
        "### Errors by method\n",
        "Mean over layers of Σ|o − o′| / Σ|o′| and of the cosine, o′ dense in float32, by noise "
        "level. Density is the share of scores that enter the softmax; in-loop methods come as "
        "near as a threshold brings them and compute q kᵀ of every tile.\n",
    ]
    for entry in grids:
        lines += [*render_errors(entry), *render_layers(entry)]
    lines += ["### In-loop skipping at equal recall\n", *render_in_loop(grids)]
    return "\n".join(lines) + "\n"


def name_of(entry: dict[str, Any]) -> str:
    return f"{' × '.join(map(str, entry['grid']))} = {entry['tokens']} tokens"


def render_errors(entry: dict[str, Any]) -> list[str]:
    levels = entry["levels"]
    lines = [
        f"**{name_of(entry)}**, {len(entry['layers'])} layers\n",
        "| asked | method | density | "
        + " | ".join(f"rel. L1 at {x:g}" for x in levels)
        + " | "
        + " | ".join(f"cosine at {x:g}" for x in levels)
        + " |",
        "|---:|---|---:|" + "---:|" * 2 * len(levels),
    ]
    for ratio, name in dict.fromkeys(
        (e["keep_ratio"], e["method"]) for s in entry["samples"] for e in s["errors"]
    ):
        found = errors_of(entry, name, ratio)
        if name == "dense" and ratio != entry["samples"][0]["errors"][0]["keep_ratio"]:
            continue
        cells = [
            "" if name == "dense" else f"{ratio:.0%}",
            WORDS[name],
            f"{statistics.fmean(e['density'] for _, _, e in found):.1%}",
        ]
        for what, digits in (("relative_l1", 3), ("cosine", 4)):
            for level in levels:
                values = [e[what] for _, x, e in found if x == level]
                cells.append(f"{statistics.fmean(values):.{digits}f}")
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def render_layers(entry: dict[str, Any]) -> list[str]:
    """Relative L1 of each layer and level at the first density, for the methods that choose
    blocks."""
    ratio = entry["samples"][0]["errors"][0]["keep_ratio"]
    names = [n for n in WORDS if n != "dense" and errors_of(entry, n, ratio)]
    lines = [
        f"Relative L1 at {ratio:.0%} by layer and noise level, {name_of(entry)}:\n",
        "| layer | noise | " + " | ".join(WORDS[n] for n in names) + " |",
        "|---:|---:|" + "---:|" * len(names),
    ]
    for layer in entry["layers"]:
        for level in entry["levels"]:
            cells = [str(layer), f"{level:g}"]
            for name in names:
                cells += [
                    f"{e['relative_l1']:.3f}"
                    for n, x, e in errors_of(entry, name, ratio)
                    if (n, x) == (layer, level)
                ]
            lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def errors_of(
    entry: dict[str, Any], name: str, ratio: float
) -> list[tuple[int, float, dict[str, Any]]]:
    return [
        (sample["layer"], sample["level"], error)
        for sample in entry["samples"]
        for error in sample["errors"]
        if (error["method"], error["keep_ratio"]) == (name, ratio)
    ]


def render_in_loop(grids: list[dict[str, Any]]) -> list[str]:
    rows = [row for entry in grids for row in entry["in_loop"]]
    gains = [row[how]["dynsparse"] - row[how]["blasst"] for row in rows for how in ("one", "each")]
    is_met = min(gains) >= TARGET
    lines = [
        "Share of tiles skipped where the mean row keeps the same share of its softmax: with one "
        "threshold for all layers, levels and heads, and with a threshold for each head of each "
        "call that keeps just that share. *Best* is what whole tiles of raster order allow, each "
        "head's tiles going by their true mass. The project's target, DynSparse "
        f"{100 * TARGET:.0f} points above BLASST, is {'met' if is_met else 'missed'}: the "
        f"difference lies between {100 * min(gains):+.1f} and {100 * max(gains):+.1f} points.\n",
        "| tokens | recall | options | DynSparse | BLASST | DynSparse, by head | BLASST, by head "
        "| best, by head |",
        "|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for entry in grids:
        for row in entry["in_loop"]:
            cells = [
                str(entry["tokens"]),
                f"{row['recall']:.0%}",
                row["setting"] or "defaults",
                *(f"{row[how][n]:.1%}" for how in ("one", "each") for n in ("dynsparse", "blasst")),
                # The order of tokens changes what tiles there are.
                "" if "token_order" in row["setting"] else f"{row['best_each']:.1%}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]
