# SPDX-License-Identifier: Apache-2.0
"""``attention`` and ``route``: the operators for callers that hold their own tensors.

This file reads methods, layouts, packed sequences and protected spans; it does no maths. Layout is
strides: a (B, N, H, D) tensor goes to the kernels as a transposed view, never as a copy.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import _ops, reference
from .methods import SLA, Dense, Method
from .reference import Segment, SLAWeights

LAYOUTS = ("bhnd", "bnhd")
BACKENDS = ("cpu", "reference")

Lengths = Sequence[int] | Tensor
Spans = Iterable[tuple[int, int]]


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
    weights: SLAWeights | None = ...,
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
    weights: SLAWeights | None = ...,
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
    weights: SLAWeights | None = None,
    cu_seqlens_q: Lengths | None = None,
    cu_seqlens_k: Lengths | None = None,
    protected_q: Spans = (),
    protected_k: Spans = (),
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q over k and v by ``method``; differentiable in q, k, v and ``weights``.

    Args:
        q: (B, H, N_q, D), or (B, N_q, H, D) with ``layout="bnhd"``; float32, bfloat16 or float16,
            last stride 1.
        k: (B, H_kv, N_k, D) in the same layout; H must be a multiple of H_kv.
        v: as ``k``.
        method: ``Dense(...)`` or ``SLA(...)``.
        layout: order of the dimensions of q, k, v and of the result.
        scale: softmax scale; None is 1 / sqrt(D).
        block_map: int8 (B, H, T_m, T_n) or broadcastable: 1 critical, 0 marginal, -1 negligible.
            None routes. Protected spans and packed sequences are laid over it.
        weights: learned tensors. Without ``proj_weight`` the projection is the zero one that
            training starts from, so that o = o_s exactly.
        cu_seqlens_q: packed sequences, as offsets 0 = c_0 <= c_1 <= ... = N_q; sequences do not
            see each other. A list or a CPU tensor (a list under torch.compile).
        cu_seqlens_k: the same for the keys; None takes ``cu_seqlens_q``.
        protected_q: spans (begin, end) of query rows that get exactly dense attention, such as
            text tokens.
        protected_k: spans of keys that every query of their sequence attends exactly.
        return_lse: also return the natural log of the critical softmax sums, (B, H, N_q), a
            constant for autograd.
        backend: None for the best kernels that fit, "cpu", or "reference" (plain PyTorch, any
            dtype, slow). The environment variable ``SPARLINE_BACKEND`` overrides it.

    Returns:
        o in the shape, layout and dtype of q, or (o, lse).
    """
    if not isinstance(method, (Dense, SLA)):
        raise TypeError(
            f"attention: method must be sparline.Dense or sparline.SLA, got {method!r}. Pass for "
            'example method=SLA(keep_ratio=0.05), or sparline.method("sla").'
        )
    q, k, v = (_to_bhnd("attention", x, layout) for x in (q, k, v))
    _check_qkv("attention", q, k, v)
    weights = _check_weights(method, SLAWeights() if weights is None else weights, q, k)
    query_segments, key_segments = make_segments(
        "attention", q, k, cu_seqlens_q, cu_seqlens_k, protected_q, protected_k
    )
    use_reference = _picks_reference("attention", q, backend)
    if isinstance(method, SLA) and method.smooth_k == "all":
        k = reference.smooth_keys(k, key_segments)
    if block_map is not None:
        block_map = _check_block_map(block_map, method, q, k, query_segments, key_segments)
    elif isinstance(method, SLA) and method.needs_block_map:
        block_map = _route(q, k, method, scale, query_segments, key_segments, backend)
    options = _attend_options("attention", method, weights, scale)
    if use_reference:
        device_type = q.device.type
        if torch.is_autocast_enabled(device_type) and q.dtype != torch.float64:
            q, k, v = (x.to(torch.get_autocast_dtype(device_type)) for x in (q, k, v))
        with torch.autocast(device_type, enabled=False):
            o, lse = reference.attend(
                q, k, v, block_map, weights, query_segments, key_segments, **options
            )
    else:
        o, lse = torch.ops.sparline.attend(
            q,
            k,
            v,
            block_map,
            _pack_weights(method, weights, q, k),
            _flatten(query_segments),
            _flatten(key_segments),
            _spec(options, backend),
        )
    o = _to_bhnd("attention", o, layout)  # its own inverse
    return (o, lse) if return_lse else o


