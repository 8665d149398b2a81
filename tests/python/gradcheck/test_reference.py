# SPDX-License-Identifier: Apache-2.0
"""The reference against finite differences and against the dense oracle, in float64."""

import random
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from cases import CASES, Case, make_inputs, random_case, route, run, run_oracle
from numeric import assert_close
from torch import Tensor

import sparline
from sparline import reference
from sparline.methods import FEATURE_MAPS, LINEAR_SCOPES, LowBit, Recipe, Skip
from sparline.reference import Segment, Weights

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


# Two sequences, a protected span in front of each axis; blocks of 3 rows, ragged; two query heads
# share a key/value head.
NUM_QUERIES, NUM_KEYS, HEADS, KV_HEADS, HEAD_DIM, BLOCK = 9, 11, 2, 1, 4, 3
QUERY_SEGMENTS = [Segment(0, 2, 0, True), Segment(2, 7, 0), Segment(7, NUM_QUERIES, 1)]
KEY_SEGMENTS = [Segment(0, 3, 0, True), Segment(3, 8, 0), Segment(8, NUM_KEYS, 1)]
MAP_SHAPE = (1, HEADS, 4, 4)
QUERY_BLOCKS = reference.make_blocks(QUERY_SEGMENTS, NUM_QUERIES, BLOCK)
KEY_BLOCKS = reference.make_blocks(KEY_SEGMENTS, NUM_KEYS, BLOCK)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def make_qkv() -> tuple[Tensor, Tensor, Tensor]:
    shape_k = (1, KV_HEADS, NUM_KEYS, HEAD_DIM)
    return randn(1, HEADS, NUM_QUERIES, HEAD_DIM), randn(*shape_k), randn(*shape_k)


def random_classes() -> Tensor:
    """Classes in which one row has neither a critical nor a marginal block."""
    block_class = torch.randint(-1, 2, MAP_SHAPE, dtype=torch.int8)
    block_class[:, 0, 1] = -1
    return block_class


def random_bits(groups: int) -> Tensor:
    return torch.randint(0, 256, (1, HEADS, 4 * groups, 1), dtype=torch.uint8)


def recipe(**parts: Any) -> Recipe:
    return Recipe(BLOCK, BLOCK, **parts)


def attend(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """``reference.attend`` in the segments above."""
    segments = {"query_segments": QUERY_SEGMENTS, "key_segments": KEY_SEGMENTS}
    return reference.attend(*args, **segments, **kwargs)


def check_gradients(function: Callable[..., Tensor], *tensors: Tensor, fast: bool = False) -> None:
    """By finite differences; ``fast`` takes one random direction instead of every element."""
    tensors = tuple(x.detach().clone().requires_grad_() for x in tensors)
    assert torch.autograd.gradcheck(function, tensors, atol=1e-7, rtol=1e-6, fast_mode=fast)


@pytest.mark.parametrize("scope", LINEAR_SCOPES)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_gradients_in_qkv_and_weights(feature_map: str, scope: str) -> None:
    qkv = make_qkv()
    if feature_map == "identity":
        qkv = tuple(x.abs() + 0.1 for x in qkv)  # keeps its denominator positive
    learned = [randn(HEAD_DIM, HEAD_DIM), randn(HEAD_DIM)]
    if feature_map.startswith("hedgehog"):
        for heads in (HEADS, KV_HEADS):
            learned += [randn(heads, HEAD_DIM, HEAD_DIM), randn(heads, HEAD_DIM)]
    parts = recipe(
        combine="projection",
        feature_map=feature_map,
        linear_scope=scope,
        epsilon=1e-5 if scope == "all" else 0.0,
    )
    block_class = random_classes()

    def o(*tensors: Tensor) -> Tensor:
        return attend(*tensors[:3], parts, block_class, Weights(*tensors[3:]))[0]

    check_gradients(o, *qkv, *learned, fast=scope != "marginal")


def test_gradients_of_the_blend() -> None:
    block_class = torch.zeros(MAP_SHAPE, dtype=torch.int8)
    block_class[:, 0, 3] = block_class[:, 1, 2] = 1  # all critical: nothing to blend with
    parts = recipe(combine="blend")

    def o(q: Tensor, k: Tensor, v: Tensor, alpha_logit: Tensor) -> Tensor:
        return attend(q, k, v, parts, block_class, Weights(alpha_logit=alpha_logit))[0]

    qkv, alpha_logit = make_qkv(), randn(1, HEADS, NUM_QUERIES).requires_grad_()
    check_gradients(o, *qkv, alpha_logit)
    (d_alpha,) = torch.autograd.grad(o(*qkv, alpha_logit).sum(), alpha_logit)
    block = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3])
    is_constant = torch.stack([(block == 0) | (block == 3), (block == 0) | (block == 2)])
    assert torch.equal(d_alpha[0] == 0, is_constant)


