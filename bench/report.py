# SPDX-License-Identifier: Apache-2.0
"""Renders docs/performance.md from bench/results/*.jsonl. No number in that page is typed by hand.

python bench/report.py [--check]      --check fails if the page is not what would be written
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
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
(`sparline.accounting.flops`). `kernel ms` is the time with the block map given. Before a row is
timed, its result is compared with the reference.
"""

KEY = ("workload", "pass", "dtype", "inputs", "method", "keep_ratio", "blocks", "scope")

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
        key = tuple(row[name] for name in KEY)
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
        and all(row[name] == other[name] for name in KEY if name != "dtype")
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
            "| pass | dtype | inputs | method | keep | blocks | scope | ms | kernel ms | × sdpa "
            "| of SGEMM | workspace MB |"
        )
        tables.append("|---|---|---|---|---:|---|---|---:|---:|---:|---:|---:|")
        tables += [_row(row) for row in chosen]
        tables.append("")
    return "\n".join(tables)


def _row(row: dict[str, Any]) -> str:
    is_sla = row["method"] == "sla"
    cells = [
        row["pass"],
        row["dtype"],
        row["inputs"],
        row["method"],
        f"{row['keep_ratio']:.0%}" if is_sla else "",
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
    results = ROOT / "bench" / "results"
    page = render(results.glob("*.jsonl"), (results / "demo").glob("*.json"))
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
