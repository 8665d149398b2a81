# SPDX-License-Identifier: Apache-2.0
"""``attention`` and ``route``: the operators for callers that hold their own tensors.

A call goes one way: arguments are checked, packed sequences, protected spans and the token order
become axes, the method's router names the tiles, the operator attends. Layout is strides: a
(B, N, H, D) tensor goes to the kernels as a transposed view, never as a copy.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import _ops, arguments, reference
from .arguments import flatten, make_spec, picks_reference, to_bhnd
from .methods import BlockRouter, ChunkRouter, Method, Recipe
from .reference import Weights, unpack_bits
from .routing import Tiles, operator_order, pool_rows, route_tiles
from .tokens import (
    Axes,
    Grids,
    Lengths,
    Spans,
    blocks_of,
    kept,
    make_axes,
    plain,
    rows_of,
    segment_numbers,
)

#: alpha = 0.9 where nothing has been learned or measured.
DEFAULT_ALPHA_LOGIT = 2.2


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    method: Method,
    layout: str = ...,
    scale: float | None = ...,
    block_map: Tensor | None = ...,
    weights: Weights | None = ...,
    gate_coarse: Tensor | None = ...,
    gate_fine: Tensor | None = ...,
    grid: Grids | None = ...,
    cu_seqlens_q: Lengths | None = ...,
    cu_seqlens_k: Lengths | None = ...,
    protected_q: Spans = ...,
    protected_k: Spans = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    method: Method,
    layout: str = ...,
    scale: float | None = ...,
    block_map: Tensor | None = ...,
    weights: Weights | None = ...,
    gate_coarse: Tensor | None = ...,
    gate_fine: Tensor | None = ...,
    grid: Grids | None = ...,
    cu_seqlens_q: Lengths | None = ...,
    cu_seqlens_k: Lengths | None = ...,
    protected_q: Spans = ...,
    protected_k: Spans = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    method: Method,
    layout: str = "bhnd",
    scale: float | None = None,
    block_map: Tensor | None = None,
    weights: Weights | None = None,
    gate_coarse: Tensor | None = None,
    gate_fine: Tensor | None = None,
    grid: Grids | None = None,
    cu_seqlens_q: Lengths | None = None,
    cu_seqlens_k: Lengths | None = None,
    protected_q: Spans = (),
    protected_k: Spans = (),
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q over k and v by ``method``; differentiable in q, k, v, ``weights``, gates and
    a soft ``block_map``.

    Args:
        q: (B, H, N_q, D), or (B, N_q, H, D) with ``layout="bnhd"``; float32, bfloat16 or float16,
            last stride 1.
        k: (B, H_kv, N_k, D) in the same layout; H must be a multiple of H_kv.
        v: as ``k``.
        method: ``SLA(...)``, ``SLA2(...)``, ``Dense()`` or any other of ``sparline.METHODS``.
        layout: order of the dimensions of q, k, v, gates and the result.
        scale: softmax scale; None is 1 / sqrt(D).
        block_map: (B, H, T_m, T_n) or broadcastable, in place of the router's: int8 with 1
            critical, 0 marginal, -1 negligible; or a floating soft map in [0, 1]. Protected spans
            and packed sequences are laid over it.
        weights: learned tensors. Without ``proj_weight`` the projection is the zero one that
            training starts from, so that o = o_s exactly; without ``alpha_logit`` alpha is 0.9;
            without ``router_q`` and ``router_k`` the router ranks pooled q and k themselves.
        gate_coarse: VSA's G_c, like q; None is 1.
        gate_fine: VSA's G_f, like q; None is 1.
        grid: where the tokens stand, ``Grid(frames, height, width)``, for methods that order or
            partition them; one for each packed sequence, or one that fits all.
        cu_seqlens_q: packed sequences, as offsets 0 = c_0 <= c_1 <= ... = N_q; sequences do not
            see each other. A list or a CPU tensor (a list under torch.compile).
        cu_seqlens_k: the same for the keys; None takes ``cu_seqlens_q``.
        protected_q: spans (begin, end) of query rows that get exactly dense attention, such as
            text tokens. With a token order they count positions; text keeps its place.
        protected_k: spans of keys that every query of their sequence attends exactly.
        return_lse: also return the natural log of the critical softmax sums, (B, H, N_q), a
            constant for autograd.
        backend: None for the best kernels that fit, "cuda", "cpu", or "reference" (plain PyTorch,
            any dtype, slow). The environment variable ``SPARLINE_BACKEND`` overrides it.

    Returns:
        o in the shape, layout and dtype of q, or (o, lse).
    """
    call = _Call.make(
        "attention",
        (q, k, v),
        method,
        layout,
        scale,
        weights,
        (grid, cu_seqlens_q, cu_seqlens_k, protected_q, protected_k),
        backend,
    )
    q, k, v = call.qkv
    if block_map is not None:
        tiles = Tiles(arguments.check_block_map(block_map, method, call.map_shape))
    else:
        tiles = call.route()
    gates = [_to_gate(name, g, q, layout) for name, g in _named_gates(gate_coarse, gate_fine)]
    if (gate_coarse is not None or gate_fine is not None) and not call.recipe.has_coarse_branch:
        raise ValueError(
            f"attention: gate_coarse and gate_fine belong to VSA, got {method}. Leave them None."
        )
    o, lse, _, _ = _attend(call, tiles)
    if call.recipe.has_coarse_branch:
        o = _with_coarse_branch(call, o, *gates)
    o = to_bhnd("attention", o, layout)  # its own inverse
    return (o, lse) if return_lse else o


