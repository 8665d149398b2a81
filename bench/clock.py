# SPDX-License-Identifier: Apache-2.0
"""What the GPU benchmarks share: a clock, what the device reaches, its time by kernel, its name."""

from __future__ import annotations

import datetime
import math
import os
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

DTYPE = torch.bfloat16
#: sm90/sparse_fwd.cu reads the same.
IS_PORTABLE_FORCED = os.environ.get("SPARLINE_CUDA_ARCH") == "80"
#: A row takes no longer than this, in seconds, but has at least five repetitions.
ROW_S = 6.0
LEAST_REPETITIONS = 5
#: Longer calls need no more warm-up than one, nor many rounds by the wall clock.
SLOW_S = 0.1


# Times --------------------------------------------------------------------------------------


class Clock:
    """Times calls on one device."""

    def __init__(self, device: torch.device, repetitions: int, row_s: float = ROW_S) -> None:
        self.device = device
        self.repetitions = repetitions
        self.row_s = row_s

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time(self, runs: Sequence[Callable[[], Any]]) -> dict[str, float]:
        """Median and half the interquartile range in ms, by the device; and by the wall clock."""
        runs[0]()
        self.wait()
        begin = time.perf_counter()
        runs[0]()
        queued_s = time.perf_counter() - begin
        self.wait()
        once_s = time.perf_counter() - begin
        if once_s < SLOW_S:
            for run in runs:
                run()
            self.wait()
        count = max(
            LEAST_REPETITIONS, min(self.repetitions, int(self.row_s / max(once_s, 1e-6) / 2))
        )
        num_walls = count if once_s < SLOW_S else 1
        begin = time.perf_counter()
        for n in range(num_walls):
            runs[n % len(runs)]()
        self.wait()
        wall_ms = 1e3 * (time.perf_counter() - begin) / num_walls
        if self.device.type == "cuda":
            times = self._device_times(runs, count, queued_s)
        else:
            times = []
            for n in range(count):
                begin = time.perf_counter()
                runs[n % len(runs)]()
                times.append(1e3 * (time.perf_counter() - begin))
        low, _, high = statistics.quantiles(times, n=4)
        return {
            "ms": statistics.median(times),
            "spread_ms": (high - low) / 2,
            "ms_wall": wall_ms,
            "repetitions": count,
        }

    def _device_times(
        self, runs: Sequence[Callable[[], Any]], count: int, queued_s: float
    ) -> list[float]:
        """Between events, while the device sleeps until the host is ahead: else a short call would
        be timed by how long it takes to launch."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        torch.cuda._sleep(int(2e9 * min(0.5, 0.002 + 1.5 * queued_s * count)))
        for n, (start, end) in enumerate(events):
            start.record()
            runs[n % len(runs)]()
            end.record()
        self.wait()
        return [start.elapsed_time(end) for start, end in events]

    def peak_extra_bytes(self, run: Callable[[], Any]) -> int | None:
        """The allocator's peak above what was there before and what stays as the result."""
        if self.device.type != "cuda":
            return None
        self.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        self.wait()
        extra = torch.cuda.max_memory_allocated() - before
        results = result if isinstance(result, (tuple, list)) else [result]
        return extra - sum(x.numel() * x.element_size() for x in results if x is not None)


def ceilings(device: torch.device) -> dict[str, float]:
    """What the device reaches: a bf16 matrix product of random numbers, and a copy."""
    is_cuda = device.type == "cuda"
    size = 8192 if is_cuda else 256
    clock = Clock(device, 20)
    a, b = (torch.randn(size, size, device=device).to(DTYPE) for _ in range(2))
    gemm_ms = clock.time([lambda: a @ b])["ms"]
    source = torch.empty((1 << 30) if is_cuda else (1 << 20), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_ms = clock.time([lambda: target.copy_(source)])["ms"]
    return {
        "gemm_tflops": round(2e-9 * size**3 / gemm_ms, 1),
        "copy_tbs": round(2e-9 * source.numel() / copy_ms, 3),
    }


# Kernels ----------------------------------------------------------------------------------------


def kernel_times(run: Callable[[], Any], repetitions: int = 5) -> list[dict[str, Any]]:
    """Every kernel of a call with its launches and microseconds, the longest first."""
    return sum_up(kernel_spans(run, repetitions), repetitions)


def kernel_spans(run: Callable[[], Any], repetitions: int) -> list[tuple[float, float, str]]:
    """(end, start, full name) of what the device did in some calls, in microseconds."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    for _ in range(2):
        run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repetitions):
            run()
        torch.cuda.synchronize()
    return [
        (event.time_range.end, event.time_range.start, event.name)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    ]


def sum_up(
    spans: Sequence[tuple[float, float, str]],
    repetitions: int,
    name_of: Callable[[str], str] | None = None,
) -> list[dict[str, Any]]:
    """Launches and times by kernel from (end, start, name) in microseconds. A kernel may start
    before the one ahead has finished, and wait: its time counts from there."""
    name_of = name_of or kernel_name
    sums: dict[str, list[float]] = {}
    before = -math.inf
    for end, start, name in sorted(spans):
        entry = sums.setdefault(name_of(name), [0, 0.0])
        entry[0] += 1
        entry[1] += max(0.0, end - max(start, before))
        before = max(before, end)
    return [
        {
            "kernel": name,
            "launches": round(count / repetitions, 2),
            "us": round(total / repetitions, 2),
        }
        for name, (count, total) in sorted(sums.items(), key=lambda item: -item[1][1])
    ]


def kernel_name(full: str) -> str:
    """The function's own name; ours keep no namespace, others' say whose they are."""
    text = re.sub(r"(\(anonymous namespace\)|<unnamed>)::", "", full.removeprefix("void "))
    head = re.split(r"[<(]", text, maxsplit=1)[0]
    if "sparline" in head:
        return head.split("::")[-1]
    return f"torch: {head.split('::')[-1]}" if "::" in head else head


# The machine -----------------------------------------------------------------------------------


def describe_machine(device: torch.device, commit: str | None) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU (smoke)"
    if commit is None:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
        commit = described.stdout.strip() or "unknown"
    return {
        "device": name,
        "kernels": kernels_of(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
    }


def kernels_of(device: torch.device) -> str:
    """Which kernels run where there is a choice: those of an architecture, or the portable ones."""
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    return "sm90" if is_hopper and not IS_PORTABLE_FORCED else "portable"


def slug(machine: dict[str, Any]) -> str:
    """Where portable kernels were asked for, their results stand apart."""
    name = machine["device"] + (" portable" if IS_PORTABLE_FORCED else "")
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
