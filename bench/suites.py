# SPDX-License-Identifier: Apache-2.0
"""What ``bench/gpu.py`` times: its rows, suite by suite."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import sparline
from sparline import BLASST, METHODS, SLA, SLA2, Dense, DynSparse, LowBit
from sparline.bench import WORKLOADS, Workload
from sparline.methods import BlockRouter, Method

SUITES = ("targets", "methods", "workloads", "scaling", "captured", "blocks")
BLOCKS: dict[str, Any] = {"block_q": 128, "block_k": 64}
KEEP_RATIOS = (0.10, 0.05, 0.03)
#: The in-loop methods have no default threshold.
IN_LOOP_THRESHOLDS = {"dynsparse": -5.0, "blasst": -3.0}
#: Key blocks that every query block keeps in the suite "scaling".
SCALING_BLOCKS = 24


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement: a method or a peer, in a direction, on a workload."""

    suite: str
    workload: Workload
    name: str  # of the method in METHODS, or of the peer
    method: Method | None = None  # None: a peer
    direction: str = "fwd"
    keep_ratio: float = 1.0
    inputs: str = "gaussian"
    part: str = "operator"  # or "router", "sparse" (the sparse branch alone, its map given)

    @property
    def label(self) -> str:
        words = [self.workload.name, self.direction, self.name]
        words += [f"keep {self.keep_ratio:.3g}"] * (self.keep_ratio < 1)
        words += [self.part] * (self.part != "operator")
        if self.method is not None:
            words += [
                getattr(self.method, "linear_scope", "")
            ] * self.method.recipe.has_linear_branch
            words += ["low-bit"] * (self.method.low_bit is not None)
            words += [str(blocks_of(self))] * (self.suite == "blocks")
            words += [setting_of(self.method)]
        return " ".join(word for word in [*words, self.inputs] if word)


# The suites -------------------------------------------------------------------------------------


def rows_of(suites: Sequence[str], names: Sequence[str] | None, quick: bool) -> list[Row]:
    chosen = [name for name in names or () if name in WORKLOADS or name in EXTRA]
    if unknown := sorted(set(names or ()) - set(chosen)):
        raise SystemExit(f"--workload: there is no {', '.join(unknown)}")
    main = [workload_of(name) for name in chosen] or [WORKLOADS["wan1.3b-480p"]]
    found: list[Row] = []
    for suite in suites:
        if suite == "targets":
            for workload in main:
                found += quick_rows(workload) if quick else target_rows(workload)
        elif suite == "methods":
            for workload in main:
                found += method_rows(workload)
        elif suite == "workloads":
            names = chosen or ["flux-1k", "cog5b", "wan1.3b-480p", "wan14b-720p", "hunyuan-720p"]
            for name in names:
                found += workload_rows(workload_of(name))
        elif suite == "scaling":
            found += scaling_rows(small="tiny" in chosen)
        elif suite == "captured":
            found += captured_rows()
        elif suite == "blocks":
            for workload in main:
                found += block_rows(workload)
        else:
            raise SystemExit(f"--suite: it must be of {', '.join(SUITES)}, got {suite!r}")
    return found


#: To try the benchmark where it would take too long.
EXTRA = {"tiny": Workload("tiny", "to try the benchmark itself", (2, 16, 20), 2, 64)}
CAPTURED = Workload("demo-37k", "the bundled model on a clip", (16, 48, 48), 4, 64)


def workload_of(name: str) -> Workload:
    found = WORKLOADS.get(name) or EXTRA.get(name)
    if found is None:
        there_are = ", ".join([*WORKLOADS, *EXTRA])
        raise SystemExit(f"--workload: it must be one of {there_are}, got {name!r}")
    return found


def baselines(suite: str, workload: Workload, direction: str, inputs: str) -> list[Row]:
    return [
        Row(suite, workload, name, direction=direction, inputs=inputs) for name in ("cudnn", "fa2")
    ]