def route(
    q: Tensor,
    k: Tensor,
    *,
    method: Method,
    layout: str = "bhnd",
    scale: float | None = None,
    weights: Weights | None = None,
    grid: Grids | None = None,
    cu_seqlens_q: Lengths | None = None,
    cu_seqlens_k: Lengths | None = None,
    protected_q: Spans = (),
    protected_k: Spans = (),
    backend: str | None = None,
) -> Tensor:
    """The block map that ``attention`` would use: (B, H, T_m, T_n).

    int8 with 1 critical, 0 marginal, -1 negligible; floating for a soft router. For VMoBA, whose
    rows choose one by one, 1 where any row of the block attends. Arguments as in ``attention``. A
    hard map is a constant: no gradient flows through it.
    """
    call = _Call.make(
        "route",
        (q, k, k),
        method,
        layout,
        scale,
        weights,
        (grid, cu_seqlens_q, cu_seqlens_k, protected_q, protected_k),
        backend,
    )
    if call.recipe.router is None:
        raise TypeError(
            f"route: method must have a router, got {method!r}. Dense attention and the in-loop "
            "methods have no block map; tile_statistics tells which tiles those skip."
        )
    tiles = call.route()
    if tiles.block_map is not None:
        return tiles.block_map
    assert tiles.bits is not None
    num_rows, num_columns = call.map_shape[2:]
    flags = torch.unflatten(unpack_bits(tiles.bits, num_columns), 2, (num_rows, -1)).any(dim=3)
    return reference.overlay_segments(flags.to(torch.int8), *call.blocks)


class TileStatistics(NamedTuple):
    """What an in-loop method did."""

    visited: Tensor  # int64 (B, H): tiles whose q k^T was computed
    skipped: (
        Tensor  # float64 (B, H): those whose exponentials and p v were not; in shares of a tile
    )
    row_votes: Tensor  # float32 (B, H, T_m): (row, tile) pairs that would skip by themselves
    kept_bits: Tensor  # uint8 (B, H, T_m G, ceil(T_n / 8)), see include/sparline/attention.h
    lse: Tensor  # float32 (B, H, N_q), over the kept tiles
    recall: Tensor | None  # float32 (B, H, N_q): the share of the dense softmax that was kept

    @property
    def sparsity(self) -> float:
        """skipped / visited. Unlike block sparsity it still pays for q k^T."""
        return (self.skipped.sum() / self.visited.sum()).item()


