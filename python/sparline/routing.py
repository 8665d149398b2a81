# SPDX-License-Identifier: Apache-2.0
"""From q and k to the tiles that are attended: routers (docs/math.md, "Routing").

A block router gives classes (int8) or, while it is trained, a soft map (float32). A chunk router
(VMoBA) gives bits: which rows attend which key blocks.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .arguments import flatten, make_spec, picks_reference, route_options
from .methods import BlockRouter, ChunkRouter, Recipe
from .reference import Segment, Weights, pack_bits
from .tokens import Axes, Rows, order_on, rows_of


class Tiles(NamedTuple):
    """What the operator is told of its tiles."""

    block_map: Tensor | None = None  # int8 or float32 (B, H, T_m, T_n)
    bits: Tensor | None = None  # uint8 (B, H, T_m G, ceil(T_n / 8))
    bit_rows: int = 0
    k_mean: Tensor | None = None  # float32 (B, H_kv, S, D): the mean keys, if the router found them


def route_tiles(
    q: Tensor,
    k: Tensor,
    recipe: Recipe,
    weights: Weights,
    axes: Axes,
    scale: float | None,
    backend: str | None,
) -> Tiles:
    """The tiles of a call by the recipe's router; q (B, H, N_q, D), k (B, H_kv, N_k, D)."""
    router = recipe.router
    if router is None:
        return Tiles()
    if isinstance(router, ChunkRouter):
        return _choose_chunks(q.detach(), k.detach(), recipe, router, axes)
    if router.mode == "hard":
        block_class, k_mean = _route(q, k, recipe, router, weights, axes, scale, backend)
        return Tiles(block_class, k_mean=k_mean)
    soft = _soft_map(q, k, recipe, router, weights, axes, scale, backend)
    if router.mode == "soft":
        return Tiles(soft)
    # Straight through: the values of the hard map, the gradient of the soft one.
    block_class, _ = _route(q, k, recipe, router, weights, axes, scale, backend)
    hard = block_class == reference.CRITICAL
    return Tiles(soft + (hard.to(soft.dtype) - soft).detach())


# Block routers ----------------------------------------------------------------------------------


def _route(
    q: Tensor,
    k: Tensor,
    recipe: Recipe,
    router: BlockRouter,
    weights: Weights,
    axes: Axes,
    scale: float | None,
    backend: str | None,
) -> tuple[Tensor, Tensor | None]:
    """Hard classes, int8 (B, H, T_m, T_n), and the mean keys if the operator subtracts them too:
    constants."""
    q, k = q.detach(), k.detach()
    proj_q, proj_k = (
        None if w is None else w.detach() for w in (weights.router_q, weights.router_k)
    )
    if picks_reference("route", q, backend):
        with torch.autocast(q.device.type, enabled=False):
            block_class = reference.route(
                q,
                k,
                router,
                recipe.block_q,
                recipe.block_k,
                axes.query_segments,
                axes.key_segments,
                scale=scale,
                proj_q=proj_q,
                proj_k=proj_k,
                query_order=axes.order,
                key_order=axes.order,
            )
            return block_class, None
    order = operator_order(axes, q)
    options = route_options(recipe, router, scale)
    block_class, k_mean = torch.ops.sparline.route(
        q,
        k,
        None if proj_q is None else proj_q.float().contiguous(),
        None if proj_k is None else proj_k.float().contiguous(),
        order,
        order,
        flatten(axes.query_segments),
        flatten(axes.key_segments),
        make_spec(options, backend),
    )
    return block_class, k_mean if "k_mean" in options else None


