# SPDX-License-Identifier: Apache-2.0
"""The section of docs/performance.md about the linear branch, from what bench/linear_ways.py
wrote."""

from __future__ import annotations

from typing import Any

HEAD = """\
### Ways to compute the linear branch

By `python bench/linear_ways.py`, commit {commit}, forward, ms.
*Complement* is ours: a matrix product of the map's complement and the states of key blocks, all of
the branch. Of two more ways a part is timed, making the states or phi(k) and the total left out: a
*gather*, by a Triton kernel, takes the states of critical blocks off the total; for *products*,
which multiplies these blocks anew beside the sparse branch, stands what twice the blocks cost that.
"""


def render_ways(report: dict[str, Any]) -> str:
    lines = [
        HEAD.format(**report),
        "| workload | sparsity | critical blocks | sparse branch | complement, all of it "
        "| gather, bf16 | gather, e4m3 | products |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {row['workload']} (H {row['H']}, N {row['N']}, D {row['D']}) "
            f"| {1.0 - row['keep_ratio']:.0%} | {row['critical_blocks']} | {row['sparse_ms']:.3f} "
            f"| {row['complement_ms']:.3f} | {row['gather_bf16_ms']:.3f} "
            f"| {row['gather_e4m3_ms']:.3f} | {row['products_ms']:.3f} |"
            for row in report["rows"]
        ),
    ]
    return "\n".join(lines) + "\n"