def sparse_linear(keep_ratio: float) -> dict[str, Method]:
    return {
        "sla": SLA.paper(keep_ratio=keep_ratio, **BLOCKS),
        "sla1": SLA.sla1(keep_ratio=keep_ratio, **BLOCKS),
        "sla_main": SLA.sla_main(keep_ratio=keep_ratio, **BLOCKS),
        "sla2": SLA2(keep_ratio=keep_ratio, **BLOCKS),
    }


def ratio_rows(
    row: Callable[..., Row], direction: str, keep_ratio: float, names: Sequence[str]
) -> list[Row]:
    """These methods with a linear branch, and the sparse branch alone."""
    methods = sparse_linear(keep_ratio)
    sparse = SLA.sparse_only(keep_ratio=keep_ratio, **BLOCKS)
    return [
        *(row(name, methods[name], direction, keep_ratio) for name in names),
        row("sparse", sparse, direction, keep_ratio, part="sparse"),
    ]


def quick_rows(workload: Workload) -> list[Row]:
    row = partial(Row, "quick", workload)
    found: list[Row] = []
    for direction in ("fwd", "bwd"):
        found += baselines("quick", workload, direction, "gaussian")
        found.append(row("dense", Dense(), direction))
        for keep_ratio in (0.05, 0.03):
            found += ratio_rows(row, direction, keep_ratio, ("sla", "sla2"))
    found.append(row("sla", sparse_linear(0.05)["sla"], "fwd", 0.05, part="router"))
    return found


def target_rows(workload: Workload) -> list[Row]:
    """What the project set out to reach, and the peers at equal density."""
    row = partial(Row, "targets", workload)
    found: list[Row] = []
    for direction in ("fwd", "bwd"):
        found += baselines("targets", workload, direction, "gaussian")
        found.append(row("dense", Dense(), direction))
        for keep_ratio in KEEP_RATIOS:
            found += ratio_rows(row, direction, keep_ratio, ("sla", "sla1", "sla_main", "sla2"))
        for name in ("flex", "triton_sla_main", "triton_sla_sla1"):
            found += [row(name, None, direction, ratio) for ratio in KEEP_RATIOS]
    for name in ("sla", "sla2"):
        found.append(row(name, sparse_linear(0.05)[name], "fwd", 0.05, part="router"))
    low_bit = {"low_bit": LowBit()}
    found.append(row("dense", Dense(**low_bit)))
    found.append(row("sla2", SLA2(keep_ratio=0.03, **low_bit, **BLOCKS), "fwd", 0.03))
    return found + in_loop_rows(workload)


def in_loop_rows(workload: Workload) -> list[Row]:
    """Time against the share of tiles that are skipped, on inputs where some can be."""
    row = partial(Row, "targets", workload, inputs="video")
    found: list[Row] = []
    for direction in ("fwd", "bwd"):
        found += baselines("targets", workload, direction, "video")
        found.append(row("dense", Dense(), direction))
        for threshold in (-math.inf, -9.0, -6.0, -4.0, -2.0):
            found.append(row("dynsparse", DynSparse(log_threshold=threshold), direction))
    for threshold in (-math.inf, -9.0, -6.0, -4.0, -2.0):
        found.append(row("dynsparse", DynSparse(log_threshold=threshold, decide_rows=64)))
    found += [row("blasst", BLASST(log_threshold=x)) for x in (-6.0, -4.0, -2.0)]
    return found


def method_rows(workload: Workload) -> list[Row]:
    """Every method by name, at its defaults, on video-like inputs."""
    found: list[Row] = []
    for direction in ("fwd", "bwd"):
        found += baselines("methods", workload, direction, "video")
        for name in METHODS:
            options = (
                {"log_threshold": IN_LOOP_THRESHOLDS[name]} if name in IN_LOOP_THRESHOLDS else {}
            )
            method = sparline.method(name, **options)
            keep_ratio = getattr(method, "keep_ratio", 1.0)
            found.append(Row("methods", workload, name, method, direction, keep_ratio, "video"))
    return found


