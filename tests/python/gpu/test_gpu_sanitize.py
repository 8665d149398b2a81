# SPDX-License-Identifier: Apache-2.0
"""A few small cases that launch every kernel, for compute-sanitizer, whose tools slow a kernel down
by a factor of tens to hundreds:

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1   # every tensor is an allocation of its own
    compute-sanitizer --tool memcheck --kernel-name kns=sparline --error-exitcode 9 \\
        python -m pytest -q -m gpu tests/python/gpu -k sanitize

and likewise with racecheck, synccheck and (without the filter by name) initcheck. racecheck takes
the votes of Hopper's skip kernels for races, words that warps store and poll: with the cases
"dynsparse" and "blasst" of the fast paths it ends in an error (docs/performance-log.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import cases
import pytest
import torch
from cases import CASES, Case, make_inputs
from harness import move, to_cpu

from sparline import BLASST, SLA, SLA2, Dense, DynSparse
from sparline.methods import Method

pytestmark = pytest.mark.gpu

NAMES = [
    "dense-packed",
    "sla-softmax-marginal",
    "sla-elu1-complement",
    "sla-relu-all",
    "sla-identity-marginal",
    "gqa-hedgehog",
    "packed-protected-hedgehog",
    "linear-marginal",
    "smooth-all",
    "padded",
    "one-token",
    "sla2-token-alpha",
    "sla2-packed-protected-soft",
    "sla2-softmax-hard",
    "top-p",
    "sparge",
    "dynsparse-diagonal_first",
    "blasst-gqa",
    "low-bit-sla2",
    "low-bit-dense-groups",
    "sla-cubes-packed",
    "vsa-text",
    "vmoba-2d-head_global",
]


def short_blocks(make: Callable[..., Method], head_dim: int) -> Case:
    method = make(keep_ratio=0.4, block_q=64, block_k=64)
    return Case(method, num_queries=290, num_keys=290, head_dim=head_dim, dtype="bfloat16")


#: The block shapes and head sizes of the fast paths, ragged.
FAST: dict[str, Case] = {
    "fast-dense-128": Case(Dense(), num_queries=300, num_keys=200, head_dim=128, dtype="bfloat16"),
    "fast-sla-64": Case(
        SLA.paper(keep_ratio=0.4, block_q=128, block_k=64),
        num_queries=290,
        num_keys=290,
        head_dim=64,
        dtype="float16",
    ),
    "fast-sla2-128": Case(
        SLA2(keep_ratio=0.4), num_queries=260, num_keys=260, head_dim=128, dtype="bfloat16"
    ),
    # Blocks of up to 64 rows.
    "fast-sparse-short-128": short_blocks(SLA.sparse_only, head_dim=128),
    "fast-sla-short-64": short_blocks(SLA.paper, head_dim=64),
    # The three kernels that skip: runs of 64 keys, tiles of two runs, groups of rows apart.
    "fast-dynsparse-128": Case(
        DynSparse(log_threshold=-1.0), num_queries=300, num_keys=330, head_dim=128, dtype="bfloat16"
    ),
    "fast-blasst-64": Case(
        BLASST(log_threshold=-1.0, block_k=128),
        num_queries=300,
        num_keys=330,
        head_dim=64,
        dtype="bfloat16",
    ),
    "fast-dynsparse-apart-128": Case(
        DynSparse(log_threshold=-1.0, decide_rows=64),
        num_queries=300,
        num_keys=330,
        head_dim=128,
        dtype="float16",
    ),
    "slow-sla-200": Case(
        SLA.sla1(keep_ratio=0.4), num_queries=100, num_keys=140, head_dim=200, dtype="bfloat16"
    ),
}


@pytest.mark.parametrize("name", [*NAMES, *FAST])
def test_sanitize(name: str, cuda: torch.device) -> None:
    """Runs, and is roughly what the CPU kernels give: the numerics have tests of their own."""
    found = FAST.get(name) or CASES[name]
    case = found if name in FAST else dataclasses.replace(found, dtype="bfloat16")
    host = make_inputs(case)
    actual = to_cpu(cases.run(case, move(host, cuda), None))
    torch.cuda.synchronize()
    expected = cases.run(case, host, "cpu")
    pairs = {"o": (actual.o, expected.o)}
    pairs |= {k: (g, expected.gradients[k]) for k, g in actual.gradients.items()}
    for what, (a, b) in pairs.items():
        assert a.isfinite().all(), what
        error = (a.double() - b.double()).norm().item()
        size = b.double().norm().item()
        assert error <= 0.3 * size + 0.02 * b.numel() ** 0.5, f"{what}: {error:.3g} of {size:.3g}"
