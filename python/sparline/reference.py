# SPDX-License-Identifier: Apache-2.0
"""What sparline computes, in plain PyTorch: the definition that every kernel is held against.

Letters are the paper's: q k v o, lse, phi, h (sum of phi(k) v^T), z (sum of phi(k)), i a query
block, j a key block, shapes (B, H, N, D). Any floating dtype up to float64; 16-bit inputs are
computed in float32. Every function is differentiable by autograd where the operator is trainable;
hard decisions (classes, skipped tiles) are constants. Readable before fast: one loop over query
blocks, and memory O(block_q x N_k).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .methods import BlockRouter, LowBit, Recipe, Skip

CRITICAL, MARGINAL, NEGLIGIBLE = 1, 0, -1


class Segment(NamedTuple):
    """Rows [begin, end) of an axis that no block straddles: a sequence, or a span of one."""

    begin: int
    end: int
    sequence: int = 0
    is_protected: bool = False


class Block(NamedTuple):
    """Rows [begin, end) of one segment: at most block_q or block_k of them."""

    begin: int
    end: int
    sequence: int = 0
    is_protected: bool = False


class Weights(NamedTuple):
    """The learned tensors; None where the method has no use for one.

    ``proj_*`` is y = x W^T + b, shared by all heads; ``feature_*`` is the linear map inside the
    hedgehog feature maps, one per query head (``_q``) and one per key/value head (``_k``);
    ``router_*`` is y = x W^T on pooled queries and keys.
    """

    proj_weight: Tensor | None = None  # (D, D)
    proj_bias: Tensor | None = None  # (D)
    feature_weight_q: Tensor | None = None  # (H, D, D)
    feature_bias_q: Tensor | None = None  # (H, D)
    feature_weight_k: Tensor | None = None  # (H_kv, D, D)
    feature_bias_k: Tensor | None = None  # (H_kv, D)
    alpha_logit: Tensor | None = None  # (H, 1), (H, T_m) or (H, N_q); the operator's: (B, H, N_q)
    router_q: Tensor | None = None  # (D, D) or (H, D, D)
    router_k: Tensor | None = None  # (D, D) or (H, D, D)


# Blocks -----------------------------------------------------------------------------------------


def make_blocks(segments: Sequence[Segment], length: int, block_rows: int) -> list[Block]:
    """Each segment cut into blocks of ``block_rows``, the last one shorter.

    No segments stand for one of ``length`` rows.
    """
    return [
        Block(begin, min(begin + block_rows, segment.end), segment.sequence, segment.is_protected)
        for segment in segments or [Segment(0, length)]
        for begin in range(segment.begin, segment.end, block_rows)
    ]


def pool(
    x: Tensor, segments: Sequence[Segment], block_rows: int, order: Tensor | None = None
) -> Tensor:
    """The mean row of every block, (B, H, T, D), in float32 at least."""
    x = _reorder(x.to(torch.promote_types(x.dtype, torch.float32)), order)
    blocks = make_blocks(segments, x.shape[2], block_rows)
    return torch.stack([x[:, :, b.begin : b.end].mean(dim=2) for b in blocks], dim=2)


def mean_keys(k: Tensor, segments: Sequence[Segment]) -> Tensor:
    """For every key the mean key of its sequence (over all its rows, protected or not)."""
    sequences = _sequences(segments, k.shape[2])
    parts = [k[:, :, s.begin : s.end] for s in sequences]
    return torch.cat([x.mean(dim=2, keepdim=True).expand_as(x) for x in parts], dim=2)


def _sequences(segments: Sequence[Segment], length: int) -> list[Segment]:
    """The sequences that have rows, each as one segment."""
    groups = itertools.groupby(segments or [Segment(0, length)], key=lambda s: s.sequence)
    members = [(number, list(group)) for number, group in groups]
    whole = [Segment(group[0].begin, group[-1].end, number) for number, group in members]
    return [s for s in whole if s.begin < s.end]


def _reorder(x: Tensor, order: Tensor | None) -> Tensor:
    """Rows (dim 2) in the order of the positions: position n is row order[n]."""
    return x if order is None else x[:, :, order.flatten().long()]


def overlay_segments(block_class: Tensor, q_blocks: list[Block], k_blocks: list[Block]) -> Tensor:
    """Lays the segments over a map: other sequences are never attended, protected spans always."""
    visible, forced = _overlay(q_blocks, k_blocks, block_class.device)
    return block_class.masked_fill(forced, CRITICAL).masked_fill(~visible, NEGLIGIBLE)


def _overlay(
    q_blocks: list[Block], k_blocks: list[Block], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which pairs of blocks are of one sequence, and which of those attend each other whatever the
    map says, because one is protected: bool (T_m, T_n)."""
    same = [[a.sequence == b.sequence for b in k_blocks] for a in q_blocks]
    protected = [[a.is_protected or b.is_protected for b in k_blocks] for a in q_blocks]
    visible = torch.tensor(same, device=device)
    return visible, torch.tensor(protected, device=device) & visible