def workload_rows(workload: Workload) -> list[Row]:
    found: list[Row] = []
    for direction in ("fwd", "bwd"):
        found += baselines("workloads", workload, direction, "gaussian")
        for keep_ratio in (0.05, 0.03):
            methods = sparse_linear(keep_ratio)
            found += [
                Row("workloads", workload, name, methods[name], direction, keep_ratio)
                for name in ("sla", "sla2")
            ]
    return found


def captured_rows() -> list[Row]:
    """What the bundled model attends over, at the longer size of docs/quality.md."""
    row = partial(Row, "captured", CAPTURED, inputs="captured")
    found = [*baselines("captured", CAPTURED, "fwd", "captured"), row("dense", Dense())]
    for keep_ratio in KEEP_RATIOS:
        found += ratio_rows(row, "fwd", keep_ratio, ("sla", "sla2"))
    found += [row("dynsparse", DynSparse(log_threshold=x)) for x in (-9.0, -6.0, -4.0, -2.0)]
    return found + [row("blasst", BLASST(log_threshold=x)) for x in (-6.0, -4.0, -2.0)]


def block_rows(workload: Workload) -> list[Row]:
    """SLA2 in other blocks than 128 x 64 and in cubes; docs/quality.md says what they are good for.
    The sparse branch alone in the blocks that most methods have by default."""
    row = partial(Row, "blocks", workload)
    found: list[Row] = []
    for direction in ("fwd", "bwd"):
        found += baselines("blocks", workload, direction, "gaussian")
        for keep_ratio in (0.05, 0.03):
            for block_q, block_k in ((128, 32), (64, 64), (64, 32), (32, 16)):
                method = SLA2(keep_ratio=keep_ratio, block_q=block_q, block_k=block_k)
                found.append(row("sla2", method, direction, keep_ratio))
            for block_q, block_k in ((128, 64), (64, 32)):
                cubes = SLA2(
                    keep_ratio=keep_ratio, block_q=block_q, block_k=block_k, token_order="cubes"
                )
                found.append(row("sla2", cubes, direction, keep_ratio))
        for keep_ratio in KEEP_RATIOS:
            sparse = SLA.sparse_only(keep_ratio=keep_ratio, block_q=64, block_k=64)
            found.append(row("sparse", sparse, direction, keep_ratio, part="sparse"))
    return found


def scaling_rows(small: bool = False) -> list[Row]:
    """A fixed number of critical blocks for each row: twice the tokens should take twice as long,
    apart from the scores of the router."""
    found: list[Row] = []
    for length in (1024, 2048) if small else (16384, 32768, 65536, 131072):
        workload = Workload(f"n{length // 1024}k", "scaling", (1, length // 64, 64), 12, 128)
        keep_ratio = (SCALING_BLOCKS + 0.5) / math.ceil(length / BLOCKS["block_k"])
        methods = sparse_linear(min(1.0, keep_ratio))
        for direction in ("fwd", "bwd"):
            for name in ("sla", "sla2"):
                row = Row("scaling", workload, name, methods[name], direction, keep_ratio)
                found.append(row)
    return found


# What a row says of itself ------------------------------------------------------------------------


def grid_of(row: Row) -> Any:
    needs_grid = row.method is not None and row.method.recipe.needs_grid
    return row.workload.place if needs_grid else None


def has_map(row: Row) -> bool:
    """Whether the operator would take the router's map from the caller."""
    router = None if row.method is None else row.method.recipe.router
    return row.part == "operator" and isinstance(router, BlockRouter) and router.mode == "hard"


def setting_of(method: Method) -> str:
    if isinstance(method, (DynSparse, BLASST)):
        rows = f", decide_rows={method.decide_rows}" if method.decide_rows else ""
        return f"log_threshold={method.log_threshold:g}{rows}"
    is_own = method.token_order == type(method).token_order
    return "" if is_own else f"token_order={method.token_order}"


def blocks_of(row: Row) -> str | None:
    if row.method is None:
        return {"flex": "128x128", "triton_sla_main": "128x64", "triton_sla_sla1": "128x64"}.get(
            row.name
        )
    return f"{row.method.recipe.block_q}x{row.method.recipe.block_k}"


def baseline_key(row: Row) -> str:
    return "|".join((row.workload.name, row.direction, row.inputs))
