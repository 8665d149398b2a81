# SPDX-License-Identifier: Apache-2.0
"""Laws that hold for every input, searched by hypothesis on every backend."""

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numeric import assert_relative, max_error
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import sparline
from sparline import SLA, Dense, SLAWeights
from sparline.methods import FEATURE_MAPS, LINEAR_SCOPES

BACKENDS = st.sampled_from(["reference", "cpu"])
LENGTHS = st.integers(1, 150)
HEAD_DIMS = st.sampled_from([4, 6, 16, 24, 64, 128])
BLOCK_ROWS = st.sampled_from([16, 20, 32, 64, 128])
SEEDS = st.integers(0, 1000)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def qkv(
    seed: int, num_queries: int, num_keys: int, d: int, heads: int = 2, batch: int = 1
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, heads, n, d, generator=generator)
        for n in (num_queries, num_keys, num_keys)
    ]


def close(actual: Tensor, expected: Tensor, ulps: float = 64.0) -> None:
    """Equal up to float32 rounding of unit-sized numbers."""
    tolerance = ulps * torch.finfo(torch.float32).eps * max(1.0, expected.abs().max().item())
    assert max_error(actual, expected) <= tolerance


@given(SEEDS, LENGTHS, LENGTHS, HEAD_DIMS, BLOCK_ROWS, BLOCK_ROWS, DTYPES, BACKENDS)
@example(0, 1, 1, 4, 16, 16, torch.float32, "cpu")
@example(0, 128, 128, 64, 128, 64, torch.float32, "cpu")
def test_keeping_everything_is_dense_softmax(
    seed: int,
    num_queries: int,
    num_keys: int,
    d: int,
    block_q: int,
    block_k: int,
    dtype: torch.dtype,
    backend: str,
) -> None:
    q, k, v = (x.to(dtype) for x in qkv(seed, num_queries, num_keys, d))
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double())
    plain = scaled_dot_product_attention(q, k, v)
    blocks = {"block_q": block_q, "block_k": block_k}
    for method in (
        Dense(**blocks),
        SLA(keep_ratio=1.0, combine="sparse", **blocks),
        SLA(keep_ratio=1.0, combine="sum", linear_scope="complement", **blocks),
    ):
        o = sparline.attention(q, k, v, method=method, backend=backend)
        assert_relative("o", o, exact, plain, dtype)


@given(SEEDS, LENGTHS, LENGTHS, HEAD_DIMS, BLOCK_ROWS, BACKENDS)
def test_keeping_nothing_is_linear_attention(
    seed: int, num_queries: int, num_keys: int, d: int, block: int, backend: str
) -> None:
    """All blocks marginal: o_s = 0, lse = -inf, and every scope is plain linear attention."""
    q, k, v = qkv(seed, num_queries, num_keys, d)
    phi_q, phi_k = q.double().softmax(-1), k.double().softmax(-1)
    expected = phi_q @ (phi_k.mT @ v.double()) / (phi_q @ phi_k.sum(2)[..., None])
    block_map = torch.zeros(1, 1, dtype=torch.int8)
    for scope in LINEAR_SCOPES:
        method = SLA(combine="sum", linear_scope=scope, epsilon=0.0, block_q=block, block_k=block)
        o, lse = sparline.attention(
            q, k, v, method=method, block_map=block_map, return_lse=True, backend=backend
        )
        close(o, expected)
        assert (lse == -torch.inf).all()


@given(SEEDS, LENGTHS, HEAD_DIMS, st.sampled_from(FEATURE_MAPS[:4]), BACKENDS)
def test_all_negligible_is_zero(
    seed: int, length: int, d: int, feature_map: str, backend: str
) -> None:
    """Nothing critical, nothing marginal: zeros, not NaN, and zero gradients."""
    q, k, v = (x.requires_grad_() for x in qkv(seed, length, length, d))
    method = SLA(combine="sum", feature_map=feature_map, block_q=32, block_k=32)
    block_map = torch.full((1, 1), -1, dtype=torch.int8)
    o = sparline.attention(q, k, v, method=method, block_map=block_map, backend=backend)
    assert (o == 0).all()
    o.sum().backward()
    assert all((x.grad == 0).all() for x in (q, k, v))


