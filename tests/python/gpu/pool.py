# SPDX-License-Identifier: Apache-2.0
"""Worker processes for harness.py: a configuration that crashes or hangs costs one result, not the
rest."""

from __future__ import annotations

import json
import os
import queue
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

HARNESS = Path(__file__).with_name("harness.py")
#: Until a worker answers; the first answer waits for torch and the device.
LIMIT_S = 120.0


class Worker:
    """One process of harness.py, started when it is needed and again after it died."""

    def __init__(self, device: str, threads: int) -> None:
        self._command = [sys.executable, str(HARNESS), "--device", device]
        self._command += ["--threads", str(threads)]
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[str] | None = None

    def check(self, name: str) -> dict[str, Any]:
        if self._process is None:
            self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=self._environment,
                text=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(name + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return self._buried(name, "the worker is gone")
        line = " "
        while line and not line.startswith("{"):  # what else may be printed is no answer
            with selectors.DefaultSelector() as selector:
                selector.register(self._process.stdout, selectors.EVENT_READ)
                if not selector.select(LIMIT_S):
                    return self._buried(name, f"no answer in {LIMIT_S:.0f} s")
            line = self._process.stdout.readline()
        if not line:
            return self._buried(name, "died")
        result: dict[str, Any] = json.loads(line)
        if result.get("is_fatal"):
            self.close()
        return result

    def _buried(self, name: str, how: str) -> dict[str, Any]:
        assert self._process is not None
        assert self._errors is not None
        if self._process.poll() is None:
            self._process.kill()
        code = self._process.wait()
        self._errors.seek(0)
        tail = self._errors.read()[-2000:]
        self._process = None
        return {
            "name": name,
            "ok": False,
            "failures": [f"{how} (exit code {code})"],
            "trace": tail,
        }

    def close(self) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


class Pool:
    """Runs configurations on several workers; every result is written as soon as it is there."""

    def __init__(self, device: str, num_workers: int, threads: int, out: Path) -> None:
        self.out = out
        self._workers = [Worker(device, threads) for _ in range(num_workers)]
        self._lock = threading.Lock()

    def run(self, names: Sequence[str]) -> list[dict[str, Any]]:
        waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
        for name in names:
            waiting.put(name)
        results: list[dict[str, Any]] = []

        def work(worker: Worker) -> None:
            while True:
                try:
                    name = waiting.get_nowait()
                except queue.Empty:
                    return
                result = worker.check(name)
                with self._lock:
                    results.append(result)
                    with self.out.open("a") as file:
                        file.write(json.dumps(result) + "\n")

        threads = [threading.Thread(target=work, args=(worker,)) for worker in self._workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


def summary(results: Sequence[dict[str, Any]], seconds: float) -> list[str]:
    """A short table: failures by method and kind, and the largest share of each rule's bound."""
    failed = [r for r in results if not r["ok"]]
    lines = [f"{len(results)} configurations, {len(failed)} failed, {seconds:.0f} s"]
    agreement: dict[str, int] = {}
    shares: dict[str, dict[str, float]] = {}
    for result in results:
        agreement[result.get("cpu", "none")] = agreement.get(result.get("cpu", "none"), 0) + 1
        for what, found in result.get("shares", {}).items():
            kind = what if what in ("o", "lse", "d_q", "d_k", "d_v") else "other"
            worst = shares.setdefault(kind, {})
            for rule, share in found.items():
                worst[rule] = max(worst.get(rule, 0.0), share)
    lines.append("beside the CPU kernels: " + ", ".join(f"{k} {n}" for k, n in agreement.items()))
    for kind in sorted(shares):
        parts = [f"{rule} {share:.3g}" for rule, share in shares[kind].items()]
        lines.append(f"  {kind:<6} worst share of the bound: " + ", ".join(parts))
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in failed:
        first = result["failures"][0]
        key = (result.get("method", "?"), first.split(" error")[0][:60])
        kinds.setdefault(key, []).append(result)
    for (method, what), members in sorted(kinds.items(), key=lambda item: -len(item[1]))[:25]:
        names = " ".join(r["name"] for r in members[:4])
        lines.append(f"  {len(members):4} x {method}: {what}   [{names}]")
    for result in failed[:5]:
        lines.append(f"{result['name']}: {'; '.join(result['failures'][:4])}")
        lines.append(f"    {result.get('case', '')}")
    return lines


def timed_run(pool: Pool, names: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    begin = time.monotonic()
    results = pool.run(names)
    return results, summary(results, time.monotonic() - begin)