@pytest.mark.parametrize("combine", ["sparse", "sum", "blend"])
def test_gradients_of_a_soft_map(combine: str) -> None:
    """Interior values, and tiles at exactly 0 and 1, which have a gradient as well."""
    soft_map = torch.rand(MAP_SHAPE, dtype=torch.float64)
    soft_map[:, 0, 1, 1:3] = torch.tensor([0.0, 1.0])
    soft_map[:, 1, 2, 2] = 0.0
    parts = recipe(combine=combine)

    def o(q: Tensor, k: Tensor, v: Tensor, m: Tensor, alpha_logit: Tensor) -> Tensor:
        return attend(q, k, v, parts, m, Weights(alpha_logit=alpha_logit))[0]

    alpha_logit = randn(1, HEADS, NUM_QUERIES)
    qkv = make_qkv()
    if combine == "blend":
        check_gradients(o, *qkv, soft_map, alpha_logit)
    else:
        check_gradients(lambda *x: o(*x, alpha_logit), *qkv, soft_map, fast=True)
    leaf = soft_map.clone().requires_grad_()
    (d_m,) = torch.autograd.grad(o(*qkv, leaf, alpha_logit).square().sum(), leaf)
    is_free = torch.zeros(4, 4, dtype=torch.bool)
    is_free[1:3, 1:3] = True  # the rest is protected or of another sequence
    is_free[3, 3] = True
    # All keys of the second sequence lie in one block: its weight cancels in the sparse branch.
    has_gradient = (d_m.abs() > 1e-12).any(dim=1)[0]
    assert torch.equal(has_gradient[:3], is_free[:3])
    assert not has_gradient[3, :3].any()


def test_a_soft_map_of_zeros_and_ones_is_a_class_map() -> None:
    qkv, block_class = make_qkv(), random_classes()
    weights = Weights(alpha_logit=randn(1, HEADS, NUM_QUERIES))
    hard = attend(*qkv, recipe(combine="blend"), block_class, weights)
    soft = attend(*qkv, recipe(combine="blend"), (block_class == 1).double(), weights)
    assert torch.equal(hard[0], soft[0])
    assert torch.equal(hard[1], soft[1])


def test_a_row_without_weight_has_no_gradient() -> None:
    """o_s = 0 and lse = -inf, in a sequence of its own without protected keys."""
    soft_map = torch.rand(MAP_SHAPE, dtype=torch.float64)
    soft_map[:, :, 3] = 0.0
    leaves = [x.requires_grad_() for x in (*make_qkv(), soft_map)]
    o, lse, _, _ = attend(*leaves[:3], recipe(), leaves[3])
    assert not o[:, :, 7:].any()
    assert torch.equal(lse[:, :, 7:], torch.full_like(lse[:, :, 7:], -torch.inf))
    d_q, _, _, d_m = torch.autograd.grad(o.sum(), leaves)
    assert not d_q[:, :, 7:].any()
    assert not d_m[:, :, 3].any()


@pytest.mark.parametrize("combine", ["sparse", "blend"])
def test_gradients_through_smoothed_keys(combine: str) -> None:
    block_class, parts = random_classes(), recipe(combine=combine, smooth_k=True)
    weights = Weights(alpha_logit=randn(1, HEADS, NUM_QUERIES))
    check_gradients(lambda *x: attend(*x, parts, block_class, weights)[0], *make_qkv())


def test_gradients_under_tile_bits() -> None:
    block_class, bits = random_classes(), random_bits(groups=2)
    check_gradients(
        lambda *x: attend(*x, recipe(), block_class, tile_bits=bits, bit_rows=2)[0], *make_qkv()
    )


