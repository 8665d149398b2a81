# SPDX-License-Identifier: Apache-2.0
"""Times one denoising step of a whole video transformer, with torch's attention and with ours.

    python bench/model.py [--only REGEX] [--modes eager,compiled] [--out FOLDER] [--limit-s SECONDS]
    python bench/model.py --device cpu --workload tiny --out /tmp/model     tries the benchmark

The model is diffusers' ``WanTransformer3DModel`` in the shape of Wan 2.1 1.3B, with random weights
in bfloat16: a step costs what it costs with trained ones, but for in-loop skipping. A step is one
call of the transformer; guidance makes it two, alike for all rows. Cross-attention is torch's in
every row, on the cuDNN backend but for the row "sdpa", which leaves the choice to torch.
``compiled`` is diffusers' ``compile_repeated_blocks(fullgraph=True)``. After its timing a row is
taken apart by kernel. Rows are appended to ``FOLDER``/<device>.jsonl (suite "model"), their
kernels written to <device>.model.json; ``bench/report.py`` renders both.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from clock import DTYPE, Clock, ceilings, describe_machine, kernel_spans, slug, sum_up
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparline
from sparline import SLA, SLA2, Dense, DynSparse
from sparline.integrations.probe import AttentionProbe
from sparline.methods import Method
from sparline.tokens import Grid

BLOCKS: dict[str, Any] = {"block_q": 128, "block_k": 64}
MODES = ("eager", "compiled")
#: A row may take longer than one of a single operator, in seconds, to have its 20 repetitions.
ROW_S = 40.0
#: Input sets that take turns.
SETS = 2
TIMESTEP = 500.0


@dataclasses.dataclass(frozen=True)
class Shape:
    """A transformer and what it is called with."""

    name: str
    grid: Grid  # of tokens
    heads: int
    head_dim: int
    ffn_dim: int
    layers: int
    channels: int
    text_length: int
    text_dim: int

    def build(self, device: torch.device) -> Any:
        """Random weights, made where they stay; in the dtypes that ``from_pretrained`` gives."""
        with device:
            model = WanTransformer3DModel(
                num_attention_heads=self.heads,
                attention_head_dim=self.head_dim,
                in_channels=self.channels,
                out_channels=self.channels,
                text_dim=self.text_dim,
                ffn_dim=self.ffn_dim,
                num_layers=self.layers,
            )
        kept = set(model._keep_in_fp32_modules)
        for name, parameter in model.named_parameters():
            if kept.isdisjoint(name.split(".")):
                parameter.data = parameter.data.to(DTYPE)
        return model.eval().requires_grad_(False)

    def inputs(self, device: torch.device, seed: int) -> dict[str, Tensor]:
        rng = torch.Generator(device).manual_seed(seed)
        frames, height, width = self.grid[:3]
        patched = (1, self.channels, frames, 2 * height, 2 * width)
        text = (1, self.text_length, self.text_dim)
        return {
            "hidden_states": torch.randn(patched, generator=rng, device=device).to(DTYPE),
            "encoder_hidden_states": torch.randn(text, generator=rng, device=device).to(DTYPE),
            "timestep": torch.full((1,), TIMESTEP, device=device),
        }


SHAPES = {
    "wan1.3b-480p": Shape("wan1.3b-480p", Grid(21, 30, 52), 12, 128, 8960, 30, 16, 512, 4096),
    "tiny": Shape("tiny", Grid(2, 4, 8), 2, 32, 64, 3, 16, 8, 32),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One attention in one mode."""

    name: str
    mode: str
    method: Method | None = None  # None: the model's own attention
    keep_ratio: float = 1.0

    @property
    def label(self) -> str:
        ratio = f" keep {self.keep_ratio:g}" if self.keep_ratio < 1.0 else ""
        return f"{self.mode} {self.name}{ratio}"


def rows_of(modes: list[str]) -> list[Row]:
    """torch's attention first: the others are compared with it."""
    found: list[Row] = []
    for mode in modes:
        found += [Row("cudnn", mode), Row("sdpa", mode), Row("dense", mode, Dense())]
        found.append(Row("sla2", mode, SLA2(keep_ratio=0.03, **BLOCKS), 0.03))
        found.append(Row("sla", mode, SLA.paper(keep_ratio=0.03, **BLOCKS), 0.03))
        found.append(Row("dynsparse", mode, DynSparse(log_threshold=-5.0)))
    return found


# One row ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def torch_attention(row: Row, device: torch.device) -> Iterator[None]:
    """The backend of every ``scaled_dot_product_attention`` within, of compiled code too if it is
    compiled within."""
    if row.name == "sdpa" or device.type == "cpu":
        yield
    else:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            yield


