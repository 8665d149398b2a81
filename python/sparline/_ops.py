# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled operators and tells PyTorch about them: shapes, gradients, autocast, vmap.

The operators live in ``torch.ops.sparline``; their schemas stand in src/torch/ops.cpp. Importing
this module never fails: without the compiled library ``require()`` raises and only
``backend="reference"`` works. The environment variable ``SPARLINE_LIBRARY`` names another library
file, for developers who build outside the package.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_load_error: str | None = "not loaded yet"
# Holds the autocast rules, which end with it.
_library = torch.library.Library("sparline", "FRAGMENT")  # type: ignore[no-untyped-call]


def library_path() -> Path | None:
    """The compiled library: ``SPARLINE_LIBRARY``, else ``_C.so`` in this package, else None."""
    if override := os.environ.get("SPARLINE_LIBRARY"):
        return Path(override)
    spec = importlib.util.find_spec(f"{__package__}._C")  # finds the file; nothing is loaded
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


def available() -> bool:
    """Whether the compiled operators are loaded."""
    return _load_error is None


def require() -> None:
    """Raises ImportError, saying why and what to do, unless the compiled operators are loaded."""
    if _load_error is not None:
        raise ImportError(
            f"sparline: the compiled operators are not available: {_load_error}. Build them with "
            "`pip install -e .` in the source tree or install a wheel, set SPARLINE_LIBRARY to a "
            'built library, or pass backend="reference".'
        )


def _option(spec: str, key: str, default: str | None = None) -> str:
    """The value of ``key`` in an operator's ``key=value`` spec."""
    for item in spec.split():
        if item.startswith(f"{key}="):
            return item.split("=", 1)[1]
    if default is None:
        raise ValueError(f"spec: {key} must be given, got {spec!r}. Add {key}=...")
    return default


