# SPDX-License-Identifier: Apache-2.0
"""Laws that hold for every input, searched by hypothesis on every backend."""

import dataclasses
import math
from typing import Any

import oracle
import pytest
import torch
from cases import CASES, make_inputs, run
from hypothesis import assume, example, given
from hypothesis import strategies as st
from numeric import assert_relative, max_error
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import sparline
from sparline import BLASST, SLA, SLA2, VSA, Dense, DynSparse, Grid, LowBit, VMoBA, Weights
from sparline.methods import FEATURE_MAPS, LINEAR_SCOPES, TILE_ORDERS, TOKEN_ORDERS, Method

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
        SLA.top_p(keep_mass=1.0, **blocks),
        SLA.hybrid(keep_ratio=1.0, **blocks),
        SLA.sparge(min_similarity=1.0, **blocks),
        SLA2(keep_ratio=1.0, **blocks),
        SLA2(keep_ratio=1.0, router_mode="soft", **blocks),
        DynSparse(log_threshold=-math.inf, **blocks),
        BLASST(log_threshold=-math.inf, tile_order="reverse", **blocks),
    ):
        o = sparline.attention(q, k, v, method=method, backend=backend)
        assert_relative("o", o, exact, plain, dtype)


GRIDS = st.builds(
    Grid,
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([0, 0, 3, 17]),
    st.sampled_from([0, 0, 5]),
)
BOXES = st.tuples(*[st.integers(1, 4)] * 3)


@given(SEEDS, GRIDS, BOXES, HEAD_DIMS, DTYPES, BACKENDS)
def test_keeping_everything_is_dense_in_every_token_order(
    seed: int, grid: Grid, box: tuple[int, int, int], d: int, dtype: torch.dtype, backend: str
) -> None:
    q, k, v = (x.to(dtype) for x in qkv(seed, grid.length, grid.length, d))
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double())
    plain = scaled_dot_product_attention(q, k, v)
    small: dict[str, Any] = {"block_q": 16, "block_k": 16}
    chunks = {"frames_1d": box[0], "window_2d": box[1:], "box_3d": box}
    zero = torch.zeros_like(q)
    calls: list[tuple[Method, dict[str, Any]]] = [
        *((Dense(token_order=order, cube=box, **small), {}) for order in TOKEN_ORDERS),
        (SLA2(keep_ratio=1.0, token_order="cubes", cube=box, **small), {}),
        (VSA(keep_ratio=1.0, cube=(2, 4, 4)), {"gate_coarse": zero}),
        *((VMoBA(partition=p, num_chunks=99, **chunks, **small), {}) for p in ("1d", "2d", "3d")),
    ]
    for method, options in calls:
        o = sparline.attention(q, k, v, method=method, grid=grid, backend=backend, **options)
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
    weights = Weights(torch.ones(8, 8), torch.full((8,), 0.5))
    block_map = torch.zeros(1, 1, dtype=torch.int8)
    o = sparline.attention(
        q, k, v, method=method, weights=weights, block_map=block_map, backend=backend
    )
    assert (o[:, :, ::2] == 0.5).all()
    o.square().sum().backward()
    assert (q.grad[:, :, ::2] == 0).all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


COMBINES = ["sum", "sparse", "linear"]
KINDS = ("dense", "sla", "sla2", "dynsparse", "blasst", "vsa", "vmoba")