def measure(row: Row, model: Any, shape: Shape, clock: Clock, compiler: str) -> dict[str, Any]:
    """Times a step and takes it apart. The model is left with its own attention."""
    device = clock.device
    is_cuda = device.type == "cuda"
    sets = [shape.inputs(device, seed) for seed in range(SETS)]
    torch._dynamo.reset()
    if row.method is not None:
        sparline.apply(model, row.method)
    try:
        with torch.no_grad(), torch_attention(row, device):
            with AttentionProbe(model) as probe:
                model(**sets[0], return_dict=False)
            begin = time.perf_counter()
            if row.mode == "compiled":
                model.compile_repeated_blocks(fullgraph=True, backend=compiler)
                model(**sets[0], return_dict=False)
            clock.wait()
            compile_s = time.perf_counter() - begin
            runs = [partial(model, **s, return_dict=False) for s in sets]
            if is_cuda:
                torch.cuda.reset_peak_memory_stats()
            timed = clock.time(runs)
            peak = torch.cuda.max_memory_allocated() if is_cuda else None
            kernels = take_apart(runs[0], row) if is_cuda else []
    finally:
        for block in model.blocks:
            block._compiled_call_impl = None
        sparline.restore(model)
    return {
        **describe(row, shape, probe),
        **timed,
        "compile_s": round(compile_s, 1) if row.mode == "compiled" else None,
        "peak_bytes": peak,
        "kernel_times": kernels,
    }


def describe(row: Row, shape: Shape, probe: AttentionProbe) -> dict[str, Any]:
    method = row.method
    in_loop = method is not None and method.recipe.skip is not None
    has_linear = method is not None and method.recipe.has_linear_branch
    blocks = None if method is None else f"{method.recipe.block_q}x{method.recipe.block_k}"
    return {
        "suite": "model",
        "mode": row.mode,
        "method": row.name,
        "pass": "fwd",
        "workload": shape.name,
        "B": 1,
        "H": shape.heads,
        "N": shape.grid.length,
        "D": shape.head_dim,
        "layers": shape.layers,
        "dtype": str(DTYPE).removeprefix("torch."),
        "keep_ratio": row.keep_ratio,
        "sparsity": 0.0 if in_loop or method is None else round(probe.sparsity, 4),
        "tile_sparsity": round(probe.sparsity, 4) if in_loop else None,
        "setting": f"log_threshold={method.log_threshold:g}"
        if isinstance(method, DynSparse)
        else "",
        "blocks": blocks,
        "scope": method.recipe.linear_scope if method is not None and has_linear else None,
        "inputs": "random weights",
        "low_bit": False,
    }


# Kernels ----------------------------------------------------------------------------------------

SELF, CROSS, GEMMS, OTHERS, REST = (
    "self-attention",
    "cross-attention",
    "matrix products",
    "norms and elementwise",
    "rest",
)
#: Of torch's attention, whichever backend.
_SDPA = re.compile(r"sdpa|flash_fwd|fmha|flash::|attention", re.IGNORECASE)
_GEMM = re.compile(r"gemm|nvjet|cutlass|splitk|gemv|cublas|xmma", re.IGNORECASE)
_OTHERS = re.compile(
    r"elementwise|norm|reduce|triton|CatArray|index|copy|fill|Memcpy DtoD", re.IGNORECASE
)


def stage_of(kernel: str, us: float, longest_us: float) -> str:
    """What a kernel is for. torch's calls for cross-attention are told from the others by their
    time, as their 512 keys are not a quarter of the tokens."""
    if "sparline" in kernel:
        return SELF
    if _SDPA.search(kernel):
        return SELF if us > longest_us / 4 else CROSS
    if _GEMM.search(kernel):
        return GEMMS
    return OTHERS if _OTHERS.search(kernel) else REST


def take_apart(run: Callable[[], Any], row: Row, repetitions: int = 2) -> list[dict[str, Any]]:
    """Time by stage and kernel, the longest first."""
    spans = kernel_spans(run, repetitions)
    is_own = row.method is None  # otherwise what torch attends is cross-attention
    times = [end - start for end, start, name in spans if _SDPA.search(name)]
    longest = max(times, default=0.0) if is_own else math.inf
    staged = [
        (end, start, f"{stage_of(name, end - start, longest)}|{name}") for end, start, name in spans
    ]
    return [
        {"stage": kernel["kernel"].split("|", 1)[0], **kernel, "kernel": kernel_of(kernel)}
        for kernel in sum_up(staged, repetitions, name_of=lambda name: name)
    ]


def kernel_of(kernel: dict[str, Any]) -> str:
    """Full names of templates fill pages."""
    name: str = kernel["kernel"].split("|", 1)[1]
    return name if len(name) <= 120 else name[:117] + "..."


