# SPDX-License-Identifier: Apache-2.0
"""Times whole operators against what a user would pick instead, in one run, on the same inputs.

A row is everything a model pays between q, k, v and o: routing, feature maps, both branches, the
projection with weights that are not zero. Its ratio is to ``scaled_dot_product_attention`` timed in
the same process. Times are medians over repetitions after a warm-up, with rotating inputs.
"""

from __future__ import annotations

import datetime
import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sparline
from sparline.accounting import block_sparsity, flops
from sparline.machine import describe_device
from sparline.methods import SLA, Dense, Method

#: Input sets that take turns, so that no call finds its own data in the cache.
NUM_INPUT_SETS = 3
WARM_UP = 2
BLOCKS: dict[str, Any] = {"block_q": 128, "block_k": 64}


class BenchError(RuntimeError):
    """A result differs from the reference, or the arguments make no sense."""


@dataclass(frozen=True)
class Workload:
    """One layer's self-attention; text tokens stand at the start or the end of the sequence."""

    name: str
    about: str
    grid: tuple[int, int, int]  # (T, H, W) in tokens, w fastest
    heads: int
    head_dim: int
    text: int = 0
    text_at: str = "end"

    @property
    def length(self) -> int:
        frames, height, width = self.grid
        return frames * height * width + self.text


@dataclass(frozen=True)
class Case:
    """One row: a method (None is torch's attention), in a direction, on a kind of input."""

    method: Method | None
    direction: str = "fwd"
    dtype: torch.dtype = torch.float32
    inputs: str = "gaussian"


_ALL = (
    Workload("cpu-8k", "the bundled demo model, 8 frames of 64 x 64 pixels", (8, 32, 32), 4, 64),
    Workload("flux-1k", "FLUX, one image of 1024 x 1024", (1, 64, 64), 24, 128, 512, "start"),
    Workload("cog5b", "CogVideoX-5B, 49 frames of 480 x 720", (13, 30, 45), 48, 64, 226, "start"),
    Workload("wan1.3b-480p", "Wan 2.1 1.3B, 81 frames of 480 x 832", (21, 30, 52), 12, 128),
    Workload("wan14b-720p", "Wan 14B, 81 frames of 720 x 1280", (21, 45, 80), 40, 128),
    Workload("hunyuan-720p", "HunyuanVideo, 129 frames of 720 x 1280", (33, 45, 80), 24, 128, 256),
)
#: Real attention shapes by name.
WORKLOADS = {workload.name: workload for workload in _ALL}


def cases(suite: str) -> list[Case]:
    """The rows of a suite; baselines stand before what is measured against them."""
    if suite == "quick":
        return [Case(None), Case(Dense()), Case(SLA(keep_ratio=0.05, **BLOCKS))]
    if suite != "cpu":
        raise BenchError(f"--suite: it must be cpu or quick, got {suite!r}.")
    rows: list[Case] = []
    for direction in ("fwd", "bwd"):
        rows += [Case(None, direction), Case(Dense(), direction)]
        for keep_ratio in (0.10, 0.05, 0.03):
            for preset in (SLA.paper, SLA.sla1):  # marginal and complement scope
                rows.append(Case(preset(keep_ratio=keep_ratio, **BLOCKS), direction))
        rows.append(Case(SLA(keep_ratio=0.05), direction))  # 64 x 64 blocks, as published
        rows.append(Case(None, direction, inputs="video"))
        rows.append(Case(SLA(keep_ratio=0.05, **BLOCKS), direction, inputs="video"))
        rows.append(Case(None, direction, torch.bfloat16))
        rows.append(Case(Dense(), direction, torch.bfloat16))
        rows.append(Case(SLA(keep_ratio=0.05, **BLOCKS), direction, torch.bfloat16))
    return rows


