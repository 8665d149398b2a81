# SPDX-License-Identifier: Apache-2.0
"""``sparline explain``: a method's maths, parameters and cost at a shape, and how it would run.

The maths is put together from the method's recipe, so that every preset and option says what it
does; docs/math.md has the whole of it.
"""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import torch

import sparline
from sparline.accounting import Flops, depends_on_data, flops
from sparline.bench import WORKLOADS
from sparline.generate import InputError, parse_variants
from sparline.methods import BlockRouter, ChunkRouter, Method, Recipe, summary
from sparline.tokens import Grid

#: Shares of the softmax at which the cost of data-dependent methods is shown.
SHARES = (0.50, 0.25, 0.10, 0.05)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def explain(
    method: str,
    options: list[str],
    shape: str,
    keys: int | None = None,
    kv_heads: int | None = None,
    dtype: str = "float32",
    grid: str | None = None,
    device: str = "cpu",
) -> str:
    """The text of ``sparline explain``; InputError for what the caller can mend."""
    q_shape = _parse_sizes("--shape", shape, 4, "B,H,N,D", "1,4,8192,64")
    if dtype not in _DTYPES:
        raise InputError(f"--dtype: it must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
    chosen = parse_variants(method, options)[0].method
    if chosen is None:
        raise InputError("method: 'original' is the model's own attention; name one of ours.")
    batch, heads, length, head_dim = q_shape
    k_shape = (batch, kv_heads or heads, keys or length, head_dim)
    parts = [
        f"{method}: {summary(method.split(':')[0])}",
        _section("maths", maths(chosen.recipe)),
        _section("options", _options(chosen)),
        _section("learned", _learned(chosen, heads, head_dim)),
        _section(f"cost at {shape}", cost(chosen, q_shape, k_shape)),
    ]
    place = _grid_of(grid, length) if chosen.recipe.needs_grid else None
    if k_shape[2] != length and place is not None:
        raise InputError(f"--keys: {method} is for self-attention, where queries are the keys.")
    plan = explain_call(q_shape, k_shape, _DTYPES[dtype], chosen, place, device)
    return "\n".join([*parts, _section("plan", plan.strip().splitlines())])


def explain_call(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    dtype: torch.dtype,
    method: Method,
    grid: Grid | None = None,
    device: str = "cpu",
) -> str:
    """The plan of a call, without its data."""
    # Expanded scalars: the shapes matter, the memory does not. The last stride must be 1.
    q, k = (torch.empty(1, shape[-1], dtype=dtype).expand(shape) for shape in (q_shape, k_shape))
    return sparline.explain(q, k, method=method, grid=grid, device=device)


# Maths ------------------------------------------------------------------------------------------


def maths(recipe: Recipe) -> list[str]:
    """The formulas of a recipe, in the letters of docs/math.md."""
    lines = []
    if recipe.token_order != "raster":
        what = {
            "cubes": f"in boxes of {' x '.join(map(str, recipe.cube))}",
            "hilbert": "along a Hilbert curve",
        }[recipe.token_order]
        lines.append(f"tokens of the grid are cut into blocks {what}")
    if recipe.smooth_k:
        lines.append("k <- k - mean over the keys of its sequence")
    if isinstance(recipe.router, BlockRouter):
        lines += _router_maths(recipe, recipe.router)
    elif isinstance(recipe.router, ChunkRouter):
        lines += _chunk_maths(recipe.router)
    elif recipe.combine != "linear":
        lines.append("C_i = every key block")
    is_soft = isinstance(recipe.router, BlockRouter) and recipe.router.mode == "soft"
    if is_soft:
        lines += [
            "o_s = sum_c m_ij exp(S_rc) v_c / sum_c m_ij exp(S_rc),  S = scale q k^T",
            f"o_l = the same of (1 - m_ij) phi(q_r) . phi(k_c),  phi = {recipe.feature_map}",
        ]
    elif recipe.combine != "linear":
        lines += _sparse_maths(recipe)
    if recipe.has_linear_branch and not is_soft:
        scope = {
            "marginal": "E_i = {j : M_ij = 0}",
            "complement": "E_i = {j not in C_i}",
            "all": "E_i = every key block",
        }[recipe.linear_scope]
        epsilon = f" + {recipe.epsilon:g}" if recipe.epsilon else ""
        lines += [
            f"{scope};  H_i = sum phi(k_j)^T v_j,  Z_i = sum phi(k_j) over E_i,  "
            f"phi = {recipe.feature_map}",
            f"o_l = phi(q) H_i / (phi(q) . Z_i{epsilon})",
        ]
    if recipe.has_coarse_branch:
        lines.append("o_c = softmax(scale mean(q_i) mean(k_j)^T) mean(v_j), for every row of i")
    lines.append(
        {
            "projection": "o = o_s + o_l W^T + b",
            "sum": "o = o_s + o_l",
            "sparse": "o = G_c o_c + G_f o_s" if recipe.has_coarse_branch else "o = o_s",
            "linear": "o = o_l",
            "blend": f"o = a o_s + (1 - a) o_l,  a = sigmoid(logit) for each {recipe.alpha_shape}",
        }[recipe.combine]
    )
    return lines


def _router_maths(recipe: Recipe, router: BlockRouter) -> list[str]:
    smoothed = "k_j - mu" if router.smooth_k and not recipe.smooth_k else "k_j"
    is_learned = recipe.combine == "blend"
    pair = ("W_q mean(q_i)", f"W_k mean({smoothed})")
    if not is_learned:
        pair = ("mean(q_i)", f"mean({smoothed})")
    lines = [
        f"score_ij = scale {pair[0]} . {pair[1]},  blocks of {recipe.block_q} x "
        f"{recipe.block_k} rows"
    ]
    if router.mode != "hard":
        lines.append(
            f"m_ij = sigmoid(score_ij / {router.temperature:g} + lambda_i),  sum_j m_ij = "
            f"{router.keep_ratio:g} T_n  (SoftTop-k)"
        )
        if router.mode == "soft":
            return lines
        lines.append("forward with the hard map below, gradient of m (straight through)")
    count = f"{router.keep_ratio:g} T_n" if router.keep_count is None else f"{router.keep_count}"
    prefix = (
        "longest prefix with softmax mass <=" if router.longest_prefix else "fewest with mass >="
    )
    by_mass = f"{prefix} {router.keep_mass:g}"
    lines.append(
        {
            "top_k": f"C_i = the {count} best j",
            "top_p": f"C_i = {by_mass}",
            "union": f"C_i = the {count} best j, and {by_mass}",
            "intersection": f"C_i = those of the {count} best j that are also {by_mass}",
        }[router.selection]
    )
    if router.min_similarity is not None:
        lines.append(
            f"blocks whose rows' mean cosine is below {router.min_similarity:g} are always computed"
        )
    if recipe.has_linear_branch and recipe.linear_scope == "marginal":
        lines.append(f"M_ij = 1 on C_i, -1 on the {router.negligible_ratio:g} T_n worst, else 0")
    return lines


def _chunk_maths(router: ChunkRouter) -> list[str]:
    axes = zip(("frames", "rows", "columns"), router.chunk, strict=True)
    box = " x ".join("all " + name if size == 0 else f"{size} {name}" for name, size in axes)
    who = "mean(q) of a block" if router.pool_queries else "q of a token"
    together = {
        "query_head": "of each query",
        "head_global": "of all queries of a head",
        "overall": "of all queries and heads",
    }[router.mode]
    chosen = (
        f"the {router.num_chunks} best chunks"
        if router.num_chunks is not None
        else f"the fewest whose min-max normalised gates {together} sum to {router.threshold:g}"
    )
    return [
        f"chunks of {box};  gate = {who} . mean(k of the chunk)",
        f"each query attends its own chunk and {chosen}",
    ]


def _sparse_maths(recipe: Recipe) -> list[str]:
    lines = []
    if recipe.skip is not None:
        reference = {
            "kept_lse": "ln of the row's sum of exp S over the kept tiles",
            "running_max": "the row's running maximum",
        }[recipe.skip.reference]
        rows = f"{recipe.skip.rows} rows" if recipe.skip.rows else "the tile"
        lines.append(
            f"tile by tile ({recipe.skip.tile_order}): S = scale q k^T; dropped if max S - ref < "
            f"{recipe.skip.log_threshold:g} for every row of {rows}, ref = {reference}"
        )
    if recipe.low_bit is not None:
        lines.append(
            "S from int8 q and k (one scale for each "
            + (f"{recipe.low_bit.q_rows} queries" if recipe.low_bit.q_rows else "query block")
            + " and key block), P V from e4m3 P and V; backward in 16 bits"
        )
    lines.append(
        "o_s = softmax over C_i of scale q k^T, times v"
        if recipe.skip is None
        else "o_s = softmax over what is kept, times v"
    )
    return lines


# Parameters -------------------------------------------------------------------------------------


def _options(method: Method) -> list[str]:
    """Every option with its value and what the class says of it."""
    about: dict[str, str] = {}
    for cls in (Method, sparline.DynSparse, type(method)):
        if not isinstance(method, cls) and cls is not sparline.DynSparse:
            continue
        args = re.split(r"\nArgs:\n", inspect.getdoc(cls) or "")[1:]
        for name, text in re.findall(r"    (\w+): ((?:.|\n        )*)", args[0] if args else ""):
            about[name] = " ".join(text.split())
    values = {key: value for key, value in method.to_dict().items() if key != "name"}
    width = max(len(f"{key} = {value}") for key, value in values.items())
    return [f"{f'{key} = {value}':<{width}}  {about.get(key, '')}" for key, value in values.items()]


def _learned(method: Method, heads: int, head_dim: int) -> list[str]:
    module = sparline.nn.module_for(
        method, head_dim=head_dim, num_heads=heads, hidden_dim=heads * head_dim
    )
    lines = [f"{name} {tuple(p.shape)}" for name, p in module.named_parameters()]
    return lines or ["nothing"]


# Cost -------------------------------------------------------------------------------------------


def cost(method: Method, q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> list[str]:
    """GFLOP by stage, forward and backward, and their share of dense attention's."""
    sizes: dict[str, Any] = {
        "batch": q_shape[0],
        "num_heads": q_shape[1],
        "num_kv_heads": k_shape[1],
        "num_queries": q_shape[2],
        "num_keys": k_shape[2],
        "head_dim": q_shape[3],
    }
    if not depends_on_data(method):
        lines = []
        for direction in ("forward", "backward"):
            counted = flops(method, **sizes, direction=direction)
            lines.append(f"{direction:<9} {_total(counted)}")
            lines.append(f"          {_stages(counted)}")
        return lines
    unit = "tiles are kept" if method.recipe.skip is not None else "scores enter the softmax"
    lines = [f"depends on the data; where this share of the {unit}:"]
    for share in SHARES:
        forward, backward = (
            flops(method, **sizes, kept_ratio=share, direction=d) for d in ("forward", "backward")
        )
        lines.append(f"{share:4.0%}  forward {_total(forward)}; backward {_total(backward)}")
    return lines


def _total(counted: Flops) -> str:
    return f"{counted.total / 1e9:.4g} GFLOP, {counted.ratio:.2%} of dense"


def _stages(counted: Flops) -> str:
    return ", ".join(f"{name} {x / 1e9:.3g}" for name, x in counted.stages.items() if x)


# Text -------------------------------------------------------------------------------------------


def _section(title: str, lines: list[str]) -> str:
    return "\n".join([f"\n{title}", *(f"  {line}".rstrip() for line in lines)])


def _parse_sizes(flag: str, text: str, count: int, form: str, example: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{flag}: it reads {form}, got {text!r}. Try {example}.") from error
    if len(sizes) != count:
        raise InputError(f"{flag}: it reads {form}, got {text!r}. Try {example}.")
    if min(sizes) < 1:
        raise InputError(f"{flag}: sizes must be positive, got {text}.")
    return sizes


def _grid_of(grid: str | None, length: int) -> Grid:
    """The given grid, or that of a known workload of this length."""
    if grid is not None:
        place = Grid(*_parse_sizes("--grid", grid, 3, "T,H,W", "8,32,32"))
        if place.length != length:
            raise InputError(
                f"--grid: it must hold the {length} tokens of --shape, got {grid} with "
                f"{math.prod(place[:3])}."
            )
        return place
    for workload in WORKLOADS.values():
        if workload.length == length and not workload.text:
            return Grid(*workload.grid)
    raise InputError(
        f"--grid: this method needs the token grid, and {length} tokens are no known workload. "
        "Pass --grid T,H,W."
    )
