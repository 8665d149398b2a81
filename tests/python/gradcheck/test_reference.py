# SPDX-License-Identifier: Apache-2.0
"""The reference against finite differences and against the dense oracle, in float64."""

import random

import oracle
import pytest
import torch
from cases import CASES, Case, make_inputs, random_case, route, run, run_oracle
from numeric import assert_close

import sparline
from sparline import reference
from sparline.methods import FEATURE_MAPS, LINEAR_SCOPES
from sparline.reference import Segment, SLAWeights

NUM_RANDOM_CASES = 120


def check_reference(case: Case) -> None:
    inputs = make_inputs(case, torch.float64)
    block_map = route(case, inputs, "reference")
    actual = run(case, inputs, "reference")
    exact = run_oracle(case, inputs, block_map)
    assert_close("o", actual.o, exact.o, 1e-11)
    assert_close("lse", actual.lse, exact.lse, 1e-11)
    for name, gradient in actual.gradients.items():
        assert_close(f"d_{name}", gradient, exact.gradients[name], 1e-10)


@pytest.mark.parametrize("name", CASES)
def test_reference_equals_oracle(name: str) -> None:
    check_reference(CASES[name])


@pytest.mark.parametrize("chunk", range(6))
def test_reference_equals_oracle_on_random_cases(chunk: int) -> None:
    rng = random.Random(f"reference {chunk}")
    for _ in range(NUM_RANDOM_CASES // 6):
        case = random_case(rng)
        try:
            check_reference(case)
        except AssertionError as error:
            pytest.fail(f"{error}\n{case}")


@pytest.mark.parametrize("scope", LINEAR_SCOPES)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_reference_gradcheck(feature_map: str, scope: str) -> None:
    """First derivatives in q, k, v and every weight: ragged, grouped, packed, protected."""
    generator = torch.Generator().manual_seed(1)
    heads, kv_heads, num_queries, num_keys, d = 2, 1, 9, 11, 4

    def randn(*shape: int) -> torch.Tensor:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        x = x.abs() + 0.1 if feature_map == "identity" else x
        return x.requires_grad_()

    q, k, v = (randn(1, h, n, d) for h, n in ((heads, 9), (kv_heads, 11), (kv_heads, 11)))
    proj = randn(d, d), randn(d)
    maps = randn(heads, d, d), randn(heads, d), randn(kv_heads, d, d), randn(kv_heads, d)
    learned = [*proj, *maps] if feature_map.startswith("hedgehog") else [*proj]
    query_segments = [Segment(0, 2, 0, True), Segment(2, 7, 0), Segment(7, num_queries, 1)]
    key_segments = [Segment(0, 3, 0, True), Segment(3, 8, 0), Segment(8, num_keys, 1)]
    block_class = torch.randint(-1, 2, (1, heads, 4, 4), generator=generator, dtype=torch.int8)
    block_class[:, 0, 1] = -1

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        weights = SLAWeights(*tensors[3:])
        o, _ = reference.attend(
            *tensors[:3],
            block_class,
            weights,
            query_segments,
            key_segments,
            block_q=3,
            block_k=3,
            feature_map=feature_map,
            linear_scope=scope,
            epsilon=1e-5 if scope == "all" else 0.0,
        )
        return o

    fast = scope != "marginal"  # one random direction instead of every element
    tensors = (q, k, v, *learned)
    assert torch.autograd.gradcheck(attend, tensors, atol=1e-7, rtol=1e-6, fast_mode=fast)


def test_reference_has_second_derivatives() -> None:
    q, k, v = (torch.randn(1, 1, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    method = sparline.SLA(keep_ratio=0.5, combine="sum")
    assert torch.autograd.gradgradcheck(
        lambda *x: sparline.attention(*x, method=method, backend="reference"), (q, k, v)
    )


def test_oracle_block_numbers() -> None:
    """The oracle itself, by hand: 10 tokens, blocks of 3, a sequence border at 4, a span at 5."""
    tokens = oracle.Tokens(10, 3, (0, 4, 10), ((5, 6),))
    assert tokens.block.tolist() == [0, 0, 0, 1, 2, 3, 4, 4, 4, 5]
    assert tokens.sequence.tolist() == [0] * 4 + [1] * 6
    assert tokens.protected.tolist() == [False] * 5 + [True] + [False] * 4
