# SPDX-License-Identifier: Apache-2.0
"""The one list of cases, the random case generator, and how a case becomes tensors and calls.

A case prints as one pastable line: ``check_case(Case(...))`` in a Python shell repeats a failure.
"""

from __future__ import annotations

import dataclasses
import math
import random
from math import inf
from typing import Any

import numpy as np
import oracle
import torch
from numeric import assert_low_bit, assert_low_bit_lse, assert_relative
from torch import Tensor

import sparline
from sparline import BLASST, SLA, SLA2, VSA, Dense, DynSparse, Grid, LowBit, VMoBA, Weights
from sparline.methods import COUNT_ROUNDINGS, FEATURE_MAPS, LINEAR_SCOPES, Method

Spans = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Case:
    method: Method
    batch: int = 1
    num_heads: int = 2
    num_kv_heads: int = 2
    num_queries: int = 80
    num_keys: int = 80
    head_dim: int = 16
    dtype: str = "float32"
    layout: str = "bhnd"
    padded: bool = False  # rows of q, k, v are followed by NaN: views into wider memory
    scale: float | None = None
    cu_q: tuple[int, ...] | None = None
    cu_k: tuple[int, ...] | None = None
    protected_q: Spans = ()
    protected_k: Spans = ()
    grids: tuple[Grid, ...] = ()  # one for each sequence
    block_map: str = "route"  # or "random" or "soft": the caller's own map, empty rows included
    bias: bool = True  # of the projection and of the hedgehog maps
    gates: str = ""  # VSA's: "coarse", "fine" or "coarse fine"
    num_alphas: int = 0  # SLA2's, for each head; 0: as many as there are blocks or tokens
    has_router: bool = True  # SLA2's matrices
    seed: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def segments(self) -> dict[str, Any]:
        return {
            "grid": list(self.grids) or None,
            "cu_seqlens_q": None if self.cu_q is None else list(self.cu_q),
            "cu_seqlens_k": None if self.cu_k is None else list(self.cu_k),
            "protected_q": self.protected_q,
            "protected_k": self.protected_k,
        }

    @property
    def block_shape(self) -> tuple[int, int]:
        m = self.method
        return (math.prod(m.cube),) * 2 if isinstance(m, VSA) else (m.block_q, m.block_k)

    @property
    def box(self) -> tuple[int, int, int] | None:
        """The boxes of the grid in whose order blocks are cut."""
        m = self.method
        if isinstance(m, VMoBA):
            return {
                "cycle": (m.frames_1d, 0, 0),  # a call outside a model is that of the first layer
                "1d": (m.frames_1d, 0, 0),
                "2d": (0, *m.window_2d),
                "3d": m.box_3d,
            }[m.partition]
        return m.cube if m.token_order == "cubes" else None

    @property
    def chunks(self) -> np.ndarray:
        """The box, or run of text, that every token is in, by its row in memory."""
        assert self.box is not None
        runs = [place[:3] for place in oracle.places(self.grids, self.box)]
        numbers = {run: n for n, run in enumerate(sorted(set(runs)))}
        return np.array([numbers[run] for run in runs])

    @property
    def order(self) -> list[int] | None:
        """Which row is at each position; None: as they are in memory."""
        if self.box is not None:
            places = oracle.places(self.grids, self.box)
            return sorted(range(len(places)), key=lambda n: places[n])
        if self.method.token_order == "hilbert":  # a unit test knows the curve
            order = []
            for frames, height, width, prefix, suffix in self.grids:
                curve = sparline.tokens.hilbert_order((frames, height, width)).tolist()
                video = [prefix + n for n in curve]
                last = prefix + len(curve)
                rows = [*range(prefix), *video, *range(last, last + suffix)]
                order += [len(order) + n for n in rows]
            return order
        return None

    @property
    def tokens(self) -> tuple[oracle.Tokens, oracle.Tokens]:
        block_q, block_k = self.block_shape
        order, borders = self.order, []
        if isinstance(self.method, (VSA, VMoBA)):
            assert order is not None
            chunk = self.chunks[order]
            borders = [p for p in range(1, len(chunk)) if chunk[p] != chunk[p - 1]]
        borders_q = borders if isinstance(self.method, VSA) else []
        return (
            oracle.Tokens(self.num_queries, block_q, self.cu_q, self.protected_q, order, borders_q),
            oracle.Tokens(self.num_keys, block_k, self.cu_k, self.protected_k, order, borders),
        )


def on_grid(method: Method, *grids: Grid, **options: Any) -> Case:
    """A case of self-attention on one grid, or of packed sequences."""
    ends = [0]
    for grid in grids:
        ends.append(ends[-1] + grid.length)
    packs = {"cu_q": tuple(ends), "cu_k": tuple(ends)} if len(grids) > 1 else {}
    return Case(
        method, grids=grids, num_queries=ends[-1], num_keys=ends[-1], **{**packs, **options}
    )


_PACKS: dict[str, Any] = {"cu_q": (0, 37, 37, 80), "cu_k": (0, 20, 61, 80)}
_SPANS: dict[str, Any] = {"protected_q": ((0, 7),), "protected_k": ((0, 7), (70, 80))}
_SMALL: dict[str, Any] = {"block_q": 16, "block_k": 16, "keep_ratio": 0.3, "negligible_ratio": 0.25}