@given(SEEDS, st.integers(1, 80), BACKENDS)
def test_dead_relu_rows_follow_the_empty_rule(seed: int, length: int, backend: str) -> None:
    """phi(q) = 0: o_l = 0 and no gradient, and the projection's bias is still there."""
    q, k, v = (x.requires_grad_() for x in qkv(seed, length, length, 8))
    with torch.no_grad():
        q[:, :, ::2] = -q[:, :, ::2].abs()
    method = SLA(feature_map="relu", block_q=16, block_k=16)
    weights = SLAWeights(torch.ones(8, 8), torch.full((8,), 0.5))
    block_map = torch.zeros(1, 1, dtype=torch.int8)
    o = sparline.attention(
        q, k, v, method=method, weights=weights, block_map=block_map, backend=backend
    )
    assert (o[:, :, ::2] == 0.5).all()
    o.square().sum().backward()
    assert (q.grad[:, :, ::2] == 0).all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def any_method(draw: st.DrawFn) -> SLA:
    return SLA(
        keep_ratio=draw(st.sampled_from([0.1, 0.3, 0.6])),
        feature_map=draw(st.sampled_from(["softmax", "elu1", "relu"])),
        linear_scope=draw(st.sampled_from(LINEAR_SCOPES)),
        combine=draw(st.sampled_from(["sum", "sparse", "linear"])),
        block_q=draw(BLOCK_ROWS),
        block_k=draw(BLOCK_ROWS),
    )


class Call(dict[str, Any]):
    """Arguments of ``attention``; prints without the numbers in its tensors."""

    def __repr__(self) -> str:
        parts = {k: tuple(x.shape) if isinstance(x, Tensor) else x for k, x in self.items()}
        return repr(parts)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    q, k, v = qkv(draw(SEEDS), draw(LENGTHS), draw(LENGTHS), draw(HEAD_DIMS), heads=3, batch=2)
    return Call(q=q, k=k, v=v, method=any_method(draw), backend=draw(BACKENDS))


def attend(call: Call, **changes: Any) -> Tensor:
    arguments = {**call, **changes}
    q, k, v = (arguments.pop(name) for name in "qkv")
    o: Tensor = sparline.attention(q, k, v, **arguments)
    return o


def same(call: Call, actual: Tensor, expected: Tensor) -> None:
    """Bit for bit from our kernels; PyTorch's own products round by memory order."""
    if call["backend"] == "reference":
        close(actual, expected)
    else:
        assert torch.equal(actual, expected)


@given(calls(), st.permutations([0, 1, 2]))
def test_head_and_batch_permutations_commute(call: Call, heads: list[int]) -> None:
    o = attend(call)
    changed = attend(call, **{name: call[name][:, heads].flip(0) for name in "qkv"})
    same(call, changed, o[:, heads].flip(0))


