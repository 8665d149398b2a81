# SPDX-License-Identifier: Apache-2.0
"""Times whole operators on a GPU against what a user would pick instead, in one run, on the same
inputs.

    python bench/gpu.py [--suite targets,methods,workloads,scaling,captured,blocks] [--quick]
                         [--profile]
                         [--peers cudnn,fa2,flex,triton_sla_main,triton_sla_sla1 | none]
                         [--workload NAME,...] [--out FOLDER] [--limit-s SECONDS]

A row is everything between q, k, v and o, the router included; ``ms_kernel`` is the same with the
block map given. Times are medians over repetitions by device events, with inputs that take turns,
while the device is kept busy until the host has queued all of them; ``ms_wall`` is what one call
after another costs by the clock, the host included. ``extra_bytes`` is the peak of the allocator
above inputs and results. SPARLINE_CUDA_ARCH=80 measures the portable kernels on any device, into
files of their own. Every row is written to ``FOLDER``/<device>.jsonl as soon as it is known;
one that fails is written as such, and the rest goes on, in a new process if the device is lost.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from clock import DTYPE, Clock, ceilings, describe_machine, slug
from inputs import make_inputs
from peers import Peer, PeerError, find_peers
from profiles import profile
from suites import (
    SUITES,
    Row,
    baseline_key,
    blocks_of,
    grid_of,
    has_map,
    rows_of,
    setting_of,
)
from torch import Tensor

import sparline
from sparline import SLA, Weights, demo
from sparline.accounting import block_sparsity, flops
from sparline.bench import WORKLOADS, Workload, learned_weights
from sparline.density import kept_share
from sparline.methods import ChunkRouter, Method

#: Input sets take turns until they are several times as large as the cache.
CACHE_BYTES, MOST_SETS = 60 << 20, 6
#: What the process ends with when the device answers no more.
LOST_CONTEXT = 86
MOST_STARTS = 10


# One row ------------------------------------------------------------------------------------------


def weights_of(method: Method, workload: Workload, device: torch.device) -> Weights:
    host = learned_weights(method, workload.heads, workload.head_dim)
    return Weights(*(None if w is None else w.to(device) for w in host))


class Bench:
    """Measures rows; inputs of the last workload are kept."""

    def __init__(
        self, device: torch.device, repetitions: int, peers: dict[str, Peer], clip: Path
    ) -> None:
        self.device = device
        self.clip = clip
        self.clock = Clock(device, repetitions)
        self.peers = peers
        self._inputs: tuple[Any, list[list[Tensor]]] = (None, [])

    def inputs(self, row: Row) -> list[list[Tensor]]:
        key = (row.workload, row.inputs)
        if self._inputs[0] != key:
            self._inputs = (None, [])
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            shape = row.workload
            size = 3 * 2 * shape.heads * shape.length * shape.head_dim
            count = max(2, min(MOST_SETS, math.ceil(3 * CACHE_BYTES / size)))
            sets = [
                make_inputs(shape, row.inputs, self.device, seed, self.clip)
                for seed in range(count)
            ]
            self._inputs = (key, sets)
        return self._inputs[1]

    def operator(self, row: Row, sets: list[list[Tensor]]) -> tuple[list[Any], list[Tensor]]:
        """A function from q, k and v to o for each input set, and what it learned."""
        if row.method is None:
            attend = self.peers[row.name].prepare(*sets[0], row.keep_ratio)
            learned = list(attend.parameters()) if isinstance(attend, torch.nn.Module) else []
            return [attend] * len(sets), learned
        method = row.method
        weights = weights_of(method, row.workload, self.device)
        learned = [
            w
            for key, w in weights._asdict().items()
            if w is not None and not key.startswith("router")
        ]
        options = {"method": method, "weights": weights, "grid": grid_of(row)}
        if row.part != "sparse":
            return [partial(sparline.attention, **options)] * len(sets), learned
        route = self.router(row)
        maps = [route(q, k) for q, k, _ in sets]
        return [partial(sparline.attention, block_map=m, **options) for m in maps], learned

    def router(self, row: Row) -> Callable[[Tensor, Tensor], Tensor]:
        """From q and k to the block map. Its weights are on the device before it is timed."""
        assert row.method is not None
        weights = weights_of(row.method, row.workload, self.device)
        router = Weights(router_q=weights.router_q, router_k=weights.router_k)
        return partial(sparline.route, method=row.method, weights=router, grid=grid_of(row))

    def measure(self, row: Row) -> dict[str, Any]:
        sets = self.inputs(row)
        told = self.describe(row, sets)
        if row.part == "router":
            route = self.router(row)
            runs: list[Callable[[], Any]] = [partial(route, q, k) for q, k, _ in sets]
            with torch.no_grad():
                return {**told, **self.clock.time(runs)}
        operators, learned = self.operator(row, sets)
        if row.direction == "fwd":
            with torch.no_grad():
                runs = [partial(f, *s) for f, s in zip(operators, sets, strict=True)]
                found = {**told, **self.clock.time(runs)}
                found["extra_bytes"] = self.clock.peak_extra_bytes(runs[0])
                if has_map(row):
                    given = dataclasses.replace(row, part="sparse")
                    operators, _ = self.operator(given, sets)
                    runs = [partial(f, *s) for f, s in zip(operators, sets, strict=True)]
                    found["ms_kernel"] = self.clock.time(runs)["ms"]
        else:
            found = {**told, **self.time_backward(operators, learned, sets)}
        return found

    def time_backward(
        self, operators: list[Any], learned: list[Tensor], sets: list[list[Tensor]]
    ) -> dict[str, Any]:
        for weight in learned:
            weight.requires_grad_()
        runs: list[Callable[[], Any]] = []
        for attend, tensors in zip(operators, sets, strict=True):
            leaves = [*(x.detach().requires_grad_() for x in tensors), *learned]
            o = attend(*leaves[:3])
            d_o = torch.randn_like(o)
            runs.append(partial(torch.autograd.grad, o, leaves, d_o, retain_graph=True))
        found: dict[str, Any] = self.clock.time(runs)
        found["extra_bytes"] = self.clock.peak_extra_bytes(runs[0])
        return found

    def describe(self, row: Row, sets: list[list[Tensor]]) -> dict[str, Any]:
        """The columns that say what is run, with the achieved sparsity."""
        workload, method = row.workload, row.method
        peer = self.peers.get(row.name) if method is None else None
        sparsity, tile_sparsity, block_map = 0.0, None, None
        if method is None:
            sparsity = 0.0 if peer is not None and peer.is_dense else 1.0 - row.keep_ratio
        elif method.recipe.skip is not None:
            with torch.no_grad():
                told = sparline.tile_statistics(*sets[0], method=method, grid=grid_of(row))
            tile_sparsity = told.sparsity
        elif isinstance(method.recipe.router, ChunkRouter):  # rows choose, not blocks
            q, k, v = (x.transpose(1, 2) for x in sets[0])
            sample: Any = SimpleNamespace(q=q, k=k, v=v, grid=workload.place)
            sparsity = 1.0 - kept_share(method, sample)
        elif method.recipe.router is not None:
            block_map = self.router(row)(sets[0][0], sets[0][1])
            sparsity = block_sparsity(block_map)
        is_linear = method is not None and method.recipe.has_linear_branch
        kept: float | None = 1.0 - (tile_sparsity or sparsity)
        if method is None or method.recipe.router is None:
            kept = kept if method is None or method.recipe.skip is not None else None
        counted = flops(
            method or SLA.sparse_only(),
            num_heads=workload.heads,
            num_queries=workload.length,
            head_dim=workload.head_dim,
            direction="forward" if row.direction == "fwd" else "backward",
            block_class=block_map if is_linear else None,
            kept_ratio=None if is_linear and block_map is not None else kept,
        )
        return {
            "suite": row.suite,
            "method": row.name,
            "part": row.part,
            "setting": "" if method is None else setting_of(method),
            "pass": row.direction,
            "workload": workload.name,
            "B": 1,
            "H": workload.heads,
            "N": workload.length,
            "D": workload.head_dim,
            "dtype": str(DTYPE).removeprefix("torch."),
            "keep_ratio": round(row.keep_ratio, 5),
            "sparsity": round(sparsity, 4),
            "tile_sparsity": None if tile_sparsity is None else round(tile_sparsity, 4),
            "low_bit": method is not None and method.low_bit is not None,
            "blocks": blocks_of(row),
            "scope": method.recipe.linear_scope if method is not None and is_linear else None,
            "inputs": row.inputs,
            "about": peer.about if peer is not None else "",
            "flops": counted.sparse if row.part == "sparse" else counted.total,
            "full_flops": counted.full,
        }

    def check(self, row: Row) -> None:
        """Compares results, or gradients, with the reference on a shorter sequence."""
        if row.method is None or row.part == "router":
            return
        width = min(12, row.workload.grid[2])
        short = dataclasses.replace(row.workload, grid=(4, 16, width), text=0, heads=2)
        changed = dataclasses.replace(row, workload=short)
        kind = "video" if row.inputs == "captured" else row.inputs  # a clip has one size
        q, k, v = make_inputs(short, kind, self.device, 11)
        weights = weights_of(row.method, short, self.device)
        d_o = torch.randn(q.shape, device=self.device)
        results = []
        for backend, dtype in ((None, DTYPE), ("reference", torch.float32)):
            leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
            o = sparline.attention(
                *leaves,
                method=row.method,
                weights=weights,
                grid=grid_of(changed),
                backend=backend,
            )
            is_backward = row.direction == "bwd"
            found = torch.autograd.grad(o, leaves, d_o.to(dtype)) if is_backward else (o,)
            results.append([x.detach().float() for x in found])
        for ours, reference in zip(*results, strict=True):
            error = float((ours - reference).norm() / reference.norm())
            if not error <= 3e-2:
                raise ArithmeticError(f"differs from the reference by {error:.2e} (relative L2)")


# Kernels ----------------------------------------------------------------------------------------


# The run ----------------------------------------------------------------------------------------


def run_rows(args: argparse.Namespace, state_file: Path) -> int:
    """The child: measures from where the state says, and writes each row down."""
    state = json.loads(state_file.read_text())
    device = torch.device(args.device)
    names = None if args.workload is None else args.workload.split(",")
    rows = rows_of(args.suite.split(","), names, args.quick)
    peers = find_peers()
    wanted = set() if args.peers == "none" else set((args.peers or ",".join(peers)).split(","))
    wanted |= {"cudnn", "fa2"}
    rows = [r for r in rows if r.method is not None or r.name in wanted]
    if args.only is not None:
        matches = {r.label for r in rows if re.search(args.only, r.label)}
        if not matches:
            raise SystemExit(
                f"--only: it must match a row's label, and {args.only!r} matches none of "
                f"{len(rows)}, such as {rows[-1].label!r}. --suite and --workload say which rows "
                "there are."
            )
        keys = {baseline_key(r) for r in rows if r.label in matches}
        rows = [
            r
            for r in rows
            if r.label in matches or (r.name in ("cudnn", "fa2") and baseline_key(r) in keys)
        ]
    bench = Bench(device, args.repetitions or (10 if args.quick else 20), peers, args.clip)
    machine = {**describe_machine(device, args.commit), **ceilings(device)}
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / f"{slug(machine)}.jsonl"
    if state["next"] == 0:
        print(f"{machine}", flush=True)
    own_dense: dict[str, float] = state["dense"]
    times: dict[str, dict[str, float]] = state["baselines"]
    checked: set[str] = set()
    for n in range(state["next"], len(rows)):
        row = rows[n]
        state["next"], state["current"] = n + 1, row.label
        state_file.write_text(json.dumps(state))  # a crash skips this row
        if time.time() - state["begin"] > args.limit_s:
            print(f"out of time before {row.label}; {len(rows) - n} rows are left out")
            break
        if (row.workload.name, row.name) in map(tuple, state["missing"]):
            continue
        try:
            key = f"{row.method} {row.direction}"
            if not args.no_check and key not in checked:
                bench.check(row)
                checked.add(key)
            measured = bench.measure(row)
        except PeerError as error:
            print(f"{row.label}: {str(error)[:300]}", flush=True)
            state["missing"].append([row.workload.name, row.name])
            continue
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{row.label}: FAILED {text[:300]}", flush=True)
            with (args.out / "failures.jsonl").open("a") as file:
                file.write(json.dumps({"row": row.label, "error": str(error)[:4000]}) + "\n")
            state["failed"].append(row.label)
            if is_lost(device):
                state_file.write_text(json.dumps(state))
                return LOST_CONTEXT
            if device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        base = times.setdefault(baseline_key(row), {})
        if row.name in ("cudnn", "fa2"):
            base[row.name] = measured["ms"]
        if row.name == "dense" and not measured["low_bit"]:
            own_dense[baseline_key(row)] = measured["ms"]
        found = finish(row, measured, base, own_dense.get(baseline_key(row)), machine)
        with results.open("a") as file:
            file.write(json.dumps(found) + "\n")
        state["rows"].append(found)
        print(line_of(row, found), flush=True)
    if args.profile and device.type == "cuda":
        entries = []
        workload = rows[0].workload if names else WORKLOADS["wan1.3b-480p"]
        path = results.with_suffix(".profile.json")
        for entry in profile(bench, workload):
            entries.append(entry)
            path.write_text(json.dumps({**machine, "entries": entries}, indent=1) + "\n")
            print(f"{entry['method']} {entry['pass']}: {entry['total_us']:.0f} us", flush=True)
            for kernel in entry["kernels"][:8]:
                print(f"    {kernel['us']:9.1f} us {kernel['launches']:5g} x {kernel['kernel']}")
    state_file.write_text(json.dumps(state))
    return 0


def finish(
    row: Row,
    measured: dict[str, Any],
    base: dict[str, float],
    dense_ms: float | None,
    machine: dict[str, Any],
) -> dict[str, Any]:
    """The row as it is written: rounded, with ratios to the baselines of the same run."""
    ms = measured["ms"]
    found: dict[str, Any] = {"ms_kernel": None, "extra_bytes": None, **measured}
    found |= {key: round(x, 4) for key, x in found.items() if isinstance(x, float) and x < 1e9}
    name = next((n for n in ("cudnn", "fa2") if n in base), None)
    found["baseline"] = name
    found["baseline_ms"] = round(base[name], 4) if name else None
    is_whole = row.part != "router"
    found["ratio"] = round(base[name] / ms, 3) if name and is_whole else None
    found["fa2_ms"] = round(base["fa2"], 4) if "fa2" in base else None
    found["ratio_fa2"] = round(base["fa2"] / ms, 3) if "fa2" in base and is_whole else None
    found["ratio_own_dense"] = round(dense_ms / ms, 3) if dense_ms and is_whole else None
    found["tflops"] = round(found["flops"] / ms / 1e9, 1) if is_whole else None
    return {**found, **machine}


def is_lost(device: torch.device) -> bool:
    """Whether the device answers no more in this process."""
    if device.type != "cuda":
        return False
    try:
        torch.zeros(1, device=device).item()
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def line_of(row: Row, found: dict[str, Any]) -> str:
    parts = [f"{row.label:<58} {found['ms']:9.3f} ms"]
    if found["ms_kernel"]:
        parts.append(f"kernel {found['ms_kernel']:8.3f}")
    if found["ratio"]:
        parts.append(f"{found['ratio']:6.2f}x {found['baseline']}")
    if found["ratio_fa2"]:
        parts.append(f"{found['ratio_fa2']:6.2f}x fa2")
    if found["tile_sparsity"] is not None:
        parts.append(f"skips {found['tile_sparsity']:.0%}, {found['ratio_own_dense']}x own dense")
    if found["tflops"]:
        parts.append(f"{found['tflops']:6.0f} TFLOP/s")
    if found["extra_bytes"] is not None:
        parts.append(f"+{found['extra_bytes'] / 1e6:.0f} MB")
    return "  ".join(parts)


def summary(rows: list[dict[str, Any]], failed: list[str]) -> list[str]:
    """A short table at the end: the targets' rows, how time grows, what failed."""
    lines = [f"{len(rows)} rows, {len(failed)} failed"]
    lines += [f"  FAILED {label}" for label in failed]
    by_key: dict[tuple[Any, ...], dict[int, float]] = {}
    for row in rows:
        if row["suite"] == "scaling":
            by_key.setdefault((row["method"], row["pass"]), {})[row["N"]] = row["ms"]
    for (method, direction), times in by_key.items():
        lengths = sorted(times)
        growth = [f"{times[b] / times[a]:.2f}" for a, b in itertools.pairwise(lengths)]
        lines.append(f"  twice the tokens, {method} {direction}: {' '.join(growth)} x the time")
    for row in rows:
        if row["suite"] in ("targets", "quick") and row["inputs"] == "gaussian":
            ratio = f"{row['ratio']:6.2f}x {row['baseline']}" if row["ratio"] else ""
            what = f"{row['pass']} {row['method']} {row['part']} {row['keep_ratio']:g}"
            lines.append(f"  {what:<40} {row['ms']:9.3f} ms  {ratio}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--suite", default="targets", help=f"of {', '.join(SUITES)}, with commas")
    add("--quick", action="store_true", help="the main rows of targets only, 10 repetitions")
    add("--profile", action="store_true", help="also take forward and backward apart by kernel")
    add("--peers", help="which to run; none: only torch's attention")
    add("--workload", help="in place of the suite's own")
    add("--only", metavar="REGEX", help="rows whose label matches, and their baselines")
    add("--clip", type=Path, default=demo.HELD_OUT_VIDEO, help="of suite captured; video or .npy")
    add("--repetitions", type=int, default=0)
    add("--no-check", action="store_true", help="time without comparing with the reference first")
    add("--out", type=Path, default=Path(__file__).parent / "results")
    add("--commit", default=os.environ.get("SPARLINE_COMMIT"), help="where there is no git")
    add("--limit-s", type=float, default=math.inf, help="start no row after this many seconds")
    add("--device", default="cuda", help="cpu, with --workload tiny, tries the benchmark itself")
    add("--state", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.state is not None:
        return run_rows(args, args.state)
    args.out.mkdir(parents=True, exist_ok=True)
    state_file = args.out / f".state-{os.getpid()}.json"
    empty: dict[str, Any] = {"next": 0, "begin": time.time(), "rows": [], "failed": []}
    state_file.write_text(json.dumps({**empty, "baselines": {}, "dense": {}, "missing": []}))
    code = 1
    for _ in range(MOST_STARTS):
        before = json.loads(state_file.read_text())["next"]
        command = [sys.executable, __file__, *sys.argv[1:], "--state", str(state_file)]
        code = subprocess.run(command, check=False).returncode
        state = json.loads(state_file.read_text())
        if code == 0 or state["next"] == before:
            break
        if code != LOST_CONTEXT:  # it had no time to say so itself
            state["failed"].append(state["current"])
            state_file.write_text(json.dumps(state))
        print(f"started again after row {state['next']}: the process ended with {code}")
    state = json.loads(state_file.read_text())
    state_file.unlink()
    print("\n".join(summary(state["rows"], state["failed"])))
    return 1 if code != 0 or state["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