_TILES: dict[str, Any] = {"block_q": 16, "block_k": 16}
_BLEND: dict[str, Any] = {**_TILES, "keep_ratio": 0.3}
_IN_LOOP: dict[str, Any] = {"block_q": 32, "block_k": 16}
_CUBES: dict[str, Any] = {"cube": (2, 2, 4)}
_CHUNKS: dict[str, Any] = {
    "frames_1d": 1,
    "window_2d": (2, 3),
    "box_3d": (2, 2, 3),
    "block_q": 32,
    "block_k": 16,
}

CASES: dict[str, Case] = {
    "dense": Case(Dense(block_q=32, block_k=16)),
    "dense-cross": Case(Dense(), num_queries=33, num_keys=150, head_dim=64),
    "dense-packed": Case(Dense(block_q=16, block_k=16), **_PACKS),
    **{
        f"sla-{feature_map}-{scope}": Case(
            SLA(feature_map=feature_map, linear_scope=scope, **_SMALL)
        )
        for feature_map in FEATURE_MAPS
        for scope in LINEAR_SCOPES
    },
    "sla-paper": Case(SLA.paper(), num_queries=300, num_keys=300, head_dim=64),
    "sla1": Case(SLA.sla1(keep_ratio=0.2), num_queries=300, num_keys=300, head_dim=128),
    "sla-main": Case(SLA.sla_main(keep_ratio=0.2), num_queries=300, num_keys=300, head_dim=40),
    "sum": Case(SLA(combine="sum", **_SMALL)),
    "sparse": Case(SLA(combine="sparse", **_SMALL)),
    "linear": Case(SLA.linear_only(block_q=16, block_k=16)),
    "linear-marginal": Case(SLA(combine="linear", **_SMALL)),
    "linear-plus-sparse": Case(SLA.linear_plus_sparse(block_q=16, block_k=16, keep_ratio=0.3)),
    "gqa": Case(SLA(**_SMALL), num_heads=4, batch=2),
    "gqa-hedgehog": Case(SLA(feature_map="hedgehog", **_SMALL), num_heads=4, num_kv_heads=1),
    "bnhd": Case(SLA(**_SMALL), layout="bnhd", batch=2),
    "padded": Case(SLA(**_SMALL), padded=True, layout="bnhd"),
    "one-token": Case(SLA(), num_queries=1, num_keys=1),
    "few-keys": Case(SLA(), num_queries=70, num_keys=3, head_dim=4),
    "cross": Case(SLA(**_SMALL), num_queries=21, num_keys=107),
    "packed": Case(SLA(**_SMALL), **_PACKS),
    "protected": Case(SLA(**_SMALL), **_SPANS),
    "packed-protected": Case(SLA(**_SMALL), **_PACKS, **_SPANS),
    "packed-protected-all": Case(SLA.sla_main(keep_ratio=0.3, block_k=16), **_PACKS, **_SPANS),
    "packed-protected-hedgehog": Case(
        SLA(feature_map="hedgehog_exp", linear_scope="complement", **_SMALL), **_PACKS, **_SPANS
    ),
    "own-map": Case(SLA(**_SMALL), block_map="random"),
    "own-map-complement": Case(
        SLA(linear_scope="complement", combine="sum", **_SMALL), block_map="random", **_SPANS
    ),
    "smooth-all": Case(SLA(smooth_k="all", **_SMALL), **_PACKS),
    "scale": Case(SLA(**_SMALL), scale=0.7),
    "no-bias": Case(SLA(feature_map="hedgehog", **_SMALL), bias=False),
    "bfloat16": Case(SLA(**_SMALL), dtype="bfloat16"),
    "float16": Case(SLA(**_SMALL), dtype="float16", layout="bnhd"),
    **{
        f"sla2-{feature_map}-{mode}": Case(
            SLA2(feature_map=feature_map, router_mode=mode, **_BLEND)
        )
        for feature_map in FEATURE_MAPS
        for mode in ("hard", "soft", "straight_through")
        if mode != "straight_through" or feature_map == "softmax"
    },
    "sla2-default": Case(SLA2(keep_ratio=0.2), num_queries=300, num_keys=300, head_dim=64),
    "sla2-no-router": Case(SLA2(**_BLEND), has_router=False),
    "sla2-head-alpha": Case(SLA2(alpha_shape="head", router_per_head=True, **_BLEND)),
    "sla2-token-alpha": Case(SLA2(alpha_shape="token", **_BLEND), batch=2),
    "sla2-stretched-alpha": Case(SLA2(**_BLEND), num_alphas=3, num_queries=130),
    "sla2-gqa": Case(SLA2(**_BLEND), num_heads=4, layout="bnhd"),
    "sla2-packed-protected": Case(SLA2(**_BLEND), **_PACKS, **_SPANS),
    "sla2-packed-protected-soft": Case(SLA2(router_mode="soft", **_BLEND), **_PACKS, **_SPANS),
    "sla2-soft-trains-qk": Case(
        SLA2(router_mode="soft", router_trains_qk=True, router_softmax=True, **_BLEND),
        num_heads=4,
    ),
    "sla2-own-map": Case(SLA2(**_BLEND), block_map="random"),
    "sla2-own-soft-map": Case(SLA2(**_BLEND), block_map="soft", **_SPANS),
    "sla2-bfloat16": Case(SLA2(router_mode="soft", **_BLEND), dtype="bfloat16"),
    "sparse-own-soft-map": Case(SLA(combine="sparse", **_SMALL), block_map="soft"),
    "top-p": Case(SLA.top_p(**_TILES)),
    "top-p-packed-protected": Case(SLA.top_p(**_TILES), **_PACKS, **_SPANS),
    "hybrid": Case(SLA.hybrid(), num_queries=300, num_keys=300),
    "intersection": Case(
        SLA(selection="intersection", keep_mass=0.7, combine="sum", **{**_SMALL, "keep_ratio": 0.6})
    ),
    "sparge": Case(SLA.sparge(min_similarity=0.08, keep_mass=0.8, **_TILES), num_heads=4),
    "sparge-default": Case(SLA.sparge(), num_queries=150, num_keys=150),
    **{
        f"{cls.name}-{order}": Case(
            cls(log_threshold=threshold, tile_order=order, decide_rows=rows, **_IN_LOOP), batch=2
        )
        for cls, threshold in ((DynSparse, -2.0), (BLASST, -0.6))
        for order, rows in (
            ("ascending", 0),
            ("reverse", 16),
            ("diagonal_first", 16),
            ("sink_first", 0),
        )
    },
    "dynsparse-nothing": Case(DynSparse(log_threshold=-inf, **_IN_LOOP)),
    "dynsparse-budget": Case(
        DynSparse.from_budget(2.0, 300), num_queries=300, num_keys=300, scale=0.6
    ),
    "dynsparse-packed-protected": Case(
        DynSparse(log_threshold=-1.5, **_IN_LOOP), **_PACKS, **_SPANS
    ),
    "blasst-gqa": Case(
        BLASST(log_threshold=-0.5, **_IN_LOOP), num_heads=4, layout="bnhd", dtype="bfloat16"
    ),
    "dense-cubes": on_grid(
        Dense(token_order="cubes", cube=(2, 3, 2), block_q=16, block_k=16), Grid(3, 5, 6)
    ),
    "sla-hilbert": on_grid(SLA(token_order="hilbert", **_SMALL), Grid(4, 4, 4, 5, 3)),
    "sla-cubes-packed": on_grid(
        SLA(token_order="cubes", cube=(2, 2, 4), **_SMALL),
        Grid(2, 3, 5, 4),
        Grid(3, 4, 4, 0, 6),
        protected_q=((0, 4),),
        protected_k=((0, 4), (76, 82)),
    ),
    "sla2-hilbert-soft": on_grid(
        SLA2(token_order="hilbert", router_mode="soft", alpha_shape="token", **_BLEND),
        Grid(3, 4, 6),
    ),
    "dynsparse-cubes": on_grid(
        DynSparse(log_threshold=-1.5, token_order="cubes", tile_order="diagonal_first", **_IN_LOOP),
        Grid(4, 5, 4),
    ),
    "vsa": on_grid(VSA(keep_ratio=0.3), Grid(5, 6, 9)),
    "vsa-gates": on_grid(VSA(keep_ratio=0.3, **_CUBES), Grid(4, 4, 7), gates="coarse fine"),
    "vsa-coarse-gate": on_grid(
        VSA(num_cubes=2, **_CUBES), Grid(4, 4, 7), gates="coarse", num_heads=4, layout="bnhd"
    ),
    "vsa-text": on_grid(
        VSA(keep_ratio=0.3, **_CUBES),
        Grid(3, 4, 6, 20, 7),
        gates="coarse fine",
        protected_q=((0, 20),),
        protected_k=((0, 20), (92, 99)),
    ),
    "vsa-packed": on_grid(
        VSA(num_cubes=2, **_CUBES), Grid(3, 4, 6, 3), Grid(2, 2, 4), dtype="float16", gates="fine"
    ),
    **{
        f"vmoba-{partition}-{mode}": on_grid(
            VMoBA(partition=partition, mode=mode, **_CHUNKS), Grid(4, 4, 6)
        )
        for partition, mode in (
            ("1d", "query_head"),
            ("2d", "head_global"),
            ("3d", "overall"),
            ("cycle", "head_global"),
        )
    },
    "vmoba-number": on_grid(
        VMoBA(partition="3d", num_chunks=3, **_CHUNKS), Grid(4, 4, 6), num_heads=4
    ),
    "vmoba-block": on_grid(
        VMoBA(partition="3d", pool_queries=True, **_CHUNKS), Grid(4, 5, 6), batch=2
    ),
    "vmoba-text": on_grid(
        VMoBA(partition="2d", **_CHUNKS),
        Grid(3, 4, 6, 9, 5),
        protected_q=((0, 9),),
        protected_k=((0, 9),),
    ),
    "vmoba-packed": on_grid(
        VMoBA(partition="2d", mode="head_global", **_CHUNKS), Grid(2, 4, 6), Grid(3, 2, 5, 0, 4)
    ),
    **{
        f"low-bit-{name}": case
        for name, case in {
            "dense": Case(Dense(low_bit=LowBit(), block_q=32, block_k=16), head_dim=64),
            "dense-groups": Case(
                Dense(
                    low_bit=LowBit(q_rows=16, p_range=224.0, v_range=4.5), block_q=64, block_k=32
                ),
                num_heads=4,
                batch=2,
            ),
            "sla": Case(SLA(low_bit=LowBit(), smooth_k="all", **_SMALL), head_dim=32),
            "sparse": Case(SLA(low_bit=LowBit(v_range=2.25), combine="sparse", **_SMALL)),
            "sla2": Case(SLA2(low_bit=LowBit(), **_BLEND), dtype="bfloat16", **_PACKS, **_SPANS),
            "recomputed-lse": Case(SLA2(low_bit=LowBit(recompute_lse=True), **_BLEND)),
            "dynsparse": Case(
                DynSparse(
                    log_threshold=-2.0, low_bit=LowBit(), tile_order="diagonal_first", **_IN_LOOP
                )
            ),
            "blasst": Case(BLASST(log_threshold=-0.6, low_bit=LowBit(q_rows=16), **_IN_LOOP)),
            "vsa": on_grid(
                VSA(keep_ratio=0.3, low_bit=LowBit(), **_CUBES), Grid(3, 4, 6), gates="coarse fine"
            ),
            "vmoba": on_grid(VMoBA(partition="3d", low_bit=LowBit(), **_CHUNKS), Grid(4, 4, 6)),
        }.items()
    },
}


