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


def _option(spec: str, key: str) -> str:
    """The value of ``key`` in an operator's ``key=value`` spec."""
    return next(item for item in spec.split() if item.startswith(f"{key}=")).split("=", 1)[1]


def _num_blocks(length: int, segments: Sequence[int], block_rows: int) -> int:
    if not segments:
        return (length + block_rows - 1) // block_rows
    rows = zip(segments[0::4], segments[1::4], strict=True)
    return sum((end - begin + block_rows - 1) // block_rows for begin, end in rows)


# Fakes: shapes, dtypes and strides without data.


def _route_fake(
    q: Tensor, k: Tensor, query_segments: Sequence[int], key_segments: Sequence[int], spec: str
) -> Tensor:
    num_rows = _num_blocks(q.shape[2], query_segments, int(_option(spec, "block_q")))
    num_columns = _num_blocks(k.shape[2], key_segments, int(_option(spec, "block_k")))
    return q.new_empty((q.shape[0], q.shape[1], num_rows, num_columns), dtype=torch.int8)


def _attend_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_class: Tensor | None,
    weights: Sequence[Tensor],
    query_segments: Sequence[int],
    key_segments: Sequence[int],
    spec: str,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _attend_backward_fake(
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    block_class: Tensor | None,
    weights: Sequence[Tensor],
    query_segments: Sequence[int],
    key_segments: Sequence[int],
    spec: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    return *gradients, [torch.empty_like(weight) for weight in weights]


# Autograd: attend's backward is the operator attend_backward, which has no derivative of its own.


def _attend_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, block_class, weights, ctx.query_segments, ctx.key_segments, ctx.spec = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, o, lse, block_class, *weights)


def _attend_gradients(ctx: Any, d_o: Tensor | None, d_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, o, lse, block_class, *weights = ctx.saved_tensors
    # PyTorch takes an empty list of integers for an empty list of tensors, whose gradient is [].
    no_segments: list[Any] = [None if s else [] for s in (ctx.query_segments, ctx.key_segments)]
    if d_o is None:
        return None, None, None, None, [None] * len(weights), *no_segments, None
    if (
        d_o.stride(-1) != 1
    ):  # an expanded gradient, as sum() makes; the kernels need unit last stride
        d_o = d_o.contiguous()
    d_q, d_k, d_v, d_weights = torch.ops.sparline.attend_backward(
        d_o,
        q,
        k,
        v,
        o,
        lse,
        block_class,
        weights,
        ctx.query_segments,
        ctx.key_segments,
        ctx.spec,
    )
    return d_q, d_k, d_v, None, d_weights, *no_segments, None


def _no_double_backward(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(
        "sparline: attention has first derivatives only, and a derivative of its backward was "
        'asked for. Call backward without create_graph=True, or pass backend="reference" for '
        "higher derivatives."
    )


# Autocast: q, k and v of attend take the autocast dtype; weights stay float32, and so does lse. The
# router ranks what comes in.


def _autocast_rule(device_type: str, key: torch._C.DispatchKey) -> Callable[..., Any]:
    def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return torch.ops.sparline.attend(q, k, v, *rest)

    return attend


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
        "sparline: attention and route have no vmap rule (torch.func.vmap, torch.vmap). They are "
        "batched over (B, H) already: reshape the extra dimension into the batch."
    )


def _register() -> None:
    torch.library.register_fake("sparline::route", _route_fake)
    torch.library.register_fake("sparline::attend", _attend_fake)
    torch.library.register_fake("sparline::attend_backward", _attend_backward_fake)
    torch.library.register_autograd(
        "sparline::attend", _attend_gradients, setup_context=_attend_setup
    )
    torch.library.register_autograd("sparline::attend_backward", _no_double_backward)
    for name in ("route", "attend", "attend_backward"):
        torch.library.register_vmap(f"sparline::{name}", _no_vmap)
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        rule = _autocast_rule(device_type, getattr(torch._C.DispatchKey, key))
        _library.impl("attend", rule, key)  # type: ignore[no-untyped-call]


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
