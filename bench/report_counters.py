# SPDX-License-Identifier: Apache-2.0
"""The section of docs/performance.md about hardware counters, from what bench/counters.py wrote."""

from __future__ import annotations

from typing import Any

HEAD = """\
### Hardware counters

By `python bench/counters.py` (Nsight Compute), commit {commit}, {workload}, forward. Shares are of
what the unit could do: tensor cores while their multiprocessor is active, L2 and device memory over
the kernel. *Waits* are the commonest reasons for which a warp does not issue, in shares of them
all.
"""


def render_counters(report: dict[str, Any]) -> str:
    lines = [
        HEAD.format(**report),
        "| call | kernel | µs | tensor cores | L2 | device memory | GB of device memory "
        "| GB from L2 | waits |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
        *("| " + " | ".join(cells(row)) + " |" for row in report["rows"]),
    ]
    return "\n".join(lines) + "\n"


def cells(row: dict[str, Any]) -> list[str]:
    def told(key: str, scale: float, digits: int, unit: str = "") -> str:
        return "" if row[key] is None else f"{row[key] * scale:.{digits}f}{unit}"

    return [
        row["case"],
        f"`{row['kernel']}`",
        told("us", 1.0, 0),
        *(told(key, 1.0, 0, " %") for key in ("tensor_pct", "l2_pct", "memory_pct")),
        told("memory_bytes", 1e-9, 2),
        told("l2_to_sm_bytes", 1e-9, 2),
        ", ".join(f"{name.replace('_', ' ')} {100 * x:.0f} %" for name, x in row["stalls"].items()),
    ]
