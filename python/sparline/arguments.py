# SPDX-License-Identifier: Apache-2.0
"""What callers pass, checked once: shapes, dtypes, weights, maps, backends."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import torch
from torch import Tensor

from . import _ops
from .methods import BlockRouter, Method, Recipe
from .reference import Weights

LAYOUTS = ("bhnd", "bnhd")
BACKENDS = ("cuda", "cpu", "reference")


def to_bhnd(caller: str, x: Tensor, layout: str) -> Tensor:
    """x as a (B, H, N, D) view; its own inverse."""
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


def check_method(caller: str, method: object) -> Method:
    if not isinstance(method, Method):
        raise TypeError(
            f"{caller}: method must be a sparline method, got {method!r}. Pass for example "
            'method=sparline.SLA(keep_ratio=0.05), or sparline.method("sla").'
        )
    return method


def check_qkv(caller: str, q: Tensor, k: Tensor, v: Tensor) -> None:
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


def check_scale(caller: str, scale: float | None) -> None:
    if scale is not None and not 0.0 < scale < math.inf:
        raise ValueError(
            f"{caller}: scale must be positive and finite, got {scale}. Pass None for 1 / "
            "sqrt(head_dim)."
        )


def check_weights(caller: str, method: Method, weights: Weights, q: Tensor, k: Tensor) -> Weights:
    """The weights, after checks: each has the right shape, and the method uses it."""
    num_heads, num_kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[3]
    recipe = method.recipe
    shapes = {
        "proj_weight": (head_dim, head_dim),
        "proj_bias": (head_dim,),
        "feature_weight_q": (num_heads, head_dim, head_dim),
        "feature_bias_q": (num_heads, head_dim),
        "feature_weight_k": (num_kv_heads, head_dim, head_dim),
        "feature_bias_k": (num_kv_heads, head_dim),
    }
    uses = {
        "proj": recipe.combine == "projection",
        "feature": recipe.has_feature_weights,
        "alpha": recipe.combine == "blend",
        "router": recipe.combine == "blend" and isinstance(recipe.router, BlockRouter),
    }
    for name, weight in weights._asdict().items():
        if weight is None:
            continue
        if not uses[name.split("_")[0]]:
            raise ValueError(
                f"{caller}: {name} was given, but {method} does not use it. Leave it None, or "
                "choose a method that learns it (docs/methods.md)."
            )
        if name in shapes and tuple(weight.shape) != shapes[name]:
            raise ValueError(
                f"{caller}: {name} must have shape {shapes[name]}, got {tuple(weight.shape)}. "
                "Hedgehog weights are per query head (_q) and per key/value head (_k)."
            )
        matrix = (head_dim, head_dim)
        if name.startswith("router") and tuple(weight.shape) not in (
            matrix,
            (num_heads, *matrix),
        ):
            raise ValueError(
                f"{caller}: {name} must have shape {matrix} or {(num_heads, *matrix)}, got "
                f"{tuple(weight.shape)}. It is one matrix for all heads, or one for each."
            )
        if name == "alpha_logit" and (
            weight.dim() != 2 or weight.shape[0] != num_heads or weight.shape[1] == 0
        ):
            raise ValueError(
                f"{caller}: alpha_logit must have shape (H, T) with H = {num_heads}, got "
                f"{tuple(weight.shape)}. T is 1, or the blocks or tokens that it was learned for."
            )
    if weights.proj_bias is not None and weights.proj_weight is None:
        raise ValueError(f"{caller}: proj_bias needs proj_weight. Pass both, or neither.")
    if (weights.router_q is None) != (weights.router_k is None):
        raise ValueError(f"{caller}: router_q and router_k go together. Pass both, or neither.")
    if (
        caller == "attention"
        and without_zero_projection(recipe, weights).has_feature_weights
        and (weights.feature_weight_q is None or weights.feature_weight_k is None)
    ):
        raise ValueError(
            "attention: hedgehog feature maps need feature_weight_q and feature_weight_k. Pass "
            "weights=Weights(...), or use sparline.nn, whose modules hold them."
        )
    return weights


def check_block_map(block_map: Tensor, method: Method, shape: tuple[int, int, int, int]) -> Tensor:
    """The caller's own map, as int8 classes or a float32 soft map, expanded to ``shape``."""
    recipe = method.recipe
    if not isinstance(recipe.router, BlockRouter) and not recipe.has_linear_branch:
        raise ValueError(
            f"attention: {method.name} takes no block_map. Use SLA or SLA2, or "
            'SLA(combine="sparse") for block-sparse attention alone.'
        )
    is_soft = block_map.is_floating_point()
    if not is_soft and block_map.dtype not in (torch.int8, torch.bool):
        raise TypeError(
            "attention: block_map must be int8 (1, 0, -1), bool (critical or not) or floating "
            f"(a soft map in [0, 1]), got {block_map.dtype}. Convert it with .to(torch.int8)."
        )
    if is_soft and recipe.low_bit is not None:
        raise ValueError(
            "attention: a soft block_map needs 16 bits, got low_bit. Pass classes, or a method "
            "without low_bit."
        )
    if is_soft and recipe.has_linear_branch and recipe.linear_scope != "complement":
        raise ValueError(
            "attention: a soft block_map needs linear_scope='complement', got "
            f"{recipe.linear_scope!r}. It shares every block between the branches: use SLA2."
        )
    if block_map.dim() > 4 or any(
        given not in (1, wanted)
        for given, wanted in zip(reversed(block_map.shape), reversed(shape), strict=False)
    ):
        raise ValueError(
            f"attention: block_map must broadcast to (B, H, T_m, T_n) = {shape}, got "
            f"{tuple(block_map.shape)}. Blocks are {recipe.block_q} x {recipe.block_k} rows and "
            "stop at every segment's end."
        )
    if block_map.device.type == "cpu" and not torch.compiler.is_compiling() and block_map.numel():
        low, high = (0, 1) if is_soft or block_map.dtype == torch.bool else (-1, 1)
        smallest, largest = block_map.detach().amin().item(), block_map.detach().amax().item()
        if not (low <= smallest and largest <= high):  # also refuses NaN
            raise ValueError(
                f"attention: block_map must hold values from {low} to {high}, got {smallest} to "
                f"{largest}. Classes are 1, 0 and -1; a soft map is a share."
            )
    block_map = block_map.expand(shape)
    if not is_soft:
        block_map = block_map.to(torch.int8)
    return block_map if block_map.stride(-1) == 1 else block_map.contiguous()