@pytest.mark.parametrize("skip_reference", ["running_max", "kept_lse"])
def test_gradients_of_kept_tiles(skip_reference: str) -> None:
    """Skipping differentiates as the same call under its own kept_bits."""
    qkv = make_qkv()
    parts = recipe(skip=Skip(skip_reference, -0.3, rows=2))
    tile_order = torch.tensor([[3, 1, 2, 0]]).expand(4, -1)
    o, lse, kept_bits, row_votes = attend(*qkv, parts, tile_order=tile_order)
    assert kept_bits is not None
    assert row_votes is not None
    assert row_votes.sum() > 0
    check_gradients(lambda *x: attend(*x, parts, tile_order=tile_order)[0], *qkv, fast=True)
    replayed = attend(*qkv, recipe(), tile_bits=kept_bits, bit_rows=2)
    assert torch.equal(o, replayed[0])
    assert torch.equal(lse, replayed[1])
    dense = attend(*qkv, recipe())
    assert not torch.equal(o, dense[0])


def test_gradients_in_a_token_order() -> None:
    query_order, key_order = torch.randperm(NUM_QUERIES), torch.randperm(NUM_KEYS)
    block_class, parts = random_classes(), recipe(combine="blend", smooth_k=True)

    def run(q: Tensor, k: Tensor, v: Tensor, alpha_logit: Tensor, **orders: Tensor) -> Any:
        return attend(q, k, v, parts, block_class, Weights(alpha_logit=alpha_logit), **orders)[:2]

    qkv, alpha_logit = make_qkv(), randn(1, HEADS, NUM_QUERIES)
    orders = {"query_order": query_order.int(), "key_order": key_order.int()}
    check_gradients(lambda *x: run(*x, **orders)[0], *qkv, alpha_logit, fast=True)
    o, lse = run(*qkv, alpha_logit, **orders)
    sorted_q, sorted_kv = qkv[0][:, :, query_order], (x[:, :, key_order] for x in qkv[1:])
    by_position = run(sorted_q, *sorted_kv, alpha_logit[:, :, query_order])
    assert torch.equal(o[:, :, query_order], by_position[0])
    assert torch.equal(lse[:, :, query_order], by_position[1])


def test_gradients_of_the_learned_router() -> None:
    """q and k through pooling, the two matrices and SoftTop-k to both branches of the operator."""
    parts = recipe(combine="blend", smooth_k=True)
    weights = Weights(alpha_logit=randn(1, HEADS, NUM_QUERIES))
    same = torch.tensor([[a.sequence == b.sequence for b in KEY_BLOCKS] for a in QUERY_BLOCKS])
    is_free = same & ~torch.tensor([block.is_protected for block in KEY_BLOCKS])
    kappa = torch.tensor([1.3, 1.3, 0.7, 0.5])  # the last row has one block to choose from

    def o(q: Tensor, k: Tensor, v: Tensor, proj_q: Tensor, proj_k: Tensor) -> Tensor:
        u = reference.pool(q, QUERY_SEGMENTS, BLOCK) @ proj_q.mT
        w = reference.pool(k, KEY_SEGMENTS, BLOCK) @ proj_k.mT
        scores = (u @ w.mT).masked_fill(~is_free, -torch.inf)
        soft_map = reference.soft_top_k(scores, kappa, temperature=0.5)
        return attend(q, k, v, parts, soft_map, weights)[0]

    matrices = randn(HEAD_DIM, HEAD_DIM), randn(HEADS, HEAD_DIM, HEAD_DIM)
    check_gradients(o, *make_qkv(), *matrices, fast=True)


