# SPDX-License-Identifier: Apache-2.0
"""Single configurations on the GPU, each against the float64 oracle and the CPU kernels.

A configuration has a name: ``case:sla-paper:bfloat16`` is one of the list of cases,
``random:0:17`` the 17th random one of seed 0, ``large:3`` one that is large enough for the fast
paths. The tests run them in worker processes (pool.py); by hand:

python tests/python/gpu/harness.py [--device cuda|cpu] [--threads 1] NAME...

Every result is held to three rules. *Noise* is how far others are from the exact result: plain
PyTorch of the same precision, the CPU kernels, and, where a linear branch takes part, whose states
are bfloat16 whatever the dtype, the definition in float64 with its features and states rounded so
(``rounded_states``), which tells apart what is lost to cancellation from what is wrong. *Grain* is
the machine epsilon of what is stored: that of the dtype, or bfloat16's with a linear branch.

  largest   the largest error of an element: the relative rule of numeric.py
  overall   the L2 norm of the error: at most twice the noise and one grain of the result's norm
  row       the L2 norm of the worst row: at most twice the noise and four grains of the largest row

Where noise is more than half of the result, little of which is left, its size alone is compared:
errors up to 16 times as large pass. Under a soft map the L2 rules allow four grains: the backward
takes rowsum(dO o) from o as it is stored, whose rounding a small m magnifies.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import random
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cases
import numpy as np
import oracle
import torch
from cases import CASES, Case, Decisions, Inputs, Result, make_inputs, on_grid, random_case
from numeric import FLOOR_ULPS, max_error
from torch import Tensor

import sparline
from sparline import (
    BLASST,
    SLA,
    SLA2,
    VSA,
    Dense,
    DynSparse,
    Grid,
    LowBit,
    VMoBA,
    functional,
    reference,
)
from sparline.reference import unpack_bits
from sparline.routing import Tiles

DTYPES = ("bfloat16", "float16")
#: Grains of the "overall" and the "row" rule.
OVERALL_GRAINS, ROW_GRAINS = 1.0, 4.0
#: How much more than the noise: of others that are as exact; where noise is all there is.
NOISES, LOST_NOISES = 2.0, 16.0
#: float32 results (lse) go through exp2 and log2 of the device.
LSE_ULPS = 4 * FLOOR_ULPS


# Configurations ---------------------------------------------------------------------------------


def case_names() -> list[str]:
    return [f"case:{name}:{dtype}" for name in CASES for dtype in DTYPES]


def random_names(count: int, seed: str = "0") -> list[str]:
    return [f"random:{seed}:{n}" for n in range(count)]


def large_names() -> list[str]:
    return [f"large:{n}" for n in range(len(large_cases()))]


def find_case(name: str) -> Case:
    kind, *rest = name.split(":")
    if kind == "case":
        return dataclasses.replace(CASES[rest[0]], dtype=rest[1])
    if kind == "large":
        return large_cases()[int(rest[0])]
    rng = random.Random(f"{rest[0]} gpu {rest[1]}")
    case = dataclasses.replace(random_case(rng), dtype=rng.choice(DTYPES))
    kind = rng.random()
    if kind < 0.05:
        return dataclasses.replace(case, head_dim=rng.choice([136, 160, 200, 256]))
    return medium(case, rng) if kind < 0.25 else case


def medium(case: Case, rng: random.Random) -> Case:
    """The same with the block shape and the head size of a fast path, and several tiles an axis."""
    if case.grids or case.cu_q is not None:
        return case
    num_queries = rng.randint(150, 800)
    spans = {}
    for name in ("protected_q", "protected_k"):
        if rng.random() < 0.2:
            begin = rng.randint(0, 100)
            spans[name] = ((begin, begin + rng.randint(1, 50)),)
        else:
            spans[name] = ()
    return dataclasses.replace(
        case,
        method=dataclasses.replace(case.method, block_q=rng.choice([64, 128]), block_k=64),  # type: ignore[call-arg]
        batch=1,
        num_heads=rng.choice([1, 2]),
        num_kv_heads=1,
        num_queries=num_queries,
        num_keys=num_queries if rng.random() < 0.6 else rng.randint(150, 800),
        head_dim=rng.choice([64, 128]),
        **spans,
    )


def large_cases() -> list[Case]:
    """Blocks of 128 x 64 and 64 x 64 at 2 000 to 6 000 tokens, every method, both head sizes."""
    blocks: dict[str, Any] = {"block_q": 128, "block_k": 64}
    sla = [
        SLA.paper(keep_ratio=0.1, **blocks),
        SLA.sla1(keep_ratio=0.05, **blocks),
        SLA.sla_main(keep_ratio=0.1, **blocks),
        SLA.sla1(keep_ratio=0.1, feature_map="elu1", **blocks),
        SLA.sla1(keep_ratio=0.1, feature_map="hedgehog", **blocks),
        SLA.paper(keep_ratio=0.1, feature_map="relu", block_q=64, block_k=64),
        SLA.sparse_only(keep_ratio=0.1, **blocks),
        SLA.linear_only(**blocks),
        SLA.linear_plus_sparse(keep_ratio=0.05, **blocks),
        SLA.paper(keep_ratio=0.1, smooth_k="all", **blocks),
        SLA.top_p(keep_mass=0.3, block_q=64, block_k=64),
        SLA.hybrid(),
    ]
    sla2 = [
        SLA2(keep_ratio=0.05),
        SLA2(keep_ratio=0.1, router_per_head=True, alpha_shape="head"),
        SLA2(keep_ratio=0.1, router_mode="soft"),
        SLA2(keep_ratio=0.1, router_mode="soft", router_trains_qk=True, block_q=64),
        SLA2(keep_ratio=0.1, feature_map="elu1", alpha_shape="token"),
    ]
    in_loop = [
        DynSparse(log_threshold=-3.0),
        DynSparse(log_threshold=-3.5, decide_rows=32, tile_order="diagonal_first"),
        BLASST(log_threshold=-1.0),
        BLASST(log_threshold=-1.2, decide_rows=16, tile_order="reverse"),
    ]
    low_bit = [
        Dense(low_bit=LowBit()),
        SLA.sparse_only(keep_ratio=0.1, low_bit=LowBit(q_rows=32), **blocks),
        SLA2(keep_ratio=0.1, low_bit=LowBit()),
        DynSparse(log_threshold=-3.0, low_bit=LowBit()),
    ]
    lengths = (2048, 3000, 4096, 5003, 2304, 6000)
    found: list[Case] = []

    def add(method: Any, **options: Any) -> None:
        n = len(found)
        length = lengths[n % len(lengths)]
        defaults: dict[str, Any] = {
            "num_heads": 2,
            "num_kv_heads": 2,
            "num_queries": length,
            "num_keys": length,
            "head_dim": (128, 64)[n % 2],
            "dtype": DTYPES[n // 2 % 2],
            "layout": ("bnhd", "bhnd")[n // 3 % 2],
            "seed": n,
        }
        found.append(Case(method, **{**defaults, **options}))

    for method in (Dense(), *sla, *sla2, *in_loop, *low_bit):
        add(method)
    add(Dense(), num_heads=6, num_kv_heads=2, num_queries=2500, num_keys=4100)
    add(SLA.paper(keep_ratio=0.1, **blocks), num_heads=4, num_kv_heads=1, padded=True)
    add(SLA.sla1(keep_ratio=0.1, **blocks), head_dim=80)
    add(SLA2(keep_ratio=0.05), head_dim=256, num_queries=2100, num_keys=2100)
    packs = {"cu_q": (0, 1000, 1000, 2900, 4000), "cu_k": (0, 700, 800, 3100, 4000)}
    spans = {"protected_q": ((0, 226),), "protected_k": ((0, 226), (3900, 4000))}
    sizes = {"num_queries": 4000, "num_keys": 4000}
    add(SLA.paper(keep_ratio=0.1, **blocks), **packs, **sizes)
    add(SLA2(keep_ratio=0.1), **spans, **sizes)
    add(SLA.sla1(keep_ratio=0.1, **blocks), **packs, **spans, **sizes)
    add(SLA.paper(keep_ratio=0.1, **blocks), block_map="random")
    add(SLA2(keep_ratio=0.1), block_map="soft")
    add(DynSparse(log_threshold=-3.0, decide_rows=64), **spans, **sizes)
    add(BLASST(log_threshold=-1.0, decide_rows=64), **packs, **sizes)
    grid = {"head_dim": 64, "dtype": "bfloat16"}
    on_grids = [
        on_grid(SLA2(keep_ratio=0.1, token_order="cubes"), Grid(8, 18, 20), **grid),
        on_grid(
            SLA.paper(keep_ratio=0.1, token_order="hilbert", **blocks),
            Grid(5, 24, 30, 77),
            head_dim=128,
        ),
        on_grid(VSA(), Grid(9, 18, 20), gates="coarse fine", **grid),
        on_grid(VMoBA(partition="2d"), Grid(6, 18, 24), **grid),
        on_grid(VMoBA(partition="3d", pool_queries=True), Grid(8, 18, 24), head_dim=128),
    ]
    found += [dataclasses.replace(case, dtype="bfloat16", seed=90 + case.num_queries % 7)
              for case in on_grids]  # fmt: skip
    return found


# On the device ----------------------------------------------------------------------------------


def to_device(x: Tensor | None, device: torch.device) -> Tensor | None:
    """The same values, strides included: what lies between rows (NaN) goes along."""
    if x is None:
        return None
    if x._base is None:
        return x.to(device)
    return x._base.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def move(inputs: Inputs, device: torch.device) -> Inputs:
    parts = {
        field.name: getattr(inputs, field.name)
        for field in dataclasses.fields(inputs)
        if field.name != "weights"
    }
    moved = {name: to_device(x, device) for name, x in parts.items()}
    weights = sparline.Weights(*(to_device(w, device) for w in inputs.weights))
    return dataclasses.replace(inputs, weights=weights, **moved)


def to_cpu(result: Result) -> Result:
    gradients = {name: x.cpu() for name, x in result.gradients.items()}
    return Result(result.o.cpu(), result.lse.cpu(), gradients)


def decide(case: Case, host: Inputs, there: Inputs) -> Decisions:
    """What a call on the device decides, checked as ``cases.route`` checks it on the CPU."""
    method = case.method
    call: dict[str, Any] = {"layout": case.layout, "scale": case.scale, **case.segments}
    exact_inputs = make_inputs(case, torch.float64)
    if isinstance(method, (DynSparse, BLASST)):
        told = sparline.tile_statistics(there.q, there.k, there.v, method=method, **call)
        kept = oracle.kept_tiles(told.kept_bits.cpu(), case.tokens[1].num_blocks)
        cases._check_skips(case, exact_inputs, kept, told.row_votes.cpu())
        return kept
    if isinstance(method, VMoBA):
        return cases._choose_chunks(case, host)
    if host.block_map is not None:
        return host.block_map
    if isinstance(method, SLA2) and method.router_mode != "hard":
        if method.router_mode == "soft":
            return None
        method = dataclasses.replace(method, router_mode="hard")
    if not isinstance(method, (SLA, SLA2, VSA)) or cases._is_linear_only(method):
        return None
    block_map = sparline.route(
        there.q, there.k, method=method, weights=_router(there.weights), **call
    ).cpu()
    cases._check_route(case, exact_inputs, block_map)
    return block_map


def _router(weights: sparline.Weights) -> sparline.Weights:
    return sparline.Weights(router_q=weights.router_q, router_k=weights.router_k)


def _agree(a: Decisions, b: Decisions) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    return type(a) is type(b)  # none, or the oracle's own choice of chunks


# Noise ------------------------------------------------------------------------------------------


class _Rounded(torch.autograd.Function):
    """x and its gradient, rounded to bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.to(torch.bfloat16).to(gradient.dtype)