# Routing ----------------------------------------------------------------------------------------


def count_blocks(ratio: float, num_blocks: int, rounding: str) -> int:
    """ratio x num_blocks as a count, in double precision."""
    exact = ratio * num_blocks
    floor = math.floor(exact)
    if rounding == "round":  # half away from zero
        return floor + (exact - floor >= 0.5)
    return math.ceil(exact) if rounding == "ceil" else floor


@torch.no_grad()
def route(
    q: Tensor,
    k: Tensor,
    router: BlockRouter,
    block_q: int,
    block_k: int,
    query_segments: Sequence[Segment] = (),
    key_segments: Sequence[Segment] = (),
    *,
    scale: float | None = None,
    proj_q: Tensor | None = None,
    proj_k: Tensor | None = None,
    query_order: Tensor | None = None,
    key_order: Tensor | None = None,
) -> Tensor:
    """The class of every pair of blocks, int8 (B, H, T_m, T_n); hard, whatever ``router.mode``."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = _reorder(q.to(dtype), query_order), _reorder(k.to(dtype), key_order)
    group = q.shape[1] // k.shape[1]
    if router.smooth_k:
        k = k - mean_keys(k, key_segments)
    u = pool(q, query_segments, block_q)  # (B,H,T_m,D)
    w = pool(k, key_segments, block_k).repeat_interleave(group, dim=1)  # (B,H,T_n,D)
    if proj_q is not None and proj_k is not None:
        u, w = u @ proj_q.to(dtype).mT, w @ proj_k.to(dtype).mT
    scores = u @ w.mT  # ranked unscaled: a rounded factor could break ties
    q_blocks = make_blocks(query_segments, q.shape[2], block_q)
    k_blocks = make_blocks(key_segments, k.shape[2], block_k)
    unlike_q = _is_unlike(q, q_blocks, router.min_similarity)
    unlike_k = _is_unlike(k, k_blocks, router.min_similarity).repeat_interleave(group, dim=1)

    classes = torch.full(scores.shape, NEGLIGIBLE, dtype=torch.int8, device=q.device)
    for sequence in {block.sequence for block in q_blocks}:
        rows = [i for i, b in enumerate(q_blocks) if b.sequence == sequence]
        columns = [
            j for j, b in enumerate(k_blocks) if b.sequence == sequence and not b.is_protected
        ]
        if columns:
            classes[:, :, torch.tensor(rows)[:, None], torch.tensor(columns)] = _classify(
                scores[:, :, rows][..., columns],
                unlike_k[:, :, columns],
                router,
                scale or q.shape[3] ** -0.5,
            )
    return overlay_segments(classes.masked_fill(unlike_q[..., None], CRITICAL), q_blocks, k_blocks)


def _is_unlike(x: Tensor, blocks: list[Block], min_similarity: float | None) -> Tensor:
    """SpargeAttn's test of blocks (B, H, T): the mean cosine of all pairs of rows is too low."""
    if min_similarity is None:
        return torch.zeros(*x.shape[:2], len(blocks), dtype=torch.bool, device=x.device)
    unit = torch.nn.functional.normalize(x, dim=-1)
    means = torch.stack([unit[:, :, b.begin : b.end].mean(dim=2) for b in blocks], dim=2)
    return means.square().sum(dim=-1) < min_similarity