def any_method(draw: st.DrawFn, kinds: tuple[str, ...], low_bit: bool, ordered: bool) -> Method:
    """Sums over all heads (VMoBA's ``overall``) are left out: no law below would hold of them."""
    kind = draw(st.sampled_from(kinds))
    shared: dict[str, Any] = {}
    if low_bit:
        shared["low_bit"] = draw(st.sampled_from([None, None, LowBit(), LowBit(q_rows=16)]))
    keep_ratio = draw(st.sampled_from([0.1, 0.3, 0.6]))
    if kind == "vsa":
        return VSA(keep_ratio=keep_ratio, cube=(2, 3, 4), **shared)
    shared |= {"block_q": draw(BLOCK_ROWS), "block_k": draw(BLOCK_ROWS)}
    if kind == "vmoba":
        return VMoBA(
            partition=draw(st.sampled_from(["1d", "2d", "3d"])),
            mode=draw(st.sampled_from(["query_head", "head_global"])),
            num_chunks=draw(st.sampled_from([None, 2])),
            pool_queries=draw(st.booleans()),
            frames_1d=1,
            window_2d=(2, 3),
            box_3d=(2, 2, 3),
            **shared,
        )
    if ordered:
        shared |= {"token_order": draw(st.sampled_from(["raster", "cubes", "hilbert"]))}
        shared |= {"cube": (2, 3, 2)}
    if kind == "dense":
        return Dense(**shared)
    if kind in ("dynsparse", "blasst"):
        cls, scale = (DynSparse, 4.0) if kind == "dynsparse" else (BLASST, 1.0)
        return cls(
            log_threshold=-scale * draw(st.sampled_from([0.3, 0.5, 0.8])),
            decide_rows=draw(st.sampled_from([0, 16])),
            tile_order=draw(st.sampled_from(TILE_ORDERS)),
            **shared,
        )
    shared |= {
        "keep_ratio": keep_ratio,
        "feature_map": draw(st.sampled_from(["softmax", "elu1", "relu"])),
    }
    if kind == "sla2":
        return SLA2(alpha_shape="head", **shared)
    return SLA(
        linear_scope=draw(st.sampled_from(LINEAR_SCOPES)),
        combine=draw(st.sampled_from(["sum", "sparse"] if shared.get("low_bit") else COMBINES)),
        selection=draw(st.sampled_from(["top_k", "top_k", "top_p", "union"])),
        **shared,
    )


class Call(dict[str, Any]):
    """Arguments of ``attention``; prints without the numbers in its tensors."""

    def __repr__(self) -> str:
        parts = {k: tuple(x.shape) if isinstance(x, Tensor) else x for k, x in self.items()}
        return repr(parts)


@st.composite
def calls(
    draw: st.DrawFn,
    kinds: tuple[str, ...] = KINDS,
    low_bit: bool = True,
    ordered: bool = True,
) -> Call:
    """Any method on batch 2 and 3 heads; on a grid where the method needs one."""
    method = any_method(draw, kinds, low_bit, ordered)
    num_queries, num_keys, d = draw(LENGTHS), draw(LENGTHS), draw(HEAD_DIMS)
    call = Call(method=method, backend=draw(BACKENDS))
    if method.recipe.needs_grid:
        call["grid"] = draw(GRIDS)
        num_queries = num_keys = call["grid"].length
    seed = draw(SEEDS)
    call.update(zip("qkv", qkv(seed, num_queries, num_keys, d, heads=3, batch=2), strict=True))
    if isinstance(method, SLA2):
        generator = torch.Generator().manual_seed(seed)
        router_q, router_k = (torch.randn(d, d, generator=generator) for _ in range(2))
        call["weights"] = Weights(
            alpha_logit=torch.full((3, 1), 0.4), router_q=router_q, router_k=router_k
        )
    return call


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


@given(calls(("sla", "sla2"), low_bit=False, ordered=False), st.randoms(use_true_random=False))
def test_block_order_does_not_matter(call: Call, rng: Any) -> None:
    """Whole key blocks may be dealt in any order, with the map dealt alike."""
    assume(call["method"].recipe.router is not None)
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


@given(calls(tuple(kind for kind in KINDS if kind not in ("vsa", "vmoba")), ordered=False))
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


def _in_loop(call: Call) -> bool:
    return isinstance(call["method"], (DynSparse, BLASST))


@given(calls(("vsa", "vmoba", "dense", "sla")), GRIDS, SEEDS)
def test_packing_grids_equals_separate_calls(call: Call, other: Grid, seed: int) -> None:
    """Each sequence with the grid of its own, cubes, chunks and text included."""
    assume("grid" in call)
    first = call["grid"]
    d = call["q"].shape[3]
    more = dict(zip("qkv", qkv(seed, other.length, other.length, d, 3, 2), strict=True))
    both = {name: torch.cat([call[name], more[name]], dim=2) for name in "qkv"}
    ends = [0, first.length, first.length + other.length]
    packed = attend(call, **both, grid=[first, other], cu_seqlens_q=ends)
    close(packed[:, :, : ends[1]], attend(call))
    close(packed[:, :, ends[1] :], attend(call, **more, grid=other))