def _soft_map(
    q: Tensor,
    k: Tensor,
    recipe: Recipe,
    router: BlockRouter,
    weights: Weights,
    axes: Axes,
    scale: float | None,
    backend: str | None,
) -> Tensor:
    """SoftTop-k of the scores, floating (B, H, T_m, T_n); differentiable in the router's matrices
    (SLA2 Eq. 16-17)."""
    if not router.trains_qk:
        q, k = q.detach(), k.detach()
    with torch.autocast(q.device.type, enabled=False):
        rows_q = rows_of(axes.query_segments, q.shape[2], recipe.block_q, axes.order_key, q.device)
        rows_k = rows_of(axes.key_segments, k.shape[2], recipe.block_k, axes.order_key, k.device)
        pooled_q, pooled_k = pool_rows(q, rows_q), pool_rows(k, rows_k)
        pooled_k = _smooth_pooled(pooled_k, rows_k)
        pooled_k = pooled_k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        if weights.router_q is not None and weights.router_k is not None:
            pooled_q = pooled_q @ weights.router_q.to(pooled_q.dtype).mT
            pooled_k = pooled_k @ weights.router_k.to(pooled_k.dtype).mT
        scores = (scale or q.shape[3] ** -0.5) * pooled_q @ pooled_k.mT
        ranked = (rows_q.sequence[:, None] == rows_k.sequence) & ~rows_k.is_protected
        scores = scores.masked_fill(~ranked, float("-inf"))
        if router.softmax:
            has_any = ranked.any(dim=-1, keepdim=True)
            shares = scores.masked_fill(~has_any, 0.0).softmax(dim=-1)
            scores = shares.masked_fill(~ranked, float("-inf"))
        # As many as the hard map keeps, but not rounded; at least one.
        kappa = (router.keep_ratio * ranked.sum(dim=-1).to(scores.dtype)).clamp(min=1.0)
        kappa = kappa.expand(scores.shape[:-1])
        if picks_reference("attention", q, backend):
            return reference.soft_top_k(scores, kappa, router.temperature)
        soft: Tensor = torch.ops.sparline.soft_top_k(
            scores.contiguous(), kappa.contiguous(), router.temperature
        )
        return soft


