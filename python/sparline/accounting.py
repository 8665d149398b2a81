# SPDX-License-Identifier: Apache-2.0
"""Sparsity and FLOPs of a call, counted the same way everywhere (docs/math.md, "Accounting")."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from .methods import SLA, Dense, Method
from .reference import CRITICAL, MARGINAL, Block, Segment, count_blocks, make_blocks

#: What one backward costs in forwards: five products for two in attention, two for one in a
#: projection.
BACKWARD_ATTENTION, BACKWARD_PROJECTION = 2.5, 2.0


def block_sparsity(block_class: Tensor) -> float:
    """1 - critical blocks / all blocks, over the whole map: the papers' figure."""
    return 1.0 - (block_class == CRITICAL).double().mean().item()


def element_sparsity(
    block_class: Tensor,
    method: Method,
    num_queries: int,
    num_keys: int,
    query_segments: Sequence[Segment] = (),
    key_segments: Sequence[Segment] = (),
) -> float:
    """1 - critical score elements / (N_q N_k): the block figure with short blocks at their true
    size.
    """
    q_rows, k_rows = _rows(method, num_queries, num_keys, query_segments, key_segments)
    critical = (block_class == CRITICAL).double()
    elements = torch.einsum("...ij,i,j->...", critical, q_rows, k_rows)
    return 1.0 - (elements.mean() / (num_queries * num_keys)).item()


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations of one call by stage, a multiply-add counted as two."""

    full: float  # what dense attention would cost; not part of total
    sparse: float = 0.0
    linear: float = 0.0
    aggregate: float = 0.0  # summing h_j and z_j over the linear scope
    projection: float = 0.0
    feature_map: float = 0.0  # the hedgehog maps' products
    router: float = 0.0

    @property
    def total(self) -> float:
        return (
            self.sparse
            + self.linear
            + self.aggregate
            + self.projection
            + self.feature_map
            + self.router
        )

    @property
    def ratio(self) -> float:
        """total / full."""
        return self.total / self.full


def flops(
    method: Method,
    *,
    batch: int = 1,
    num_heads: int,
    num_kv_heads: int | None = None,
    num_queries: int,
    num_keys: int | None = None,
    head_dim: int,
    block_class: Tensor | None = None,
    query_segments: Sequence[Segment] = (),
    key_segments: Sequence[Segment] = (),
    direction: str = "forward",
) -> Flops:
    """FLOPs of one call of ``method``.

    ``block_class`` (B, H, T_m, T_n) gives the achieved counts; without it every block counts as
    full and the counts of the method's ratios are used (a single unprotected sequence).
    ``direction`` is "forward", "backward" or "both"; the router runs in the forward only.
    """
    if direction not in ("forward", "backward", "both"):
        raise ValueError(
            f'flops: direction must be "forward", "backward" or "both", got {direction!r}. A '
            "training step is both."
        )
    num_keys = num_queries if num_keys is None else num_keys
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    heads, kv_heads = batch * num_heads, batch * num_kv_heads
    features = 2 * head_dim if isinstance(method, SLA) and method.has_feature_weights else head_dim
    q_blocks = make_blocks(query_segments, num_queries, method.block_q)
    k_blocks = make_blocks(key_segments, num_keys, method.block_k)
    pairs = sum(a.sequence == b.sequence for a in q_blocks for b in k_blocks)

    full = 4.0 * head_dim * heads * _visible_elements(q_blocks, k_blocks)
    if isinstance(method, Dense):
        forward = Flops(full, sparse=full)
    else:
        elements, adds = _achieved_counts(
            method, heads, num_queries, num_keys, block_class, q_blocks, k_blocks
        )
        uses_linear, hedgehog = method.has_linear_branch, method.has_feature_weights
        per_query = 2.0 * num_queries * features * head_dim + 2.0 * num_queries * features
        per_key = 2.0 * num_keys * features * head_dim + num_keys * features
        pooled = (heads * num_queries + kv_heads * num_keys) * head_dim
        forward = Flops(
            full,
            sparse=4.0 * head_dim * elements if method.combine != "linear" else 0.0,
            linear=heads * per_query + kv_heads * per_key if uses_linear else 0.0,
            aggregate=features * (head_dim + 1.0) * adds if uses_linear else 0.0,
            projection=2.0 * heads * num_queries * head_dim**2
            if method.combine == "projection"
            else 0.0,
            feature_map=2.0 * (heads * num_queries + kv_heads * num_keys) * head_dim**2
            if hedgehog
            else 0.0,
            router=pooled + 2.0 * heads * pairs * head_dim if method.needs_block_map else 0.0,
        )
    backward = Flops(
        full * BACKWARD_ATTENTION,
        sparse=forward.sparse * BACKWARD_ATTENTION,
        linear=forward.linear * BACKWARD_ATTENTION,
        aggregate=forward.aggregate * BACKWARD_ATTENTION,
        projection=forward.projection * BACKWARD_PROJECTION,
        feature_map=forward.feature_map * BACKWARD_PROJECTION,
    )
    if direction == "both":
        ours, theirs = dataclasses.astuple(forward), dataclasses.astuple(backward)
        return Flops(*(a + b for a, b in zip(ours, theirs, strict=True)))
    return forward if direction == "forward" else backward


def _rows(
    method: Method,
    num_queries: int,
    num_keys: int,
    query_segments: Sequence[Segment],
    key_segments: Sequence[Segment],
) -> tuple[Tensor, Tensor]:
    q_blocks = make_blocks(query_segments, num_queries, method.block_q)
    k_blocks = make_blocks(key_segments, num_keys, method.block_k)
    return _block_rows(q_blocks), _block_rows(k_blocks)


def _block_rows(blocks: list[Block]) -> Tensor:
    return torch.tensor([b.end - b.begin for b in blocks], dtype=torch.float64)


def _visible_elements(q_blocks: list[Block], k_blocks: list[Block]) -> int:
    """Score elements of dense attention: sequences see only themselves."""
    keys: dict[int, int] = {}
    for block in k_blocks:
        keys[block.sequence] = keys.get(block.sequence, 0) + block.end - block.begin
    return sum((b.end - b.begin) * keys.get(b.sequence, 0) for b in q_blocks)


def _achieved_counts(
    method: SLA,
    heads: int,
    num_queries: int,
    num_keys: int,
    block_class: Tensor | None,
    q_blocks: list[Block],
    k_blocks: list[Block],
) -> tuple[float, float]:
    """Critical score elements, and additions of an h_j for the linear sums, over all heads."""
    total = len(k_blocks)
    if block_class is None:
        num_critical = min(
            max(count_blocks(method.keep_ratio, total, method.count_rounding), 1), total
        )
        num_negligible = min(
            total - num_critical,
            count_blocks(method.negligible_ratio, total, method.count_rounding),
        )
        elements = float(heads * num_queries * min(num_critical * method.block_k, num_keys))
        in_scope = {
            "marginal": total - num_critical - num_negligible,
            "complement": total - num_critical,
            "all": total,
        }[method.linear_scope]
        return elements, float(heads * len(q_blocks) * min(in_scope, total - in_scope))
    critical = (block_class == CRITICAL).double().cpu()
    elements = torch.einsum(
        "bhij,i,j->", critical, _block_rows(q_blocks), _block_rows(k_blocks)
    ).item()
    if method.linear_scope == "all":
        return elements, 0.0
    members = (
        block_class == MARGINAL if method.linear_scope == "marginal" else block_class != CRITICAL
    )
    in_scope_rows = members.sum(dim=-1).double()
    return elements, torch.minimum(in_scope_rows, total - in_scope_rows).sum().item()