@given(calls(low_bit=False), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_protected_queries_are_dense(call: Call, a: float, b: float) -> None:
    """Any span of rows; on a grid the text in front, since spans count positions."""
    n = call["q"].shape[2]
    begin, end = sorted((int(a * n), int(b * n)))
    if "grid" in call:
        begin, end = 0, call["grid"].prefix
    o = attend(call, protected_q=[(begin, end)])
    dense = scaled_dot_product_attention(*(call[name].double() for name in "qkv"))
    if begin < end:
        close(o[:, :, begin:end], dense[:, :, begin:end])


# Token orders -----------------------------------------------------------------------------------


@given(GRIDS, BOXES, st.sampled_from(["cubes", "hilbert"]))
def test_orders_are_permutations(grid: Grid, box: tuple[int, int, int], name: str) -> None:
    shape = grid[:3]
    if name == "cubes":
        order, sizes = sparline.tokens.cube_order(shape, box)
        assert order.tolist() == sorted(
            range(math.prod(shape)), key=lambda n: oracle.places([(*shape, 0, 0)], box)[n]
        )
        assert sum(sizes) == math.prod(shape)
    else:
        order = sparline.tokens.hilbert_order(shape)
    assert sorted(order.tolist()) == list(range(math.prod(shape)))


@pytest.mark.parametrize("side", [1, 2, 4, 8])
def test_hilbert_takes_unit_steps(side: int) -> None:
    """On a cube whose side is a power of two the curve never leaps."""
    order = torch.from_numpy(sparline.tokens.hilbert_order((side, side, side)))
    t, h, w = order // side**2, order // side % side, order % side
    steps = sum(x.diff().abs() for x in (t, h, w))
    assert (steps == 1).all()


@given(
    calls(("dense", "sla", "sla2", "dynsparse", "blasst")), GRIDS, st.sampled_from(TOKEN_ORDERS[1:])
)
def test_token_order_is_a_permutation_of_rows(call: Call, grid: Grid, name: str) -> None:
    """Tokens dealt out by hand, attended as they lie, and put back: the same, gradients too."""
    d = call["q"].shape[3]
    tensors = dict(zip("qkv", qkv(1, grid.length, grid.length, d, 3, 2), strict=True))
    method, plain = (
        dataclasses.replace(call["method"], token_order=order, cube=(2, 2, 3))
        for order in (name, "raster")
    )
    if name == "cubes":
        order, _ = sparline.tokens.cube_order(grid[:3], (2, 2, 3))
    else:
        order = sparline.tokens.hilbert_order(grid[:3])
    rows = torch.arange(grid.length)
    rows[grid.prefix : grid.prefix + len(order)] = grid.prefix + torch.from_numpy(order)
    back = rows.argsort()
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    o = attend(call, **leaves, method=method, grid=grid)
    by_hand = attend(
        call, **{name: x[:, :, rows] for name, x in leaves.items()}, method=plain, grid=None
    )[:, :, back]
    same(call, o, by_hand)
    if method.low_bit is None:
        pair = (torch.autograd.grad(x.sum(), leaves.values()) for x in (o, by_hand))
        for ours, theirs in zip(*pair, strict=True):
            close(ours, theirs, ulps=256.0)


# Soft maps and learned routers ------------------------------------------------------------------


def soft_top_k(scores: Tensor, kappa: Tensor, temperature: float, backend: str) -> Tensor:
    if backend == "reference":
        return sparline.reference.soft_top_k(scores, kappa, temperature)
    m: Tensor = torch.ops.sparline.soft_top_k(scores, kappa.contiguous(), temperature)
    return m


@given(SEEDS, st.integers(1, 90), st.floats(0.02, 1.2), st.sampled_from([0.03, 0.1, 1.0]), BACKENDS)
@example(0, 1, 0.5, 0.1, "cpu")
def test_soft_top_k(seed: int, total: int, share: float, temperature: float, backend: str) -> None:
    """Sums to kappa; rises with the score and with kappa; knows differences only; its gradient is
    that of the implicit function."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, 2, 3, total, generator=generator)
    scores[..., total // 2] = -math.inf if total > 3 else 0.0
    listed = (scores > -math.inf).sum(dim=-1)
    kappa = (share * total) * torch.linspace(0.8, 1.0, 6).reshape(1, 2, 3)
    leaf = scores.clone().requires_grad_()
    m = soft_top_k(leaf, kappa, temperature, backend)
    target = torch.minimum(kappa, listed.float())
    assert ((m.sum(dim=-1) - target).abs() <= 3e-5 * target).all()
    assert (m[scores == -math.inf] == 0).all()
    assert (m[kappa >= listed][scores[kappa >= listed] > -math.inf] == 1).all()
    sorted_m = m.gather(-1, scores.argsort(dim=-1))
    assert (sorted_m.diff(dim=-1) >= -1e-6).all()
    assert (soft_top_k(scores, 1.1 * kappa, temperature, backend) >= m - 1e-4).all()
    assert max_error(soft_top_k(scores + 3.0, kappa, temperature, backend), m) <= 1e-4
    d_m = torch.randn(m.shape, generator=generator)
    (d_scores,) = torch.autograd.grad(m, leaf, d_m)
    for place in [(0, h, i) for h in range(2) for i in range(3)]:
        row = scores[place] > -math.inf
        exact = scores[place][row].double().requires_grad_()
        soft = oracle.soft_top_k(exact, kappa[place].item(), temperature)
        (expected,) = torch.autograd.grad(soft, exact, d_m[place][row].double())
        assert max_error(m[place][row], soft.detach()) <= 1e-4
        assert max_error(d_scores[place][row], expected) <= 1e-3 / temperature
        assert (d_scores[place][~row] == 0).all()


def test_soft_top_k_gradient_is_exact() -> None:
    scores = torch.randn(2, 1, 3, 7, dtype=torch.float64, requires_grad=True)
    kappa = torch.linspace(0.7, 6.9, 3, dtype=torch.float64).expand(2, 1, 3)
    assert torch.autograd.gradcheck(
        lambda x: sparline.reference.soft_top_k(x, kappa, 0.1), scores, atol=1e-7, rtol=1e-6
    )


@given(calls(("sla2",), low_bit=False, ordered=False))
def test_soft_map_of_zeros_and_ones_is_the_hard_operator(call: Call) -> None:
    """Forward and the gradients of q, k and v."""
    shape = (
        2,
        3,
        -(-call["q"].shape[2] // call["method"].block_q),
        -(-call["k"].shape[2] // call["method"].block_k),
    )
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5
    results = []
    for block_map in (keep, keep.float()):
        leaves = {name: call[name].clone().requires_grad_() for name in "qkv"}
        o = attend(call, **leaves, block_map=block_map)
        results.append([o, *torch.autograd.grad(o.sum(), leaves.values())])
    for hard, soft in zip(*results, strict=True):
        close(soft, hard, ulps=256.0)


@given(calls(("sla2",), ordered=False))
def test_identity_router_is_top_k(call: Call) -> None:
    """SLA2's router with identity matrices, and without any, picks what SLA's does."""
    q, k, method, backend = (call[name] for name in ("q", "k", "method", "backend"))
    identity = torch.eye(q.shape[3])
    blocks = {"block_q": method.block_q, "block_k": method.block_k}
    sla = SLA(keep_ratio=method.keep_ratio, negligible_ratio=0.0, **blocks)
    expected = sparline.route(q, k, method=sla, backend=backend)
    for weights in (Weights(), Weights(router_q=identity, router_k=identity)):
        block_map = sparline.route(q, k, method=method, weights=weights, backend=backend)
        assert torch.equal(block_map, expected)


@given(calls(("sla2",), low_bit=False, ordered=False))
def test_alpha_chooses_the_branch(call: Call) -> None:
    """alpha -> 1 gives o_s, alpha -> 0 gives o_l where there is one."""
    method = call["method"]
    shape = (-(-call["q"].shape[2] // method.block_q), -(-call["k"].shape[2] // method.block_k))
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(2)) > 0.5
    keep[:, 0] = True
    if shape[1] > 1:
        keep[:, 1] = False
    shared = {
        "feature_map": "softmax",
        "block_q": method.block_q,
        "block_k": method.block_k,
        "smooth_k": "all",
        "linear_scope": "complement",
    }
    for logit, combine in ((40.0, "sparse"), (-40.0, "linear" if shape[1] > 1 else "sparse")):
        weights = Weights(alpha_logit=torch.full((3, 1), logit))
        o = attend(
            call,
            method=dataclasses.replace(method, feature_map="softmax"),
            weights=weights,
            block_map=keep,
        )
        branch = SLA(combine=combine, **shared)
        close(o, attend(call, method=branch, weights=None, block_map=keep))


# Skipping in the loop ---------------------------------------------------------------------------


def tile_flags(call: Call, method: Method) -> tuple[Any, sparline.TileStatistics]:
    """Whether each row keeps each tile, (B, H, N_q, T_n)."""
    q, k, v = (call[name] for name in "qkv")
    statistics = sparline.tile_statistics(
        q, k, v, method=method, recall=True, backend=call["backend"]
    )
    kept = oracle.kept_tiles(statistics.kept_bits, -(-k.shape[2] // method.block_k))
    rows = torch.arange(q.shape[2])
    group_rows = method.decide_rows or method.block_q
    groups = -(-method.block_q // group_rows)
    row = rows // method.block_q * groups + rows % method.block_q // group_rows
    return kept[:, :, row.numpy()], statistics


@given(calls(("dynsparse", "blasst"), low_bit=False, ordered=False))
def test_recall_has_its_bound(call: Call) -> None:
    """After n dropped tiles of block_k keys a row keeps at least 1 / (1 + n block_k e^lambda) of
    its softmax; the statistics add up."""
    method = call["method"]
    kept, statistics = tile_flags(call, method)
    dropped = torch.from_numpy((~kept).sum(axis=-1))
    bound = 1 / (1 + dropped * method.block_k * math.exp(method.log_threshold))
    assert statistics.recall is not None
    assert (statistics.recall >= bound - 1e-5).all()
    assert (statistics.recall <= 1 + 1e-5).all()
    shape = -(-call["q"].shape[2] // method.block_q), kept.shape[-1]
    assert (statistics.visited == shape[0] * shape[1]).all()
    assert (statistics.skipped <= statistics.visited).all()
    if method.decide_rows == 0:
        of_blocks = (~kept[:, :, :: method.block_q]).sum(axis=(-1, -2))
        assert torch.equal(statistics.skipped.long(), torch.from_numpy(of_blocks))
    assert (statistics.row_votes.sum(dim=-1) >= dropped.sum(dim=-1)).all()
    assert 0.0 <= statistics.sparsity < 1.0


@given(calls(("dynsparse",), low_bit=False, ordered=False))
def test_dynsparse_skips_first(call: Call) -> None:
    """lse >= m: as long as both have kept the same tiles, what BLASST skips DynSparse skips too. So
    where they part for the first time, DynSparse has skipped and BLASST has not. (After that all is
    possible: having kept less, DynSparse may keep more.)"""
    method = call["method"]
    options = {name: getattr(method, name) for name in ("block_q", "block_k", "decide_rows")}
    blasst = BLASST(log_threshold=method.log_threshold, tile_order=method.tile_order, **options)
    ours, theirs = (tile_flags(call, m)[0] for m in (method, blasst))
    tokens = (
        oracle.Tokens(call["q"].shape[2], method.block_q, None, ()),
        oracle.Tokens(call["k"].shape[2], method.block_k, None, ()),
    )
    visits = oracle.tile_orders(method.tile_order, *tokens)
    for row in range(call["q"].shape[2]):
        order = visits[row // method.block_q]
        a, b = (torch.from_numpy(x[:, :, row][..., order]) for x in (ours, theirs))
        differs = a != b
        first = differs.to(torch.int8).argmax(dim=-1, keepdim=True)
        assert (~a.gather(-1, first) | ~differs.any(dim=-1, keepdim=True)).all()


# Low bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [(448.0, 448.0), (224.0, 4.5), (448.0, 2.25)])
def test_low_bit_error(ranges: tuple[float, float], backend: str) -> None:
    """Gaussian q, k, v at N = 2048, D = 128: relative L1 0.038, cosine 0.9993, for all ranges."""
    q, k, v = (x.bfloat16().float() for x in qkv(0, 2048, 2048, 128, heads=1))
    exact = scaled_dot_product_attention(q, k, v)
    method = Dense(low_bit=LowBit(p_range=ranges[0], v_range=ranges[1]))
    o = sparline.attention(q, k, v, method=method, backend=backend)
    l1 = ((o - exact).abs().sum() / exact.abs().sum()).item()
    cosine = torch.nn.functional.cosine_similarity(o.flatten(), exact.flatten(), dim=0).item()
    assert 0.036 <= l1 <= 0.040
    assert 0.9991 <= cosine <= 0.9995


def test_smoothing_helps_low_bits(backend: str) -> None:
    """A bias of the key channels of standard deviation 4: relative L1 0.048, smoothed 0.039."""
    q, k, v = qkv(0, 2048, 2048, 128, heads=1)
    k = k + 4 * torch.randn(128)
    exact = scaled_dot_product_attention(q, k, v)
    errors = []
    for mode in ("all", "router"):
        method = SLA(
            keep_ratio=1.0,
            combine="sum",
            linear_scope="complement",
            smooth_k=mode,
            block_q=128,
            low_bit=LowBit(),
        )
        o = sparline.attention(q, k, v, method=method, backend=backend)
        errors.append(((o - exact).abs().sum() / exact.abs().sum()).item())
    assert 0.037 <= errors[0] <= 0.041
    assert 0.044 <= errors[1] <= 0.053


# Bits and extremes ------------------------------------------------------------------------------


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
            assert torch.equal(bits(ours), bits(first))


EVERY_KIND = [
    "sla2-softmax-hard",
    "sla2-softmax-soft",
    "sla2-softmax-straight_through",
    "top-p",
    "sparge",
    "dynsparse-reverse",
    "blasst-diagonal_first",
    "sla-hilbert",
    "vsa-gates",
    "vmoba-1d-query_head",
    "vmoba-2d-head_global",
    "vmoba-block",
    "low-bit-dense",
    "low-bit-sla2",
    "low-bit-dynsparse",
]


@pytest.mark.parametrize("name", EVERY_KIND)
def test_no_method_depends_on_threads(name: str) -> None:
    case = CASES[name]
    inputs = make_inputs(case)
    runs = []
    for num_threads in (1, 2, 2):
        torch.set_num_threads(num_threads)
        result = run(case, inputs, "cpu")
        runs.append([result.o, result.lse, *result.gradients.values()])
    for other in runs[1:]:
        for ours, first in zip(other, runs[0], strict=True):
            assert torch.equal(bits(ours), bits(first))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("name", EVERY_KIND)
def test_large_scores_of_every_method(name: str, backend: str) -> None:
    """Scores of +-1e4, equal keys, constant rows and zeros stay finite, forward and backward.

    Under low bits the forward alone: the published backward takes exp(S - lse) of exact S and
    rounded lse, and at scores of 1e4 one step of int8 is beyond float32.
    """
    case = CASES[name]
    inputs = make_inputs(case)
    for x in (inputs.q, inputs.k):
        x[:, :, :20] *= 100
    inputs.k[:, :, 30:50] = inputs.k[:, :, 30:31]
    inputs.q[:, :, 50:] = 1.0
    inputs.q[:, :, 60:] = inputs.k[:, :, 60:] = inputs.v[:, :, 60:] = 0.0
    result = run(case, inputs, backend)
    checked = {"o": result.o, "lse": result.lse}
    if case.method.low_bit is None:
        checked |= result.gradients
    bad = [name for name, x in checked.items() if not x.isfinite().all()]
    assert not bad


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", EVERY_KIND)
def test_bad_numbers_stay_in_their_head_in_every_method(
    name: str, value: float, backend: str
) -> None:
    case = dataclasses.replace(CASES[name], batch=2)
    clean, dirty = make_inputs(case), make_inputs(case)
    for x, row in ((dirty.q, 3), (dirty.k, 33), (dirty.v, 70)):
        x[1, 0, row, 2] = value
    results = [run(case, inputs, backend) for inputs in (clean, dirty)]
    names = ("q", "k", "v")
    before, after = ([r.o, *(r.gradients[name] for name in names)] for r in results)
    for a, b in zip(before, after, strict=True):
        for place in ((0, 0), (0, 1), (1, -1)):  # the last head has other keys than the first
            assert torch.equal(a[place], b[place])


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