@contextlib.contextmanager
def rounded_states() -> Iterator[None]:
    """The definition, its features, states and sums of states rounded as the kernels store them."""
    plain = reference._linear_branch

    def rounded(x: Tensor) -> Tensor:
        out: Tensor = _Rounded.apply(x)  # type: ignore[no-untyped-call]
        return out

    def branch(
        phi_q: Tensor, h: Tensor, z: Tensor, weight: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        # One state for each query block, already summed: its weight is 1, or 0 where it is empty.
        h_sum = rounded(torch.einsum("bhj,bhjfd->bhfd", weight, rounded(h)))[:, :, None]
        z_sum = rounded(torch.einsum("bhj,bhjf->bhf", weight, rounded(z)))[:, :, None]
        has_any = (weight > 0).any(dim=-1, keepdim=True).to(weight.dtype)
        return plain(rounded(phi_q), h_sum, z_sum, has_any, epsilon)

    reference._linear_branch = branch
    try:
        yield
    finally:
        reference._linear_branch = plain


# Rules ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Judge:
    """Collects, for each tensor, by how much of each rule's bound the error takes."""

    case: Case
    found: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    failures: list[str] = dataclasses.field(default_factory=list)

    @property
    def grain(self) -> float:
        has_states = self.case.method.recipe.has_linear_branch
        dtype = torch.bfloat16 if has_states else self.case.torch_dtype
        return torch.finfo(dtype).eps

    @property
    def is_soft(self) -> bool:
        method = self.case.method
        return isinstance(method, SLA2) and method.router_mode != "hard"

    def hold(self, what: str, error: float, bound: float, rule: str, detail: str = "") -> None:
        share = 0.0 if error == 0.0 else error / bound if bound > 0 else math.inf
        share = math.inf if math.isnan(share) else share
        self.found.setdefault(what, {})[rule] = share
        if not share <= 1.0:
            self.failures.append(f"{what}: {rule} error {error:.3e} > {bound:.3e}{detail}")

    def compare(
        self,
        what: str,
        actual: Tensor,
        exact: Tensor,
        noises: Sequence[Tensor],
        *,
        grain: float,
        magnitude: float = 0.0,
        slack: float = 0.0,
        only_largest: bool = False,
    ) -> None:
        if actual.shape != exact.shape:
            self.failures.append(f"{what}: shape {tuple(actual.shape)} of {tuple(exact.shape)}")
            return
        actual, exact = actual.double(), exact.double()
        finite = exact[exact.isfinite()]
        largest = finite.abs().max().item() if finite.numel() else 0.0
        errors = [max_error(x, exact) for x in noises]
        noise = max([x for x in errors if math.isfinite(x)], default=0.0)
        floor = (FLOOR_ULPS * grain + slack) * max(largest, magnitude)
        detail = f" (largest {largest:.3e}, noise {noise:.3e})"
        times = NOISES if noise < largest / 2 else LOST_NOISES
        self.hold(what, max_error(actual, exact), times * noise + floor, "largest", detail)
        if only_largest:
            return

        def norms(x: Tensor) -> tuple[float, float]:
            rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
            return x.norm().item(), rows.norm(dim=-1).max().item()

        size, row_size = norms(exact)
        error, row_error = norms(actual - exact)
        kept = [norms(x.double() - exact) for x, e in zip(noises, errors, strict=True)
                if math.isfinite(e)]  # fmt: skip
        noise, row_noise = (max((pair[n] for pair in kept), default=0.0) for n in (0, 1))
        if not kept:  # nothing to say how ill-conditioned it is
            size, row_size = 4 * size, 4 * row_size
        tiny = 1e-6 * max(1.0, magnitude)
        number, width = exact.numel() ** 0.5, exact.shape[-1] ** 0.5
        times = NOISES if noise < size / 2 else LOST_NOISES
        grains = ROW_GRAINS if self.is_soft else OVERALL_GRAINS
        bound = times * noise + (grains * grain + slack) * size + tiny * number
        self.hold(what, error, bound, "overall", f" (size {size:.3e}, noise {noise:.3e})")
        bound = times * row_noise + (ROW_GRAINS * grain + slack) * row_size + tiny * width
        self.hold(what, row_error, bound, "row", f" (row {row_size:.3e}, noise {row_noise:.3e})")
        self.found[what]["l2"] = error / size if size > 0 else 0.0

    def compare_low_bit(
        self, what: str, actual: Tensor, exact: Tensor, noises: Sequence[Tensor], magnitude: float
    ) -> None:
        """The fixed bounds of numeric.assert_low_bit, one grain wider for 16-bit products."""
        actual, exact = actual.double(), exact.double()
        size, largest = exact.norm().item(), exact.abs().max().item()
        rounding = 1e-5 + 0.5 * self.grain * magnitude
        noise = max([max_error(x, exact) for x in noises], default=0.0)
        bound = noise + (0.125 + 16 * self.grain) * largest + 16 * rounding
        self.hold(what, max_error(actual, exact), bound, "largest", f" (largest {largest:.3e})")
        noise = max([(x.double() - exact).norm().item() for x in noises], default=0.0)
        bound = noise + (6e-3 + 1.5 * self.grain) * size + rounding * exact.numel() ** 0.5
        error = (actual - exact).norm().item()
        self.hold(what, error, bound, "overall", f" (size {size:.3e}, noise {noise:.3e})")
        self.found[what]["l2"] = error / size if size > 0 else 0.0

    def compare_all(self, actual: Result, exact: Result, noises: Sequence[Result]) -> None:
        """o, lse and every gradient, with the allowances of ``cases.check_case``."""
        case, method = self.case, self.case.method
        low_bit = method.low_bit is not None
        if actual.o.dtype != case.torch_dtype or actual.lse.dtype != torch.float32:
            self.failures.append(f"dtypes: o {actual.o.dtype}, lse {actual.lse.dtype}")
        slack = 2e-5 if self.is_soft else 0.0
        is_relu = getattr(method, "feature_map", "") == "relu"
        magnitude = case.head_dim**0.5 * (10.0 if is_relu else 1.0)
        of_map = {"block_map": 100.0 * case.block_shape[0] ** 0.5}
        others = [r.o for r in noises]
        if low_bit:
            self.compare_low_bit("o", actual.o, exact.o, others, 0.0)
            if not torch.equal(actual.lse.isinf(), exact.lse.isinf()):
                self.failures.append("lse: other rows are empty")
            self.hold("lse", max_error(actual.lse, exact.lse), 0.05, "largest")
        else:
            self.compare("o", actual.o, exact.o, others, grain=self.grain, slack=slack)
            ulp = torch.finfo(torch.float32).eps * LSE_ULPS / FLOOR_ULPS
            rounded = [exact.lse.float(), *(r.lse for r in noises if r.lse.dtype == torch.float32)]
            self.compare(
                "lse",
                actual.lse,
                exact.lse,
                rounded,
                grain=ulp,
                magnitude=1.0,
                slack=slack,
                only_largest=True,
            )
        for name, gradient in actual.gradients.items():
            others = [r.gradients[name] for r in noises]
            exact_gradient = exact.gradients[name]
            if low_bit:
                self.compare_low_bit(f"d_{name}", gradient, exact_gradient, others, 1.0)
                continue
            self.compare(
                f"d_{name}",
                gradient,
                exact_gradient,
                others,
                grain=self.grain,
                magnitude=magnitude * of_map.get(name, 1.0),
                slack=slack,
            )


# One configuration ------------------------------------------------------------------------------


def check(name: str, device: torch.device) -> dict[str, Any]:
    """Runs one configuration; its failures and what share of each bound its errors take."""
    case = find_case(name)
    begin = time.perf_counter()
    judge = Judge(case)
    against = "nothing"
    try:
        run = check_large if name.startswith("large") else check_small
        against = run(case, device, judge)
    except AssertionError as error:  # of a check of decisions
        judge.failures.append(f"decisions: {error}")
    return {
        "name": name,
        "ok": not judge.failures,
        "failures": judge.failures,
        "shares": judge.found,
        "cpu": against,
        "method": case.method.name,
        "dtype": case.dtype,
        "case": repr(case),
        "seconds": round(time.perf_counter() - begin, 3),
    }


def check_small(case: Case, device: torch.device, judge: Judge) -> str:
    """Against the dense oracle, which follows the device's own decisions once they are checked."""
    host, exact_inputs = make_inputs(case), make_inputs(case, torch.float64)
    there = move(host, device)
    decisions = decide(case, host, there)
    if isinstance(decisions, oracle.Choice):  # rows that rounding may turn have no say
        sure = ~cases._to_bhnd(case, decisions.unsure[..., None])
        for inputs in (host, exact_inputs):
            inputs.d_o.mul_(sure)
        there = move(host, device)
    before = [x.clone() for x in (there.q, there.k, there.v)]
    actual = to_cpu(cases.run(case, there, None))
    for letter, x, copy in zip("qkv", (there.q, there.k, there.v), before, strict=True):
        if not torch.equal(x, copy):
            judge.failures.append(f"{letter} was written to")
    exact = cases.run_oracle(case, exact_inputs, decisions)
    noises, against = [], "not comparable"
    if case.method.low_bit is None:
        noises.append(cases.run_oracle(case, host, decisions))
        if case.method.recipe.has_linear_branch:
            with rounded_states():
                told = dataclasses.replace(exact_inputs, block_map=decisions)
                is_map = isinstance(decisions, Tensor)
                noises.append(cases.run(case, told if is_map else exact_inputs, "reference"))
    same = _agree(decisions, cases.route(case, host, "cpu"))
    if same or isinstance(case.method, (SLA, SLA2, VSA)):
        is_fed = not same and getattr(case.method, "router_mode", "hard") == "hard"
        fed = dataclasses.replace(host, block_map=decisions) if is_fed else host
        if same or is_fed:
            against = "same decisions" if same else "fed with the device's map"
            noises.append(cases.run(case, fed, "cpu"))
    if isinstance(decisions, oracle.Choice):
        actual, exact, *noises = (
            Result(r.o.where(sure, 0), r.lse.where(~decisions.unsure, 0), r.gradients)
            for r in (actual, exact, *noises)
        )
    judge.compare_all(actual, exact, noises)
    return against


def check_large(case: Case, device: torch.device, judge: Judge) -> str:
    """Against the reference in float64, on the device itself, given the same tiles."""
    host = make_inputs(case)
    there = move(host, device)
    doubled = move(make_inputs(case, torch.float64), device)
    tiles, skipped = _device_tiles(case, there)
    actual = to_cpu(cases.run(case, there, None))
    exact = to_cpu(_reference(case, doubled, tiles, skipped))
    _check_large_decisions(case, doubled, tiles, skipped, judge)
    noises, against = [], "not comparable"
    method = case.method
    if method.recipe.has_linear_branch and method.low_bit is None:
        with rounded_states():
            noises.append(to_cpu(_reference(case, doubled, tiles, skipped)))
    fed: Inputs | None = host
    if skipped is not None:
        told = sparline.tile_statistics(
            host.q, host.k, host.v, method=method, layout=case.layout, **case.segments
        )
        fed = host if torch.equal(told.kept_bits, skipped.cpu()) else None
    elif isinstance(method, VMoBA):  # takes no map
        fed = None
    elif isinstance(tiles.block_map, Tensor) and not tiles.block_map.is_floating_point():
        fed = dataclasses.replace(host, block_map=tiles.block_map.cpu())
    if fed is not None:
        against = "same decisions"
        noises.append(cases.run(case, fed, "cpu"))
    judge.compare_all(actual, exact, noises)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the workers share the device
    return against


def _call_of(case: Case, inputs: Inputs, backend: str | None) -> functional._Call:
    options = case.segments
    axes = (
        options["grid"],
        options["cu_seqlens_q"],
        options["cu_seqlens_k"],
        options["protected_q"],
        options["protected_k"],
    )
    qkv = (inputs.q, inputs.k, inputs.v)
    return functional._Call.make(
        "attention", qkv, case.method, case.layout, case.scale, inputs.weights, axes, backend
    )


def _device_tiles(case: Case, there: Inputs) -> tuple[Tiles, Tensor | None]:
    """The tiles of a call on the device, and the bits of those that a skip rule kept."""
    call = _call_of(case, there, None)
    with torch.no_grad():
        if call.recipe.skip is not None:
            return Tiles(), functional._attend(call, Tiles())[2]
        return (Tiles(there.block_map) if there.block_map is not None else call.route()), None


def _reference(case: Case, inputs: Inputs, tiles: Tiles, skipped: Tensor | None) -> Result:
    """The definition in the dtype of ``inputs`` on their device, over these tiles."""
    leaves, inputs = cases._require_grad(inputs)
    call = _call_of(case, inputs, "reference")
    router_mode = getattr(case.method, "router_mode", "hard")
    if inputs.block_map is not None:
        tiles = Tiles(inputs.block_map)
    elif router_mode != "hard":
        tiles = call.route()  # smooth in everything
    if skipped is not None:
        skip = call.recipe.skip
        assert skip is not None
        tiles = Tiles(bits=skipped, bit_rows=skip.rows or call.recipe.block_q)
        call = dataclasses.replace(call, recipe=dataclasses.replace(call.recipe, skip=None))
    o, lse, _, _ = functional._attend(call, tiles)
    if call.recipe.has_coarse_branch:
        gates = [functional._to_gate("gate", g, call.qkv[0], case.layout)
                 for g in (inputs.gate_coarse, inputs.gate_fine)]  # fmt: skip
        o = functional._with_coarse_branch(call, o, *gates)
    return cases._result(cases._to_bhnd(case, o), lse, leaves, inputs.d_o)


def _check_large_decisions(
    case: Case, doubled: Inputs, tiles: Tiles, skipped: Tensor | None, judge: Judge
) -> None:
    """Decisions against those of the float64 reference, apart from near-ties: small cases check
    every one of them."""
    call = _call_of(case, doubled, "reference")
    with torch.no_grad():
        if skipped is not None and case.method.low_bit is None:
            wanted = functional._attend(call, Tiles())[2]
            assert wanted is not None
            columns = call.map_shape[3]
            same = (unpack_bits(skipped, columns) == unpack_bits(wanted, columns)).double()
            judge.hold("kept_bits", 1.0 - same.mean().item(), 5e-3, "differing")
        elif (
            tiles.block_map is not None
            and doubled.block_map is None
            and getattr(case.method, "router_mode", "hard") == "hard"
        ):
            wanted = call.route().block_map
            same = (tiles.block_map == wanted).double()
            judge.hold("block_map", 1.0 - same.mean().item(), 1e-3, "differing")


# Worker -----------------------------------------------------------------------------------------


def prepare(device: torch.device, threads: int) -> None:
    """Poisons what torch hands out unwritten, results and workspaces included."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(0.9)


def safe_check(name: str, device: torch.device) -> dict[str, Any]:
    """``check``, where whatever goes wrong is a failure of the configuration. ``is_fatal``: the
    device's context is gone, and nothing else can run in this process."""
    try:
        return check(name, device)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        result = {
            "name": name,
            "ok": False,
            "failures": [text.splitlines()[0]],
            "trace": traceback.format_exc()[-3000:],
            "is_fatal": "CUDA error" in text or "CUDA:" in text or "cudaError" in text,
        }
        with contextlib.suppress(LookupError):
            case = find_case(name)
            result |= {"case": repr(case), "method": case.method.name}
        return result


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", help="configurations; none: read them from stdin")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    device = torch.device(args.device)
    warnings.filterwarnings("ignore", message=".*deterministic.*")
    prepare(device, args.threads)
    if args.names:
        results = [safe_check(name, device) for name in args.names]
        for result in results:
            print(json.dumps(result, indent=1))
        return 0 if all(result["ok"] for result in results) else 1
    for line in sys.stdin:  # a worker of pool.py: a name in, a line out
        result = safe_check(line.strip(), device)
        print(json.dumps(result), flush=True)
        if result.get("is_fatal"):
            return 3
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