def route(
    q: Tensor,
    k: Tensor,
    *,
    method: SLA,
    layout: str = "bhnd",
    scale: float | None = None,
    cu_seqlens_q: Lengths | None = None,
    cu_seqlens_k: Lengths | None = None,
    protected_q: Spans = (),
    protected_k: Spans = (),
    backend: str | None = None,
) -> Tensor:
    """The block map that ``attention`` would use: int8 (B, H, T_m, T_n).

    1 is critical, 0 marginal, -1 negligible. Arguments as in ``attention``. The map is a constant:
    no gradient flows through it.
    """
    if not isinstance(method, SLA):
        raise TypeError(
            f"route: method must be sparline.SLA, got {method!r}. Dense attention has no block map."
        )
    q, k = (_to_bhnd("route", x, layout) for x in (q, k))
    _check_qkv("route", q, k, k)
    query_segments, key_segments = make_segments(
        "route", q, k, cu_seqlens_q, cu_seqlens_k, protected_q, protected_k
    )
    return _route(q, k, method, scale, query_segments, key_segments, backend)


def explain(
    q: Tensor,
    k: Tensor,
    *,
    method: Method,
    layout: str = "bhnd",
    cu_seqlens_q: Lengths | None = None,
    cu_seqlens_k: Lengths | None = None,
    protected_q: Spans = (),
    protected_k: Spans = (),
    backend: str | None = None,
) -> str:
    """The plan for such a call in words: backend, blocks, workspace, what was rejected and why."""
    _ops.require()
    q, k = (_to_bhnd("explain", x, layout) for x in (q, k))
    _check_qkv("explain", q, k, k)
    query_segments, key_segments = make_segments(
        "explain", q, k, cu_seqlens_q, cu_seqlens_k, protected_q, protected_k
    )
    spec = _spec(_attend_options("explain", method, None, None), backend)
    has_block_map = isinstance(method, SLA) and method.needs_block_map
    text: str = torch.ops.sparline.explain(
        q, k, _flatten(query_segments), _flatten(key_segments), spec, has_block_map
    )
    return text


