# SPDX-License-Identifier: Apache-2.0
"""Times whole operators against what a user would pick instead, in one run, on the same inputs.

A row is everything a model pays between q, k, v and o: routing, feature maps, all branches, the
projection with weights that are not zero. Every method of ``METHODS`` is brought to one density
(``sparline.density``) on video-like inputs. A row's ratio is to ``scaled_dot_product_attention``
timed in the same process. Times are medians over repetitions after a warm-up, with rotating inputs.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
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
from sparline.density import Tuned, tune
from sparline.machine import describe_device
from sparline.methods import BLASST, METHODS, SLA, BlockRouter, Dense, DynSparse, Method
from sparline.tokens import Grid

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

    @property
    def place(self) -> Grid:
        """Where the tokens stand."""
        prefix, suffix = (self.text, 0) if self.text_at == "start" else (0, self.text)
        return Grid(*self.grid, prefix, suffix)


@dataclass(frozen=True)
class Case:
    """One row: a method (None is torch's attention), in a direction, on a kind of input."""

    method: Method | None
    direction: str = "fwd"
    dtype: torch.dtype = torch.float32
    inputs: str = "gaussian"
    name: str = ""  # in METHODS, if the row is one of a method at a density
    density: float | None = None  # bring the method called ``name`` to it
    low_bit: bool = False


@dataclass(frozen=True)
class _Inputs:
    """Inputs in the form that ``sparline.density`` takes."""

    q: Tensor  # (1, N, H, D)
    k: Tensor
    v: Tensor
    grid: Grid
    layer: int = 2  # where VMoBA's partition is 3d


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
    return rows + _family() + _in_loop()


def _family() -> list[Case]:
    """Every method with a router or a linear branch at 90, 95 and 97 % forward, 95 % backward."""
    names = [
        name for name, cls in METHODS.items() if not issubclass(cls, (Dense, DynSparse, BLASST))
    ]
    rows = [Case(None, "fwd", inputs="video")]
    for density in (0.10, 0.05, 0.03):
        rows += [
            Case(None, inputs="video", name=name, density=density)
            for name in names
            if name != "linear" or density == 0.05  # it has no density
        ]
        rows.append(Case(None, inputs="video", name="sla2", density=density, low_bit=True))
    rows.append(Case(None, "bwd", inputs="video"))
    rows += [Case(None, "bwd", inputs="video", name=name, density=0.05) for name in names]
    return rows


def _in_loop() -> list[Case]:
    """The in-loop methods over thresholds: time against the share of tiles that they skip."""
    rows = [Case(None, "fwd", inputs="video"), Case(Dense(), "fwd", inputs="video")]
    thresholds: tuple[float, ...] = (float("-inf"), -9.0, -7.0, -5.0, -4.0, -3.0, -2.0, -1.0)
    rows += [Case(DynSparse(x), "fwd", inputs="video", name="dynsparse") for x in thresholds]
    rows += [Case(BLASST(x), "fwd", inputs="video", name="blasst") for x in thresholds[2:]]
    rows.append(Case(None, "bwd", inputs="video"))
    rows += [Case(DynSparse(x), "bwd", inputs="video", name="dynsparse") for x in (-5.0, -3.0)]
    return rows


def brought_to_density(case: Case, workload: Workload) -> tuple[Case, Tuned | None]:
    """The case with its method, where that follows from a density on its inputs."""
    if case.density is None:
        return case, None
    made = make_inputs(workload, case.inputs, torch.float32, seed=0)
    q, k, v = (x.transpose(1, 2) for x in made)
    tuned = tune(case.name, _Inputs(q, k, v, workload.place), case.density)
    low_bit = sparline.LowBit() if case.low_bit else None
    method = dataclasses.replace(tuned.method, low_bit=low_bit)
    return dataclasses.replace(case, method=method), tuned


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


def learned_weights(method: Method, heads: int, head_dim: int) -> sparline.Weights:
    """Learned tensors away from their initial values: with zeros the branches would cost the same
    but show nothing."""
    rng = torch.Generator().manual_seed(7)

    def matrix() -> Tensor:
        return torch.randn(head_dim, head_dim, generator=rng) / math.sqrt(head_dim)

    combine = method.recipe.combine
    if combine == "projection":
        return sparline.Weights(proj_weight=matrix(), proj_bias=torch.zeros(head_dim))
    if combine == "blend":
        eye = torch.eye(head_dim)
        return sparline.Weights(
            alpha_logit=torch.randn(heads, 64, generator=rng),
            router_q=eye + 0.1 * matrix(),
            router_k=eye + 0.1 * matrix(),
        )
    return sparline.Weights()


def operator(
    case: Case, workload: Workload, backend: str | None = None
) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], list[Tensor]]:
    """The function from q, k, v to o, and its learned tensors. VSA's gates belong to the layer, and
    are 1 here."""
    method = case.method
    if method is None:
        return F.scaled_dot_product_attention, []
    weights = learned_weights(method, workload.heads, workload.head_dim)
    # The hard router passes no gradient on.
    learned = [w for key, w in weights._asdict().items() if w is not None and key[:6] != "router"]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grid = _grid(method, workload)
        o: Tensor = sparline.attention(
            q, k, v, method=method, weights=weights, grid=grid, backend=backend
        )
        return o

    return attend, learned