def tile_statistics(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    method: Method,
    layout: str = "bhnd",
    scale: float | None = None,
    grid: Grids | None = None,
    cu_seqlens_q: Lengths | None = None,
    cu_seqlens_k: Lengths | None = None,
    protected_q: Spans = (),
    protected_k: Spans = (),
    recall: bool = False,
    backend: str | None = None,
) -> TileStatistics:
    """Runs an in-loop method (DynSparse, BLASST) and tells which tiles it skipped.

    Arguments as in ``attention``. ``recall`` also runs dense attention, to say how much of each
    row's softmax was kept.
    """
    call = _Call.make(
        "tile_statistics",
        (q, k, v),
        method,
        layout,
        scale,
        None,
        (grid, cu_seqlens_q, cu_seqlens_k, protected_q, protected_k),
        backend,
    )
    if call.recipe.skip is None:
        raise TypeError(
            f"tile_statistics: method must skip inside the loop, got {method!r}. Pass DynSparse or "
            "BLASST; route gives the map of the others."
        )
    with torch.no_grad():
        _, lse, kept_bits, row_votes = _attend(call, Tiles(), counts_votes=True)
        assert kept_bits is not None
        assert row_votes is not None
        query_blocks, key_blocks = call.blocks
        keys_of = Counter(block.sequence for block in key_blocks)
        visited = sum(keys_of[block.sequence] for block in query_blocks)
        # A tile whose row groups decide apart counts by the share of its groups that has rows.
        group = call.recipe.skip.rows or call.recipe.block_q
        num_groups = -(-call.recipe.block_q // group)
        shares = torch.zeros(len(query_blocks), num_groups, dtype=torch.float64)
        for i, block in enumerate(query_blocks):
            used = -(-(block.end - block.begin) // group)
            shares[i, :used] = 1.0 / used
        flags = unpack_bits(kept_bits, len(key_blocks)).sum(dim=-1)  # (B, H, T_m G)
        kept = (flags * shares.flatten().to(flags.device)).sum(dim=-1)
        shape = call.qkv[0].shape[:2]
        total = torch.full(shape, visited, dtype=torch.float64, device=kept.device)
        share = None
        if recall:
            dense = dataclasses.replace(call, recipe=dataclasses.replace(call.recipe, skip=None))
            share = (lse - _attend(dense, Tiles())[1]).exp()
        return TileStatistics(total.long(), total - kept, row_votes, kept_bits, lse, share)


def explain(
    q: Tensor,
    k: Tensor,
    *,
    method: Method,
    layout: str = "bhnd",
    grid: Grids | None = None,
    cu_seqlens_q: Lengths | None = None,
    cu_seqlens_k: Lengths | None = None,
    protected_q: Spans = (),
    protected_k: Spans = (),
    backend: str | None = None,
    device: str | None = None,
) -> str:
    """The plan for such a call in words: backend, blocks, workspace, what was rejected and why.

    ``device`` "cpu" or "cuda" asks for another device than that of q, "sm_80", "sm_90", ... for a
    CUDA device of that kind.
    """
    _ops.require()
    arguments.check_method("explain", method)
    q, k = (to_bhnd("explain", x, layout) for x in (q, k))
    arguments.check_qkv("explain", q, k, k)
    recipe = method.recipe
    axes = make_axes(
        "explain",
        recipe,
        q.shape[2],
        k.shape[2],
        grid,
        cu_seqlens_q,
        cu_seqlens_k,
        protected_q,
        protected_k,
    )
    router = recipe.router
    has_bits = isinstance(router, ChunkRouter) and not router.pool_queries
    options = arguments.attend_options(recipe, None, bit_rows=1 if has_bits else 0)
    if router is not None and not has_bits:
        is_soft = isinstance(router, BlockRouter) and router.mode != "hard"
        options["block_map"] = "soft" if is_soft else "class"
    if device is not None and device.startswith("sm_"):
        options["device"], options["cuda_arch"] = "cuda", device.removeprefix("sm_")
    elif device is not None:
        options["device"] = device
    text: str = torch.ops.sparline.explain(
        q,
        k,
        flatten(axes.query_segments),
        flatten(axes.key_segments),
        make_spec(options, backend),
    )
    return text


# One call ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call after its arguments were checked; q, k and v as (B, H, N, D) views."""

    qkv: tuple[Tensor, Tensor, Tensor]
    recipe: Recipe
    weights: Weights
    axes: Axes
    scale: float | None
    backend: str | None
    is_reference: bool

    @staticmethod
    def make(
        caller: str,
        qkv: tuple[Tensor, Tensor, Tensor],
        method: Method,
        layout: str,
        scale: float | None,
        weights: Weights | None,
        axes: tuple[Any, ...],
        backend: str | None,
    ) -> _Call:
        arguments.check_method(caller, method)
        q, k, v = (to_bhnd(caller, x, layout) for x in qkv)
        arguments.check_qkv(caller, q, k, v)
        arguments.check_scale(caller, scale)
        weights = arguments.check_weights(
            caller, method, Weights() if weights is None else weights, q, k
        )
        recipe = arguments.without_zero_projection(method.recipe, weights)
        grid, *rest = axes
        made = make_axes(caller, recipe, q.shape[2], k.shape[2], grid, *rest)
        use_reference = picks_reference(caller, q, backend)
        return _Call((q, k, v), recipe, weights, made, scale, backend, use_reference)

    @property
    def map_shape(self) -> tuple[int, int, int, int]:
        q, k, _ = self.qkv
        return (
            q.shape[0],
            q.shape[1],
            _ops._num_blocks(q.shape[2], flatten(self.axes.query_segments), self.recipe.block_q),
            _ops._num_blocks(k.shape[2], flatten(self.axes.key_segments), self.recipe.block_k),
        )

    @property
    def blocks(self) -> tuple[list[reference.Block], list[reference.Block]]:
        q, k, _ = self.qkv
        return (
            reference.make_blocks(self.axes.query_segments, q.shape[2], self.recipe.block_q),
            reference.make_blocks(self.axes.key_segments, k.shape[2], self.recipe.block_k),
        )

    @property
    def attended_dtype(self) -> torch.dtype:
        """Of q, k and v where they are attended: autocast casts them on the way."""
        q = self.qkv[0]
        if q.dtype == torch.float64 or not torch.is_autocast_enabled(q.device.type):
            return q.dtype
        return torch.get_autocast_dtype(q.device.type)

    def route(self) -> Tiles:
        q, k, _ = self.qkv
        dtype = self.attended_dtype
        if q.is_cuda and q.dtype == torch.float32:
            # Routers rank what comes in, where they can: the GPU's take 16 bits.
            q, k = q.to(dtype), k.to(dtype)
        with torch.autocast(q.device.type, enabled=False):
            tiles = route_tiles(
                q, k, self.recipe, self.weights, self.axes, self.scale, self.backend
            )
        # Keys that are still to be rounded have another mean.
        return tiles if k.dtype == dtype else tiles._replace(k_mean=None)


def _attend(
    call: _Call, tiles: Tiles, counts_votes: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The operator: o, lse and, for in-loop methods, kept_bits and, if asked for, row_votes."""
    q, k, v = call.qkv
    recipe, axes = call.recipe, call.axes
    weights = call.weights._replace(router_q=None, router_k=None)
    if recipe.combine == "blend":
        weights = weights._replace(alpha_logit=_alpha_rows(call))
    tile_order = _tile_order(call)
    if call.is_reference:
        q, k, v = (x.to(call.attended_dtype) for x in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):
            return reference.attend(
                q,
                k,
                v,
                recipe,
                tiles.block_map,
                weights,
                axes.query_segments,
                axes.key_segments,
                scale=call.scale,
                tile_bits=tiles.bits,
                bit_rows=tiles.bit_rows,
                query_order=axes.order,
                key_order=axes.order,
                tile_order=tile_order,
            )
    block_map = tiles.block_map
    if block_map is not None and block_map.is_floating_point():
        block_map = block_map.float()
    order = operator_order(axes, q)
    options = arguments.attend_options(recipe, call.scale, tiles.bit_rows)
    if counts_votes:
        options["row_votes"] = True
    o, lse, kept_bits, row_votes = torch.ops.sparline.attend(
        q,
        k,
        v,
        block_map,
        tiles.bits,
        order,
        order,
        tile_order,
        tiles.k_mean,
        arguments.pack_weights(recipe, weights, q, k),
        flatten(axes.query_segments),
        flatten(axes.key_segments),
        make_spec(options, call.backend),
    )
    return o, lse, kept_bits, row_votes


def _tile_order(call: _Call) -> Tensor | None:
    """The order in which an in-loop method visits key blocks, int32 (T_m, T_n); None ascends.

    Each sequence has an order of its own; blocks of others, which are not visited, stand last.
    """
    skip = call.recipe.skip
    if skip is None or skip.tile_order == "ascending":
        return None
    q, k, _ = call.qkv
    return _tile_order_on(
        skip.tile_order,
        segment_numbers(call.axes.query_segments),
        segment_numbers(call.axes.key_segments),
        plain((q.shape[2], k.shape[2], call.recipe.block_q, call.recipe.block_k)),
        q.device,
    )


@kept
def _tile_order_on(
    name: str,
    query_segments: tuple[int, ...],
    key_segments: tuple[int, ...],
    sizes: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    num_queries, num_keys, block_q, block_k = sizes
    query_blocks = blocks_of(query_segments, num_queries, block_q)
    key_blocks = blocks_of(key_segments, num_keys, block_k)
    with torch.device("cpu"):
        order = torch.empty(len(query_blocks), len(key_blocks), dtype=torch.int32)
        for sequence in dict.fromkeys(block.sequence for block in query_blocks):
            rows = [i for i, block in enumerate(query_blocks) if block.sequence == sequence]
            columns = [j for j, block in enumerate(key_blocks) if block.sequence == sequence]
            others = [j for j, block in enumerate(key_blocks) if block.sequence != sequence]
            j = torch.arange(len(columns))
            if name == "reverse":
                distance = -j.double().expand(len(rows), -1)
            else:  # outwards from the diagonal, the nearer first, the lower index first at a tie
                i = torch.arange(len(rows), dtype=torch.float64)[:, None]
                distance = (j - ((i + 0.5) * len(columns) / len(rows) - 0.5)).abs()
                if name == "sink_first":
                    distance[:, :1] = -1.0
            first = torch.tensor(columns, dtype=torch.long)[distance.argsort(dim=-1, stable=True)]
            last = torch.tensor(others, dtype=torch.long).expand(len(rows), -1)
            order[rows] = torch.cat([first, last], dim=1).to(torch.int32)
    return order.to(device)


def _alpha_rows(call: _Call) -> Tensor:
    """alpha's logit for each row, (B, H, N_q): the learned values stretched to this length."""
    q = call.qkv[0]
    batch, num_heads, length = q.shape[:3]
    logit = call.weights.alpha_logit
    if logit is None:
        return q.new_full((batch, num_heads, length), DEFAULT_ALPHA_LOGIT, dtype=torch.float32)
    axes = call.axes
    rows = rows_of(axes.query_segments, length, call.recipe.block_q, axes.order_key, q.device)
    if logit.shape[1] == 1:
        values = logit.expand(num_heads, length)
    else:
        # Learned for blocks or for tokens; interpolated within each sequence.
        has_tokens = call.recipe.alpha_shape == "token"
        parts = []
        for sequence in dict.fromkeys(block.sequence for block in rows.blocks):
            blocks = [b for b in rows.blocks if b.sequence == sequence]
            wanted = sum(b.end - b.begin for b in blocks) if has_tokens else len(blocks)
            parts.append(stretch(logit, wanted))
        values = parts[0] if len(parts) == 1 else torch.cat([logit[:, :0], *parts], dim=1)
        if not has_tokens:
            values = values[:, rows.block_of_row]
    return values.expand(batch, num_heads, length)


def stretch(values: Tensor, length: int) -> Tensor:
    """(H, T) interpolated to (H, length), linearly, end points mapped onto each other."""
    if values.shape[1] == length:
        return values
    # Written out, because the gradient of F.interpolate adds up in no fixed order on a GPU.
    num_values, length = plain((values.shape[1], length))
    ends, share = _stretched_places(num_values, length, values.dtype, values.device)
    low, high = values[:, ends].unbind(1)
    return torch.lerp(low, high, share)


@kept
def _stretched_places(
    num_values: int, length: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Between which two of ``num_values`` each of ``length`` lies (2, length), and how far from the
    first."""
    last = num_values - 1
    at = torch.linspace(0.0, last, length, dtype=torch.float64, device=device)
    low = at.floor().long().clamp(max=max(last - 1, 0))
    return torch.stack([low, (low + 1).clamp(max=last)]), (at - low).to(dtype)


# VSA's coarse branch ----------------------------------------------------------------------------


def _named_gates(
    gate_coarse: Tensor | None, gate_fine: Tensor | None
) -> list[tuple[str, Tensor | None]]:
    return [("gate_coarse", gate_coarse), ("gate_fine", gate_fine)]


def _to_gate(name: str, gate: Tensor | None, q: Tensor, layout: str) -> Tensor | None:
    if gate is None:
        return None
    gate = to_bhnd("attention", gate, layout)
    if gate.shape != q.shape:
        raise ValueError(
            f"attention: {name} must have the shape of q, {tuple(q.shape)} as (B, H, N, D), got "
            f"{tuple(gate.shape)}. It is a gate for each token and channel."
        )
    return gate


def _with_coarse_branch(
    call: _Call, o_fine: Tensor, gate_coarse: Tensor | None, gate_fine: Tensor | None
) -> Tensor:
    """G_c o_c + G_f o_f, where o_c is dense attention among the block means, for all rows of a
    block. Protected rows keep o_f."""
    q, k, v = call.qkv
    axes, recipe = call.axes, call.recipe
    rows_q = rows_of(axes.query_segments, q.shape[2], recipe.block_q, axes.order_key, q.device)
    rows_k = rows_of(axes.key_segments, k.shape[2], recipe.block_k, axes.order_key, k.device)
    means = pool_rows(q, rows_q), pool_rows(k, rows_k), pool_rows(v, rows_k)
    if q.is_cuda:  # whose kernels store 16 bits
        means = means[0].to(q.dtype), means[1].to(q.dtype), means[2].to(q.dtype)
    coarse = dataclasses.replace(
        call,
        qkv=means,
        recipe=Recipe(recipe.block_q, recipe.block_k),
        axes=Axes(_block_segments(rows_q.blocks), _block_segments(rows_k.blocks)),
    )
    with torch.autocast(q.device.type, enabled=False):
        o_means = _attend(coarse, Tiles())[0]
    o_coarse = o_means[:, :, rows_q.block_of_row].to(o_fine.dtype)
    protected = rows_q.is_protected[rows_q.block_of_row][:, None]
    coarse_term = o_coarse if gate_coarse is None else gate_coarse.to(o_fine.dtype) * o_coarse
    fine_term = o_fine if gate_fine is None else gate_fine.to(o_fine.dtype) * o_fine
    return torch.where(protected, o_fine, coarse_term + fine_term)


def _block_segments(blocks: list[reference.Block]) -> list[reference.Segment]:
    """One segment of block means for each sequence."""
    counts: dict[int, int] = {}
    for block in blocks:
        counts[block.sequence] = counts.get(block.sequence, 0) + 1
    segments, begin = [], 0
    for sequence, count in counts.items():
        segments.append(reference.Segment(begin, begin + count, sequence))
        begin += count
    return segments