def make_segments(
    caller: str,
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Lengths | None,
    cu_seqlens_k: Lengths | None,
    protected_q: Spans,
    protected_k: Spans,
) -> tuple[list[Segment], list[Segment]]:
    """Packed sequences and protected spans of both axes as segments; [] where there are neither."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    if cu_seqlens_q is None and cu_seqlens_k is not None:
        raise ValueError(
            f"{caller}: cu_seqlens_k needs cu_seqlens_q. Pass both, or cu_seqlens_q alone when "
            "they are equal."
        )
    spans_q, spans_k = list(protected_q), list(protected_k)
    if cu_seqlens_q is None and not spans_q and not spans_k:
        return [], []
    offsets_q = _offsets(caller, "cu_seqlens_q", cu_seqlens_q, num_queries)
    offsets_k = _offsets(
        caller, "cu_seqlens_k", cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, num_keys
    )
    if len(offsets_q) != len(offsets_k):
        raise ValueError(
            f"{caller}: cu_seqlens_q and cu_seqlens_k must hold the same number of sequences, got "
            f"{len(offsets_q) - 1} and {len(offsets_k) - 1}. Use zero-length sequences to align "
            "them."
        )
    return (
        _cut(caller, "protected_q", offsets_q, spans_q),
        _cut(caller, "protected_k", offsets_k, spans_k),
    )


def _offsets(caller: str, name: str, lengths: Lengths | None, length: int) -> list[int]:
    if lengths is None:
        return [0, length]
    if isinstance(lengths, Tensor):
        if lengths.device.type != "cpu" or lengths.is_floating_point() or lengths.dim() != 1:
            raise ValueError(
                f"{caller}: {name} must be a list of ints or a one-dimensional integer CPU "
                f"tensor, got a {lengths.dtype} tensor of shape {tuple(lengths.shape)} on "
                f"{lengths.device}. Convert it once with .tolist()."
            )
        lengths = [int(offset) for offset in lengths.tolist()]
    offsets = list(lengths)
    if (
        len(offsets) < 2
        or offsets[0] != 0
        or offsets[-1] != length
        or any(a > b for a, b in itertools.pairwise(offsets))
    ):
        raise ValueError(
            f"{caller}: {name} must rise from 0 to the number of rows, {length}, got {offsets}. "
            "It holds the start of every packed sequence and the end of the last."
        )
    return offsets


def _cut(caller: str, name: str, offsets: list[int], spans: list[tuple[int, int]]) -> list[Segment]:
    """Segments between all borders; a span that crosses sequences is cut at their border."""
    length = offsets[-1]
    for begin, end in spans:
        if not 0 <= begin <= end <= length:
            raise ValueError(
                f"{caller}: {name} must hold spans 0 <= begin <= end <= {length}, got ({begin}, "
                f"{end}). Spans count rows of the whole axis, packed sequences included."
            )
    spans = [(begin, end) for begin, end in spans if begin < end]
    segments = []
    for sequence, (first, last) in enumerate(itertools.pairwise(offsets)):
        inside = {first, last}
        for begin, end in spans:
            inside.update(row for row in (begin, end) if first < row < last)
        borders = sorted(inside)
        for begin, end in itertools.pairwise(borders):
            is_protected = any(a <= begin and end <= b for a, b in spans)
            segments.append(Segment(begin, end, sequence, is_protected))
    return segments


def _flatten(segments: list[Segment]) -> list[int]:
    return [
        number for s in segments for number in (s.begin, s.end, s.sequence, int(s.is_protected))
    ]


def _to_bhnd(caller: str, x: Tensor, layout: str) -> Tensor:
    if layout not in LAYOUTS:
        raise ValueError(
            f'{caller}: layout must be "bhnd" or "bnhd", got {layout!r}. It names the order of '
            "batch, heads, rows and head dimension."
        )
    if x.dim() != 4:
        raise ValueError(
            f"{caller}: q, k and v must have four dimensions ({layout}), got shape "
            f"{tuple(x.shape)}. Add the missing ones with unsqueeze or unflatten."
        )
    return x.transpose(1, 2) if layout == "bnhd" else x


def _check_qkv(caller: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuses what no backend takes; limits of the kernels are theirs to refuse."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} as (B, H, N, D)"
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"{caller}: q, k and v must agree in batch and head_dim, and k and v in shape, got "
            f"{shapes}. Check the layout argument."
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{caller}: the query heads must be a multiple of the key/value heads, got {shapes}. "
            "Check the layout argument."
        )
    if min(q.shape) == 0 or min(k.shape) == 0:
        raise ValueError(
            f"{caller}: no dimension may be empty, got {shapes}. Skip the call instead."
        )
    if not (q.dtype == k.dtype == v.dtype) or not q.dtype.is_floating_point:
        raise TypeError(
            f"{caller}: q, k and v must have one floating dtype, got {q.dtype}, {k.dtype}, "
            f"{v.dtype}. Cast them to the same one."
        )
    if not (q.device == k.device == v.device):
        raise ValueError(
            f"{caller}: q, k and v must be on one device, got {q.device}, {k.device}, {v.device}. "
            "Move them together."
        )


def _check_weights(method: Method, weights: SLAWeights, q: Tensor, k: Tensor) -> SLAWeights:
    """The weights, after checks: each has the right shape, and the method uses it."""
    num_heads, num_kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[3]
    shapes = {
        "proj_weight": (head_dim, head_dim),
        "proj_bias": (head_dim,),
        "feature_weight_q": (num_heads, head_dim, head_dim),
        "feature_bias_q": (num_heads, head_dim),
        "feature_weight_k": (num_kv_heads, head_dim, head_dim),
        "feature_bias_k": (num_kv_heads, head_dim),
    }
    uses_proj = isinstance(method, SLA) and method.combine == "projection"
    uses_features = isinstance(method, SLA) and method.has_feature_weights
    for name, shape in shapes.items():
        weight: Tensor | None = getattr(weights, name)
        if weight is None:
            continue
        if not (uses_proj if name.startswith("proj") else uses_features):
            raise ValueError(
                f"attention: {name} was given, but {method} does not use it. Leave it None, or "
                'choose combine="projection" or a hedgehog feature_map.'
            )
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"attention: {name} must have shape {shape}, got {tuple(weight.shape)}. Hedgehog "
                "weights are per query head (_q) and per key/value head (_k)."
            )
    if weights.proj_bias is not None and weights.proj_weight is None:
        raise ValueError("attention: proj_bias needs proj_weight. Pass both, or neither.")
    if uses_features and (weights.feature_weight_q is None or weights.feature_weight_k is None):
        raise ValueError(
            "attention: the hedgehog feature maps need feature_weight_q and feature_weight_k. "
            "Pass weights=SLAWeights(...), or use sparline.nn.SLA, which holds them."
        )
    return weights


def _check_block_map(
    block_map: Tensor,
    method: Method,
    q: Tensor,
    k: Tensor,
    query_segments: list[Segment],
    key_segments: list[Segment],
) -> Tensor:
    if isinstance(method, Dense):
        raise ValueError(
            'attention: Dense takes no block_map. Use SLA(combine="sparse") for block-sparse '
            "attention."
        )
    if block_map.dtype not in (torch.int8, torch.bool):
        raise TypeError(
            "attention: block_map must be int8 (1, 0, -1) or bool (critical or not), got "
            f"{block_map.dtype}. Convert it with .to(torch.int8)."
        )
    shape = (
        q.shape[0],
        q.shape[1],
        _ops._num_blocks(q.shape[2], _flatten(query_segments), method.block_q),
        _ops._num_blocks(k.shape[2], _flatten(key_segments), method.block_k),
    )
    if block_map.dim() > 4 or any(
        given not in (1, wanted)
        for given, wanted in zip(reversed(block_map.shape), reversed(shape), strict=False)
    ):
        raise ValueError(
            f"attention: block_map must broadcast to (B, H, T_m, T_n) = {shape}, got "
            f"{tuple(block_map.shape)}. Blocks are {method.block_q} x {method.block_k} rows and "
            "stop at every segment's end."
        )
    block_map = block_map.to(torch.int8).expand(shape)
    return block_map if block_map.stride(-1) == 1 else block_map.contiguous()


def _attend_options(
    caller: str, method: Method, weights: SLAWeights | None, scale: float | None
) -> dict[str, Any]:
    """What to compute: keyword arguments of ``reference.attend``, and the operators' spec."""
    _check_scale(caller, scale)
    options: dict[str, Any] = {
        "block_q": method.block_q,
        "block_k": method.block_k,
        "scale": 0.0 if scale is None else float(scale),
    }
    if isinstance(method, Dense):
        return {**options, "combine": "sparse"}
    combine = method.combine
    if combine == "projection" and weights is not None and weights.proj_weight is None:
        combine = "sparse"  # the projection at its zero initialisation
    return {
        **options,
        "combine": combine,
        "feature_map": method.feature_map,
        "linear_scope": method.linear_scope,
        "epsilon": method.resolved_epsilon,
    }