def make_inputs(
    workload: Workload, kind: str, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (1, H, N, D): "gaussian", or "video", which attends locally and sharply.

    Video-like tensors are random Fourier features of the token's place in the grid, so that q.k
    falls off with distance as a Gaussian, plus a direction of its own for each head and a little
    noise.
    """
    rng = torch.Generator().manual_seed(seed)
    shape = (1, workload.heads, workload.length, workload.head_dim)

    def noise() -> Tensor:
        return torch.randn(shape, generator=rng)

    if kind == "gaussian":
        q, k, v = noise(), noise(), noise()
    else:
        axes = [torch.linspace(0.0, 1.0, size) for size in workload.grid]
        place = torch.cartesian_prod(*axes)  # (T H W, 3), w fastest
        frequency = 8.0 * torch.randn(workload.heads, 3, workload.head_dim, generator=rng)
        phase = 2 * torch.pi * torch.rand(workload.heads, 1, workload.head_dim, generator=rng)
        field = 2**0.5 * torch.cos(place @ frequency + phase)  # (H, T H W, D)
        if workload.text:
            text = torch.randn(workload.heads, workload.text, workload.head_dim, generator=rng)
            parts = [text, field] if workload.text_at == "start" else [field, text]
            field = torch.cat(parts, dim=1)
        direction = torch.randn(workload.heads, 1, workload.head_dim, generator=rng)
        q = 1.3 * field + 0.3 * noise()
        k = 1.3 * field + direction + 0.3 * noise()
        v = field.roll(1, dims=-1) + 0.3 * noise()
    return q.to(dtype), k.to(dtype), v.to(dtype)


def projection_weights(head_dim: int) -> sparline.SLAWeights:
    """Weights of the linear branch away from zero: with zeros the branch would cost the same but
    show nothing."""
    rng = torch.Generator().manual_seed(7)
    weight = torch.randn(head_dim, head_dim, generator=rng) / head_dim**0.5
    return sparline.SLAWeights(proj_weight=weight, proj_bias=torch.zeros(head_dim))


def operator(
    case: Case, head_dim: int, backend: str | None = None
) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], list[Tensor]]:
    """The function from q, k, v to o, and its learned tensors."""
    method = case.method
    if method is None:
        return F.scaled_dot_product_attention, []
    if isinstance(method, Dense):
        return lambda q, k, v: sparline.attention(q, k, v, method=method, backend=backend), []
    weights = projection_weights(head_dim)
    learned = [w for w in weights if w is not None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparline.attention(q, k, v, method=method, weights=weights, backend=backend)

    return attend, learned


def median_ms(runs: Sequence[Callable[[], Any]], repetitions: int) -> tuple[float, float]:
    """Median and half the interquartile range over repetitions that cycle through ``runs``."""
    for idx in range(WARM_UP):
        runs[idx % len(runs)]()
    times = []
    for idx in range(repetitions):
        start = time.perf_counter()
        runs[idx % len(runs)]()
        times.append(1e3 * (time.perf_counter() - start))
    quarters = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    return statistics.median(times), (quarters[2] - quarters[0]) / 2


def time_case(case: Case, workload: Workload, repetitions: int) -> dict[str, Any]:
    """ms and spread_ms of the whole operator and, for SLA, ms_kernel with the block map given."""
    sets = [make_inputs(workload, case.inputs, case.dtype, seed) for seed in range(NUM_INPUT_SETS)]
    attend, learned = operator(case, workload.head_dim)
    if case.direction == "bwd":
        return dict(
            zip(
                ("ms", "spread_ms"), _time_backward(attend, learned, sets, repetitions), strict=True
            )
        )
    with torch.no_grad():
        ms, spread = median_ms([partial(attend, *s) for s in sets], repetitions)
        row: dict[str, Any] = {"ms": ms, "spread_ms": spread}
        method = case.method
        if isinstance(method, SLA) and method.needs_block_map:
            maps = [sparline.route(q, k, method=method) for q, k, _ in sets]
            weights = projection_weights(workload.head_dim)
            row["ms_kernel"], _ = median_ms(
                [
                    partial(sparline.attention, *s, method=method, block_map=m, weights=weights)
                    for s, m in zip(sets, maps, strict=True)
                ],
                repetitions,
            )
            row["sparsity"] = statistics.mean(block_sparsity(m) for m in maps)
    return row


def _time_backward(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    learned: list[Tensor],
    sets: Sequence[tuple[Tensor, Tensor, Tensor]],
    repetitions: int,
) -> tuple[float, float]:
    for weight in learned:
        weight.requires_grad_(True)
    runs: list[Callable[[], Any]] = []
    for q, k, v in sets:
        leaves = [x.requires_grad_(True) for x in (q, k, v)] + learned
        o = attend(q, k, v)
        d_o = torch.randn(o.shape, generator=torch.Generator().manual_seed(3)).to(o.dtype)
        runs.append(partial(torch.autograd.grad, o, leaves, d_o, retain_graph=True))
    return median_ms(runs, repetitions)


def check_case(case: Case, workload: Workload) -> None:
    """Compares outputs, or gradients, with the reference on a shorter sequence of the same heads.

    Raises BenchError if the relative L2 error is above what the dtype explains.
    """
    short = Workload(f"{workload.name} (short)", "", (4, 16, 12), workload.heads, workload.head_dim)
    q, k, v = make_inputs(short, case.inputs, case.dtype, seed=11)
    results = []
    for backend, dtype in ((None, case.dtype), ("reference", torch.float32)):
        leaves = [x.detach().to(dtype).requires_grad_(True) for x in (q, k, v)]
        attend, _ = operator(case, workload.head_dim, backend)
        o = attend(*leaves)
        d_o = torch.randn(o.shape, generator=torch.Generator().manual_seed(3))
        wanted = torch.autograd.grad(o, leaves, d_o.to(dtype)) if case.direction == "bwd" else (o,)
        results.append([x.detach().float() for x in wanted])
    limit = 1e-4 if case.dtype == torch.float32 else 2e-2
    for ours, reference in zip(*results, strict=True):
        error = float((ours - reference).norm() / reference.norm())
        if not error <= limit:
            raise BenchError(
                f"bench: {label(case)} must agree with the reference before it is timed (relative "
                f"L2 <= {limit}), got {error:.2e}. Run make test, or pass --no-check to time it "
                "anyway."
            )


def sgemm_gflops(size: int = 2048) -> float:
    """The rate of the machine's own float32 matrix product, the roof of the kernels here."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    ms, _ = median_ms([lambda: torch.mm(a, b)], 20)
    return 2.0 * size**3 / ms / 1e6


def label(case: Case) -> str:
    name = "sdpa" if case.method is None else case.method.name
    keep = f" keep {case.method.keep_ratio:.0%}" if isinstance(case.method, SLA) else ""
    scope = f" {case.method.linear_scope}" if isinstance(case.method, SLA) else ""
    return f"{name}{keep}{scope} {case.direction} {_dtype_name(case.dtype)} {case.inputs}"


def run(
    *,
    suite: str,
    workloads: Sequence[str] | None,
    repetitions: int,
    check: bool,
    out: Path | None,
    report: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Runs a suite; appends each row to ``out``/<device>.jsonl as soon as it is known."""
    names = list(workloads or ["cpu-8k"])
    for name in names:
        if name not in WORKLOADS:
            raise BenchError(f"--workload: it must be one of {', '.join(WORKLOADS)}, got {name!r}.")
    suite_cases = cases(suite)
    machine = describe_machine()
    gemm = sgemm_gflops()
    report(f"{machine['device']}, torch {machine['torch']}, SGEMM {gemm:.0f} GFLOP/s")
    rows: list[dict[str, Any]] = []
    for name in names:
        workload = WORKLOADS[name]
        baselines: dict[tuple[str, torch.dtype, str], float] = {}
        for case in suite_cases:
            if check and case.method is not None:
                check_case(case, workload)
            measured = time_case(case, workload, repetitions)
            key = (case.direction, case.dtype, case.inputs)
            if case.method is None:
                baselines[key] = measured["ms"]
            row = {
                **describe_case(suite, case, workload),
                **{key: round(value, 4) for key, value in measured.items()},
                "baseline": "sdpa",
                "baseline_ms": round(baselines[key], 4),
                "ratio": round(baselines[key] / measured["ms"], 3),
                "sgemm_gflops": round(gemm, 1),
                **machine,
            }
            row["gflops"] = round(row["flops"] / row["ms"] / 1e6, 1)
            rows.append(row)
            report(
                f"{label(case):<44} {row['ms']:9.1f} ms  {row['ratio']:6.2f}x sdpa  "
                f"{row['gflops'] / gemm:4.0%} of SGEMM"
            )
            if out is not None:
                out.mkdir(parents=True, exist_ok=True)
                with (out / f"{_slug(machine['device'])}.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
    return rows


def describe_case(suite: str, case: Case, workload: Workload) -> dict[str, Any]:
    """The columns of a row that say what was run."""
    method = case.method
    counted = flops(
        method or Dense(),
        num_heads=workload.heads,
        num_queries=workload.length,
        head_dim=workload.head_dim,
        direction="forward" if case.direction == "fwd" else "backward",
    )
    is_sla = isinstance(method, SLA)
    return {
        "suite": suite,
        "method": "sdpa" if method is None else method.name,
        "pass": case.direction,
        "workload": workload.name,
        "B": 1,
        "H": workload.heads,
        "N": workload.length,
        "D": workload.head_dim,
        "dtype": _dtype_name(case.dtype),
        "keep_ratio": method.keep_ratio if isinstance(method, SLA) else 1.0,
        "sparsity": round(1.0 - counted.sparse / counted.full, 4) if is_sla else 0.0,
        "blocks": f"{method.block_q}x{method.block_k}" if method is not None else None,
        "scope": method.linear_scope if isinstance(method, SLA) else None,
        "inputs": case.inputs,
        "ms_kernel": None,
        "flops": counted.total,
        "extra_bytes": _extra_bytes(case, workload),
    }


def _extra_bytes(case: Case, workload: Workload) -> int | None:
    """Workspace as the plan counts it; None for torch's attention, which does not tell."""
    if case.method is None:
        return None
    shape = (1, workload.heads, workload.length, workload.head_dim)
    q = torch.empty(1, workload.head_dim, dtype=case.dtype).expand(shape)
    text = sparline.explain(q, q, method=case.method)
    word = "forward" if case.direction == "fwd" else "backward"
    found = re.search(rf"workspace_bytes:.*{word} (\d+)", text)
    return int(found.group(1)) if found else None


def describe_machine() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "device": describe_device(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or None,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
    }


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
