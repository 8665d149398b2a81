# SPDX-License-Identifier: Apache-2.0
"""The section of docs/performance.md about whole models, from what bench/model.py wrote."""

from __future__ import annotations

from typing import Any

HEAD = """\
### A denoising step of a whole model

By `python bench/model.py`: diffusers' `WanTransformer3DModel` in the shape of Wan 2.1 1.3B
({layers} layers, {tokens} tokens), bfloat16, one call of the transformer. **The weights are
random**: a step costs what it costs with trained ones, except that DynSparse skips what random
attention lets it skip. Cross-attention is torch's in all rows. `×` compares with the faster of
torch's two backends in the same mode; *compiled* is `compile_repeated_blocks(fullgraph=True)`.
"""
#: What the project set out to reach: SLA2 at 97 % against torch's attention.
TARGET = 2.5
MODES = {"eager": "eager", "compiled": "compiled"}
NAMES = {"cudnn": "torch, cuDNN", "sdpa": "torch, its own choice", "dense": "dense, sparline"}
#: Kernels of a row that are named, the longest first.
NAMED = 6


def render_model(rows: list[dict[str, Any]], kernels: dict[str, Any] | None) -> str:
    if not rows:
        return ""
    first = rows[0]
    lines = [HEAD.format(layers=first["layers"], tokens=f"{first['N']:,}".replace(",", " "))]
    lines += [
        "| target | wanted | measured |",
        "|---|---:|---:|",
        *(
            f"| SLA2 at 97 %, {row['mode']} | ≥ {TARGET}× {row['baseline']} | {row['ratio']:.2f}× "
            f"({'met' if row['ratio'] >= TARGET else 'missed'}) |"
            for row in rows
            if row["method"] == "sla2" and row["keep_ratio"] == 0.03
        ),
        "",
    ]
    rows = sorted(rows, key=lambda row: list(MODES).index(row["mode"]))
    stages = list(next((r["stages_ms"] for r in rows if r["stages_ms"]), {}))
    lines += [
        "| mode | attention | sparsity | ms | × | "
        + " | ".join(f"{s} ms" for s in stages)
        + " | commit |",
        "|---|---|---:|---:|---:|" + "---:|" * len(stages) + "---|",
    ]
    for row in rows:
        told = row["stages_ms"] or dict.fromkeys(stages)
        sparsity = row["sparsity"] or row["tile_sparsity"]
        cells = [
            row["mode"],
            " ".join(filter(None, (NAMES.get(row["method"], row["method"]), row["setting"]))),
            "" if sparsity is None or sparsity == 0.0 else f"{sparsity:.1%}",
            f"{row['ms']:.1f} ± {row['spread_ms']:.1f}",
            f"{row['ratio']:.2f}" if row["ratio"] else "",
            *("" if told[stage] is None else f"{told[stage]:.1f}" for stage in stages),
            row["commit"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    if kernels is not None:
        lines += render_kernels(kernels)
    return "\n".join(lines) + "\n"


def render_kernels(report: dict[str, Any]) -> list[str]:
    """The longest kernels of SLA2's step, outside its attention: what is left to save."""
    lines: list[str] = []
    for entry in report["entries"]:
        if entry["method"] != "sla2":
            continue
        lines += [
            f"The longest kernels of a step with SLA2, {entry['mode']} ({entry['ms']:.1f} ms):\n",
            "| stage | kernel | launches | ms |",
            "|---|---|---:|---:|",
            *(
                f"| {kernel['stage']} | `{short(kernel['kernel'])}` | {kernel['launches']:g} "
                f"| {kernel['us'] / 1e3:.1f} |"
                for kernel in entry["kernel_times"][:NAMED]
            ),
            "",
        ]
    return lines


def short(kernel: str) -> str:
    name = kernel.removeprefix("void ").replace("|", "/")
    return name if len(name) <= 72 else name[:69] + "..."