def random_case(rng: random.Random) -> Case:
    """Any legal small case: ragged, packed, protected, grouped, strided, any method."""

    def maybe(probability: float) -> bool:
        return rng.random() < probability

    def length() -> int:
        return rng.randint(1, rng.choice([20, 70, 70, 130, 130, 260]))

    def spans(n: int) -> Spans:
        cuts = sorted(rng.randint(0, n) for _ in range(2 * rng.randint(1, 2)))
        return tuple(zip(cuts[0::2], cuts[1::2], strict=True))

    method = _random_method(rng)
    options: dict[str, Any] = {}
    if method.recipe.needs_grid:
        sides = ((1, 5), (1, 6), (1, 6))
        text = (0, 0, 3, 9, 20)
        grids = [
            Grid(*(rng.randint(*side) for side in sides), rng.choice(text), rng.choice(text))
            for _ in range(rng.choice([1, 1, 1, 2]))
        ]
        options = {"grids": tuple(grids)}
        num_queries = num_keys = sum(grid.length for grid in grids)
        if len(grids) > 1:
            options["cu_q"] = options["cu_k"] = (0, grids[0].length, num_keys)
    else:
        num_queries = length()
        num_keys = num_queries if maybe(0.5) else length()
        if maybe(0.25):
            inner = rng.randint(0, 2)
            for name, n in (("cu_q", num_queries), ("cu_k", num_keys)):
                options[name] = (0, *sorted(rng.randint(0, n) for _ in range(inner)), n)
    num_kv_heads = rng.choice([1, 1, 2, 3])
    group = rng.choice([1, 1, 2, 3]) if num_kv_heads < 3 else 1
    head_dim = rng.choice([4, 6, 8, 10, 12, 16, 20, 32, 40, 64, 64, 96, 128])
    if isinstance(method, SLA) and not _is_linear_only(method) and maybe(0.3):
        options["block_map"] = "random"
    if isinstance(method, SLA2):
        options["block_map"] = rng.choice(["route"] * 6 + ["random"] + ["soft"])
        options["has_router"] = maybe(0.8)
        options["num_alphas"] = rng.choice([0, 0, 1, 4])
        if method.low_bit is not None and options["block_map"] == "soft":
            options["block_map"] = "route"
    if isinstance(method, VSA):
        options["gates"] = rng.choice(["", "coarse", "fine", "coarse fine", "coarse fine"])
    return Case(
        method,
        batch=rng.choice([1, 1, 1, 2]),
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        num_queries=num_queries,
        num_keys=num_keys,
        head_dim=head_dim,
        dtype=rng.choice(["float32", "float32", "float32", "bfloat16", "float16"]),
        layout=rng.choice(["bhnd", "bnhd"]),
        padded=maybe(0.3),
        scale=rng.choice([None, None, 1.5 * head_dim**-0.5]),
        protected_q=spans(num_queries) if maybe(0.2) else (),
        protected_k=spans(num_keys) if maybe(0.3) else (),
        bias=maybe(0.7),
        seed=rng.randrange(1 << 30),
        **options,
    )