def by_stage(found: dict[str, Any]) -> dict[str, float]:
    """ms of each stage; what is left of the step is the device idle."""
    sums = dict.fromkeys((SELF, CROSS, GEMMS, OTHERS, REST), 0.0)
    for kernel in found["kernel_times"]:
        sums[kernel["stage"]] += kernel["us"] / 1e3
    idle = max(0.0, found["ms"] - sum(sums.values()))
    return {name: round(ms, 3) for name, ms in {**sums, "idle": idle}.items()}


# The run ----------------------------------------------------------------------------------------


def finish(found: dict[str, Any], bases: dict[str, float]) -> dict[str, Any]:
    """The row as it is written: against the faster of torch's backends in the same mode."""
    name = min(bases, key=lambda key: bases[key]) if bases else None
    return {
        **{key: round(x, 4) if isinstance(x, float) else x for key, x in found.items()},
        "ms_kernel": None,
        "extra_bytes": None,
        "baseline": name,
        "baseline_ms": round(bases[name], 4) if name else None,
        "ratio": round(bases[name] / found["ms"], 3) if name else None,
        "stages_ms": by_stage(found) if found["kernel_times"] else None,
    }


def write_kernels(path: Path, machine: dict[str, Any], found: dict[str, Any]) -> None:
    """Kernels of a row, in place of those of its last measurement."""
    report = json.loads(path.read_text()) if path.exists() else {"entries": []}
    key = (found["workload"], found["mode"], found["method"])
    entries = [e for e in report["entries"] if (e["workload"], e["mode"], e["method"]) != key]
    names = ("workload", "mode", "method", "ms", "kernel_times")
    entries.append({**{name: found[name] for name in names}, **machine})
    path.write_text(json.dumps({"entries": entries}, indent=1) + "\n")


def run_rows(args: argparse.Namespace) -> int:
    device, shape = torch.device(args.device), SHAPES[args.workload]
    clock = Clock(device, args.repetitions, row_s=ROW_S)
    machine = {**describe_machine(device, args.commit), **ceilings(device)}
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / f"{slug(machine)}.jsonl"
    print(machine, flush=True)
    begin = time.time()
    model = shape.build(device)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e9:.2f} G parameters after {time.time() - begin:.1f} s", flush=True)
    bases: dict[str, dict[str, float]] = {mode: {} for mode in MODES}
    failed = 0
    for row in rows_of(args.modes.split(",")):
        is_base = row.method is None
        if not (is_base or args.only is None or re.search(args.only, row.label)):
            continue
        if time.time() - begin > args.limit_s:
            print(f"out of time before {row.label}")
            break
        try:
            found = measure(row, model, shape, clock, args.compiler)
        except Exception as error:  # one row that fails must not cost the others
            failed += 1
            print(f"{row.label}: FAILED {type(error).__name__}: {str(error)[:1500]}", flush=True)
            continue
        if is_base:
            bases[row.mode][row.name] = found["ms"]
        told = finish(found, bases[row.mode])
        if told["kernel_times"]:
            write_kernels(results.with_suffix(".model.json"), machine, told)
        del told["kernel_times"]
        with results.open("a") as file:
            file.write(json.dumps({**told, **machine}) + "\n")
        print(line_of(row, told), flush=True)
    return 1 if failed else 0


def line_of(row: Row, told: dict[str, Any]) -> str:
    parts = [f"{row.label:<24} {told['ms']:9.2f} ms ± {told['spread_ms']:.2f}"]
    parts.append(f"{told['ratio']:5.2f}x {told['baseline']}" if told["ratio"] else "")
    if told["tile_sparsity"] is not None:
        parts.append(f"skips {told['tile_sparsity']:.0%}")
    if told["compile_s"] is not None:
        parts.append(f"compiled in {told['compile_s']} s")
    if told["stages_ms"]:
        parts.append(", ".join(f"{name} {ms:.1f}" for name, ms in told["stages_ms"].items()))
    return "  ".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--workload", choices=list(SHAPES), default="wan1.3b-480p")
    add("--modes", default=",".join(MODES), help=f"of {', '.join(MODES)}, with commas")
    add("--only", metavar="REGEX", help="rows whose label matches, and torch's attention")
    add("--repetitions", type=int, default=20)
    add("--compiler", default="inductor", help="backend of torch.compile")
    add("--out", type=Path, default=Path(__file__).parent / "results")
    add("--commit", default=os.environ.get("SPARLINE_COMMIT"), help="where there is no git")
    add("--limit-s", type=float, default=math.inf, help="start no row after this many seconds")
    add("--device", default="cuda", help="cpu, with --workload tiny, tries the benchmark itself")
    return run_rows(parser.parse_args())


if __name__ == "__main__":
    raise SystemExit(main())
