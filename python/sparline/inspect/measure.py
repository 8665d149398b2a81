# SPDX-License-Identifier: Apache-2.0
"""What one captured call tells about attention: where its mass lies and which method would keep it.

Everything is measured in float32 against dense attention on the same q, k, v. Dense weights exist
for one block of queries at a time, and of long sequences only ``QUERY_BLOCKS`` evenly spaced
blocks are looked at, so that memory is O(block_q x N) and time O(N).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import sparline
from sparline import density
from sparline.methods import SLA, TOKEN_ORDERS, Method
from sparline.reference import CRITICAL, MARGINAL, NEGLIGIBLE
from sparline.tokens import make_axes

from .capture import Sample

#: Query blocks whose dense weights are computed, at most.
QUERY_BLOCKS = 64
#: Query rows whose dense weights are decomposed, at most.
RANK_ROWS = 256

KEEP_RATIOS = (0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05, 0.02)
LOG_THRESHOLDS = (-10.0, -8.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0)
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CLASSES = {"critical": CRITICAL, "marginal": MARGINAL, "negligible": NEGLIGIBLE}
#: Columns of a picture of a map, and heads that have one, at most.
PICTURE, PICTURE_HEADS = 128, 8

Heads = list[float]  # a figure for each head


@dataclasses.dataclass(frozen=True)
class Recall:
    """Share of the dense softmax mass inside the kept blocks, by token order and router."""

    sparsity: list[float]  # achieved, of each level
    top_k: dict[str, list[Heads]]  # of each order and level: the router that SLA uses
    oracle: dict[str, list[Heads]]  # the best that any choice of as many blocks can keep
    random: list[float]  # expected of as many blocks drawn blindly


@dataclasses.dataclass(frozen=True)
class Error:
    """One method against dense attention."""

    method: str
    setting: str  # the options that were set to reach the density
    density: float  # achieved: share of score elements that enter the softmax
    flops: float  # of dense attention's
    relative_l1: Heads
    cosine: Heads


@dataclasses.dataclass(frozen=True)
class Skipping:
    """Share of tiles dropped inside the loop, by threshold."""

    log_thresholds: list[float]
    dynsparse: list[Heads]
    blasst: list[Heads]


@dataclasses.dataclass(frozen=True)
class Rank:
    """How many directions the softmax weights of a sample of rows need, in one class of blocks."""

    ranks: list[int]
    energy: list[Heads]  # share of the squared weights in the first singular directions
    effective: Heads  # exp of the entropy of the normalised singular values
    stable: Heads  # sum of squared singular values over the largest


class Maps(NamedTuple):
    """Pictures of some heads, (H', QUERY_BLOCKS, PICTURE) or smaller; rows are query blocks."""

    heads: list[int]
    mass: Tensor  # dense mass of a block, relative to an even spread
    score: Tensor  # softmax of the pooled scores, likewise
    classes: Tensor  # (H', 3, ...): share of critical, marginal and negligible blocks


@dataclasses.dataclass(frozen=True)
class Measurement:
    model: str
    step: int
    layer: int
    timestep: float
    grid: tuple[int, ...]
    num_heads: int
    head_dim: int
    class_mass: dict[str, Heads]  # dense mass inside each class of SLA's map
    recall: Recall
    errors: list[Error]
    skipping: Skipping
    rank: dict[str, Rank]  # all, critical, marginal
    maps: Maps = dataclasses.field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """All figures; the maps are pictures only."""
        told = dataclasses.asdict(dataclasses.replace(self, maps=Maps([], *[torch.empty(0)] * 3)))
        del told["maps"]
        return told


#: Stages of ``measure_sample`` besides the methods, for a progress bar.
STAGES = ("maps", "recall", "low rank", "in-loop skipping")


def measure_sample(
    sample: Sample,
    methods: Sequence[str],
    keep_ratio: float,
    on_stage: Callable[[str], None] = lambda _: None,
) -> Measurement:
    """Measures everything about one call. ``on_stage`` is called before each of ``STAGES`` and each
    method."""
    router = SLA(keep_ratio=keep_ratio)
    on_stage("maps")
    mass, blocks = block_mass(sample, router)
    classes = _route(sample, router)
    class_mass = {
        name: (mass * (classes[:, blocks] == value)).sum(-1).mean(-1).tolist()
        for name, value in CLASSES.items()
    }
    maps = _maps(sample, router, mass, classes[:, blocks], blocks)
    on_stage("recall")
    recall = measure_recall(sample)
    on_stage("low rank")
    rank = measure_rank(sample, router, classes)
    on_stage("in-loop skipping")
    skipping = measure_skipping(sample)
    return Measurement(
        model=sample.model,
        step=sample.step,
        layer=sample.layer,
        timestep=sample.timestep,
        grid=tuple(sample.grid),
        num_heads=sample.q.shape[2],
        head_dim=sample.q.shape[3],
        class_mass=class_mass,
        recall=recall,
        errors=measure_errors(sample, methods, keep_ratio, on_stage),
        skipping=skipping,
        rank=rank,
        maps=maps,
    )


# Where the mass lies ----------------------------------------------------------------------------


def block_mass(sample: Sample, method: Method) -> tuple[Tensor, list[int]]:
    """The share of softmax weight that query blocks give to each key block, (H, I, T_n) float32,
    and which query blocks those I are. Blocks are the method's, in its token order."""
    recipe = method.recipe
    q, k = _ordered(sample, method)
    scale = sample.q.shape[3] ** -0.5
    blocks = _spread(-(-q.shape[1] // recipe.block_q), QUERY_BLOCKS)
    mass = [
        [
            _sum_blocks(
                (scale * q_head[i * recipe.block_q : (i + 1) * recipe.block_q] @ k_head.mT)
                .softmax(dim=-1)
                .mean(dim=0),
                recipe.block_k,
            )
            for i in blocks
        ]
        for q_head, k_head in zip(q, k, strict=True)
    ]
    return torch.stack([torch.stack(rows) for rows in mass]), blocks


def measure_recall(sample: Sample) -> Recall:
    top_k: dict[str, list[Heads]] = {}
    oracle: dict[str, list[Heads]] = {}
    sparsity: list[float] = []
    for order in TOKEN_ORDERS:
        method = SLA.sparse_only(token_order=order)
        mass, blocks = block_mass(sample, method)
        best = mass.sort(dim=-1, descending=True).values.cumsum(dim=-1).mean(dim=1)  # (H, T_n)
        top_k[order], oracle[order], sparsity = [], [], []
        for keep_ratio in KEEP_RATIOS:
            routed = _route(sample, dataclasses.replace(method, keep_ratio=keep_ratio))
            chosen = routed[:, blocks] == CRITICAL
            top_k[order].append((mass * chosen).sum(dim=-1).mean(dim=-1).tolist())
            count = int(chosen[0, 0].sum())
            oracle[order].append(best[:, count - 1].tolist())
            sparsity.append(1.0 - count / mass.shape[-1])
    return Recall(sparsity, top_k, oracle, random=[1.0 - s for s in sparsity])


def _maps(sample: Sample, method: SLA, mass: Tensor, classes: Tensor, blocks: list[int]) -> Maps:
    recipe, num_keys = method.recipe, mass.shape[-1]
    heads = _spread(len(mass), PICTURE_HEADS)
    q, k = (x[heads] for x in _ordered(sample, method))
    q_mean, k_mean = _block_means(q, recipe.block_q), _block_means(k, recipe.block_k)
    score = (sample.q.shape[3] ** -0.5 * q_mean[:, blocks] @ k_mean.mT).softmax(dim=-1)
    shares = torch.stack([(classes[heads] == value).float() for value in CLASSES.values()], dim=1)
    return Maps(heads, _shrink(mass[heads] * num_keys), _shrink(score * num_keys), _shrink(shares))


def _shrink(maps: Tensor) -> Tensor:
    """Means over equal parts of the last dimension, to at most PICTURE of them."""
    maps = maps.cpu()
    return maps if maps.shape[-1] <= PICTURE else F.adaptive_avg_pool2d(maps, (None, PICTURE))


# Low rank ---------------------------------------------------------------------------------------


def measure_rank(sample: Sample, method: SLA, classes: Tensor) -> dict[str, Rank]:
    """The rank of the weights of evenly spaced rows: all of them, and within a class of blocks."""
    recipe = method.recipe
    q, k = _ordered(sample, method)
    rows = torch.tensor(_spread(q.shape[1], RANK_ROWS), device=q.device)
    row_block = torch.div(rows, recipe.block_q, rounding_mode="floor")
    key_block = torch.arange(k.shape[1], device=q.device) // recipe.block_k
    parts: dict[str, list[Tensor]] = {"all": [], "critical": [], "marginal": []}
    for q_head, k_head, map_head in zip(q, k, classes, strict=True):
        weights = (q.shape[2] ** -0.5 * q_head[rows] @ k_head.mT).softmax(dim=-1)
        row_classes = map_head[row_block][:, key_block]
        for name, singular_values in parts.items():
            part = weights if name == "all" else weights * (row_classes == CLASSES[name])
            gram = part.double() @ part.double().mT  # rows x rows: its roots are the values wanted
            singular_values.append(torch.linalg.eigvalsh(gram).clamp(min=0).flip(0).sqrt())
    return {name: _rank(torch.stack(values)) for name, values in parts.items()}


def _rank(values: Tensor) -> Rank:
    """``values``: singular values, (H, R) in falling order."""
    tiny = torch.finfo(values.dtype).tiny
    energy = values.square()
    total = energy.sum(dim=-1).clamp(min=tiny)
    share = values / values.sum(dim=-1, keepdim=True).clamp(min=tiny)
    ranks = [rank for rank in RANKS if rank < values.shape[-1]] + [values.shape[-1]]
    cumulative = energy.cumsum(dim=-1) / total[:, None]
    return Rank(
        ranks,
        energy=[cumulative[:, rank - 1].tolist() for rank in ranks],
        effective=torch.special.entr(share).sum(dim=-1).exp().tolist(),
        stable=(total / energy[:, 0].clamp(min=tiny)).tolist(),
    )


# Methods ----------------------------------------------------------------------------------------


def measure_skipping(sample: Sample) -> Skipping:
    rates = {
        name: [
            density.skipped_shares(
                sparline.method(name, log_threshold=t), sample, density.SKIP_TILES
            )
            for t in LOG_THRESHOLDS
        ]
        for name in ("dynsparse", "blasst")
    }
    return Skipping(list(LOG_THRESHOLDS), rates["dynsparse"], rates["blasst"])


def measure_errors(
    sample: Sample,
    methods: Sequence[str],
    keep_ratio: float,
    on_stage: Callable[[str], None] = lambda _: None,
) -> list[Error]:
    """Every method at the density ``keep_ratio``, or as near as it can come, against dense."""
    q, k, v = (x.float().transpose(1, 2) for x in (sample.q, sample.k, sample.v))
    dense = F.scaled_dot_product_attention(q, k, v)[0]  # (H, N, D)
    errors = []
    for name in methods:
        on_stage(name)
        tuned = density.tune(name, sample, keep_ratio)
        o = tuned.run(sample).float()[0].transpose(0, 1)
        errors.append(
            Error(
                name,
                tuned.setting,
                tuned.density,
                tuned.flops,
                relative_l1=((o - dense).abs().sum((1, 2)) / dense.abs().sum((1, 2))).tolist(),
                cosine=F.cosine_similarity(o.flatten(1), dense.flatten(1)).tolist(),
            )
        )
    return errors


# Small parts ------------------------------------------------------------------------------------


def _ordered(sample: Sample, method: Method) -> tuple[Tensor, Tensor]:
    """q and k in float32, (H, N, D), rows in the method's token order."""
    num_rows = sample.q.shape[1]
    axes = make_axes("inspect", method.recipe, num_rows, num_rows, sample.grid, None, None, (), ())
    q, k = (x[0].transpose(0, 1).float() for x in (sample.q, sample.k))
    if axes.order is None:
        return q, k
    order = axes.order.to(q.device)
    return q[:, order], k[:, order]


def _route(sample: Sample, method: Method) -> Tensor:
    """The method's map, (H, T_m, T_n)."""
    return sparline.route(sample.q, sample.k, method=method, layout="bnhd", grid=sample.grid)[0]


def _spread(total: int, at_most: int) -> list[int]:
    """Evenly spaced numbers below ``total``."""
    count = min(total, at_most)
    return [(2 * n + 1) * total // (2 * count) for n in range(count)]


def _sum_blocks(x: Tensor, block_rows: int) -> Tensor:
    """Sums over blocks of the last dimension; the last block may be short."""
    padded = F.pad(x, (0, -x.shape[-1] % block_rows))
    return torch.unflatten(padded, -1, (-1, block_rows)).sum(dim=-1)


def _block_means(x: Tensor, block_rows: int) -> Tensor:
    """Means of blocks of rows, (H, N, D) to (H, T, D)."""
    rows = x.new_ones(1, x.shape[1])
    return _sum_blocks(x.mT, block_rows).mT / _sum_blocks(rows, block_rows)[..., None]