def _classify(scores: Tensor, unlike: Tensor, router: BlockRouter, scale: float) -> Tensor:
    """Classes of the unprotected key blocks of one sequence: (B, H, rows, T) from the scores and
    the key blocks (B, H, T) that are critical without being ranked."""
    total = scores.shape[-1]
    unlike = unlike[:, :, None].expand_as(scores)
    # The total order: score descending, index ascending; then NaN, then what is not ranked.
    no_nan = scores.nan_to_num(-math.inf, math.inf, -math.inf)
    by_score = no_nan.argsort(dim=-1, descending=True, stable=True)
    place = scores.isnan().to(torch.int8).masked_fill(unlike, 2).gather(-1, by_score)
    order = by_score.gather(-1, place.argsort(dim=-1, stable=True))
    rank = order.argsort(dim=-1)
    num_ranked = total - unlike.sum(dim=-1, keepdim=True)

    # Every selection is a prefix of that order.
    count = router.keep_count
    if count is None:
        count = count_blocks(router.keep_ratio, total, router.count_rounding)
    by_count = num_ranked.clamp(max=min(max(count, 1), total))
    by_mass = num_ranked
    if router.keep_mass < 1.0:
        score = scores.gather(-1, order)
        mass = (scale * (score - score[..., :1])).exp().masked_fill(unlike.gather(-1, order), 0.0)
        mass = mass.nan_to_num(0.0)  # nor does anything else without a finite score weigh
        gathered, wanted = mass.cumsum(dim=-1), router.keep_mass * mass.sum(dim=-1, keepdim=True)
        if router.longest_prefix:
            by_mass = (gathered <= wanted).sum(dim=-1, keepdim=True)
        else:
            by_mass = 1 + (gathered < wanted).sum(dim=-1, keepdim=True)
        by_mass = by_mass.clamp(min=1).minimum(num_ranked)
    num_critical = {
        "top_k": by_count,
        "top_p": by_mass,
        "union": torch.maximum(by_count, by_mass),
        "intersection": torch.minimum(by_count, by_mass),
    }[router.selection]
    num_negligible = count_blocks(router.negligible_ratio, total, router.count_rounding)
    classes = torch.full_like(scores, MARGINAL, dtype=torch.int8)
    classes = classes.masked_fill(rank >= num_ranked - num_negligible, NEGLIGIBLE)
    return classes.masked_fill((rank < num_critical) | unlike, CRITICAL)


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, kappa: Tensor, temperature: float) -> Tensor:
        listed = scores > -math.inf
        total = listed.sum(dim=-1, keepdim=True)
        y = scores / temperature
        # lambda lies between logit(kappa / T) - max y and logit(kappa / T) - min y.
        center = (kappa / total).logit()
        low = center - y.amax(dim=-1, keepdim=True)
        high = center - y.masked_fill(~listed, math.inf).amin(dim=-1, keepdim=True)
        for _ in range(80 if scores.dtype == torch.float64 else 40):
            middle = (low + high) / 2
            is_low = (y + middle).sigmoid().sum(dim=-1, keepdim=True) < kappa
            low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
        m = torch.where(kappa < total, (y + (low + high) / 2).sigmoid(), 1.0)
        m = m.masked_fill(~listed, 0.0)
        ctx.save_for_backward(m)
        ctx.temperature = temperature
        return m

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (m,), (d_m,) = ctx.saved_tensors, gradients
        slope = m * (1 - m)
        mean = (slope * d_m).sum(dim=-1, keepdim=True)
        mean = mean / slope.sum(dim=-1, keepdim=True).clamp(min=1e-12)
        return slope / ctx.temperature * (d_m - mean), None, None


def soft_top_k(scores: Tensor, kappa: Tensor | float, temperature: float) -> Tensor:
    """SLA2 Eq. 17: m = sigmoid(scores / temperature + lambda) with lambda such that each row (the
    last axis) sums to its kappa.

    kappa broadcasts to the rows. Scores of -inf are left out; where kappa is at least the number of
    the others they are all 1, with gradient 0. The gradient is that of the implicit function.
    """
    kappa = torch.as_tensor(kappa, dtype=scores.dtype, device=scores.device)
    m: Tensor = _SoftTopK.apply(scores, kappa.expand(scores.shape[:-1])[..., None], temperature)  # type: ignore[no-untyped-call]
    return m


# Attention --------------------------------------------------------------------------------------