def _check_scale(caller: str, scale: float | None) -> None:
    if scale is not None and not 0.0 < scale < math.inf:
        raise ValueError(
            f"{caller}: scale must be positive and finite, got {scale}. Pass None for 1 / "
            "sqrt(head_dim)."
        )


def _route(
    q: Tensor,
    k: Tensor,
    method: SLA,
    scale: float | None,
    query_segments: list[Segment],
    key_segments: list[Segment],
    backend: str | None,
) -> Tensor:
    _check_scale("route", scale)
    options: dict[str, Any] = {
        "block_q": method.block_q,
        "block_k": method.block_k,
        "scale": 0.0 if scale is None else float(scale),
        "critical_ratio": float(method.keep_ratio),
        "negligible_ratio": float(method.negligible_ratio),
        "count_rounding": method.count_rounding,
        "smooth_k": method.smooth_k == "router",  # under "all" the keys come smoothed
    }
    q, k = q.detach(), k.detach()
    if _picks_reference("route", q, backend):
        with torch.autocast(q.device.type, enabled=False):
            return reference.route(q, k, query_segments, key_segments, **options)
    block_class: Tensor = torch.ops.sparline.route(
        q, k, _flatten(query_segments), _flatten(key_segments), _spec(options, backend)
    )
    return block_class


def _spec(options: dict[str, Any], backend: str | None) -> str:
    """``key=value`` pairs for the operators; floats keep every digit."""
    if torch.compiler.is_compiling():  # numbers that dynamic shapes made symbols become constants
        from torch.fx.experimental.symbolic_shapes import guard_scalar

        options = {k: x if isinstance(x, str) else guard_scalar(x) for k, x in options.items()}
    items = [f"{key}={int(x) if isinstance(x, bool) else x}" for key, x in options.items()]
    return " ".join(items if backend is None else [*items, f"backend={backend}"])


def _pack_weights(method: Method, weights: SLAWeights, q: Tensor, k: Tensor) -> list[Tensor]:
    """The operators' form: [], or all six in order, float32 and contiguous, absent ones empty."""
    if all(weight is None for weight in weights):
        return []
    if isinstance(method, SLA) and method.has_feature_weights:  # y = x W^T + b, with b = 0
        shape_q, shape_k = (q.shape[1], q.shape[3]), (k.shape[1], k.shape[3])
        if weights.feature_bias_q is None:
            weights = weights._replace(feature_bias_q=q.new_zeros(shape_q, dtype=torch.float32))
        if weights.feature_bias_k is None:
            weights = weights._replace(feature_bias_k=k.new_zeros(shape_k, dtype=torch.float32))
    absent = torch.empty(0, dtype=torch.float32, device=q.device)
    return [absent if weight is None else weight.float().contiguous() for weight in weights]


def _picks_reference(caller: str, q: Tensor, backend: str | None) -> bool:
    """Whether plain PyTorch runs the call; else makes sure that the kernels can be called."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(
            f"{caller}: backend must be None, {', '.join(repr(name) for name in BACKENDS)}, got "
            f"{backend!r}. None takes the best that fits."
        )
    if (os.environ.get("SPARLINE_BACKEND") or backend) == "reference":
        return True
    _ops.require()
    _ops.refuse_transforms(caller)
    if q.dtype == torch.float64:
        raise TypeError(
            f"{caller}: the kernels take float32, bfloat16 or float16, got {q.dtype}. Cast q, k "
            'and v, or pass backend="reference".'
        )
    return False