def _random_method(rng: random.Random) -> Method:
    """SLA most often, since it has most options; in one case of six low bits or a token order."""
    kind = rng.choices(
        ["dense", "sla", "sla2", "dynsparse", "blasst", "vsa", "vmoba"], [2, 9, 5, 2, 2, 3, 4]
    )[0]
    blocks = {
        name: rng.choice([16, 17, 24, 32, 48, 64, 100, 128]) for name in ("block_q", "block_k")
    }
    groups = [rows for rows in (0, 16, 32) if rows <= blocks["block_q"]]
    low_bit = None
    if rng.random() < 0.16:
        ranges = rng.choice([(448.0, 448.0), (448.0, 2.25), (224.0, 4.5)])
        q_rows = rng.choice(groups if kind != "vsa" else [0, 16])
        low_bit = LowBit(q_rows, *ranges, recompute_lse=rng.random() < 0.2)
    box = tuple(rng.randint(1, 4) for _ in range(3))
    shared = {"low_bit": low_bit}
    keep_ratio = rng.choice([0.0, 0.1, 0.3, 0.5, 1.0, round(rng.random(), 3)])
    if kind == "vsa":
        cubes = [(2, 2, 4), (4, 4, 4), (3, 2, 3), (1, 4, 5), (2, 6, 6), (4, 2, 2)]
        number = rng.choice([None, None, 1, 3])
        return VSA(keep_ratio=keep_ratio, num_cubes=number, cube=rng.choice(cubes), **shared)
    if kind == "vmoba":
        return VMoBA(
            threshold=rng.choice([0.0, 0.1, 0.25, 0.4, 0.7, 0.95]),
            mode=rng.choice(sparline.methods.CHUNK_MODES),
            num_chunks=rng.choice([None, None, None, 1, 2, 5]),
            partition=rng.choice(sparline.methods.PARTITIONS),
            frames_1d=box[0],
            window_2d=box[1:],
            box_3d=box,
            pool_queries=rng.random() < 0.25,
            **blocks,
            **shared,
        )
    if rng.random() < 0.16:
        shared |= {"token_order": rng.choice(["cubes", "hilbert"]), "cube": box}
    shared |= blocks
    if kind == "dense":
        return Dense(**shared)
    if kind in ("dynsparse", "blasst"):
        cls, scale = (DynSparse, 4.0) if kind == "dynsparse" else (BLASST, 1.0)
        return cls(
            log_threshold=-scale * rng.choice([0.2, 0.5, 0.8, 1.5, inf]),
            decide_rows=rng.choice(groups),
            tile_order=rng.choice(sparline.methods.TILE_ORDERS),
            **shared,
        )
    feature_map = rng.choice(FEATURE_MAPS)
    shared |= {
        "keep_ratio": keep_ratio,
        "feature_map": feature_map,
        "count_rounding": rng.choice(COUNT_ROUNDINGS),
    }
    if kind == "sla2":
        # Smoothed keys have both signs, and the identity map is for non-negative rows.
        shared["feature_map"] = "softmax" if feature_map == "identity" else feature_map
        return SLA2(
            alpha_shape=rng.choice(sparline.methods.ALPHA_SHAPES),
            router_per_head=rng.random() < 0.3,
            router_mode="hard" if low_bit else rng.choice(sparline.methods.ROUTER_MODES),
            temperature=rng.choice([0.1, 0.5]),
            router_softmax=rng.random() < 0.2,
            router_trains_qk=rng.random() < 0.4,
            **shared,
        )
    smooth_k = rng.choice(["router", "router", "none", "all"])
    combines = ["projection", "projection", "sum", "sparse", "sparse"]
    return SLA(
        negligible_ratio=rng.choice([0.0, 0.1, 0.3, round(rng.random(), 3)]),
        linear_scope=rng.choice(LINEAR_SCOPES),
        smooth_k="router" if feature_map == "identity" else smooth_k,
        epsilon=rng.choice([None, None, 1e-3]),
        combine=rng.choice(combines if low_bit else [*combines, "linear"]),
        selection=rng.choice(["top_k", "top_k", "top_k", "top_p", "union", "intersection"]),
        keep_mass=rng.choice([0.0, 0.3, 0.5, 0.9, 1.0]),
        longest_prefix=rng.random() < 0.3,
        min_similarity=rng.choice([None, None, None, -0.5, 0.02, 0.06, 0.6]),
        **shared,
    )


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Tensors of a case; q, k, v, d_o and the gates in its layout."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_o: Tensor
    weights: Weights
    block_map: Tensor | None
    gate_coarse: Tensor | None = None
    gate_fine: Tensor | None = None