def phi(x: Tensor, feature_map: str, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The feature map, per row of the unscaled x (B, H, N, D); F = 2 D for the hedgehog maps, else
    D.
    """
    if feature_map == "softmax":
        return x.softmax(dim=-1)
    if feature_map == "elu1":
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
    if feature_map == "relu":
        return x.relu()
    if feature_map == "identity":
        return x
    assert weight is not None
    y = x @ weight.to(x.dtype).mT
    if bias is not None:
        y = y + bias.to(x.dtype)[:, None]
    if feature_map == "hedgehog":
        return torch.cat([y.softmax(dim=-1), (-y).softmax(dim=-1)], dim=-1)
    assert feature_map == "hedgehog_exp"
    return torch.cat([y.exp(), (-y).exp()], dim=-1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    recipe: Recipe,
    block_map: Tensor | None = None,
    weights: Weights = Weights(),  # noqa: B008 (a tuple: immutable)
    query_segments: Sequence[Segment] = (),
    key_segments: Sequence[Segment] = (),
    *,
    scale: float | None = None,
    tile_bits: Tensor | None = None,
    bit_rows: int = 0,
    query_order: Tensor | None = None,
    key_order: Tensor | None = None,
    tile_order: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """o (B, H, N_q, D), lse (B, H, N_q), and with a skip rule kept_bits and row_votes.

    ``block_map`` is None (every block is critical), classes (int8) or a soft map m (floating), (B,
    H, T_m, T_n). ``tile_bits`` and kept_bits are uint8 (B, H, T_m G, ceil(T_n / 8)) for G row
    groups a query block; row_votes (B, H, T_m) counts (row, tile) pairs. ``weights.alpha_logit`` is
    (B, H, N_q). Everything but o is a constant for autograd.
    """
    output_dtype, dtype = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q = _reorder(q.to(dtype), query_order)
    k, v = (_reorder(x.to(dtype), key_order) for x in (k, v))
    batch, num_heads, num_queries, head_dim = q.shape
    group = num_heads // k.shape[1]
    scale = scale or head_dim**-0.5
    q_blocks = make_blocks(query_segments, num_queries, recipe.block_q)
    k_blocks = make_blocks(key_segments, k.shape[2], recipe.block_k)
    combine, skip, low_bit = recipe.combine, recipe.skip, recipe.low_bit
    linear_k = k
    if recipe.smooth_k:
        # A row of dS sums to zero, so the mean takes no gradient from the sparse branch. Saying so
        # by detach is what defines the low-bit backward, where that sum is not exactly zero.
        mean = mean_keys(k, key_segments)
        linear_k, k = k - mean, k - mean.detach()

    visible, forced = _overlay(q_blocks, k_blocks, q.device)
    if block_map is None:
        block_map = torch.tensor(CRITICAL, dtype=torch.int8, device=q.device)
    block_map = block_map.expand(batch, num_heads, len(q_blocks), len(k_blocks))
    is_soft = block_map.is_floating_point()
    sparse_weight, linear_weight = (
        x.to(dtype) for x in _tile_weights(block_map, visible, forced, recipe.linear_scope)
    )
    if combine != "sparse":  # h_j and z_j of every key block, once per key/value head
        phi_q = phi(q, recipe.feature_map, weights.feature_weight_q, weights.feature_bias_q)
        phi_k = phi(linear_k, recipe.feature_map, weights.feature_weight_k, weights.feature_bias_k)
        parts = [(phi_k[:, :, b.begin : b.end], v[:, :, b.begin : b.end]) for b in k_blocks]
        h = torch.stack([f.mT @ x for f, x in parts], dim=2).repeat_interleave(group, dim=1)
        z = torch.stack([f.sum(dim=2) for f, _ in parts], dim=2).repeat_interleave(group, dim=1)
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    if low_bit is not None:
        rounded_k, delta_k = round_int8(k, k_blocks)
        rounded_v = _round_values(v, low_bit, key_segments)
    if tile_bits is not None:
        bits = unpack_bits(tile_bits, len(k_blocks))
        bits = bits.reshape(*bits.shape[:2], len(q_blocks), -1, len(k_blocks))
        bits = bits | forced[:, None]  # of row groups, (B,H,T_m,G,T_n)
    orders = torch.arange(len(k_blocks), device=q.device).expand(len(q_blocks), -1)
    if tile_order is not None:
        orders = tile_order.reshape(-1, len(k_blocks)).long().expand(len(q_blocks), -1)
    if combine == "blend":
        assert weights.alpha_logit is not None
        alpha = _reorder(weights.alpha_logit.to(dtype), query_order).sigmoid()[..., None]

    o_rows, lse_rows, kept_rows, votes = [], [], [], []
    for i, block in enumerate(q_blocks):
        rows = slice(block.begin, block.end)
        num_rows = block.end - block.begin
        has_sparse = combine != "linear" or block.is_protected
        weight = sparse_weight[:, :, i, None] * has_sparse  # (B,H,1 or rows,T_n)
        if tile_bits is not None:
            weight = weight * _to_rows(bits[:, :, i], bit_rows, num_rows)
        s = scale * q[:, :, rows] @ k.mT  # (B,H,rows,N_k)
        if low_bit is not None:
            sub_rows = low_bit.q_rows or recipe.block_q
            rounded_q, delta_q = round_int8(q[:, :, rows], make_blocks((), num_rows, sub_rows))
            s_low = (scale * delta_q * delta_k.mT * (rounded_q @ rounded_k.mT)).detach()
        if skip is not None:
            kept, vote = _keep_tiles(
                s if low_bit is None else s_low,
                weight[:, :, 0] > 0,
                forced[i].tolist(),
                orders[i].tolist(),
                k_blocks,
                skip,
                recipe.block_q,
            )
            kept_rows.append(kept)
            votes.append(vote)
            weight = weight * _to_rows(kept, skip.rows or recipe.block_q, num_rows)
        o, lse = _softmax(s, v, _to_keys(weight, k_blocks), is_soft)
        if low_bit is not None:
            exact_lse = lse
            o_low, lse = _low_bit_softmax(s_low, rounded_v, weight, orders[i], k_blocks, low_bit)
            o = _StraightThrough.apply(  # type: ignore[no-untyped-call]
                s,
                v,
                _to_keys(weight, k_blocks) > 0,
                o_low,
                exact_lse if low_bit.recompute_lse else lse,
            )
        lse_rows.append(lse.squeeze(-1))
        if combine != "sparse" and not block.is_protected:
            o_l, valid = _linear_branch(
                phi_q[:, :, rows], h, z, linear_weight[:, :, i], recipe.epsilon
            )
            if combine == "blend":
                a = torch.where(valid, alpha[:, :, rows], 1.0)
                o = a * o + (1 - a) * o_l
            else:
                o = o + (_project(o_l, weights) if combine == "projection" else o_l)
        o_rows.append(o)

    memory_order = None if query_order is None else query_order.flatten().argsort()
    o = _reorder(torch.cat(o_rows, dim=2), memory_order).to(output_dtype)
    lse = _reorder(torch.cat(lse_rows, dim=2).detach(), memory_order)
    if skip is None:
        return o, lse, None, None
    return o, lse, pack_bits(torch.cat(kept_rows, dim=2)), torch.stack(votes, dim=2)


def _tile_weights(
    block_map: Tensor, visible: Tensor, forced: Tensor, linear_scope: str
) -> tuple[Tensor, Tensor]:
    """What either branch weighs a tile by, (B, H, T_m, T_n): 0 or 1 under classes, m and 1 - m
    under a soft map."""
    if block_map.is_floating_point():
        m = block_map.masked_fill(forced, 1.0).masked_fill(~visible, 0.0)
        return m, (1 - m).masked_fill(~visible, 0.0)
    critical = ((block_map == CRITICAL) & visible) | forced
    in_scope = {
        "marginal": (block_map == MARGINAL) & visible & ~critical,
        "complement": visible & ~critical,
        "all": visible.expand_as(critical),
    }[linear_scope]
    return critical, in_scope


def _softmax(s: Tensor, v: Tensor, weight: Tensor, is_soft: bool) -> tuple[Tensor, Tensor]:
    """o of softmax with p = weight exp(s), and the log of the row sums (B, H, rows, 1).

    A row without weight gives 0 and -inf. Under a soft map a tile of weight 0 still has a gradient,
    so that its exponentials are taken; far above all others they are cut off.
    """
    seen = weight > 0
    shift = torch.where(seen, (s + weight.log()).detach(), -math.inf).amax(dim=-1, keepdim=True)
    is_empty = shift == -math.inf
    shift = shift.masked_fill(is_empty, 0.0)
    exponent = (s - shift).clamp(max=0.5 * math.log(torch.finfo(s.dtype).max))
    p = weight * exponent.masked_fill(is_empty if is_soft else ~seen, -math.inf).exp()
    row_sum = p.sum(dim=-1, keepdim=True)
    o = (p @ v) / row_sum.masked_fill(row_sum == 0, 1.0)
    return o, (shift + row_sum.log()).detach()


def _linear_branch(
    phi_q: Tensor, h: Tensor, z: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """o_l of one query block over the tiles of its scope, weight (B, H, T_n), and which rows have
    one. Empty rule: without a positive, finite denominator it is 0."""
    numerator = phi_q @ torch.einsum("bhj,bhjfd->bhfd", weight, h)
    denominator = phi_q @ torch.einsum("bhj,bhjf->bhf", weight, z)[..., None] + epsilon
    is_empty = ~(weight > 0).any(dim=-1)[..., None, None]
    valid = (denominator > 0) & denominator.isfinite() & ~is_empty
    return torch.where(valid, numerator, 0.0) / torch.where(valid, denominator, 1.0), valid


def _project(o_l: Tensor, weights: Weights) -> Tensor:
    assert weights.proj_weight is not None
    o_l = o_l @ weights.proj_weight.to(o_l.dtype).mT
    return o_l if weights.proj_bias is None else o_l + weights.proj_bias.to(o_l.dtype)


# Tiles ------------------------------------------------------------------------------------------


def _to_keys(tiles: Tensor, k_blocks: list[Block]) -> Tensor:
    """(..., T_n) -> (..., N_k)"""
    rows = torch.tensor([b.end - b.begin for b in k_blocks], device=tiles.device)
    return tiles.repeat_interleave(rows, dim=-1)


def _to_rows(groups: Tensor, group_rows: int, num_rows: int) -> Tensor:
    """(B, H, G, T_n) -> (B, H, rows, T_n)"""
    return groups.repeat_interleave(group_rows, dim=2)[:, :, :num_rows]


def _tile_max(s: Tensor, k_blocks: list[Block]) -> Tensor:
    """(..., N_k) -> (..., T_n)"""
    return torch.stack([s[..., b.begin : b.end].amax(dim=-1) for b in k_blocks], dim=-1)


def unpack_bits(bits: Tensor, num_tiles: int) -> Tensor:
    """uint8 (..., ceil(T_n / 8)) -> bool (..., T_n): tile j is bit j % 8 of byte j / 8."""
    places = torch.arange(8, device=bits.device)
    return ((bits[..., None] >> places) & 1).flatten(-2)[..., :num_tiles].bool()


def pack_bits(flags: Tensor) -> Tensor:
    """The inverse of ``unpack_bits``."""
    flags = torch.nn.functional.pad(flags.int(), (0, -flags.shape[-1] % 8))
    flags = flags.reshape(*flags.shape[:-1], -1, 8)
    return (flags << torch.arange(8, device=flags.device)).sum(dim=-1).to(torch.uint8)


@torch.no_grad()
def _keep_tiles(
    s: Tensor,
    visited: Tensor,
    is_forced: list[bool],
    order: list[int],
    k_blocks: list[Block],
    skip: Skip,
    block_q: int,
) -> tuple[Tensor, Tensor]:
    """The loop of DynSparse and BLASST over the visited tiles (B, H, T_n) of a query block.

    Returns the tiles that each row group keeps, bool (B, H, G, T_n), and the number of (row, tile)
    pairs that passed the test, (B, H). Groups past the last row keep nothing.
    """
    group_rows = skip.rows or block_q
    num_groups = -(-block_q // group_rows)
    num_rows = s.shape[2]
    best = _tile_max(s, k_blocks)
    if skip.reference == "running_max":
        energy, add = best, torch.maximum
    else:
        parts = [s[..., b.begin : b.end].logsumexp(dim=-1) for b in k_blocks]
        energy, add = torch.stack(parts, dim=-1), torch.logaddexp
    kept = s.new_zeros(*visited.shape[:2], num_groups, len(k_blocks), dtype=torch.bool)
    votes = s.new_zeros(visited.shape[:2], dtype=torch.float32)
    reference = s.new_full(s.shape[:3], -math.inf)  # (B,H,rows), over what was kept so far
    for j in order:
        # Against -inf the difference is inf or NaN: the first tile of a row is never skipped.
        passes = (best[..., j] - reference < skip.log_threshold) & visited[:, :, j, None]
        if is_forced[j]:
            passes = torch.zeros_like(passes)
        votes += passes.sum(dim=-1)
        for g, first in enumerate(range(0, num_rows, group_rows)):
            agree = passes[:, :, first : first + group_rows].all(dim=-1)
            kept[:, :, g, j] = visited[:, :, j] & ~agree
        kept_by_row = _to_rows(kept, group_rows, num_rows)[..., j]
        reference = torch.where(kept_by_row, add(reference, energy[..., j]), reference)
    return kept, votes


# Low bit ----------------------------------------------------------------------------------------


def round_int8(x: Tensor, blocks: list[Block]) -> tuple[Tensor, Tensor]:
    """x / delta as integers, and delta for every row, (B, H, N, 1): delta = max |x| / 127 over a
    block, 1 where all is zero; halves go to even."""
    parts = [x[:, :, b.begin : b.end].abs().amax(dim=(2, 3), keepdim=True) for b in blocks]
    delta = _to_keys(torch.cat(parts, dim=3), blocks).mT / 127
    delta = delta.masked_fill(delta == 0, 1.0)
    return (x / delta).round().clamp(-127, 127), delta


def round_e4m3(x: Tensor) -> Tensor:
    """x rounded to FP8 e4m3: 3 bits after the leading one, down to steps of 2^-9; halves go to
    even, and all beyond 448 becomes 448. Arithmetic, because a cast would round float64 twice."""
    _, exponent = torch.frexp(x)  # |x| = [1/2, 1) 2^exponent
    step = torch.ldexp(torch.ones_like(x), exponent.clamp(min=-5) - 4)
    return ((x / step).round() * step).clamp(-448, 448)


def _round_values(v: Tensor, low_bit: LowBit, segments: Sequence[Segment]) -> Tensor:
    """v as its e4m3 form stands for it, with one scale for each channel of a sequence."""
    parts = []
    for sequence in _sequences(segments, v.shape[2]):
        rows = v[:, :, sequence.begin : sequence.end]
        delta = rows.abs().amax(dim=2, keepdim=True) / low_bit.v_range
        delta = delta.masked_fill(delta == 0, 1.0)
        parts.append(delta * round_e4m3(rows / delta))
    return torch.cat(parts, dim=2)


@torch.no_grad()
def _low_bit_softmax(
    s: Tensor,
    v: Tensor,
    weight: Tensor,
    order: Tensor,
    k_blocks: list[Block],
    low_bit: LowBit,
) -> tuple[Tensor, Tensor]:
    """o and lse of one query block: each tile's probabilities are rounded as they stand when it is
    visited, relative to the running maximum; the sums that divide them are not rounded."""
    seen = _to_keys(weight, k_blocks) > 0
    best = torch.where(weight > 0, _tile_max(s, k_blocks), -math.inf)
    running = best[..., order].cummax(dim=-1).values
    last = running[..., -1:].masked_fill(running[..., -1:] == -math.inf, 0.0)
    running = _to_keys(running[..., order.argsort()], k_blocks)
    p = torch.where(seen, s - running, -math.inf).exp()
    rescale = torch.where(seen, running - last, -math.inf).exp()
    row_sum = (p * rescale).sum(dim=-1, keepdim=True)
    rounded = round_e4m3(low_bit.p_range * p) / low_bit.p_range
    o = (rounded * rescale) @ v / row_sum.masked_fill(row_sum == 0, 1.0)
    return o, last + row_sum.log()


class _StraightThrough(torch.autograd.Function):
    """Passes the low-bit o on. Backward is that of softmax(s) v with unquantised s and v, in which
    the probabilities come from the given lse and the row's d_o . o from the given o."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, v: Tensor, seen: Tensor, o: Tensor, lse: Tensor) -> Tensor:
        ctx.save_for_backward(s, v, seen, o, lse)
        return o.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (s, v, seen, o, lse), (d_o,) = ctx.saved_tensors, gradients
        p = torch.where(seen, s - lse, -math.inf).exp()
        d_p = d_o @ v.mT
        d_s = p * (d_p - (d_o * o).sum(dim=-1, keepdim=True))
        return d_s, p.mT @ d_o, None, None, None
