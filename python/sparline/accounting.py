# SPDX-License-Identifier: Apache-2.0
"""Sparsity and FLOPs of a call, counted the same way everywhere (docs/math.md, "Accounting")."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .methods import BlockRouter, ChunkRouter, Method, Recipe
from .reference import CRITICAL, MARGINAL, Block, Segment, count_blocks, make_blocks

#: What one backward costs in forwards: five products for two in attention, two for one in a
#: projection.
BACKWARD_ATTENTION, BACKWARD_PROJECTION = 2.5, 2.0


def block_sparsity(block_class: Tensor) -> float:
    """1 - critical blocks / all blocks, over the whole map: the papers' figure.

    Under a soft map every block with a weight is computed, and counts.
    """
    return 1.0 - is_critical(block_class).double().mean().item()


def is_critical(block_class: Tensor) -> Tensor:
    """The blocks that enter the softmax."""
    return block_class > 0 if block_class.is_floating_point() else block_class == CRITICAL


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
    critical = is_critical(block_class).double()
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
    coarse: float = 0.0  # VSA's attention among cube means
    combine: float = 0.0  # SLA2's alpha, VSA's gates

    @property
    def stages(self) -> dict[str, float]:
        """Each stage by name; they add up to ``total``."""
        return {key: x for key, x in dataclasses.asdict(self).items() if key != "full"}

    @property
    def total(self) -> float:
        return sum(self.stages.values())

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
    kept_ratio: float | None = None,
    query_segments: Sequence[Segment] = (),
    key_segments: Sequence[Segment] = (),
    direction: str = "forward",
) -> Flops:
    """FLOPs of one call of ``method``.

    ``block_class`` (B, H, T_m, T_n) gives the achieved counts; without it every block counts as
    full and the counts of the method's ratios are used (a single unprotected sequence). Methods
    whose share depends on the data (top-p, VMoBA, DynSparse, BLASST) need one of the two:
    ``kept_ratio`` is the share of the score elements, or for the in-loop methods of the visited
    tiles, that takes part in the softmax. ``direction`` is "forward", "backward" or "both"; the
    router runs in the forward only.
    """
    if direction not in ("forward", "backward", "both"):
        raise ValueError(
            f'flops: direction must be "forward", "backward" or "both", got {direction!r}. A '
            "training step is both."
        )
    num_keys = num_queries if num_keys is None else num_keys
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    heads, kv_heads = batch * num_heads, batch * num_kv_heads
    recipe = method.recipe
    features = 2 * head_dim if recipe.has_feature_weights else head_dim
    q_blocks = make_blocks(query_segments, num_queries, recipe.block_q)
    k_blocks = make_blocks(key_segments, num_keys, recipe.block_k)

    full = 4.0 * head_dim * heads * _visible_elements(q_blocks, k_blocks)
    elements, adds = _achieved_counts(
        method, heads, num_queries, num_keys, block_class, kept_ratio, q_blocks, k_blocks
    )
    sparse = 4.0 * head_dim * elements
    if recipe.skip is not None:  # q k^T of every tile, p v of the kept ones
        sparse = 0.5 * full + 2.0 * head_dim * elements
    uses_linear = recipe.has_linear_branch
    per_query = 2.0 * num_queries * features * head_dim + 2.0 * num_queries * features
    per_key = 2.0 * num_keys * features * head_dim + num_keys * features
    pairs = sum(a.sequence == b.sequence for a in q_blocks for b in k_blocks)
    pooled = (heads * num_queries + kv_heads * num_keys) * head_dim
    blends = recipe.combine == "blend"
    forward = Flops(
        full,
        sparse=sparse if recipe.combine != "linear" else 0.0,
        linear=heads * per_query + kv_heads * per_key if uses_linear else 0.0,
        aggregate=features * (head_dim + 1.0) * adds if uses_linear else 0.0,
        projection=2.0 * heads * num_queries * head_dim**2
        if recipe.combine == "projection"
        else 0.0,
        feature_map=2.0 * (heads * num_queries + kv_heads * num_keys) * head_dim**2
        if recipe.has_feature_weights
        else 0.0,
        router=_router_flops(
            recipe, heads, kv_heads, num_queries, num_keys, head_dim, q_blocks, k_blocks
        ),
        # Means of v besides those of the router, and attention among the means.
        coarse=4.0 * heads * pairs * head_dim + kv_heads * num_keys * head_dim
        if recipe.has_coarse_branch
        else 0.0,
        combine=3.0 * heads * num_queries * head_dim if blends or recipe.has_coarse_branch else 0.0,
    )
    pooling = pooled if recipe.has_coarse_branch else 0.0
    backward = Flops(
        full * BACKWARD_ATTENTION,
        sparse=5.0 * 2.0 * head_dim * elements
        if recipe.skip is not None
        else forward.sparse * BACKWARD_ATTENTION,
        linear=forward.linear * BACKWARD_ATTENTION,
        aggregate=forward.aggregate * BACKWARD_ATTENTION,
        projection=forward.projection * BACKWARD_PROJECTION,
        feature_map=forward.feature_map * BACKWARD_PROJECTION,
        coarse=forward.coarse * BACKWARD_ATTENTION + pooling,
        combine=forward.combine * BACKWARD_PROJECTION,
    )
    if direction == "both":
        ours, theirs = dataclasses.astuple(forward), dataclasses.astuple(backward)
        return Flops(*(a + b for a, b in zip(ours, theirs, strict=True)))
    return forward if direction == "forward" else backward


def depends_on_data(method: Method) -> bool:
    """Whether the share that takes part in the softmax follows from the data, not from a ratio."""
    recipe = method.recipe
    router = recipe.router
    if isinstance(router, BlockRouter):
        return router.selection != "top_k" or router.min_similarity is not None
    return recipe.skip is not None or isinstance(router, ChunkRouter)


def _router_flops(
    recipe: Recipe,
    heads: int,
    kv_heads: int,
    num_queries: int,
    num_keys: int,
    head_dim: int,
    q_blocks: list[Block],
    k_blocks: list[Block],
) -> float:
    router = recipe.router
    if router is None:
        return 0.0
    if isinstance(router, ChunkRouter):
        gates = math.ceil(num_keys / recipe.block_k)  # chunks, at most one for each key block
        queries = len(q_blocks) if router.pool_queries else num_queries
        return kv_heads * num_keys * head_dim + 2.0 * heads * queries * gates * head_dim
    pairs = sum(a.sequence == b.sequence for a in q_blocks for b in k_blocks)
    pooled = (heads * num_queries + kv_heads * num_keys) * head_dim
    learned = 2.0 * heads * (len(q_blocks) + len(k_blocks)) * head_dim**2
    return pooled + 2.0 * heads * pairs * head_dim + learned * (recipe.combine == "blend")


def _rows(
    method: Method,
    num_queries: int,
    num_keys: int,
    query_segments: Sequence[Segment],
    key_segments: Sequence[Segment],
) -> tuple[Tensor, Tensor]:
    q_blocks = make_blocks(query_segments, num_queries, method.recipe.block_q)
    k_blocks = make_blocks(key_segments, num_keys, method.recipe.block_k)
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
    method: Method,
    heads: int,
    num_queries: int,
    num_keys: int,
    block_class: Tensor | None,
    kept_ratio: float | None,
    q_blocks: list[Block],
    k_blocks: list[Block],
) -> tuple[float, float]:
    """Score elements in the softmax, and additions of an h_j to the linear sums; of all heads."""
    recipe, total = method.recipe, len(k_blocks)
    router = recipe.router
    if kept_ratio is not None:
        members = 1.0 if recipe.linear_scope == "all" else 1.0 - kept_ratio
        if recipe.linear_scope == "marginal" and isinstance(router, BlockRouter):
            members = max(0.0, members - router.negligible_ratio)
        share = min(members, 1.0 - members)
        return (
            kept_ratio * heads * _visible_elements(q_blocks, k_blocks),
            heads * len(q_blocks) * total * share,
        )
    if block_class is not None:
        critical = is_critical(block_class).double().cpu()
        elements = torch.einsum(
            "bhij,i,j->", critical, _block_rows(q_blocks), _block_rows(k_blocks)
        ).item()
        if recipe.linear_scope == "all":
            return elements, 0.0
        if block_class.is_floating_point():  # every block is in the linear branch too
            return elements, float(block_class.numel())
        is_marginal = recipe.linear_scope == "marginal"
        linear = block_class == MARGINAL if is_marginal else block_class != CRITICAL
        in_scope_rows = linear.sum(dim=-1).double()
        return elements, torch.minimum(in_scope_rows, total - in_scope_rows).sum().item()
    if depends_on_data(method):
        raise ValueError(
            f"flops: what {method.name} keeps depends on the data, and neither block_class nor "
            "kept_ratio was given. Pass the map that sparline.route returns, or a ratio."
        )
    if router is None:
        is_linear = recipe.combine == "linear"
        return (0.0 if is_linear else float(heads * _visible_elements(q_blocks, k_blocks))), 0.0
    assert isinstance(router, BlockRouter)
    if router.mode == "soft":  # every block is in both branches
        return float(heads * _visible_elements(q_blocks, k_blocks)), float(
            heads * len(q_blocks) * total
        )
    wanted = router.keep_count or count_blocks(router.keep_ratio, total, router.count_rounding)
    num_critical = min(max(wanted, 1), total)
    num_negligible = min(
        total - num_critical,
        count_blocks(router.negligible_ratio, total, router.count_rounding),
    )
    elements = float(heads * num_queries * min(num_critical * recipe.block_k, num_keys))
    in_scope = {
        "marginal": total - num_critical - num_negligible,
        "complement": total - num_critical,
        "all": total,
    }[recipe.linear_scope]
    return elements, float(heads * len(q_blocks) * min(in_scope, total - in_scope))
