# SPDX-License-Identifier: Apache-2.0
"""examples/train_demo_cuda.py at toy size on the CPU, and what it calls out of line."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(
        "train_demo_cuda", EXAMPLES / "train_demo_cuda.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_demo_cuda", module)
    spec.loader.exec_module(module)
    return module


def test_runs_agree_at_toy_size(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    toy = {"steps": 6, "batch": 1, "frames": 2, "size": 8, "layers": 1, "warmup": 2}
    words = [f"--{name}={value}" for name, value in toy.items()]
    monkeypatch.setattr(sys, "argv", ["train", f"--out={tmp_path}", "--device=cpu", *words])
    script.main()
    curves = json.loads((tmp_path / "curves.json").read_text())["curves"]
    assert all("error" not in curve for curve in curves.values()), curves
    for name in ("sparline dense", "sparline SLA, density 1"):
        assert curves[name]["loss"] == pytest.approx(curves["torch"]["loss"], rel=1e-4)
    assert curves["torch, seed 1"]["loss"] != curves["torch"]["loss"]


def curves(**losses: Any) -> dict[str, Any]:
    base = [1.0 - 0.005 * n for n in range(100)]
    found = {
        "torch": base,
        "torch, seed 1": [x + 0.01 for x in base],
        "torch, seed 2": [x - 0.01 for x in base],
        "sparline dense": [x + 0.001 for x in base],
    }
    return {name: {"loss": values} for name, values in {**found, **losses}.items()}


def test_the_measure_is_the_seed(script: ModuleType) -> None:
    base = curves()["torch"]["loss"]
    assert script.judge(curves(), 100)["ok"]
    for wrong in (
        [x + 0.02 * (n > 50) for n, x in enumerate(base)],  # further away than another seed
        [x * 1.02 for x in base],  # from the first step on
        [1.0] * 100,  # does not fall
        [*base[:-1], float("nan")],
    ):
        assert not script.judge(curves(**{"sparline dense": wrong}), 100)["ok"]
    broken = {**curves(), "sparline dense": {"error": "no kernel"}}
    assert not script.judge(broken, 100)["ok"]