def _grid(method: Method, workload: Workload) -> Grid | None:
    return workload.place if method.recipe.needs_grid else None


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
    """ms and spread_ms of the whole operator, ms_kernel with the block map given where there is
    one, and what was left out of the softmax."""
    sets = [make_inputs(workload, case.inputs, case.dtype, seed) for seed in range(NUM_INPUT_SETS)]
    attend, learned = operator(case, workload)
    method, is_backward = case.method, case.direction == "bwd"
    if is_backward:
        ms, spread = _time_backward(attend, learned, sets, repetitions)
    with torch.no_grad():
        if not is_backward:
            ms, spread = median_ms([partial(attend, *s) for s in sets], repetitions)
        row: dict[str, Any] = {"ms": ms, "spread_ms": spread}
        if method is None:
            return row
        grid = _grid(method, workload)
        if method.recipe.skip is not None:
            told = [sparline.tile_statistics(*s, method=method, grid=grid) for s in sets]
            row["tile_sparsity"] = statistics.mean(t.sparsity for t in told)
        elif not is_backward and isinstance(method.recipe.router, BlockRouter):
            weights = learned_weights(method, workload.heads, workload.head_dim)
            routers = {"router_q": weights.router_q, "router_k": weights.router_k}
            maps = [
                sparline.route(q, k, method=method, grid=grid, weights=sparline.Weights(**routers))
                for q, k, _ in sets
            ]
            given = {"method": method, "weights": weights, "grid": grid}
            row["ms_kernel"], _ = median_ms(
                [
                    partial(sparline.attention, *s, block_map=m, **given)
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
        attend, _ = operator(case, short, backend)
        o = attend(*leaves)
        d_o = torch.randn(o.shape, generator=torch.Generator().manual_seed(3))
        wanted = torch.autograd.grad(o, leaves, d_o.to(dtype)) if case.direction == "bwd" else (o,)
        results.append([x.detach().float() for x in wanted])
    # A low-bit code may round the other way where float32 sums differ in their last bit.
    limit = 1e-4 if case.dtype == torch.float32 and not case.low_bit else 2e-2
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
    method = case.method
    words = [_name(case)]
    if case.density is not None:
        words.append(f"at {case.density:.0%}")
    elif isinstance(method, SLA):
        words += [f"keep {method.keep_ratio:.0%}", method.linear_scope]
    elif isinstance(method, (DynSparse, BLASST)):
        words.append(f"{method.log_threshold:g}")
    words += ["low-bit"] * case.low_bit
    return " ".join([*words, case.direction, _dtype_name(case.dtype), case.inputs])


def _name(case: Case) -> str:
    return case.name or ("sdpa" if case.method is None else case.method.name)


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
        for planned in suite_cases:
            case, tuned = brought_to_density(planned, workload)
            if check and case.method is not None:
                check_case(case, workload)
            measured = time_case(case, workload, repetitions)
            key = (case.direction, case.dtype, case.inputs)
            if case.method is None:
                baselines[key] = measured["ms"]
            row = {
                **describe_case(suite, case, workload, tuned, measured.get("tile_sparsity")),
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


def describe_case(
    suite: str,
    case: Case,
    workload: Workload,
    tuned: Tuned | None,
    tile_sparsity: float | None,
) -> dict[str, Any]:
    """The columns of a row that say what was run."""
    method = case.method
    kept_ratio = None if tuned is None else tuned.density
    if method is not None and method.recipe.skip is not None:
        kept_ratio = 1.0 - (tile_sparsity or 0.0)
    counted = flops(
        method or Dense(),
        num_heads=workload.heads,
        num_queries=workload.length,
        head_dim=workload.head_dim,
        direction="forward" if case.direction == "fwd" else "backward",
        # The achieved share, unless the linear sums need the counts that the ratios promise.
        kept_ratio=None if method is None or method.recipe.has_linear_branch else kept_ratio,
    )
    is_in_loop = method is not None and method.recipe.skip is not None
    has_block_sparsity = method is not None and not is_in_loop
    linear = method is not None and method.recipe.has_linear_branch
    return {
        "suite": suite,
        "method": _name(case),
        "setting": tuned.setting if tuned is not None else _setting(method),
        "pass": case.direction,
        "workload": workload.name,
        "B": 1,
        "H": workload.heads,
        "N": workload.length,
        "D": workload.head_dim,
        "dtype": _dtype_name(case.dtype),
        "keep_ratio": case.density or getattr(method, "keep_ratio", 1.0),
        "sparsity": round(1.0 - counted.sparse / counted.full, 4) if has_block_sparsity else 0.0,
        "tile_sparsity": None,
        "low_bit": case.low_bit,
        "blocks": f"{method.recipe.block_q}x{method.recipe.block_k}" if method else None,
        "scope": method.recipe.linear_scope if method is not None and linear else None,
        "inputs": case.inputs,
        "ms_kernel": None,
        "flops": counted.total,
        "full_flops": counted.full,
        "extra_bytes": _extra_bytes(case, workload),
    }


def _setting(method: Method | None) -> str:
    if isinstance(method, (DynSparse, BLASST)):
        return f"log_threshold={method.log_threshold:g}"
    return ""


def _extra_bytes(case: Case, workload: Workload) -> int | None:
    """Workspace as the plan counts it; None for torch's attention, which does not tell."""
    if case.method is None:
        return None
    shape = (1, workload.heads, workload.length, workload.head_dim)
    q = torch.empty(1, workload.head_dim, dtype=case.dtype).expand(shape)
    text = sparline.explain(q, q, method=case.method, grid=_grid(case.method, workload))
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
