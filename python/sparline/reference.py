# SPDX-License-Identifier: Apache-2.0
"""What sparline computes, in plain PyTorch: the definition that every kernel is held against.

Letters are the paper's: q k v o, lse, phi, h (sum of phi(k) v^T), z (sum of phi(k)), i a query
block, j a key block, shapes (B, H, N, D). Any floating dtype up to float64; 16-bit inputs are
computed in float32. Every function is differentiable by autograd where the operator is trainable;
the block classes are constants. Readable before fast: one loop over query blocks, and memory
O(block_q x N_k).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

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


class SLAWeights(NamedTuple):
    """The learned tensors; None where the method has no use for one.

    ``proj_*`` is y = x W^T + b, shared by all heads; ``feature_*`` is the linear map inside the
    hedgehog feature maps, one per query head (``_q``) and one per key/value head (``_k``).
    """

    proj_weight: Tensor | None = None  # (D, D)
    proj_bias: Tensor | None = None  # (D)
    feature_weight_q: Tensor | None = None  # (H, D, D)
    feature_bias_q: Tensor | None = None  # (H, D)
    feature_weight_k: Tensor | None = None  # (H_kv, D, D)
    feature_bias_k: Tensor | None = None  # (H_kv, D)


def make_blocks(segments: Sequence[Segment], length: int, block_rows: int) -> list[Block]:
    """Each segment cut into blocks of ``block_rows``, the last one shorter.

    No segments stand for one of ``length`` rows.
    """
    return [
        Block(begin, min(begin + block_rows, segment.end), segment.sequence, segment.is_protected)
        for segment in segments or [Segment(0, length)]
        for begin in range(segment.begin, segment.end, block_rows)
    ]


def count_blocks(ratio: float, num_blocks: int, rounding: str) -> int:
    """ratio x num_blocks as a count, in double precision."""
    exact = ratio * num_blocks
    floor = math.floor(exact)
    if rounding == "round":  # half away from zero
        return floor + (exact - floor >= 0.5)
    return math.ceil(exact) if rounding == "ceil" else floor


def smooth_keys(k: Tensor, segments: Sequence[Segment]) -> Tensor:
    """k minus the mean key of its sequence (all rows of the sequence, protected or not)."""
    segments = segments or [Segment(0, k.shape[2])]
    mean_dtype = torch.promote_types(k.dtype, torch.float32)
    parts: list[Tensor] = []
    for _, members in itertools.groupby(segments, key=lambda segment: segment.sequence):
        spans = list(members)
        rows = k[:, :, spans[0].begin : spans[-1].end]
        parts.append((rows - rows.mean(dim=2, keepdim=True, dtype=mean_dtype)).to(k.dtype))
    return torch.cat(parts, dim=2)


def overlay_segments(block_class: Tensor, q_blocks: list[Block], k_blocks: list[Block]) -> Tensor:
    """Lays the segments over a map: other sequences are never attended, protected spans always."""
    device = block_class.device
    same = torch.tensor(
        [[a.sequence == b.sequence for b in k_blocks] for a in q_blocks], device=device
    )
    protected = torch.tensor(
        [[a.is_protected or b.is_protected for b in k_blocks] for a in q_blocks], device=device
    )
    block_class = block_class.masked_fill(protected, CRITICAL)
    return block_class.masked_fill(~same, NEGLIGIBLE)


@torch.no_grad()
def route(
    q: Tensor,
    k: Tensor,
    query_segments: Sequence[Segment] = (),
    key_segments: Sequence[Segment] = (),
    *,
    block_q: int = 64,
    block_k: int = 64,
    scale: float | None = None,
    critical_ratio: float = 0.05,
    negligible_ratio: float = 0.10,
    count_rounding: str = "floor",
    smooth_k: bool = True,
) -> Tensor:
    """SLA Eq. 2-3: the class of every pair of blocks, int8 (B, H, T_m, T_n)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(dtype), k.to(dtype)
    if smooth_k:
        k = smooth_keys(k, key_segments)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    q_blocks = make_blocks(query_segments, q.shape[2], block_q)
    k_blocks = make_blocks(key_segments, k.shape[2], block_k)
    q_mean = torch.stack(
        [q[:, :, b.begin : b.end].mean(dim=2) for b in q_blocks], dim=2
    )  # (B,H,T_m,D)
    k_mean = torch.stack(
        [k[:, :, b.begin : b.end].mean(dim=2) for b in k_blocks], dim=2
    )  # (B,H,T_n,D)
    scores = (scale or q.shape[3] ** -0.5) * q_mean @ k_mean.mT
    block_class = torch.full(scores.shape, MARGINAL, dtype=torch.int8, device=q.device)
    for sequence in {block.sequence for block in q_blocks}:
        rows = [i for i, b in enumerate(q_blocks) if b.sequence == sequence]
        columns = [
            j for j, b in enumerate(k_blocks) if b.sequence == sequence and not b.is_protected
        ]
        total = len(columns)
        num_critical = min(max(count_blocks(critical_ratio, total, count_rounding), 1), total)
        num_negligible = min(
            total - num_critical, count_blocks(negligible_ratio, total, count_rounding)
        )
        # The total order: score descending, then index ascending; NaN comes after everything.
        score = scores[:, :, rows][..., columns]
        by_score = score.nan_to_num(-math.inf, math.inf, -math.inf).argsort(
            dim=-1, descending=True, stable=True
        )
        nan_last = score.isnan().gather(-1, by_score).to(torch.int8).argsort(dim=-1, stable=True)
        rank = by_score.gather(-1, nan_last).argsort(dim=-1)
        chosen = torch.where(rank < num_critical, CRITICAL, MARGINAL)
        chosen = torch.where(rank >= total - num_negligible, NEGLIGIBLE, chosen).to(torch.int8)
        block_class[:, :, torch.tensor(rows)[:, None], torch.tensor(columns, dtype=torch.long)] = (
            chosen
        )
    return overlay_segments(block_class, q_blocks, k_blocks)


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
    block_class: Tensor | None = None,
    weights: SLAWeights = SLAWeights(),  # noqa: B008 (a tuple: immutable)
    query_segments: Sequence[Segment] = (),
    key_segments: Sequence[Segment] = (),
    *,
    block_q: int = 64,
    block_k: int = 64,
    scale: float | None = None,
    combine: str = "projection",
    feature_map: str = "softmax",
    linear_scope: str = "marginal",
    epsilon: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """SLA Eq. 4-6: o (B, H, N_q, D) and the natural log of the critical sums, lse (B, H, N_q).

    ``block_class`` None makes every block critical. lse is a constant for autograd.
    """
    output_dtype, dtype = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    batch, num_heads, num_queries, head_dim = q.shape
    group = num_heads // k.shape[1]
    scale = scale or head_dim**-0.5
    q_blocks = make_blocks(query_segments, num_queries, block_q)
    k_blocks = make_blocks(key_segments, k.shape[2], block_k)
    if block_class is None:
        block_class = torch.full((1, 1, 1, 1), CRITICAL, dtype=torch.int8, device=q.device)
    block_class = overlay_segments(
        block_class.expand(batch, num_heads, len(q_blocks), len(k_blocks)), q_blocks, k_blocks
    )
    if combine != "sparse":  # h_j and z_j of every key block, once per key/value head
        phi_q = phi(q, feature_map, weights.feature_weight_q, weights.feature_bias_q)  # (B,H,N_q,F)
        phi_k = phi(k, feature_map, weights.feature_weight_k, weights.feature_bias_k)
        parts = [(phi_k[:, :, b.begin : b.end], v[:, :, b.begin : b.end]) for b in k_blocks]
        h = torch.stack([f.mT @ x for f, x in parts], dim=2).repeat_interleave(group, dim=1)
        z = torch.stack([f.sum(dim=2) for f, _ in parts], dim=2).repeat_interleave(group, dim=1)
        if linear_scope == "marginal":
            in_scope = block_class == MARGINAL
        else:
            same = torch.tensor([[a.sequence == b.sequence for b in k_blocks] for a in q_blocks])
            in_scope = same.to(q.device) & ((block_class != CRITICAL) | (linear_scope == "all"))
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    key_rows = torch.tensor([b.end - b.begin for b in k_blocks], device=q.device)

    o_rows, lse_rows = [], []
    for i, block in enumerate(q_blocks):
        rows = slice(block.begin, block.end)
        # Sparse branch: softmax over the critical blocks. A row without any gives 0 and -inf.
        critical = (block_class[:, :, i] == CRITICAL).repeat_interleave(key_rows, dim=-1)
        if combine == "linear" and not block.is_protected:
            critical = torch.zeros_like(critical)  # no softmax is taken
        s = scale * q[:, :, rows] @ k.mT  # (B,H,rows,N_k)
        s = s.masked_fill(~critical[:, :, None], -math.inf)
        row_max = s.detach().amax(dim=-1, keepdim=True)
        row_max = row_max.masked_fill(row_max == -math.inf, 0.0)
        p = (s - row_max).exp()
        row_sum = p.sum(dim=-1, keepdim=True)
        o = (p @ v) / row_sum.masked_fill(row_sum == 0, 1.0)
        lse_rows.append((row_max + row_sum.log()).squeeze(-1))
        if combine != "sparse" and not block.is_protected:
            # Linear branch over E_i. Empty rule: without a positive, finite denominator it is 0.
            member = in_scope[:, :, i].to(dtype)
            is_empty = ~in_scope[:, :, i].any(dim=-1)[..., None, None]
            numerator = phi_q[:, :, rows] @ torch.einsum("bhj,bhjfd->bhfd", member, h)
            denominator = phi_q[:, :, rows] @ torch.einsum("bhj,bhjf->bhf", member, z)[..., None]
            denominator = denominator + epsilon
            valid = (denominator > 0) & denominator.isfinite() & ~is_empty
            o_l = torch.where(valid, numerator, 0.0) / torch.where(valid, denominator, 1.0)
            if combine == "projection":
                assert weights.proj_weight is not None
                o_l = o_l @ weights.proj_weight.to(dtype).mT
                if weights.proj_bias is not None:
                    o_l = o_l + weights.proj_bias.to(dtype)
            o = o + o_l
        o_rows.append(o)
    return torch.cat(o_rows, dim=2).to(output_dtype), torch.cat(lse_rows, dim=2).detach()