def picks_reference(caller: str, q: Tensor, backend: str | None) -> bool:
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


# The operators' form ----------------------------------------------------------------------------


def flatten(segments: list[Any]) -> list[int]:
    return [
        number for s in segments for number in (s.begin, s.end, s.sequence, int(s.is_protected))
    ]


def make_spec(options: dict[str, Any], backend: str | None) -> str:
    """``key=value`` pairs for the operators; floats keep every digit."""
    if torch.compiler.is_compiling():  # numbers that dynamic shapes made symbols become constants
        from torch.fx.experimental.symbolic_shapes import guard_scalar

        options = {k: x if isinstance(x, str) else guard_scalar(x) for k, x in options.items()}
    items = [f"{key}={int(x) if isinstance(x, bool) else x}" for key, x in options.items()]
    return " ".join(items if backend is None else [*items, f"backend={backend}"])


def attend_options(recipe: Recipe, scale: float | None, bit_rows: int = 0) -> dict[str, Any]:
    """The spec of ``attend``; what a recipe does not use is left out."""
    options: dict[str, Any] = {
        "block_q": recipe.block_q,
        "block_k": recipe.block_k,
        "scale": 0.0 if scale is None else float(scale),
        "combine": recipe.combine,
    }
    if recipe.has_linear_branch:
        options["feature_map"] = recipe.feature_map
        options["linear_scope"] = recipe.linear_scope
        options["epsilon"] = recipe.epsilon
    if recipe.smooth_k:
        options["smooth_k"] = True
    if bit_rows:
        options["bit_rows"] = bit_rows
    if recipe.skip is not None:
        options["skip"] = recipe.skip.reference
        options["skip_threshold"] = recipe.skip.log_threshold
        options["skip_rows"] = recipe.skip.rows
    if recipe.low_bit is not None:
        options["low_bit"] = True
        options["low_bit_q_rows"] = recipe.low_bit.q_rows
        options["p_range"] = float(recipe.low_bit.p_range)
        options["v_range"] = float(recipe.low_bit.v_range)
        options["recompute_lse"] = recipe.low_bit.recompute_lse
    return options


def route_options(recipe: Recipe, router: BlockRouter, scale: float | None) -> dict[str, Any]:
    """The spec of ``route``."""
    options: dict[str, Any] = {
        "block_q": recipe.block_q,
        "block_k": recipe.block_k,
        "scale": 0.0 if scale is None else float(scale),
        "critical_ratio": float(router.keep_ratio),
        "negligible_ratio": float(router.negligible_ratio),
        "count_rounding": router.count_rounding,
        "smooth_router": router.smooth_k,
    }
    if router.smooth_k and recipe.smooth_k:  # who finds the mean keys hands them on
        options["k_mean"] = True
    if router.keep_count is not None:
        options["critical_count"] = router.keep_count
    if router.selection != "top_k":
        options["selection"] = router.selection
        options["critical_mass"] = float(router.keep_mass)
        options["longest_prefix"] = router.longest_prefix
    if router.min_similarity is not None:
        options["min_similarity"] = float(router.min_similarity)
    return options


def pack_weights(recipe: Recipe, weights: Weights, q: Tensor, k: Tensor) -> list[Tensor]:
    """The operators' form: [], or seven in order, float32 and contiguous, absent ones empty.

    The router's matrices are not among them: they act before.
    """
    weights = weights._replace(router_q=None, router_k=None)
    if not recipe.has_feature_weights:  # given, but without a projection there is no linear branch
        weights = Weights(*weights[:2], alpha_logit=weights.alpha_logit)
    if all(weight is None for weight in weights):
        return []
    if recipe.has_feature_weights:  # y = x W^T + b, with b = 0
        shape_q, shape_k = (q.shape[1], q.shape[3]), (k.shape[1], k.shape[3])
        if weights.feature_bias_q is None:
            weights = weights._replace(feature_bias_q=q.new_zeros(shape_q, dtype=torch.float32))
        if weights.feature_bias_k is None:
            weights = weights._replace(feature_bias_k=k.new_zeros(shape_k, dtype=torch.float32))
    absent = torch.empty(0, dtype=torch.float32, device=q.device)
    return [absent if weight is None else weight.float().contiguous() for weight in weights[:7]]


def without_zero_projection(recipe: Recipe, weights: Weights | None) -> Recipe:
    """A call without a projection is one with the zeros that training starts from: o = o_s."""
    if recipe.combine == "projection" and weights is not None and weights.proj_weight is None:
        return dataclasses.replace(recipe, combine="sparse")
    return recipe