def make_inputs(case: Case, dtype: torch.dtype | None = None) -> Inputs:
    """Gaussian tensors, kept away from where the linear branch is ill-conditioned.

    The identity map gets non-negative rows (nothing else keeps its denominator positive). The relu
    map gets no tiny positive numbers: one alone in its row is a tiny denominator, and rounding
    errors grow by its inverse. Rows without a positive number remain, and follow the empty rule.
    """
    generator = torch.Generator().manual_seed(case.seed)
    dtype = dtype or case.torch_dtype
    method = case.method

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    feature_map = method.feature_map if isinstance(method, (SLA, SLA2)) else ""

    def rows(num_heads: int, length: int, *, is_feature: bool = False) -> Tensor:
        shape = (case.batch, num_heads, length, case.head_dim)
        if case.layout == "bnhd":
            shape = (case.batch, length, num_heads, case.head_dim)
        x = randn(*shape)
        if is_feature and feature_map == "identity":
            x = x.abs()
        if is_feature and feature_map == "relu":
            x = torch.where(x.abs() < 0.1, x.sign() * 0.1, x)
        x = x.to(case.torch_dtype).to(dtype)  # the values that the case's own dtype can hold
        if case.padded:
            wide = torch.full((*shape[:3], case.head_dim + 8), float("nan"), dtype=dtype)
            wide[..., : case.head_dim] = x
            x = wide[..., : case.head_dim]
        return x

    q = rows(case.num_heads, case.num_queries, is_feature=True)
    k = rows(case.num_kv_heads, case.num_keys, is_feature=True)
    v = rows(case.num_kv_heads, case.num_keys)
    d_o = rows(case.num_heads, case.num_queries)
    q_tokens, k_tokens = case.tokens
    d = case.head_dim
    found: dict[str, Tensor] = {}
    if isinstance(method, SLA) and method.combine == "projection":
        found["proj_weight"] = randn(d, d) / d**0.5
        if case.bias:
            found["proj_bias"] = randn(d)
    has_linear_branch = isinstance(method, SLA2) or getattr(method, "combine", "sparse") != "sparse"
    if has_linear_branch and feature_map.startswith("hedgehog"):
        for side, heads in (("q", case.num_heads), ("k", case.num_kv_heads)):
            found[f"feature_weight_{side}"] = 0.5 * torch.eye(d) + 0.3 * randn(heads, d, d) / d**0.5
            if case.bias:
                found[f"feature_bias_{side}"] = 0.3 * randn(heads, d)
    if isinstance(method, SLA2):
        places = {"block": q_tokens.num_blocks, "token": case.num_queries, "head": 1}
        found["alpha_logit"] = randn(case.num_heads, case.num_alphas or places[method.alpha_shape])
        if case.has_router:
            heads_shape = (case.num_heads,) if method.router_per_head else ()
            for name in ("router_q", "router_k"):
                found[name] = torch.eye(d) + 0.5 * randn(*heads_shape, d, d) / d**0.5
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weights = Weights(**{name: w.float().to(weight_dtype) for name, w in found.items()})
    map_shape = (case.batch, case.num_heads, q_tokens.num_blocks, k_tokens.num_blocks)
    block_map = None
    if case.block_map == "random":
        block_map = torch.randint(-1, 2, map_shape, generator=generator, dtype=torch.int8)
        block_map[0, 0, 0] = -1  # nothing critical, nothing marginal
        block_map[-1, -1, -1] = 0
    elif case.block_map == "soft":
        block_map = torch.sigmoid(2 * randn(*map_shape)).clamp(min=0.01).float().to(weight_dtype)
        block_map[0, 0, 0, 0] = 0.0
        block_map[-1, -1, -1] = 1.0
    gates = {f"gate_{name}": rows(case.num_heads, case.num_queries) for name in case.gates.split()}
    return Inputs(q, k, v, d_o, weights, block_map, **gates)


