# SPDX-License-Identifier: Apache-2.0
"""Takes operators apart by kernel: ``gpu.py --profile``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from clock import kernel_times
from suites import BLOCKS, Row

from sparline import SLA, SLA2, Dense, DynSparse, LowBit
from sparline.bench import Workload
from sparline.methods import Method

if TYPE_CHECKING:
    from gpu import Bench

#: What is taken apart with --profile.
PROFILED: dict[str, Method] = {
    "dense": Dense(),
    "sla keep 0.05": SLA.paper(keep_ratio=0.05, **BLOCKS),
    "sla1 keep 0.05": SLA.sla1(keep_ratio=0.05, **BLOCKS),
    "sla1 keep 0.03": SLA.sla1(keep_ratio=0.03, **BLOCKS),
    "sla2 keep 0.05": SLA2(keep_ratio=0.05, **BLOCKS),
    "sla2 keep 0.03 low-bit": SLA2(keep_ratio=0.03, low_bit=LowBit(), **BLOCKS),
    "dynsparse": DynSparse(log_threshold=-5.0),
}


def profile(bench: Bench, workload: Workload) -> Iterator[dict[str, Any]]:
    """Device time by kernel, of a forward and of a backward."""
    for label, method in PROFILED.items():
        for direction in ("fwd", "bwd"):
            if direction == "bwd" and method.low_bit is not None:
                continue
            row = Row("profile", workload, label, method, direction)
            sets = bench.inputs(row)
            operators, learned = bench.operator(row, sets[:1])
            leaves = [*sets[0], *learned]
            if direction == "fwd":
                with torch.no_grad():
                    kernels = kernel_times(partial(operators[0], *sets[0]))
            else:
                leaves = [x.detach().requires_grad_() for x in leaves]
                o = operators[0](*leaves[:3])
                d_o = torch.randn_like(o)
                run = partial(torch.autograd.grad, o, leaves[:3], d_o, retain_graph=True)
                kernels = kernel_times(run)
            told = bench.describe(row, sets)
            yield {
                **{key: told[key] for key in ("method", "pass", "workload", "B", "H", "N", "D")},
                **{key: told[key] for key in ("sparsity", "tile_sparsity", "blocks", "scope")},
                "combine": method.recipe.combine,
                "low_bit": method.low_bit is not None,
                "kernels": kernels,
                "total_us": round(sum(k["us"] for k in kernels), 2),
            }