@given(calls(), st.randoms(use_true_random=False))
def test_block_order_does_not_matter(call: Call, rng: Any) -> None:
    """Whole key blocks may be dealt in any order, with the map dealt alike."""
    block = call["method"].block_k
    q, k, v = (call[name] for name in "qkv")
    whole = max(1, k.shape[2] // block) * block
    k, v = k[:, :, :whole], v[:, :, :whole]
    num_blocks = -(-k.shape[2] // block)
    order = list(range(num_blocks))
    rng.shuffle(order)
    block_map = torch.randint(-1, 2, (2, 3, -(-q.shape[2] // call["method"].block_q), num_blocks))
    block_map = block_map.to(torch.int8)
    rows = [r for j in order for r in range(j * block, min((j + 1) * block, k.shape[2]))]
    o = attend(call, k=k, v=v, block_map=block_map)
    dealt = attend(call, k=k[:, :, rows], v=v[:, :, rows], block_map=block_map[..., order])
    close(dealt, o)


@given(calls())
def test_strided_equals_contiguous(call: Call) -> None:
    """Layout, slices of wider rows (with NaN between them) and broadcast batches change nothing."""
    o = attend(call)
    swapped = {name: call[name].transpose(1, 2).contiguous() for name in "qkv"}
    same(call, attend(call, **swapped, layout="bnhd").transpose(1, 2), o)
    sliced = {}
    for name in "qkv":
        x = call[name]
        wide = torch.full((*x.shape[:3], x.shape[3] + 5), float("nan"))
        wide[..., 3:-2] = x
        sliced[name] = wide[..., 3:-2]
    same(call, attend(call, **sliced), o)
    first = {name: call[name][:1].expand(2, -1, -1, -1) for name in "qkv"}
    same(call, attend(call, **first)[1], o[0])


@given(calls())
def test_fused_projection_needs_no_copy(call: Call) -> None:
    """q, k and v as slices of one tensor, as fused projections make them; gradients too."""
    q = call["q"]
    fused = torch.randn(2, q.shape[2], 3, 3, q.shape[3], requires_grad=True)
    q, k, v = fused.unbind(dim=2)
    o = attend(call, q=q, k=k, v=v, layout="bnhd")
    (gradient,) = torch.autograd.grad(o.square().sum(), fused)
    apart = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
    expected = attend(call, **dict(zip("qkv", apart, strict=True)))
    same(call, o.transpose(1, 2), expected)
    expected = torch.autograd.grad(expected.square().sum(), apart)
    for part, whole in zip(expected, gradient.unbind(dim=2), strict=True):
        same(call, part.transpose(1, 2), whole)


@given(calls())
def test_packing_equals_separate_calls(call: Call) -> None:
    """Sequences packed along the rows give what each gives alone."""
    n_q, n_k = call["q"].shape[2], call["k"].shape[2]
    cut_q, cut_k = n_q // 3, (n_k + 1) // 2
    packed = attend(call, cu_seqlens_q=[0, cut_q, n_q], cu_seqlens_k=[0, cut_k, n_k])
    parts = [(slice(0, cut_q), slice(0, cut_k)), (slice(cut_q, n_q), slice(cut_k, n_k))]
    for rows_q, rows_k in parts:
        q, k, v = call["q"][:, :, rows_q], call["k"][:, :, rows_k], call["v"][:, :, rows_k]
        if q.shape[2] and k.shape[2]:
            close(packed[:, :, rows_q], attend(call, q=q, k=k, v=v))


@given(calls(), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_protected_queries_are_dense(call: Call, a: float, b: float) -> None:
    n = call["q"].shape[2]
    begin, end = sorted((int(a * n), int(b * n)))
    o = attend(call, protected_q=[(begin, end)])
    dense = scaled_dot_product_attention(*(call[name].double() for name in "qkv"))
    if begin < end:
        close(o[:, :, begin:end], dense[:, :, begin:end])


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("scope", LINEAR_SCOPES)
def test_results_never_depend_on_threads(feature_map: str, scope: str) -> None:
    """Bit for bit equal with one and two threads, and from run to run: map, forward, backward."""
    method = SLA(
        keep_ratio=0.3,
        negligible_ratio=0.2,
        feature_map=feature_map,
        linear_scope=scope,
        block_q=32,
        block_k=16,
    )
    module = sparline.nn.SLA(16, 4, 2, method=method)
    torch.nn.init.normal_(module.proj_l.weight)
    q = torch.randn(2, 4, 150, 16)
    k, v = (torch.randn(2, 2, 170, 16) for _ in range(2))
    runs = []
    for num_threads in (1, 2, 2, 1):
        torch.set_num_threads(num_threads)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        block_map = sparline.route(*leaves[:2], method=method)
        o = module(*leaves)
        gradients = torch.autograd.grad(o.square().sum(), [*leaves, *module.parameters()])
        runs.append([block_map, o, *gradients])
    for other in runs[1:]:
        for ours, first in zip(other, runs[0], strict=True):
            assert torch.equal(ours.view(torch.uint8), first.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores(dtype: torch.dtype, backend: str) -> None:
    """Scores of +-1e4, equal keys and constant rows stay finite, forward and backward."""
    q, k, v = (x.to(dtype) for x in qkv(0, 70, 90, 16))
    q[:, :, :20] *= 100
    k[:, :, :20] *= 100
    k[:, :, 30:50] = k[:, :, 30:31]
    q[:, :, 50:] = 1.0
    for feature_map in ("softmax", "elu1", "relu"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        method = SLA(keep_ratio=0.4, combine="sum", feature_map=feature_map, block_q=16, block_k=16)
        o = sparline.attention(*leaves, method=method, backend=backend)
        o.sum().backward()
        assert o.isfinite().all()
        assert all(x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_numbers_stay_in_their_head(value: float, backend: str) -> None:
    """They may reach any output of their (batch, head), and no other; gradients alike."""
    q, k, v = qkv(0, 70, 90, 16, heads=2, batch=2)
    method = SLA(keep_ratio=0.4, combine="sum", block_q=16, block_k=16)

    def run(*tensors: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        o = sparline.attention(*leaves, method=method, backend=backend)
        o.sum().backward()
        return [o, *(x.grad for x in leaves)]

    clean = run(q, k, v)
    for n in range(3):
        tensors = [x.clone() for x in (q, k, v)]
        tensors[n][1, 0, 33, 2] = value
        for before, after in zip(clean, run(*tensors), strict=True):
            for b, h in ((0, 0), (0, 1), (1, 1)):
                assert torch.equal(before[b, h], after[b, h])


def test_poison_is_real() -> None:
    """Uninitialised memory holds NaN in these tests, so unwritten elements cannot hide."""
    assert torch.empty(7, 3).isnan().all()
    assert torch.empty_like(torch.zeros(2, 3)).isnan().all()
    assert (torch.empty(64, dtype=torch.uint8) == 255).all()