@dataclasses.dataclass(frozen=True)
class Result:
    o: Tensor
    lse: Tensor
    gradients: dict[str, Tensor]  # of everything in Inputs that has one


def _require_grad(inputs: Inputs) -> tuple[dict[str, Tensor], Inputs]:
    """Leaves for autograd with the same strides, by name; and the inputs with the leaves in."""
    names = ("q", "k", "v", "block_map", "gate_coarse", "gate_fine")
    given = {name: getattr(inputs, name) for name in names}
    leaves = {
        name: x.detach().requires_grad_()
        for name, x in given.items()
        if x is not None and x.is_floating_point()
    }
    weights = {
        name: w.detach().clone().requires_grad_()
        for name, w in inputs.weights._asdict().items()
        if w is not None
    }
    changed = dataclasses.replace(inputs, weights=inputs.weights._replace(**weights), **leaves)
    return {**leaves, **weights}, changed


def _result(o: Tensor, lse: Tensor, leaves: dict[str, Tensor], d_o: Tensor) -> Result:
    gradients = torch.autograd.grad(o, list(leaves.values()), d_o, materialize_grads=True)
    return Result(o.detach(), lse, dict(zip(leaves, gradients, strict=True)))


def attend(case: Case, inputs: Inputs, backend: str | None) -> tuple[Tensor, Tensor]:
    """o and lse through the public API; None leaves the choice of the backend to the library."""
    return sparline.attention(
        inputs.q,
        inputs.k,
        inputs.v,
        method=case.method,
        layout=case.layout,
        scale=case.scale,
        block_map=inputs.block_map,
        weights=inputs.weights,
        gate_coarse=inputs.gate_coarse,
        gate_fine=inputs.gate_fine,
        return_lse=True,
        backend=backend,
        **case.segments,
    )


def run(case: Case, inputs: Inputs, backend: str | None) -> Result:
    """Forward and backward through the public API."""
    leaves, inputs = _require_grad(inputs)
    o, lse = attend(case, inputs, backend)
    return _result(o, lse, leaves, inputs.d_o)


# Decisions of a call that the oracle takes over after they were checked: a block map, the tiles
# that were kept, or (from the oracle itself) the chunks that each query chose.
Decisions = Tensor | np.ndarray | oracle.Choice | None


def route(case: Case, inputs: Inputs, backend: str) -> Decisions:
    """What a call of this case decides."""
    method = case.method
    call = {"layout": case.layout, "backend": backend, **case.segments}
    if isinstance(method, (DynSparse, BLASST)):
        statistics = sparline.tile_statistics(
            inputs.q, inputs.k, inputs.v, method=method, scale=case.scale, **call
        )
        kept = oracle.kept_tiles(statistics.kept_bits, case.tokens[1].num_blocks)
        _check_skips(case, make_inputs(case, torch.float64), kept, statistics.row_votes)
        return kept
    if isinstance(method, VMoBA):
        return _choose_chunks(case, inputs)
    if inputs.block_map is not None:
        return inputs.block_map
    if isinstance(method, SLA2) and method.router_mode != "hard":
        if method.router_mode == "soft":
            return None  # without decisions: a smooth function
        method = dataclasses.replace(method, router_mode="hard")
    if not isinstance(method, (SLA, SLA2, VSA)) or _is_linear_only(method):
        return None
    router = {name: getattr(inputs.weights, name) for name in ("router_q", "router_k")}
    block_map = sparline.route(
        inputs.q,
        inputs.k,
        method=method,
        scale=case.scale,
        weights=Weights(**router),
        **call,
    )
    _check_route(case, make_inputs(case, torch.float64), block_map)
    return block_map


def _is_linear_only(method: Method) -> bool:
    return isinstance(method, SLA) and (method.combine, method.linear_scope) == ("linear", "all")


def _smooths(method: Method) -> bool:
    """Whether all of the operator sees keys without their mean: where it says so, and under low
    bits where nothing but the softmax, which it does not change, sees them."""
    if isinstance(method, SLA2):
        return True
    if isinstance(method, SLA) and (method.smooth_k == "all" or method.combine != "sparse"):
        return method.smooth_k == "all"
    return method.low_bit is not None


def _scale(case: Case) -> float:
    return case.head_dim**-0.5 if case.scale is None else case.scale


