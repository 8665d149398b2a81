# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests that need a GPU: ``pytest -m gpu tests/python/gpu``.

Without a CUDA device, or with a library that holds no CUDA backend, they are skipped with the
reason. Results are written while they come, to ``SPARLINE_GPU_OUT`` (else ``OUT``, else a temporary
folder), and a short table of them stands at the end of the run.

  SPARLINE_TEST_CASES    how many random configurations, 2000
  SPARLINE_TEST_SEED     which ones
  SPARLINE_GPU_WORKERS   processes that check them, at most 12
  SPARLINE_GPU_HUGE      1 also runs what takes up to 60 GB of device memory
  SPARLINE_GPU_SOAK      1 also runs ten thousand calls on two streams
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from run import LOST_CONTEXT

from sparline import _ops

SKIPPED = "GPU TESTS DO NOT RUN"
_tables: list[str] = []


def missing() -> str | None:
    """Why nothing can run on a GPU here; None if it can."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    if not _ops.available():
        return f"the compiled library is missing: {_ops._load_error}"
    backends = json.loads(torch.ops.sparline.build_info())["backends"]
    if not any(name.startswith("cuda") for name in backends):
        return f"the library at {_ops.library_path()} has no cuda backend, only {backends}"
    return None


def _done_file() -> Path | None:
    """Where run.py wants to know which tests need not be started again."""
    name = os.environ.get("SPARLINE_GPU_DONE")
    return Path(name) if name else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    why = missing()
    done = _done_file()
    if done is not None and done.exists():
        names = set(done.read_text().splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in names])
        items[:] = [item for item in items if item.nodeid not in names]
    for item in items:
        if here not in item.path.parents or item.get_closest_marker("gpu") is None:
            continue
        if why is not None:
            item.add_marker(pytest.mark.skip(reason=f"{SKIPPED}: {why}"))


def pytest_runtest_logstart(nodeid: str) -> None:
    if (done := _done_file()) is not None:
        with done.open("a") as file:
            file.write(nodeid + "\n")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    """Ends the run where the device answers no more: every test after it would fail."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"the device's context is gone after {nodeid}: {error}", LOST_CONTEXT)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    if any(SKIPPED in str(report.longrepr) for report in skipped):
        terminalreporter.write_line(f"{SKIPPED}: {missing()}", red=True, bold=True)
    for line in _tables:
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """In place of the fixture for the CPU: workers poison memory for themselves, and the other
    tests here are about torch's own allocator."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def out_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = os.environ.get("SPARLINE_GPU_OUT") or os.environ.get("OUT")
    path = Path(named) if named else tmp_path_factory.mktemp("gpu")
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(scope="session")
def pool(out_dir: Path) -> Iterator[Pool]:
    cores = len(os.sched_getaffinity(0))
    workers = int(os.environ.get("SPARLINE_GPU_WORKERS", "0")) or min(12, cores)
    made = Pool("cuda", workers, max(1, cores // workers), out_dir / "gpu_numerics.jsonl")
    yield made
    made.close()


@pytest.fixture
def tell() -> Any:
    """Adds lines to the table at the end of the run."""
    return _tables.extend


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda")