def pool_rows(x: Tensor, rows: Rows) -> Tensor:
    """Means of the blocks, (B, H, T, D), float32 at least; differentiable."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    num_blocks = len(rows.blocks)
    if rows.even_rows:  # without atomics: faster on a GPU, and the same bits every time
        x = x if rows.order is None else x.index_select(2, rows.order)
        x = F.pad(x, (0, 0, 0, num_blocks * rows.even_rows - x.shape[2]))
        sums = torch.unflatten(x, 2, (num_blocks, rows.even_rows)).sum(dim=3, dtype=dtype)
    else:
        sums = x.new_zeros((*x.shape[:2], num_blocks, x.shape[3]), dtype=dtype)
        sums = sums.index_add(2, rows.block_of_row, x.to(dtype))
    return sums / rows.counts.to(dtype)[:, None]


def _smooth_pooled(pooled: Tensor, rows: Rows) -> Tensor:
    """Pooled keys minus the mean key of their sequence. It moves all scores of a row alike."""
    counts = rows.counts.to(pooled.dtype)
    same = (rows.sequence[:, None] == rows.sequence).to(pooled.dtype) * counts
    return pooled - (same / same.sum(dim=1, keepdim=True)) @ pooled


# Chunk routers (VMoBA) --------------------------------------------------------------------------


def _choose_chunks(q: Tensor, k: Tensor, recipe: Recipe, router: ChunkRouter, axes: Axes) -> Tiles:
    """Which rows attend which key blocks, from the gate q . mean(k of a chunk)."""
    assert axes.chunk_ends is not None
    device, length, ends = q.device, k.shape[2], axes.chunk_ends
    # By row in memory for tensors, by position for what is compared with blocks.
    rows_q = rows_of(axes.query_segments, length, recipe.block_q, axes.order_key, device)
    places_q = rows_of(axes.query_segments, length, recipe.block_q, None, device)
    places_k = rows_of(axes.key_segments, length, recipe.block_k, None, device)
    chunks = [Segment(a, b) for a, b in itertools.pairwise((0, *ends))]
    chunk_rows = rows_of(chunks, length, length, axes.order_key, device)
    chunk_of_position = rows_of(chunks, length, length, None, device).block_of_row
    means = pool_rows(k, chunk_rows)
    means = means.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (B, H, C, D)

    own = chunk_of_position[:, None] == torch.arange(len(ends), device=device)  # (N, C)
    if router.pool_queries:
        queries = pool_rows(q, rows_q)  # (B, H, T_m, D)
        own_blocks = own.new_zeros(len(rows_q.blocks), len(ends))
        own = own_blocks.index_put((places_q.block_of_row, chunk_of_position), own.new_ones(()))
    else:
        key = axes.order_key
        queries = q if key is None else q[:, :, order_on(key, device, torch.int64)]
        queries = queries.to(means.dtype)  # (B, H, N, D)
    gate = queries @ means.mT  # (B, H, rows, C), unscaled
    kept = torch.zeros_like(gate, dtype=torch.bool)
    for sequence in dict.fromkeys(b.sequence for b in places_k.blocks):
        # A sequence is a run of positions, and so of blocks and of chunks.
        inside = [b for b in places_k.blocks if b.sequence == sequence]
        first = sum(end <= inside[0].begin for end in ends)
        columns = slice(first, sum(end < inside[-1].end for end in ends) + 1)
        rows = slice(inside[0].begin, inside[-1].end)
        if router.pool_queries:
            blocks = [i for i, b in enumerate(rows_q.blocks) if b.sequence == sequence]
            rows = slice(blocks[0], blocks[-1] + 1)
        chosen = select_chunks(gate[:, :, rows, columns], own[rows, columns], router)
        kept[:, :, rows, columns] = chosen
    bits = kept[..., chunk_of_position[places_k.begins]]  # (B, H, rows, T_n)
    if router.pool_queries:
        return Tiles(bits.to(torch.int8))
    # Bits are laid out block by block: short blocks are filled up.
    block = places_q.block_of_row
    in_block = torch.arange(length, device=device) - places_q.begins[block]
    padded = bits.new_zeros((*bits.shape[:2], len(rows_q.blocks) * recipe.block_q, bits.shape[3]))
    padded[:, :, block * recipe.block_q + in_block] = bits
    return Tiles(bits=pack_bits(padded), bit_rows=1)


def select_chunks(gate: Tensor, own: Tensor, router: ChunkRouter) -> Tensor:
    """The chunks that are kept, bool like gate (B, H, rows, C); own (rows, C) always are.

    Ranking is by score descending, then by chunk ascending (and by row, where rows are ranked
    together).
    """
    num_chunks = gate.shape[-1]
    if router.num_chunks is not None:
        rank = gate.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return (rank < min(router.num_chunks, num_chunks)) | own
    first = {"query_head": 3, "head_global": 2, "overall": 1}[router.mode]
    # Gates that are not finite rank last, so that they do not spoil what is ranked with them.
    infinity, is_finite = float("inf"), gate.isfinite()
    low = gate.masked_fill(~is_finite, infinity).flatten(first).amin(dim=-1)
    high = gate.masked_fill(~is_finite, -infinity).flatten(first).amax(dim=-1)
    low, high = (x.reshape(*x.shape, *[1] * (4 - first)) for x in (low, high))
    flat = high <= low
    scores = torch.where(flat, 1.0, (gate - low) / torch.where(flat, 1.0, high - low))
    scores = torch.where(is_finite, scores, 0.0).flatten(first)
    ranked, index = scores.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(dim=-1, dtype=torch.float64) - ranked
    total = ranked.sum(dim=-1, keepdim=True, dtype=torch.float64)
    chosen = before < router.threshold * total  # the prefix without this one falls short
    chosen[..., 0] = True
    kept = torch.zeros_like(chosen).scatter(-1, index, chosen).reshape(gate.shape) | own
    if router.mode == "query_head":  # a query that chose only its own chunk takes one more
        is_alone = (kept == own).all(dim=-1, keepdim=True)
        best = gate.masked_fill(own, float("-inf")).argmax(dim=-1, keepdim=True)
        extra = torch.zeros_like(kept).scatter(-1, best, True) & ~own
        kept = kept | (extra & is_alone)
    return kept


def operator_order(axes: Axes, q: Tensor) -> Tensor | None:
    """The order as the operators take it: int32, on the device of q."""
    return None if axes.order_key is None else order_on(axes.order_key, q.device, torch.int32)
