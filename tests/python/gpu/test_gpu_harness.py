# SPDX-License-Identifier: Apache-2.0
"""The harness itself, without a GPU: it passes the CPU kernels, and finds what is broken."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import cases
import harness
import pytest
import torch
from pool import Pool, summary
from torch import Tensor

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "name",
    [
        "case:packed-protected:bfloat16",
        "case:padded:float16",
        "case:sla2-packed-protected-soft:float16",
        "case:dynsparse-reverse:bfloat16",
        "case:vmoba-2d-head_global:bfloat16",
        "case:low-bit-sla2:bfloat16",
        "random:0:3",
    ],
)
def test_the_cpu_kernels_pass(name: str) -> None:
    assert harness.check(name, CPU)["failures"] == []


def test_large_cases_are_as_many_as_promised() -> None:
    found = harness.large_cases()
    assert len(found) >= 40
    assert len(set(map(repr, found))) == len(found)


def _drop_a_row(x: Tensor) -> None:
    x[..., -1, :] = 0


def _swap_rows(x: Tensor) -> None:
    x[..., [0, 1], :] = x[..., [1, 0], :]


def _stretch(x: Tensor) -> None:
    x *= 1.05


def _one_nan(x: Tensor) -> None:
    x.view(-1)[0] = float("nan")


@pytest.mark.parametrize("damage", [_drop_a_row, _swap_rows, _stretch, _one_nan])
@pytest.mark.parametrize("what", ["o", "q", "k", "v", "proj_weight"])
def test_damage_is_found(what: str, damage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rule's bound is tight enough to see one wrong row in each result."""
    run = cases.run

    def broken(case: cases.Case, inputs: cases.Inputs, backend: str | None) -> cases.Result:
        result = run(case, inputs, backend)  # type: ignore[arg-type]
        if backend is not None:
            return result
        changed = result.o if what == "o" else result.gradients[what]
        changed = changed.clone()
        damage(changed)
        if what == "o":
            return dataclasses.replace(result, o=changed)
        return dataclasses.replace(result, gradients={**result.gradients, what: changed})

    monkeypatch.setattr(cases, "run", broken)
    result = harness.check("case:sla-softmax-complement:bfloat16", CPU)
    name = what if what == "o" else f"d_{what}"
    assert any(line.startswith(name) for line in result["failures"]), result


def test_a_dead_worker_costs_one_result(tmp_path: Path) -> None:
    pool = Pool("cpu", num_workers=1, threads=1, out=tmp_path / "results.jsonl")
    pool._workers[0].check("case:dense:float16")
    process = pool._workers[0]._process
    assert process is not None
    process.kill()
    process.wait()
    results = pool.run(["case:dense:bfloat16", "case:gqa:bfloat16"])
    pool.close()
    assert [r["ok"] for r in results] == [False, True]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
    assert "1 failed" in summary(results, 0.0)[0]


def test_what_goes_wrong_is_a_result() -> None:
    result = harness.safe_check("case:no-such-case:bfloat16", CPU)
    assert not result["ok"]
    assert "KeyError" in result["failures"][0]
