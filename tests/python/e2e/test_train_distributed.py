# SPDX-License-Identifier: Apache-2.0
"""Two processes train as one does: replicated, sharded, and with the tokens of a clip between
them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

pytest.importorskip("diffusers")

import training

from sparline import train
from sparline.train import checkpoint
from sparline.train.loop import Trainer
from sparline.train.router import RouterTrainer

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

RANKS = 2
SLA2 = training.METHOD
VSA = {"name": "vsa", "keep_ratio": 0.25, "cube": [2, 4, 4]}
SHARED: dict[str, Any] = {
    "training": {"max_train_steps": 4, "gradient_accumulation_steps": 2, "ema_decay": 0.5},
    "checkpoint": {"checkpointing_steps": 2},
}
#: Runs of two processes, and the run of one that each must equal.
RUNS: dict[str, dict[str, Any]] = {
    "replicated": {"method": SLA2, "distributed": {"sharding": "replicate"}},
    "sharded": {"method": SLA2, "model": {"gradient_checkpointing": True}},
    "teacher": {"method": SLA2, "loss": {"kind": "teacher_mse"}},
    "lora": {"method": SLA2, "lora": {"rank": 2}},
    "ulysses": {"method": SLA2, "distributed": {"ulysses_degree": 2}},
    "ulysses, gates": {"method": VSA, "distributed": {"ulysses_degree": 2}},
}
ROUTER: dict[str, Any] = {
    "task": "router",
    "model": {"alpha_start": "constant"},  # so far off that what is trained is nearer, and kept
    "router": {"keep_ratios": [0.25], "steps": 4, "buffer_samples": 1, "batch_samples": 1},
}


def make(folder: Path, settings: dict[str, Any], ranks: int) -> train.Config:
    """Batches of two clips: on one process, or one clip on each of two."""
    degree = settings.get("distributed", {}).get("ulysses_degree", 1)
    batch = 2 * degree // ranks if ranks > 1 else 2
    # Held-out losses in between, of six clips: averaged weights come and go.
    merged = {
        **SHARED,
        "data": {"train_batch_size": batch},
        "logging": {"validation_steps": 2, "validation_batches": 6 // batch},
        **settings,
    }
    if ranks == 1:
        merged["distributed"] = {}
    return training.make_config(folder, **merged)


def run(folder: Path, name: str, ranks: int) -> None:
    trainer = Trainer(make(folder / f"{name}-{ranks}", RUNS[name], ranks), device="cpu")
    trainer.run()


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": str(RANKS), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    for name in RUNS:
        run(Path(folder), name, RANKS)
    # The checkpoint of one process goes on with two.
    config = make(Path(folder) / "resumed", RUNS["sharded"], RANKS)
    longer = train.from_dict(config.to_dict(), ["training.max_train_steps=6"])
    trainer = Trainer(longer, device="cpu")
    assert trainer.step == 4
    trainer.run()
    RouterTrainer(training.make_config(Path(folder) / "router-2", **ROUTER)).run(
        lambda done, total, words: None
    )
    dist.barrier()
    os._exit(0)  # gloo's threads may outlive the interpreter, which then aborts


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    for name in RUNS:
        run(folder, name, 1)
    shutil.copytree(folder / "sharded-1", folder / "resumed")
    mp.spawn(worker, args=(str(folder),), nprocs=RANKS, join=True)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_of_one_process(name: str, runs: Path) -> None:
    for key in ("grad_norm", "held_out_loss"):
        one, two = (training.lines(runs / f"{name}-{ranks}", key) for ranks in (1, RANKS))
        assert len(one) == (4 if key == "grad_norm" else 2)
        for a, b in zip(one, two, strict=True):
            assert a["step"] == b["step"]
            for value in ("loss", "grad_norm", "held_out_loss"):
                if value in a:
                    assert a[value] == pytest.approx(b[value], rel=2e-4), (a, b)


@pytest.mark.parametrize("name", RUNS)
def test_exports_are_those_of_one_process(name: str, runs: Path) -> None:
    one, two = (runs / f"{name}-{ranks}" / "final" for ranks in (1, RANKS))
    files = sorted(p.relative_to(two) for p in two.rglob("*.safetensors"))
    assert files
    for file in files:
        a, b = load_file(one / file), load_file(two / file)
        assert a.keys() == b.keys()
        for key, value in a.items():
            torch.testing.assert_close(b[key], value, rtol=1e-2, atol=2e-3, msg=f"{file} {key}")


def test_a_checkpoint_goes_on_with_another_number_of_processes(runs: Path) -> None:
    names = [p.name for p in checkpoint.list_checkpoints(runs / "resumed")]
    assert names[-1] == "checkpoint-6"
    lines = training.lines(runs / "resumed", "grad_norm")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    two = training.lines(runs / "sharded-2", "grad_norm")
    assert [line["loss"] for line in lines[:4]] == pytest.approx(
        [line["loss"] for line in two], rel=2e-4
    )


def test_routers_learn_from_the_clips_of_both(runs: Path) -> None:
    alone = training.make_config(runs / "router-1", **ROUTER)
    RouterTrainer(alone).run(lambda done, total, words: None)
    a, b = (load_file(runs / f"router-{n}" / "router-0.25.safetensors") for n in (1, RANKS))
    assert a.keys() == b.keys()
    assert any(not torch.equal(value, b[name]) for name, value in a.items())
    assert all(value.isfinite().all() for value in b.values())


def test_torchrun(tmp_path: Path) -> None:
    config = training.make_config(tmp_path / "run", training={"max_train_steps": 2})
    (tmp_path / "run.json").write_text(json.dumps(config.to_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "sparline.cli", "train", str(tmp_path / "run.json"), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 2, loss") == 1  # one process speaks
    assert (tmp_path / "run" / "final" / "sparline.safetensors").is_file()