def test_gradients_of_soft_top_k() -> None:
    scores = randn(2, 3, 7)
    scores[0, 0, 2:4] = -torch.inf
    kappa = torch.tensor([[2.5, 0.4, 6.9], [1.0, 7.0, 9.0]])
    inside = scores.clone().requires_grad_()
    m = reference.soft_top_k(inside, kappa, 0.2)
    assert_close("sum", m.sum(dim=-1), kappa.double().clamp(max=7), 1e-12)
    assert torch.equal(m[0, 0, 2:4], torch.zeros(2, dtype=torch.float64))
    (d_scores,) = torch.autograd.grad((m * randn(7)).sum(), inside)
    assert d_scores[1, 1:].abs().max() == 0  # all blocks are in
    assert d_scores.sum(dim=-1).abs().max() < 1e-12

    for soft_top_k in (
        lambda x: reference.soft_top_k(x, kappa, 0.2),
        lambda x: reference.soft_top_k(x, 1.7, 1.0),
    ):
        check_gradients(soft_top_k, randn(2, 3, 7))
    leaf = randn(2, 7).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: reference.soft_top_k(x, 1.7, 1.0), leaf)


def test_gradients_of_pooling() -> None:
    order = torch.randperm(NUM_KEYS)
    x = randn(1, KV_HEADS, NUM_KEYS, HEAD_DIM)
    check_gradients(lambda x: reference.pool(x, KEY_SEGMENTS, BLOCK, order), x)


@pytest.mark.parametrize("smooth_k", [False, True])
@pytest.mark.parametrize("recompute_lse", [False, True])
def test_low_bit_backward(recompute_lse: bool, smooth_k: bool) -> None:
    """The published procedure: dense formulas on unquantised q, k, v, with the forward's o and lse;
    no gradient through the mean key."""
    low_bit = LowBit(recompute_lse=recompute_lse)
    q, k, v = (x.requires_grad_() for x in make_qkv())
    bits = random_bits(groups=2)
    parts = recipe(low_bit=low_bit, smooth_k=smooth_k)
    o, lse, _, _ = attend(q, k, v, parts, tile_bits=bits, bit_rows=2)
    exact = attend(q, k, v, recipe(smooth_k=smooth_k), tile_bits=bits, bit_rows=2)
    error = ((o - exact[0]).norm() / exact[0].norm()).item()
    assert 1e-4 < error < 0.1
    d_o = randn(*o.shape)
    d_q, d_k, d_v = torch.autograd.grad(o, (q, k, v), d_o)

    with torch.no_grad():
        scale = HEAD_DIM**-0.5
        sequence = torch.tensor([0] * 8 + [1] * 3)
        means = torch.stack([k[0, 0, sequence == s].mean(dim=0) for s in (0, 1)])
        keys = k[0, 0] - means[sequence] * smooth_k  # (N_k,D)
        values = v[0, 0]
        expected = [torch.zeros_like(x) for x in (q, k, v)]
        for h in range(HEADS):
            for i, block in enumerate(QUERY_BLOCKS):
                for r in range(block.begin, block.end):
                    byte = int(bits[0, h, 2 * i + (r - block.begin) // 2, 0])
                    columns = [
                        c
                        for j, b in enumerate(KEY_BLOCKS)
                        for c in range(b.begin, b.end)
                        if b.sequence == block.sequence
                        and (b.is_protected or block.is_protected or byte >> j & 1)
                    ]
                    s = scale * keys[columns] @ q[0, h, r]
                    row_lse = s.logsumexp(dim=0) if recompute_lse else lse[0, h, r]
                    p = (s - row_lse).exp()
                    d_p = values[columns] @ d_o[0, h, r]
                    d_s = p * (d_p - d_o[0, h, r] @ o[0, h, r])
                    expected[0][0, h, r] = scale * d_s @ keys[columns]
                    expected[1][0, 0, columns] += scale * d_s[:, None] * q[0, h, r]
                    expected[2][0, 0, columns] += p[:, None] * d_o[0, h, r]
    for name, actual, wanted in zip("qkv", (d_q, d_k, d_v), expected, strict=True):
        assert_close(f"d_{name}", actual, wanted, 1e-12)


def test_low_bit_leaves_the_linear_branch_alone() -> None:
    qkv = make_qkv()
    block_class = random_classes()
    options = {"combine": "sum", "linear_scope": "marginal"}
    exact, low = (
        [
            attend(*qkv, recipe(low_bit=low_bit, **parts), block_class)[0]
            for parts in (options, {"combine": "sparse"})
        ]
        for low_bit in (None, LowBit())
    )
    assert_close("o_l", low[0] - low[1], exact[0] - exact[1], 1e-14)


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
