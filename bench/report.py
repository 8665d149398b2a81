# SPDX-License-Identifier: Apache-2.0
"""Renders docs/performance.md from bench/results/*.jsonl. No number in that page is typed by hand.

python bench/report.py [--check]      --check fails if the page is not what would be written
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "performance.md"

HEAD = """\
# Performance

Measured by `make bench`, rendered by `python bench/report.py` from `bench/results/`. Not edited by
hand.

A row times a whole operator: everything between q, k, v and o, that is routing, feature maps, both
branches and the projection (with weights that are not zero). `× sdpa` compares with
`torch.nn.functional.scaled_dot_product_attention`, timed in the same run on the same inputs;
backward is the backward alone, to q, k, v and the projection. `of SGEMM` is the share of the
machine's own float32 matrix product that the counted operations reach
(`sparline.accounting.flops`). `kernel ms` is the time with the block map given. `FLOPs` is the
share of dense attention's. Rows on video-like inputs bring every method to one density
(`sparline.density`), by the setting shown; in-loop methods show the tiles that they skip after
q kᵀ, which is not block sparsity. VSA runs with gates of 1, VMoBA by boxes. Before a row is timed,
its result is compared with the reference.
"""

KEY = (
    *("workload", "pass", "dtype", "inputs", "method", "keep_ratio", "setting", "blocks", "scope"),
    "low_bit",
)

#: What the project set out to reach on two cores, float32, cpu-8k: (words, row filter, x sdpa).
CPU_TARGETS: list[tuple[str, dict[str, Any], float]] = [
    ("dense, forward", {"method": "dense", "pass": "fwd"}, 0.9),
    ("SLA 90 %, forward", {"method": "sla", "pass": "fwd", "keep_ratio": 0.1}, 8.0),
    ("SLA 95 %, forward", {"method": "sla", "pass": "fwd", "keep_ratio": 0.05}, 14.0),
    ("SLA 90 %, backward", {"method": "sla", "pass": "bwd", "keep_ratio": 0.1}, 18.0),
]


def latest(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last measurement of each kind of row, in the order of the last run."""
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(row.get(name) for name in KEY)
        kept.pop(key, None)
        kept[key] = row
    return list(kept.values())


def render(files: Iterable[Path], demos: Iterable[Path]) -> str:
    parts = [HEAD]
    for path in sorted(files):
        lines = path.read_text().splitlines()
        rows = latest(row for row in map(json.loads, lines) if row["suite"] != "quick")
        if not rows:
            continue
        last = rows[-1]
        commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
        parts.append(
            f"## {last['device']}\n\n"
            f"{last['isa']}, torch {last['torch']}, commit {commits}, {last['date']} UTC; "
            f"SGEMM {last['sgemm_gflops']:.0f} GFLOP/s.\n"
        )
        parts += [render_targets(rows), render_rows(rows)]
    parts += [render_demo(path) for path in sorted(demos)]
    quality = RESULTS / "quality.json"
    if quality.exists():
        parts.append(render_quality(json.loads(quality.read_text())))
    return "\n".join(parts)


