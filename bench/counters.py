# SPDX-License-Identifier: Apache-2.0
"""Hardware counters of Hopper's kernels, by Nsight Compute: how busy tensor cores, L2 and device
memory are, what crosses from L2 to the multiprocessors, and what warps wait for.

    python bench/counters.py [--only REGEX] [--out FOLDER]      needs ncu and leave to read counters

Each case is one call after warm-up, in a process of its own; ncu runs each kernel several times and
leaves the clocks as they are. Writes ``FOLDER``/<device>.counters.json, which bench/report.py
renders.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from clock import describe_machine, kernel_name, slug
from inputs import make_inputs
from suites import BLOCKS, workload_of

import sparline
from sparline import SLA, SLA2, Dense, DynSparse, Method, Weights
from sparline.bench import learned_weights

#: (words, method, inputs)
CASES: list[tuple[str, Method, str]] = [
    ("SLA, 90 %", SLA.paper(keep_ratio=0.10, **BLOCKS), "gaussian"),
    ("SLA, 97 %", SLA.paper(keep_ratio=0.03, **BLOCKS), "gaussian"),
    ("SLA2, 97 %", SLA2(keep_ratio=0.03, **BLOCKS), "gaussian"),
    ("dense", Dense(), "gaussian"),
    ("DynSparse, nothing skipped", DynSparse(log_threshold=-math.inf), "video"),
    ("DynSparse, −9", DynSparse(log_threshold=-9.0), "video"),
    ("DynSparse, −2", DynSparse(log_threshold=-2.0), "video"),
]
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats")
#: What is told of a kernel, and by which metrics: the first that there is.
METRICS: dict[str, tuple[str, ...]] = {
    "us": ("gpu__time_duration.sum",),
    "tensor_pct": (
        "sm__pipe_tensor_op_gmma_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    ),
    "l2_pct": ("lts__throughput.avg.pct_of_peak_sustained_elapsed",),
    "memory_pct": (
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    ),
    "memory_bytes": ("dram__bytes.sum",),
    "l2_to_sm_bytes": ("l1tex__m_xbar2l1tex_read_bytes.sum",),
}
ASKED = (
    "dram__bytes.sum",
    "l1tex__m_xbar2l1tex_read_bytes.sum",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
)
#: Warps of a scheduler that wait for a cause, over all instructions that it issues.
STALL = re.compile(r"smsp__average_warps_issue_stalled_(?!selected_)(\w+)_per_issue_active\.ratio")
NAMED_STALLS = 4
SCALES = {"": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3, "K": 1e3, "M": 1e6, "G": 1e9}


# One case ---------------------------------------------------------------------------------------


def attend_once(case: int, workload_name: str) -> None:
    """Between the marks is one call of the operator, its router included."""
    device, workload = torch.device("cuda"), workload_of(workload_name)
    _, method, inputs = CASES[case]
    host = learned_weights(method, workload.heads, workload.head_dim)
    weights = Weights(*(None if w is None else w.to(device) for w in host))
    q, k, v = make_inputs(workload, inputs, device, 0)
    run = partial(sparline.attention, q, k, v, method=method, weights=weights)
    with torch.no_grad():
        for _ in range(2):
            run()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        run()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def profile(case: int, workload: str) -> str:
    """What ncu prints, comma separated. Raises RuntimeError with its words where it fails."""
    command = ["ncu", "--profile-from-start", "off", "--clock-control", "none", "--csv"]
    command += ["--page", "raw", "--print-units", "base", "--kernel-name", "regex:sm90"]
    for section in SECTIONS:
        command += ["--section", section]
    command += ["--metrics", ",".join(ASKED), sys.executable, __file__]
    command += ["--workload", workload, "--case", str(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = done.stdout + done.stderr
    if done.returncode != 0 or "==ERROR==" in told or "No kernels were profiled" in told:
        raise RuntimeError(f"ncu: {told[-2000:]}")
    return done.stdout


# What ncu prints ----------------------------------------------------------------------------------


def kernels_of(text: str) -> list[dict[str, Any]]:
    """Of each launch the metrics above and its main stalls. The first line of the table names the
    columns, the second one their units."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    names, units, *rows = csv.reader(lines)
    return [
        read_kernel(dict(zip(names, zip(row, units, strict=True), strict=True))) for row in rows
    ]


def read_kernel(cells: dict[str, tuple[str, str]]) -> dict[str, Any]:
    def number(name: str) -> float:
        value, unit = cells[name]
        scale = 1.0
        for word in ("second", "byte"):  # base units, unless ncu prefers others
            if (found := re.match(rf"([numKMG]?){word}", unit)) is not None:
                scale = SCALES[found.group(1)]
        if (found := re.fullmatch(r"([num]?)s", unit)) is not None:
            scale = SCALES[found.group(1)]
        return float(value.replace(",", "")) * scale

    told: dict[str, Any] = {"kernel": kernel_name(cells["Kernel Name"][0])}
    for key, wanted in METRICS.items():
        name = next((n for n in wanted if n in cells and cells[n][0]), None)
        told[key] = None if name is None else number(name)
        told.setdefault("metrics", {})[key] = name
    if told["us"] is not None:
        told["us"] *= 1e6
    stalls = {
        found.group(1): number(name)
        for name in cells
        if (found := STALL.fullmatch(name)) and cells[name][0]
    }
    most = sorted(stalls.items(), key=lambda item: -item[1])[:NAMED_STALLS]
    total = sum(stalls.values())
    told["stalls"] = {name: round(value / total, 3) for name, value in most} if total else {}
    return told


# The run ----------------------------------------------------------------------------------------


def measure(case: int, workload: str, raw: Path | None) -> list[dict[str, Any]]:
    text = profile(case, workload)
    if raw is not None:
        raw.mkdir(parents=True, exist_ok=True)
        (raw / f"{case}.csv").write_text(text)
    return [{"case": CASES[case][0], **kernel} for kernel in kernels_of(text)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--workload", default="wan1.3b-480p")
    names = ", ".join(words for words, _, _ in CASES)
    add("--only", metavar="REGEX", help=f"of {names.replace('%', '%%')}")
    add("--commit", default=os.environ.get("SPARLINE_COMMIT"), help="where there is no git")
    add("--out", type=Path, default=Path(__file__).parent / "results")
    add("--raw", type=Path, help="also keep there what ncu prints")
    add("--case", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        attend_once(args.case, args.workload)
        return 0
    if shutil.which("ncu") is None or not torch.cuda.is_available():
        raise SystemExit("counters: needs a GPU, and Nsight Compute's ncu on the PATH.")

    machine = describe_machine(torch.device("cuda"), args.commit)
    chosen = [
        n for n, (words, _, _) in enumerate(CASES) if not args.only or re.search(args.only, words)
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{slug(machine)}.counters.json"
    rows: list[dict[str, Any]] = []
    for case in chosen:
        rows += measure(case, args.workload, args.raw)
        report = {**machine, "workload": args.workload, "rows": rows}
        path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        print(f"{CASES[case][0]}: {len(rows)} kernels so far, in {path}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
