# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels, forward and backward, against the float64 oracle by the relative rule.

``SPARLINE_TEST_SEED`` picks another set of random cases; ``SPARLINE_TEST_CASES`` how many.
"""

import os
import random

import pytest
import torch
from cases import CASES, check_case, random_case

NUM_RANDOM_CASES = int(os.environ.get("SPARLINE_TEST_CASES", "520"))
CHUNKS = 26


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_oracle(name: str) -> None:
    check_case(CASES[name], "cpu")


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_kernels_equal_oracle_on_random_cases(chunk: int) -> None:
    torch.set_num_threads(1 + chunk % 2)
    rng = random.Random(f"{os.environ.get('SPARLINE_TEST_SEED', '0')} kernels {chunk}")
    for _ in range(-(-NUM_RANDOM_CASES // CHUNKS)):
        case = random_case(rng)
        try:
            check_case(case, "cpu")
        except (AssertionError, RuntimeError) as error:
            pytest.fail(f"{error}\n{case}")
