# SPDX-License-Identifier: Apache-2.0
"""Methods brought to one density, so that their errors can be compared.

Density is the share of score elements that enter the softmax. Where a method sets it directly, it
is asked for it; where it follows from another option, that option is found by trial on the
captured tensors. What cannot come down to the density (in-loop skipping with a whole tile
deciding) or has none (linear attention) is run as near as it comes, and says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

import sparline
from sparline.accounting import flops
from sparline.methods import BLASST, SLA, VSA, DynSparse, Method, VMoBA
from sparline.reference import CRITICAL, Weights, unpack_bits
from sparline.routing import route_tiles
from sparline.tokens import Grid, make_axes, rows_of

#: Values of an option that are tried between its bounds, at most.
SEARCHES = 8
#: Query tiles on which in-loop thresholds are tried, at most.
SKIP_TILES = 16
GOLDEN = 0.5 * (5**0.5 - 1.0)
#: SpargeAttn's defaults of theta: of its top-p and of its top-k interface.
SIMILARITIES = (0.6, -0.1)


class Sample(Protocol):
    """What one layer's self-attention sees; q, k and v are (1, N, H, D)."""

    @property
    def q(self) -> Tensor: ...
    @property
    def k(self) -> Tensor: ...
    @property
    def v(self) -> Tensor: ...
    @property
    def grid(self) -> Grid: ...
    @property
    def layer(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A method at a density."""

    method: Method
    setting: str  # options that make the density
    density: float  # achieved
    flops: float  # of dense attention's

    def run(self, sample: Sample) -> Tensor:
        """o (1, N, H, D). Learned tensors have their initial values: SLA's projection is zero,
        SLA2's alpha is fitted to this sample's dense output, VSA's coarse gate is zero."""
        heads, head_dim = sample.q.shape[2:]
        arguments: dict[str, Any] = {"layout": "bnhd", "grid": sample.grid}
        # Kernels of a GPU take 16-bit tensors only.
        dtype = torch.bfloat16 if sample.q.is_cuda else torch.float32
        q, k, v = (x.to(dtype) for x in (sample.q, sample.k, sample.v))
        with torch.no_grad():
            if isinstance(self.method, VSA):  # its module makes the gate from the layer's input
                arguments["gate_coarse"] = torch.zeros_like(q)
                o: Tensor = sparline.attention(q, k, v, method=self.method, **arguments)
                return o
            module = sparline.nn.module_for(
                self.method, head_dim=head_dim, num_heads=heads, hidden_dim=0
            ).to(q.device)
            if isinstance(module, sparline.nn.SLA2):
                module.init_alpha(q, k, v, **arguments)
            o = module(q, k, v, **arguments)
            return o


def tune(name: str, sample: Sample, keep_ratio: float) -> Tuned:
    """The method called ``name`` in ``sparline.METHODS`` at the density that SLA has with
    ``keep_ratio``: that ratio, down to whole blocks."""
    target = kept_share(SLA(keep_ratio=keep_ratio), sample)
    cls = sparline.METHODS[name]
    if issubclass(cls, (DynSparse, BLASST)):
        return _tune_in_loop(name, sample, target)
    if issubclass(cls, VMoBA):
        return _tune_chunks(name, sample, target)
    if issubclass(cls, VSA):
        cube = sparline.method(name).cube
        sides = zip(sample.grid[:3], cube, strict=True)
        count = max(1, math.floor(keep_ratio * math.prod(-(-side // c) for side, c in sides)))
        return _tuned(sparline.method(name, num_cubes=count), sample, f"num_cubes={count}")
    if name in ("top_p", "hybrid", "sparge"):
        return _tune_mass(name, sample, target)
    if name in ("dense", "linear"):
        return _tuned(sparline.method(name), sample, "")
    return _tuned(
        sparline.method(name, keep_ratio=keep_ratio), sample, f"keep_ratio={keep_ratio:g}"
    )


def _tune_mass(name: str, sample: Sample, target: float) -> Tuned:
    """The top-p rules: ``keep_mass`` makes the density."""
    fixed: dict[str, float] = {}
    if name == "hybrid":  # its authors take 3 % by top-k of 5 % in all
        fixed["keep_ratio"] = 0.6 * target
    if name == "sparge":
        # Unlike blocks are always computed: that alone may be more than the density.
        for fixed["min_similarity"] in SIMILARITIES:
            least = sparline.method(name, keep_mass=0.0, **fixed)
            if kept_share(least, sample) <= target:
                break

    def make(keep_mass: float) -> Method:
        return sparline.method(name, keep_mass=keep_mass, **fixed)

    keep_mass = search(lambda x: kept_share(make(x), sample), 0.0, 1.0, target)
    options = {**fixed, "keep_mass": keep_mass}
    setting = " ".join(f"{key}={value:.3g}" for key, value in options.items())
    return _tuned(make(keep_mass), sample, setting)


def _tune_chunks(name: str, sample: Sample, target: float) -> Tuned:
    """The layer's own partition, or boxes where its chunks are too large for the density."""
    own = sparline.method(name).for_layer(sample.layer)
    assert isinstance(own, VMoBA)
    tuned = _tune_threshold(own, sample, target)
    if tuned.density > 1.25 * target and own.partition != "3d":
        tuned = _tune_threshold(dataclasses.replace(own, partition="3d"), sample, target)
    return tuned


def _tune_threshold(method: VMoBA, sample: Sample, target: float) -> Tuned:
    def make(threshold: float) -> Method:
        return dataclasses.replace(method, threshold=threshold)

    threshold = search(lambda x: kept_share(make(x), sample), 0.0, 1.0, target)
    setting = f"threshold={threshold:.3g} partition={method.partition}"
    return _tuned(make(threshold), sample, setting)


def _tune_in_loop(name: str, sample: Sample, target: float) -> Tuned:
    def make(log_threshold: float) -> Method:
        return sparline.method(name, log_threshold=log_threshold)

    def kept(log_threshold: float) -> float:
        shares = skipped_shares(make(log_threshold), sample, SKIP_TILES)
        return 1.0 - sum(shares) / len(shares)

    threshold = -search(lambda x: kept(-x), 1e-3, 12.0, target)  # lower keeps more
    shares = skipped_shares(make(threshold), sample)
    density = 1.0 - sum(shares) / len(shares)
    return _tuned(make(threshold), sample, f"log_threshold={threshold:.3g}", density)


def search(share: Callable[[float], float], low: float, high: float, target: float) -> float:
    """Where a share of scores, which rises to 1 at ``high``, comes nearest to ``target``: the chord
    and the middle in turn, until it is within a hundredth."""
    tried = {low: share(low), high: 1.0}
    for turn in range(SEARCHES):
        if not tried[low] < target < tried[high]:
            break
        part = (target - tried[low]) / (tried[high] - tried[low]) if turn % 2 == 0 else 0.5
        between = low + part * (high - low)
        tried[between] = share(between)
        if abs(tried[between] - target) <= 0.01 * target:
            break
        low, high = (between, high) if tried[between] < target else (low, between)
    return min(tried, key=lambda x: abs(tried[x] - target))


def _tuned(method: Method, sample: Sample, setting: str, density: float | None = None) -> Tuned:
    density = kept_share(method, sample) if density is None else density
    _, num_rows, heads, head_dim = sample.q.shape
    block_class = None
    if method.recipe.has_linear_branch and method.recipe.router is not None:
        block_class = sparline.route(
            sample.q, sample.k, method=method, layout="bnhd", grid=sample.grid
        )
    counted = flops(
        method,
        num_heads=heads,
        num_queries=num_rows,
        head_dim=head_dim,
        block_class=block_class,
        kept_ratio=density if block_class is None else None,
    )
    blocks = f"blocks={method.recipe.block_q}x{method.recipe.block_k}"
    return Tuned(method, f"{blocks} {setting}".strip(), density, counted.ratio)


def kept_share(method: Method, sample: Sample) -> float:
    """The share of score elements that enter the softmax of a method with a router."""
    recipe = method.recipe
    if recipe.combine == "linear":
        return 0.0
    if recipe.router is None:
        return 1.0
    q, k = (x.transpose(1, 2) for x in (sample.q, sample.k))
    length = q.shape[2]
    axes = make_axes("inspect", recipe, length, length, sample.grid, None, None, (), ())
    tiles = route_tiles(q, k, recipe, Weights(), axes, None, None)
    keys = rows_of(
        axes.key_segments, length, recipe.block_k, None, torch.device("cpu")
    ).counts.double()
    if tiles.bits is not None:  # rows choose one by one; short blocks are filled up with none
        rows = unpack_bits(tiles.bits, len(keys)).sum(dim=2).cpu().double()  # (1, H, T_n)
        return ((rows @ keys).sum() / (rows.shape[1] * length**2)).item()
    assert isinstance(tiles.block_map, Tensor)
    queries = rows_of(
        axes.query_segments, length, recipe.block_q, None, torch.device("cpu")
    ).counts.double()
    critical = (tiles.block_map == CRITICAL).cpu().double()
    kept = torch.einsum("bhij,i,j->", critical, queries, keys)
    return (kept / (critical.shape[1] * length**2)).item()


def skipped_shares(method: Method, sample: Sample, num_tiles: int | None = None) -> list[float]:
    """The share of tiles that an in-loop method skips, for each head; of ``num_tiles`` query tiles
    from all over the sequence, or of all."""
    block_q = method.recipe.block_q
    q = sample.q
    whole = q.shape[1] // block_q
    if num_tiles is not None and whole > num_tiles:
        tiles = torch.unflatten(q[:, : whole * block_q], 1, (whole, block_q))
        # Multiples of the golden ratio: even spacing may meet the same place of every frame.
        chosen = sorted({int(whole * (GOLDEN * n % 1.0)) for n in range(1, num_tiles + 1)})
        q = tiles[:, chosen].flatten(1, 2)
    told = sparline.tile_statistics(q, sample.k, sample.v, method=method, layout="bnhd")
    shares: list[float] = (told.skipped / told.visited)[0].tolist()
    return shares
