# SPDX-License-Identifier: Apache-2.0
"""examples/train_demo_model.py at toy size: it learns, survives a crash exactly, and exports."""

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

from sparline.demo import data
from sparline.demo.data import Scene
from sparline.demo.pipeline import DemoPipeline

SCRIPT = Path(__file__).parents[3] / "examples" / "train_demo_model.py"
TOY = {
    "--layers": 1,
    "--heads": 1,
    "--ffn": 32,
    "--frames": 2,
    "--size": 8,
    "--batch": 2,
    "--warmup": 1,
    "--log-every": 1,
    "--eval-every": 2,
    "--sample-every": 4,
    "--sample-steps": 1,
    "--checkpoint-every": 2,
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tensors this small run slower on several threads; conftest puts the number back."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "scenes.npz"
    pixels = torch.randint(0, 256, (40, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    made = [Scene("photo", "photo", pixels[:1].byte())]
    made += [Scene(name, "clip", pixels.byte()) for name in ("one", "two", "three")]
    data.save_scenes(path, made)
    return path


@pytest.fixture
def train(script: ModuleType, scenes: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(out: Path, *options: str) -> None:
        toy = [word for option in TOY.items() for word in map(str, option)]
        command = ["train", "--data", str(scenes), "--out", str(out), *toy, *options]
        monkeypatch.setattr(sys, "argv", command)
        script.main()

    return run


def trajectory(out: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "ms"} for entry in entries]


def test_a_crashed_run_takes_the_same_steps(
    train: Any, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "whole", "--steps", "4")

    write = script.Log.write

    def crash_at_three(self: Any, **entry: Any) -> None:
        write(self, **entry)
        if entry.get("step") == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(script.Log, "write", crash_at_three)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "crashed", "--steps", "4")
    monkeypatch.setattr(script.Log, "write", write)
    train(tmp_path / "crashed", "--steps", "4")

    assert trajectory(tmp_path / "whole") == trajectory(tmp_path / "crashed")
    whole, crashed = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        for name in ("whole", "crashed")
    )
    assert whole["step"] == crashed["step"] == 4
    for part in ("model", "average"):
        for key, value in whole[part].items():
            assert torch.equal(value, crashed[part][key]), key
    assert (tmp_path / "crashed" / "samples_000004.png").is_file()


def test_time_limit_stops_between_steps_and_resumes(train: Any, tmp_path: Path) -> None:
    train(tmp_path, "--steps", "2", "--max-minutes", "0")
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 0
    train(tmp_path, "--steps", "2")
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2


def test_a_failed_save_leaves_the_old_checkpoint(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, "--steps", "1", "--eval-every", "9", "--sample-every", "9")
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def save(state: Any, path: Path) -> None:
        path.write_bytes(b"half a checkpoint")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="disk full"):
        train(tmp_path, "--steps", "2")
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_export_is_a_pipeline_in_bf16(train: Any, tmp_path: Path) -> None:
    card = tmp_path / "weights" / "MODEL_CARD.md"
    card.parent.mkdir()
    card.write_text("stays")
    train(tmp_path / "run", "--steps", "1", "--export", str(card.parent))
    assert card.read_text() == "stays"
    loaded = DemoPipeline.from_pretrained(card.parent)
    assert loaded.class_names == ("photo", "one", "two", "three")
    average = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["average"]
    for key, value in loaded.transformer.state_dict().items():
        assert torch.equal(value, average[key].bfloat16().to(value.dtype)), key