def render_demo(path: Path) -> str:
    """The table that ``sparline generate --compare`` printed, from its results.json."""
    report = json.loads(path.read_text())
    job = report["job"]
    start = f"over {Path(job['init_video']).name}" if job["init_video"] else "from noise"
    lines = [
        f"## The bundled model, {start}\n",
        f"{job['steps']} steps, the first {job['dense_steps']} with the model's own attention, "
        f"guidance {job['guidance']:g}, class {job['prompt']}, on {report['device']}. PSNR and "
        "SSIM are against the first row, at an equal seed.\n",
        "| method | s / step | faster | attention share | block sparsity | PSNR dB | SSIM |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    first = report["results"][0]
    for row in report["results"]:
        alike = "| | |"  # the first row is what the others are compared with
        if row["psnr_db"] is not None:
            alike = f"| {row['psnr_db']:.1f} | {row['ssim']:.3f} |"
        lines.append(
            f"| {row['label']} | {row['step_s']:.2f} | {first['step_s'] / row['step_s']:.2f}× "
            f"| {row['attention_share']:.0%} | {row['sparsity']:.1%} {alike}"
        )
    return "\n".join(lines) + "\n"


def render_quality(report: dict[str, Any]) -> str:
    """The tables of bench/quality.py: errors, which no clock is needed for."""
    lines = [
        "## Errors\n",
        f"By `python bench/quality.py`, commit {report['machine']['commit']}. *Captured* are q, k "
        f"and v of {len(report['samples'])} layers and steps of the bundled model. Relative L1 is "
        "Σ|o − o′| / Σ|o′| against float64.\n",
        "### Low-bit forward, INT8 q kᵀ and e4m3 p v, dense\n",
        "| inputs | p range | v range | queries a scale | k smoothed | relative L1 | cosine |",
        "|---|---:|---:|---:|---|---:|---:|",
    ]
    lines += [
        f"| {row['inputs']} | {row['p_range']:g} | {row['v_range']:g} | {row['q_rows']} "
        f"| {'yes' if row['smooth_k'] else 'no'} | {row['relative_l1']:.4f} "
        f"| {row['cosine']:.5f} |"
        for row in report["low_bit"]
    ]
    lines += [
        "\n### In-loop skipping at equal recall, captured\n",
        "Share of tiles skipped where the mean row keeps the same share of its softmax, one "
        "threshold for all layers, steps and heads. The project's target, DynSparse 15 points "
        "above BLASST, is "
        + (
            "met.\n"
            if all(r["dynsparse"] >= r["blasst"] + 0.15 for r in report["in_loop"])
            else "missed on these tensors.\n"
        ),
        "| recall | options | DynSparse | BLASST |",
        "|---:|---|---:|---:|",
    ]
    for row in report["in_loop"]:
        lines.append(
            f"| {row['recall']:.0%} | {row['setting'] or 'defaults'} | {row['dynsparse']:.1%} "
            f"| {row['blasst']:.1%} |"
        )
    lines += [
        "\n### Token order at equal sparsity, captured\n",
        "Blocks of 64 × 64. Recall is the share of the dense softmax that top-k keeps; errors are "
        "of the sparse branch alone and of SLA2 with its router untrained and α measured.\n",
        "| blocks kept | order | recall | relative L1, sparse | relative L1, SLA2 |",
        "|---:|---|---:|---:|---:|",
    ]
    for row in report["token_order"]:
        lines.append(
            f"| {row['keep_ratio']:.0%} | {row['order']} | {row['recall']:.1%} "
            f"| {row['sparse_relative_l1']:.3f} | {row['sla2_relative_l1']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def render_targets(rows: list[dict[str, Any]]) -> str:
    """Targets beside what was measured; the slower of the linear scopes counts."""
    table = ["| target, float32, cpu-8k | wanted | measured |", "|---|---:|---:|"]
    common = {"workload": "cpu-8k", "dtype": "float32", "inputs": "gaussian"}
    for words, wanted, ratio in CPU_TARGETS:
        found = [
            row
            for row in rows
            if row["blocks"] in ("128x64", None)
            and all(row[key] == value for key, value in {**common, **wanted}.items())
        ]
        if found:
            measured = min(row["ratio"] for row in found)
            verdict = "met" if measured >= ratio else "missed"
            table.append(f"| {words} | ≥ {ratio:g}× sdpa | {measured:.2f}× ({verdict}) |")
    pairs = [
        (row["ms"], other["ms"])
        for row in rows
        for other in rows
        if row["dtype"] == "bfloat16"
        and row["method"] != "sdpa"
        and other["dtype"] == "float32"
        and all(row.get(name) == other.get(name) for name in KEY if name != "dtype")
    ]
    if pairs:
        measured = min(full / half for half, full in pairs)
        verdict = "met" if measured >= 1.0 else "missed"
        table.append(
            f"| bfloat16 not slower than float32 | ≥ 1× float32 | {measured:.2f}× ({verdict}) |"
        )
    return "\n".join(table) + "\n"


def render_rows(rows: list[dict[str, Any]]) -> str:
    tables = []
    for workload in dict.fromkeys(row["workload"] for row in rows):
        chosen = [row for row in rows if row["workload"] == workload]
        first = chosen[0]
        shape = f"B {first['B']}, H {first['H']}, N {first['N']}, D {first['D']}"
        tables.append(f"### {workload} ({shape})\n")
        tables.append(
            "| pass | dtype | inputs | method | setting | sparsity | tiles skipped | FLOPs "
            "| blocks | scope | ms | kernel ms | × sdpa | of SGEMM | workspace MB |"
        )
        tables.append("|---|---|---|---|---|---:|---:|---:|---|---|---:|---:|---:|---:|---:|")
        tables += [_row(row) for row in chosen]
        tables.append("")
    return "\n".join(tables)


def _row(row: dict[str, Any]) -> str:
    # Blocks that are left out before q k^T, and tiles that are left after it, are not one number.
    in_loop = row["tile_sparsity"] is not None
    name = row["method"] + (", low bit" if row["low_bit"] else "")
    setting = re.sub(r"blocks=\S+ ?|keep_ratio=[\d.]+$", "", row["setting"])
    cells = [
        row["pass"],
        row["dtype"],
        row["inputs"],
        name,
        setting,
        f"{row['sparsity']:.1%}" if row["sparsity"] and not in_loop else "",
        f"{row['tile_sparsity']:.1%}" if in_loop else "",
        f"{row['flops'] / row['full_flops']:.1%}",
        row["blocks"] or "",
        row["scope"] or "",
        f"{row['ms']:.1f} ± {row['spread_ms']:.1f}",
        f"{row['ms_kernel']:.1f}" if row["ms_kernel"] else "",
        f"{row['ratio']:.2f}",
        f"{row['gflops'] / row['sgemm_gflops']:.0%}",
        f"{row['extra_bytes'] / 1e6:.1f}" if row["extra_bytes"] is not None else "",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    page = render(RESULTS.glob("*.jsonl"), (RESULTS / "demo").glob("*.json"))
    if "--check" in sys.argv[1:]:
        if PAGE.exists() and PAGE.read_text() == page:
            return 0
        print(f"{PAGE} is not what bench/results renders to. Run: python bench/report.py")
        return 1
    PAGE.write_text(page)
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