def run_oracle(case: Case, inputs: Inputs, decisions: Decisions) -> Result:
    """Forward and backward of the dense oracle, in the dtype of q."""
    leaves, inputs = _require_grad(inputs)
    dtype = inputs.q.dtype
    q, k, v = (_to_bhnd(case, x) for x in (inputs.q, inputs.k, inputs.v))
    method, scale = case.method, _scale(case)
    q_tokens, k_tokens = case.tokens
    options: dict[str, Any] = {"combine": "sparse", "smooths": _smooths(method)}
    w = Weights(*(None if x is None else x.to(dtype) for x in inputs.weights))
    if isinstance(method, (SLA, SLA2)):
        options |= {
            "feature_map": method.feature_map,
            "feature_weights": (
                w.feature_weight_q,
                w.feature_bias_q,
                w.feature_weight_k,
                w.feature_bias_k,
            ),
        }
    if isinstance(method, SLA):
        default_epsilon = 1e-5 if method.linear_scope == "all" else 0.0
        options |= {
            "combine": method.combine,
            "scope": method.linear_scope,
            "epsilon": default_epsilon if method.epsilon is None else method.epsilon,
            "proj_weight": w.proj_weight,
            "proj_bias": w.proj_bias,
        }
    if isinstance(method, SLA2):
        assert w.alpha_logit is not None
        logit = oracle.spread_alpha(w.alpha_logit, method.alpha_shape, q_tokens)
        options |= {"combine": "blend", "scope": "complement", "alpha_logit": logit}
    if method.low_bit is not None:
        options["low_bit"] = dataclasses.asdict(method.low_bit)
    pairs = None
    if isinstance(decisions, np.ndarray):
        assert isinstance(method, (DynSparse, BLASST))
        group_rows = method.decide_rows or method.block_q
        options |= {
            "kept": oracle.kept_pairs(decisions, q_tokens, k_tokens, method.block_q, group_rows),
            "visits": _visits(case),
        }
    elif isinstance(decisions, oracle.Choice):
        options["kept"] = decisions.kept
    elif inputs.block_map is not None:
        block_map = inputs.block_map
        if block_map.is_floating_point():
            block_map = block_map.to(dtype)
        pairs = oracle.to_pairs(block_map, q_tokens, k_tokens)
    elif isinstance(method, SLA2) and method.router_mode != "hard":
        soft = _soft_map(case, inputs)
        if decisions is not None:  # straight through: these values, that gradient
            soft = (decisions == 1).to(soft.dtype) + (soft - soft.detach())
        pairs = oracle.to_pairs(soft.to(dtype), q_tokens, k_tokens)
    elif decisions is not None:
        pairs = oracle.to_pairs(decisions, q_tokens, k_tokens)
    o, lse = oracle.attend(q, k, v, pairs, q_tokens, k_tokens, scale=scale, **options)
    if isinstance(method, VSA):
        coarse = oracle.coarse_branch(q, k, v, q_tokens, k_tokens, scale)
        fine = o
        if inputs.gate_coarse is not None:
            coarse = _to_bhnd(case, inputs.gate_coarse) * coarse
        if inputs.gate_fine is not None:
            fine = _to_bhnd(case, inputs.gate_fine) * fine
        o = torch.where(torch.from_numpy(q_tokens.protected)[:, None], o, coarse + fine)
    return _result(_to_bhnd(case, o), lse, leaves, inputs.d_o)


def _to_bhnd(case: Case, x: Tensor) -> Tensor:
    """Its own inverse."""
    return x.transpose(1, 2) if case.layout == "bnhd" else x


def _visits(case: Case) -> list[list[int]]:
    assert isinstance(case.method, (DynSparse, BLASST))
    q_tokens, k_tokens = case.tokens
    return oracle.tile_orders(case.method.tile_order, q_tokens, k_tokens)


def _scores(case: Case, inputs: Inputs) -> Tensor:
    """Of the block router, in at least float32."""
    dtype = torch.promote_types(inputs.q.dtype, torch.float32)
    q, k = (_to_bhnd(case, x).to(dtype) for x in (inputs.q, inputs.k))
    if isinstance(case.method, SLA2) and not case.method.router_trains_qk:
        q, k = q.detach(), k.detach()
    w = inputs.weights
    return oracle.pooled_scores(q, k, *case.tokens, _scale(case), w.router_q, w.router_k)


def _soft_map(case: Case, inputs: Inputs) -> Tensor:
    assert isinstance(case.method, SLA2)
    return oracle.soft_map(
        _scores(case, inputs),
        *case.tokens,
        keep_ratio=case.method.keep_ratio,
        temperature=case.method.temperature,
        softmax=case.method.router_softmax,
    )


def _choose_chunks(case: Case, inputs: Inputs) -> oracle.Choice:
    method = case.method
    assert isinstance(method, VMoBA)
    q_tokens, _ = case.tokens
    queries = np.arange(case.num_queries)
    return oracle.choose_chunks(
        _to_bhnd(case, inputs.q),
        _to_bhnd(case, inputs.k),
        q_tokens.block if method.pool_queries else queries,
        case.chunks,
        case.chunks,
        q_tokens.sequence,
        mode=method.mode,
        threshold=method.threshold,
        num_chunks=method.num_chunks,
    )