def _num_blocks(length: int, segments: Sequence[int], block_rows: int) -> int:
    if not segments:
        return (length + block_rows - 1) // block_rows
    rows = zip(segments[0::4], segments[1::4], strict=True)
    return sum((end - begin + block_rows - 1) // block_rows for begin, end in rows)


def _block_map_shape(
    q: Tensor, k: Tensor, query_segments: Sequence[int], key_segments: Sequence[int], spec: str
) -> tuple[int, int, int, int]:
    num_rows = _num_blocks(q.shape[2], query_segments, int(_option(spec, "block_q")))
    num_columns = _num_blocks(k.shape[2], key_segments, int(_option(spec, "block_k")))
    return q.shape[0], q.shape[1], num_rows, num_columns


def _num_sequences(query_segments: Sequence[int], key_segments: Sequence[int]) -> int:
    """How many sequences the segments of either axis name."""
    return len({*(query_segments[2::4] or (0,)), *(key_segments[2::4] or (0,))})


def _skips(spec: str) -> bool:
    return _option(spec, "skip", "none") != "none"


# Fakes: shapes, dtypes and strides without data.


def _route_fake(
    q: Tensor,
    k: Tensor,
    proj_q: Tensor | None,
    proj_k: Tensor | None,
    query_order: Tensor | None,
    key_order: Tensor | None,
    query_segments: Sequence[int],
    key_segments: Sequence[int],
    spec: str,
) -> tuple[Tensor, Tensor]:
    shape = _block_map_shape(q, k, query_segments, key_segments, spec)
    mean_shape: tuple[int, ...] = (0,)
    if _option(spec, "k_mean", "0") == "1":
        num_sequences = _num_sequences(query_segments, key_segments)
        mean_shape = (*k.shape[:2], num_sequences, k.shape[3])
    return (
        q.new_empty(shape, dtype=torch.int8),
        q.new_empty(mean_shape, dtype=torch.float32),
    )


def _attend_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: Tensor | None,
    tile_bits: Tensor | None,
    query_order: Tensor | None,
    key_order: Tensor | None,
    tile_order: Tensor | None,
    k_mean: Tensor | None,
    weights: Sequence[Tensor],
    query_segments: Sequence[int],
    key_segments: Sequence[int],
    spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bits_shape: tuple[int, ...] = (0,)
    votes_shape: tuple[int, ...] = (0,)
    if _skips(spec):
        *heads, rows, columns = _block_map_shape(q, k, query_segments, key_segments, spec)
        block_q = int(_option(spec, "block_q"))
        skip_rows = int(_option(spec, "skip_rows", "0")) or block_q
        groups = (block_q + skip_rows - 1) // skip_rows
        bits_shape = (*heads, rows * groups, (columns + 7) // 8)
        if _option(spec, "row_votes", "0") == "1":  # without a rule it is refused
            votes_shape = (*heads, rows)
    return (
        torch.empty_like(q),
        q.new_empty(q.shape[:3], dtype=torch.float32),
        q.new_empty(bits_shape, dtype=torch.uint8),
        q.new_empty(votes_shape, dtype=torch.float32),
    )


def _attend_backward_fake(
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    block_map: Tensor | None,
    tile_bits: Tensor | None,
    query_order: Tensor | None,
    key_order: Tensor | None,
    k_mean: Tensor | None,
    weights: Sequence[Tensor],
    query_segments: Sequence[int],
    key_segments: Sequence[int],
    spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    is_soft = block_map is not None and block_map.dtype == torch.float32
    map_shape = _block_map_shape(q, k, query_segments, key_segments, spec) if is_soft else (0,)
    d_block_map = q.new_empty(map_shape, dtype=torch.float32)
    return *gradients, d_block_map, [torch.empty_like(weight) for weight in weights]


def _soft_top_k_fake(scores: Tensor, kappa: Tensor, temperature: float) -> Tensor:
    return torch.empty_like(scores)


def _soft_top_k_backward_fake(d_soft_map: Tensor, soft_map: Tensor, temperature: float) -> Tensor:
    return torch.empty_like(soft_map)


# Autograd: the backward of attend and of soft_top_k is an operator of its own, which has no
# derivative.


def _attend_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, block_map, tile_bits, query_order, key_order, _, k_mean, weights = inputs[:10]
    ctx.query_segments, ctx.key_segments, ctx.spec = inputs[10:]
    o, lse, kept_bits, row_votes = output
    ctx.mark_non_differentiable(lse, kept_bits, row_votes)
    ctx.set_materialize_grads(False)
    # The tiles that a skip rule kept are a constant of the backward, as a caller's own bits are.
    bits = kept_bits if _skips(ctx.spec) else tile_bits
    tensors = (q, k, v, o, lse, block_map, bits, query_order, key_order, k_mean)
    ctx.save_for_backward(*tensors, *weights)


def _attend_gradients(ctx: Any, d_o: Tensor | None, *_: None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing unpacks at every access
    *tensors, block_map, bits, query_order, key_order, k_mean = saved[:10]
    weights = list(saved[10:])
    # PyTorch takes an empty list of integers for an empty list of tensors, whose gradient is [].
    no_segments: list[Any] = [None if s else [] for s in (ctx.query_segments, ctx.key_segments)]
    if d_o is None:
        return *[None] * 9, [None] * len(weights), *no_segments, None
    if (
        d_o.stride(-1) != 1
    ):  # an expanded gradient, as sum() makes; the kernels need unit last stride
        d_o = d_o.contiguous()
    d_q, d_k, d_v, d_block_map, d_weights = torch.ops.sparline.attend_backward(
        d_o,
        *tensors,
        block_map,
        bits,
        query_order,
        key_order,
        k_mean,
        weights,
        ctx.query_segments,
        ctx.key_segments,
        ctx.spec,
    )
    is_soft = block_map is not None and block_map.dtype == torch.float32
    d_map = d_block_map if is_soft else None
    # d_k goes through the mean of k, wherever that was found: k_mean itself is a constant.
    return d_q, d_k, d_v, d_map, *[None] * 5, d_weights, *no_segments, None


def _soft_top_k_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, ctx.temperature = inputs
    ctx.save_for_backward(output)


def _soft_top_k_gradients(ctx: Any, d_soft_map: Tensor) -> tuple[Any, ...]:
    (soft_map,) = ctx.saved_tensors
    if d_soft_map.stride(-1) != 1:
        d_soft_map = d_soft_map.contiguous()
    d_scores = torch.ops.sparline.soft_top_k_backward(d_soft_map, soft_map, ctx.temperature)
    return d_scores, None, None


def _no_double_backward(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(
        "sparline: attention and soft_top_k have first derivatives only, and a derivative of their "
        "backward was asked for. Call backward without create_graph=True, or pass "
        'backend="reference" for higher derivatives.'
    )


# Autocast: q, k and v of attend take the autocast dtype; block map and weights stay float32, and so
# does lse. soft_top_k takes float32, whatever precision its scores were made in. The router ranks
# what comes in.


def _autocast_rules(device_type: str, key: torch._C.DispatchKey) -> dict[str, Callable[..., Any]]:
    def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return torch.ops.sparline.attend(q, k, v, *rest)

    def soft_top_k(scores: Tensor, kappa: Tensor, temperature: float) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return torch.ops.sparline.soft_top_k(scores.float(), kappa.float(), temperature)

    return {"attend": attend, "soft_top_k": soft_top_k}


def refuse_transforms(caller: str) -> None:
    """Raises inside torch.func transforms and forward-mode AD, which would drop derivatives."""
    if torch.compiler.is_compiling():
        return
    in_transform = torch._C._functorch.peek_interpreter_stack() is not None
    if in_transform or torch.autograd.forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"sparline: {caller} supports reverse-mode autograd only, and was called inside a "
            "torch.func transform (grad, vmap, jvp, ...) or forward-mode AD. Use "
            'torch.autograd.grad or backward, or pass backend="reference". What vmap would add is '
            "there already: reshape the extra dimension into the batch."
        )


def _no_vmap(*args: Any) -> Any:
    raise NotImplementedError(
        "sparline: attention, route and soft_top_k have no vmap rule (torch.func.vmap, "
        "torch.vmap). They are batched over (B, H) already: reshape the extra dimension into the "
        "batch."
    )


def _register() -> None:
    fakes: dict[str, Callable[..., Any]] = {
        "route": _route_fake,
        "attend": _attend_fake,
        "attend_backward": _attend_backward_fake,
        "soft_top_k": _soft_top_k_fake,
        "soft_top_k_backward": _soft_top_k_backward_fake,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"sparline::{name}", fake)
        torch.library.register_vmap(f"sparline::{name}", _no_vmap)
    torch.library.register_autograd(
        "sparline::attend", _attend_gradients, setup_context=_attend_setup
    )
    torch.library.register_autograd(
        "sparline::soft_top_k", _soft_top_k_gradients, setup_context=_soft_top_k_setup
    )
    for name in ("attend_backward", "soft_top_k_backward"):
        torch.library.register_autograd(f"sparline::{name}", _no_double_backward)
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        rules = _autocast_rules(device_type, getattr(torch._C.DispatchKey, key))
        for name, rule in rules.items():
            _library.impl(name, rule, key)  # type: ignore[no-untyped-call]


def _load() -> None:
    global _load_error
    path = library_path()
    if path is None:
        _load_error = f"no _C.so in {Path(__file__).parent}"
        return
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as error:
        _load_error = f"{path} does not load ({error})"
        return
    _register()
    _load_error = None


_load()
