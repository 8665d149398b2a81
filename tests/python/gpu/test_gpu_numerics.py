# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, forward and backward, against the float64 oracle and the CPU kernels.

What fails can be repeated alone: python tests/python/gpu/harness.py NAME
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from harness import case_names, large_names, random_names
from pool import Pool, timed_run

pytestmark = pytest.mark.gpu

Tell = Callable[[list[str]], None]


def run_all(pool: Pool, names: list[str], title: str, tell: Tell) -> None:
    results, lines = timed_run(pool, names)
    tell([f"-- {title} --", *lines])
    failed = [r["name"] for r in results if not r["ok"]]
    assert not failed, f"{len(failed)} of {len(results)} failed, see {pool.out}\n" + "\n".join(
        lines
    )


def test_case_list(pool: Pool, tell: Tell) -> None:
    """The one list of cases, in both dtypes."""
    run_all(pool, case_names(), "case list", tell)


def test_random_configurations(pool: Pool, tell: Tell) -> None:
    count = int(os.environ.get("SPARLINE_TEST_CASES", "2000"))
    seed = os.environ.get("SPARLINE_TEST_SEED", "0")
    run_all(pool, random_names(count, seed), f"random configurations, seed {seed}", tell)


def test_large_configurations(pool: Pool, tell: Tell) -> None:
    """2 000 to 6 000 tokens in the published block shapes, where the fast paths run."""
    run_all(pool, large_names(), "large configurations", tell)