def check_case(case: Case, backend: str = "cpu") -> None:
    """Decisions, forward and backward of one case against the float64 oracle: by the relative rule,
    or under low bits, whose rounding steps plain PyTorch does not share, by fixed bounds."""
    inputs, exact_inputs = make_inputs(case), make_inputs(case, torch.float64)
    before = [x.clone() for x in (inputs.q, inputs.k, inputs.v)]
    decisions = route(case, inputs, backend)
    if isinstance(decisions, oracle.Choice):  # rows that rounding may turn have no say
        sure = ~_to_bhnd(case, decisions.unsure[..., None])
        inputs.d_o.mul_(sure)
        exact_inputs.d_o.mul_(sure)
    actual = run(case, inputs, backend)
    for name, x, copy in zip("qkv", (inputs.q, inputs.k, inputs.v), before, strict=True):
        assert torch.equal(x, copy), f"{name} was written to"
    exact = run_oracle(case, exact_inputs, decisions)
    dtype = case.torch_dtype
    assert actual.o.dtype == dtype
    assert actual.lse.dtype == torch.float32
    if isinstance(decisions, oracle.Choice):
        actual, exact = (
            Result(r.o.where(sure, 0), r.lse.where(~decisions.unsure, 0), r.gradients)
            for r in (actual, exact)
        )
    if case.method.low_bit is not None:
        assert_low_bit("o", actual.o, exact.o, dtype)
        assert_low_bit_lse(actual.lse, exact.lse)
        for name, gradient in actual.gradients.items():
            assert_low_bit(f"d_{name}", gradient, exact.gradients[name], dtype, magnitude=1.0)
        return
    same_precision = run_oracle(case, inputs, decisions)
    plain_o = same_precision.o
    if isinstance(decisions, oracle.Choice):
        plain_o = plain_o.where(sure, 0)
    # SoftTop-k may stop where the sum is within 1e-5 of kappa, relatively.
    is_soft = isinstance(case.method, SLA2) and case.method.router_mode != "hard"
    slack = 2e-5 if is_soft else 0.0
    assert_relative("o", actual.o, exact.o, plain_o, dtype, slack=slack)
    rounded = exact.lse.float()
    assert_relative("lse", actual.lse, exact.lse, rounded, torch.float32, 1.0, slack)
    # d_o . v and d_o . o nearly cancel in dS; so do the two terms of dphi, over a denominator that
    # has a smallest feature of 0.1 in it (make_inputs).
    is_relu = getattr(case.method, "feature_map", "") == "relu"
    # So does all of dm where a tile is the only one: a sum over its rows, of terms up to 1 / m.
    magnitude = case.head_dim**0.5 * (10.0 if is_relu else 1.0)
    of_map = {"block_map": 100.0 * case.block_shape[0] ** 0.5}
    for name, gradient in actual.gradients.items():
        assert_relative(
            f"d_{name}",
            gradient,
            exact.gradients[name],
            same_precision.gradients[name],
            dtype,
            magnitude=magnitude * of_map.get(name, 1.0),
            slack=slack,
        )


def _check_route(case: Case, exact_inputs: Inputs, block_map: Tensor) -> None:
    """Counts and order of a routed map; near-ties within float32 rounding may fall either way."""
    method = case.method
    q_tokens, k_tokens = case.tokens
    scores = _scores(case, exact_inputs)
    rules: dict[str, Any] = {"negligible_ratio": 0.0, "rounding": "ceil"}
    if isinstance(method, SLA):
        rules = {
            name: getattr(method, name)
            for name in ("negligible_ratio", "selection", "keep_mass", "longest_prefix")
        }
        rules["rounding"] = method.count_rounding
        if method.min_similarity is not None:
            q, k = (_to_bhnd(case, x) for x in (exact_inputs.q, exact_inputs.k))
            if method.smooth_k != "none":
                k = oracle.smoothed(k, k_tokens)
            k = k.repeat_interleave(case.num_heads // case.num_kv_heads, dim=1)
            rules["similarity"] = (
                oracle.similarities(q, q_tokens) - method.min_similarity,
                oracle.similarities(k, k_tokens) - method.min_similarity,
            )
    elif isinstance(method, SLA2):
        rules["rounding"] = method.count_rounding
    elif isinstance(method, VSA):
        rules["keep_count"] = method.num_cubes
    assert isinstance(method, (SLA, SLA2, VSA))
    oracle.check_map(
        block_map,
        scores,
        q_tokens,
        k_tokens,
        keep_ratio=method.keep_ratio,
        tolerance=(4e-5 if isinstance(method, SLA2) else 1e-5) * _scale(case) * case.head_dim**0.5,
        **rules,
    )


def _check_skips(case: Case, exact_inputs: Inputs, kept: np.ndarray, row_votes: Tensor) -> None:
    """Every tile that an in-loop method kept or skipped. An integer step of int8 that falls on the
    other side moves a score by up to some hundredths."""
    method = case.method
    assert isinstance(method, (DynSparse, BLASST))
    q_tokens, k_tokens = case.tokens
    q, k = (_to_bhnd(case, x) for x in (exact_inputs.q, exact_inputs.k))
    if _smooths(method):
        k = oracle.smoothed(k, k_tokens)
    k = k[:, oracle.group_of(case.num_heads, case.num_kv_heads)]
    if method.low_bit is None:
        scores = _scale(case) * q @ k.mT
    else:
        scores = oracle.low_bit_scores(
            q, k, q_tokens, k_tokens, _scale(case), method.low_bit.q_rows
        )
    oracle.check_skips(
        kept,
        row_votes,
        scores,
        q_tokens,
        k_tokens,
        _visits(case),
        reference="kept_lse" if isinstance(method, DynSparse) else "running_max",
        log_threshold=method.log_threshold,
        block_q=method.block_q,
        group_rows=method.decide_rows or method.block_q,
        slack=1e-4 if method.low_bit is None else 0.05,
    )
