# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning at toy size: it learns, survives kills to the bit, and says what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("diffusers")

import training

import sparline
from sparline import train
from sparline.cli import app
from sparline.train import checkpoint, setup
from sparline.train.distributed import World
from sparline.train.loop import Log, Trainer, schedule

pytestmark = pytest.mark.e2e


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tensors this small run slower on several threads; conftest puts the number back."""
    torch.set_num_threads(1)


def tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint, flat, copied."""

    def walk(prefix: str, value: Any) -> Any:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(f"{prefix}/{key}", inner)
        else:
            yield prefix, value.clone()

    return dict(walk("", trainer.state()))


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


# Learning ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        {"name": "original"},
        training.METHOD,
        {**training.METHOD, "low_bit": True},
        {"name": "sla", "keep_ratio": 0.25, "block_q": 16, "block_k": 16},
        {"name": "sla_main", "keep_ratio": 0.25, "block_q": 16, "block_k": 16},
        {"name": "sparse", "keep_ratio": 0.25, "block_q": 16, "block_k": 16},
        {"name": "top_p", "keep_mass": 0.3, "block_q": 16, "block_k": 16},
        {"name": "linear", "block_q": 16, "block_k": 16},
        {"name": "linear_plus_sparse", "keep_ratio": 0.25, "block_q": 16, "block_k": 16},
        {"name": "vsa", "keep_ratio": 0.25, "cube": [2, 4, 4]},
        {"name": "vmoba", "box_3d": [2, 4, 4], "window_2d": [4, 4], "block_q": 16, "block_k": 16},
    ],
    ids=lambda method: method["name"] + "-low-bit" * method.get("low_bit", False),
)
def test_every_method_is_trained(method: dict[str, Any], tmp_path: Path) -> None:
    config = training.make_config(
        tmp_path / "run", method=method, training={"max_train_steps": 12}, loss={"logit_std": 0.1}
    )
    trainer = Trainer(config)
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    trainer.run()
    losses = [line["loss"] for line in training.lines(tmp_path / "run") if "grad_norm" in line]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    kinds = {group.kind for group in trainer.groups}
    assert kinds - {"model"} == {
        "sla2": {"alpha"},
        "sla": {"projection"},
        "sla_main": {"projection"},
        "vsa": {"gate"},
    }.get(method["name"], set())
    for kind in kinds:
        group = next(g for g in trainer.groups if g.kind == kind)
        assert any(not torch.equal(p, before[n]) for n, p in group.parameters.items()), kind


def test_teacher_mse_starts_at_what_sparsity_costs_and_falls(tmp_path: Path) -> None:
    config = training.make_config(
        tmp_path / "run",
        method={"name": "sparse", "keep_ratio": 0.25, "block_q": 16, "block_k": 16},
        loss={"kind": "teacher_mse"},
        training={"max_train_steps": 12},
    )
    trainer = Trainer(config)
    assert trainer.teacher is not None
    frozen = {name: p.clone() for name, p in trainer.teacher.named_parameters()}
    trainer.run()
    losses = [line["loss"] for line in training.lines(tmp_path / "run") if "grad_norm" in line]
    assert 0.0 < losses[0] < 0.1  # flow matching starts above 1
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    for name, p in trainer.teacher.named_parameters():
        assert torch.equal(p, frozen[name])
    dense = training.make_config(
        tmp_path / "dense", method={"name": "original"}, loss={"kind": "teacher_mse"}
    )
    assert Trainer(dense).train_step()[0] == 0.0


def test_alpha_starts_where_the_configuration_says(tmp_path: Path) -> None:
    trainer = Trainer(training.make_config(tmp_path / "run", model={"alpha_start": "mass"}))
    layers = [m for m in trainer.transformer.modules() if isinstance(m, sparline.nn.SLA2)]
    # An untrained model attends evenly: a quarter of the blocks hold about a quarter.
    for layer in layers:
        assert 0.2 < layer.alpha_logit.sigmoid().mean() < 0.4
    fitted = Trainer(training.make_config(tmp_path / "fitted"))
    others = [m for m in fitted.transformer.modules() if isinstance(m, sparline.nn.SLA2)]
    for layer, other in zip(layers, others, strict=True):
        assert not torch.allclose(layer.alpha_logit, other.alpha_logit, atol=0.01)
    kept = Trainer(training.make_config(tmp_path / "kept", model={"alpha_start": "constant"}))
    layer = next(m for m in kept.transformer.modules() if isinstance(m, sparline.nn.SLA2))
    assert layer.alpha_logit.sigmoid().mean().item() == pytest.approx(0.9, abs=1e-3)


def test_accumulation_is_a_larger_batch(tmp_path: Path) -> None:
    one = Trainer(training.make_config(tmp_path / "one", data={"train_batch_size": 4}))
    split = Trainer(
        training.make_config(
            tmp_path / "split",
            data={"train_batch_size": 1},
            training={"gradient_accumulation_steps": 4},
        )
    )
    for _ in range(2):
        assert one.train_step() == pytest.approx(split.train_step(), rel=1e-4)
    for name, p in one.parameters.items():
        torch.testing.assert_close(p, split.parameters[name], rtol=1e-3, atol=2e-4)


def test_checkpointed_activations_give_the_same_step(tmp_path: Path) -> None:
    plain = Trainer(training.make_config(tmp_path / "plain"))
    saving = Trainer(
        training.make_config(tmp_path / "saving", model={"gradient_checkpointing": True})
    )
    assert saving.transformer.is_gradient_checkpointing
    assert plain.train_step() == pytest.approx(saving.train_step(), rel=1e-5)


def test_bf16_keeps_float32_weights(tmp_path: Path) -> None:
    trainer = Trainer(training.make_config(tmp_path / "run", training={"mixed_precision": "bf16"}))
    exact = Trainer(training.make_config(tmp_path / "exact"))
    loss, norm = trainer.train_step()
    assert (loss, norm) == pytest.approx(exact.train_step(), rel=0.05)
    assert loss != exact.train_step()[0]
    assert all(p.dtype == torch.float32 for p in trainer.parameters.values())
    assert trainer.average is not None
    assert all(t.dtype == torch.float32 for t in trainer.average.tensors.values())


def test_the_average_follows_and_changes_places(tmp_path: Path) -> None:
    trainer = Trainer(training.make_config(tmp_path / "run", training={"ema_decay": 0.5}))
    name = "proj_out.weight"
    start = trainer.parameters[name].detach().clone()
    trainer.train_step()
    first = trainer.parameters[name].detach().clone()
    assert trainer.average is not None
    average = trainer.average.tensors[name].clone()
    torch.testing.assert_close(average, torch.lerp(start, first, 0.9))  # min(0.5, 1 / 10)
    with trainer.averaged():
        assert torch.equal(trainer.parameters[name], average)
    assert torch.equal(trainer.parameters[name], first)
    assert torch.equal(trainer.average.tensors[name], average)


# Parameters -------------------------------------------------------------------------------------


def test_kinds_have_rates_and_decays_of_their_own(tmp_path: Path) -> None:
    config = training.make_config(
        tmp_path / "run",
        optimizer={"learning_rate": 1e-3, "adam_weight_decay": 0.1, "lr_warmup_steps": 2},
        parameters={"alpha": {"learning_rate": 1e-1}},
    )
    trainer = Trainer(config)
    settings = {g.kind: (g.learning_rate, g.weight_decay) for g in trainer.groups}
    assert settings == {"model": (1e-3, 0.1), "alpha": (1e-1, 0.0)}
    trainer.train_step()
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates == pytest.approx([0.5e-3, 0.5e-1])


def test_stage_2_freezes_the_router(tmp_path: Path) -> None:
    trainer = Trainer(training.make_config(tmp_path / "run"))
    routers = {
        n: p for n, p in trainer.transformer.named_parameters() if setup.kind_of(n) == "router"
    }
    assert len(routers) == 2 * training.LAYERS
    before = {n: p.clone() for n, p in routers.items()}
    trainer.run()
    for name, p in routers.items():
        assert not p.requires_grad
        assert torch.equal(p, before[name])


def test_a_router_can_train_straight_through(tmp_path: Path) -> None:
    method = {**training.METHOD, "router_mode": "straight_through"}
    trainer = Trainer(training.make_config(tmp_path / "run", method=method))
    assert "router" in {group.kind for group in trainer.groups}
    name = "blocks.0.attn1.processor.attention.router.proj_q.weight"
    before = trainer.parameters[name].detach().clone()
    trainer.train_step()
    assert not torch.equal(trainer.parameters[name], before)


def test_what_cannot_be_trained(tmp_path: Path) -> None:
    with pytest.raises(train.TrainError, match="router_mode=hard gives none"):
        Trainer(training.make_config(tmp_path / "a", parameters={"router": {"frozen": False}}))
    frozen = {kind: {"frozen": True} for kind in ("model", "alpha")}
    with pytest.raises(train.TrainError, match="every kind of parameters is frozen"):
        Trainer(training.make_config(tmp_path / "b", parameters=frozen))


def test_a_gpu_takes_16_bits(tmp_path: Path) -> None:
    config = training.make_config(tmp_path / "run")
    model = setup.load_transformer(config.model)
    with pytest.raises(train.TrainError, match=r"takes 16 bits, got training\.mixed_precision=no"):
        setup.add_method(model, config, torch.device("cuda"))


@pytest.mark.parametrize("freeze", ["model", "alpha"])
def test_a_frozen_kind_stays_as_it_is(freeze: str, tmp_path: Path) -> None:
    config = training.make_config(tmp_path / "run", parameters={freeze: {"frozen": True}})
    trainer = Trainer(config)
    everything = dict(trainer.transformer.named_parameters())
    before = {name: p.detach().clone() for name, p in everything.items()}
    trainer.run()
    changed = {setup.kind_of(n) for n, p in everything.items() if not torch.equal(p, before[n])}
    assert changed == {"model", "alpha"} - {freeze}


def test_the_schedule_warms_up_and_falls() -> None:
    settings = train.from_dict({"optimizer": {"lr_warmup_steps": 4, "lr_min_ratio": 0.1}}).optimizer
    shares = [schedule(settings, n, 12) for n in range(13)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    assert shares[4] == 1.0
    assert shares[4:] == sorted(shares[4:], reverse=True)
    assert shares[8] == pytest.approx(0.55)
    assert shares[12] == pytest.approx(0.1)
    constant = train.from_dict({"optimizer": {"lr_scheduler": "constant"}}).optimizer
    assert schedule(constant, 11, 12) == 1.0


# Kills ------------------------------------------------------------------------------------------

RESUMED: dict[str, Any] = {
    "training": {"max_train_steps": 6, "gradient_accumulation_steps": 2},
    "checkpoint": {"checkpointing_steps": 2, "checkpoints_total_limit": 2},
    "logging": {"validation_steps": 3, "validation_batches": 2},
}


def test_a_killed_run_takes_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Trainer(training.make_config(tmp_path / "whole", **RESUMED))
    whole.run()

    write = Log.write

    def killed_at_five(self: Log, step: int, **entry: Any) -> None:
        write(self, step, **entry)
        if step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Log, "write", killed_at_five)
    with pytest.raises(KeyboardInterrupt):
        Trainer(training.make_config(tmp_path / "killed", **RESUMED)).run()
    monkeypatch.setattr(Log, "write", write)
    with (tmp_path / "killed" / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a line that the kill cut short
    resumed = Trainer(training.make_config(tmp_path / "killed", **RESUMED))
    assert resumed.step == 4
    resumed.run()

    assert_same(tensors(whole), tensors(resumed))
    for key in ("loss", "held_out_loss"):
        a, b = (training.lines(tmp_path / name, key) for name in ("whole", "killed"))
        assert a == b
        assert a
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path / "killed")] == [
        "checkpoint-4",
        "checkpoint-6",
    ]


def test_a_kill_during_the_write_leaves_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(training.make_config(tmp_path / "run"))
    trainer.train_step()
    trainer.save_checkpoint()
    good = tensors(trainer)
    trainer.train_step()

    save = checkpoint.dcp.save

    def half(tensors: Any, checkpoint_id: Path, **options: Any) -> None:
        save(tensors, checkpoint_id=checkpoint_id, **options)
        for file in checkpoint_id.iterdir():
            file.write_bytes(file.read_bytes()[:10])
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.dcp, "save", half)
    with pytest.raises(OSError, match="disk full"):
        trainer.save_checkpoint()
    monkeypatch.setattr(checkpoint.dcp, "save", save)
    assert (tmp_path / "run" / "checkpoint-2.partial").is_dir()

    resumed = Trainer(training.make_config(tmp_path / "run"))
    assert resumed.step == 1
    assert_same(tensors(resumed), good)
    resumed.train_step()
    resumed.save_checkpoint()
    names = sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*"))
    assert names == ["checkpoint-1", "checkpoint-2"]


def test_sigterm_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    config = training.make_config(tmp_path / "run", training={"max_train_steps": 100_000})
    file = tmp_path / "run.json"
    file.write_text(json.dumps(config.to_dict()))
    command = [sys.executable, "-m", "sparline.cli", "train", str(file), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    while not (log.exists() and "grad_norm" in log.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped early; resumable" in out
    assert len(checkpoint.list_checkpoints(tmp_path / "run")) == 1


def test_time_runs_out_between_steps(tmp_path: Path) -> None:
    stopped = train.run(training.make_config(tmp_path / "run", training={"max_minutes": 1e-9}))
    assert isinstance(stopped, train.Summary)
    assert (stopped.step, stopped.is_done, stopped.exported) == (0, False, None)
    done = train.run(training.make_config(tmp_path / "run"))
    assert isinstance(done, train.Summary)
    assert (done.step, done.is_done) == (4, True)


def test_another_method_does_not_resume(tmp_path: Path) -> None:
    Trainer(training.make_config(tmp_path / "run")).save_checkpoint()
    other = {**training.METHOD, "keep_ratio": 0.5}
    with pytest.raises(train.TrainError, match=r"checkpoint-0 was made with method .*0\.25"):
        Trainer(training.make_config(tmp_path / "run", method=other))
    anew = {"resume_from_checkpoint": "none"}
    assert Trainer(training.make_config(tmp_path / "run", method=other, checkpoint=anew)).step == 0
    wrong = {"resume_from_checkpoint": str(tmp_path / "nowhere")}
    with pytest.raises(train.TrainError, match="must be a checkpoint folder"):
        Trainer(training.make_config(tmp_path / "run", checkpoint=wrong))


# Guards -----------------------------------------------------------------------------------------


def poison(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    load = trainer.source.load

    def load_or_nan(draw: Any) -> Any:
        latents, text = load(draw)
        return (latents * torch.nan if trainer.step in steps else latents), text

    monkeypatch.setattr(trainer.source, "load", load_or_nan)


def test_steps_that_are_not_finite_change_nothing_and_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(training.make_config(tmp_path / "run"))
    poison(trainer, monkeypatch, {1, 3})
    trainer.train_step()
    before = tensors(trainer)
    trainer.train_step()
    assert_same(before, tensors(trainer))
    summary = trainer.run()
    assert (summary.step, summary.nonfinite_steps) == (4, 2)
    assert "2 steps skipped: not finite" in summary.words()[0]
    skipped = training.lines(tmp_path / "run", "event")[1:]
    assert [line["event"] for line in skipped] == ["skipped", "skipped"]
    for p in trainer.parameters.values():
        assert p.isfinite().all()


def test_a_run_that_stays_not_finite_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = {"max_train_steps": 9, "max_nonfinite_steps": 3}
    trainer = Trainer(training.make_config(tmp_path / "run", training=limit))
    poison(trainer, monkeypatch, set(range(2, 9)))
    with pytest.raises(train.TrainError, match=r"3 steps in a row were not \(step 4: loss nan"):
        trainer.run()


def test_a_device_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(self: Trainer) -> tuple[float, float]:
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB.\nDetails")

    monkeypatch.setattr(Trainer, "train_step", too_much)
    with pytest.raises(train.TrainError, match=r"Tried to allocate 9 GiB\. Set model\.gradient_"):
        train.run(training.make_config(tmp_path / "run"))


def test_heads_and_tokens_split_evenly(tmp_path: Path) -> None:
    model = setup.load_transformer(training.make_config(tmp_path / "run").model)
    world = World(torch.device("cpu"), size=3, ulysses_degree=3)
    with pytest.raises(train.TrainError, match="must divide the model's heads, got 3 and 2"):
        world.split_sequence(model)
    with pytest.raises(train.TrainError, match="must divide the tokens of a clip, got 3 and 32"):
        world.check_tokens(model, torch.zeros(1, 3, 2, 8, 8))


# The command line -------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["train", *arguments])


def test_train_from_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = training.make_config(
        tmp_path / "run",
        logging={"report_to": "tensorboard", "sample_steps": 2, "num_inference_steps": 1},
    )
    file = tmp_path / "run.json"
    file.write_text(json.dumps(config.to_dict()))
    result = run(str(file), "training.max_train_steps=2", "logging.validation_batches=1")
    assert result.exit_code == 0, result.output
    assert "step 2, loss" in result.output
    folder = tmp_path / "run"
    assert (folder / "samples" / "step-000002.png").is_file()
    assert list((folder / "tensorboard").glob("events*"))
    loaded = setup.load_transformer(
        train.from_dict({"model": {"path": str(folder / "final" / "transformer")}}).model
    )
    sparline.load_state(loaded, folder / "final" / "sparline.safetensors")
    result = run(str(file), "training.max_train_steps=2")
    assert "step 2" in result.output  # nothing left to do, and it says so


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["method.keep=0.1"], "no option method.keep. The nearest is method.keep_ratio"),
        (["model.path=nowhere"], "there is no folder model.path=nowhere"),
        (["model.path=."], "model.path=. must be a diffusers pipeline"),
        (["data.path=nowhere.npz"], "nowhere.npz is not a readable scene cache"),
        (["model.state=nowhere.safetensors"], "there is no file nowhere.safetensors"),
        (["data.height=12"], "square clips"),
        (["data.source=latents", "data.path=."], "must hold .safetensors or .tar files"),
        (["distributed.ulysses_degree=2"], "must divide the number of processes, got 2 and 1"),
        (["model.dense_layers=[9]"], "dense_layers must name blocks of the model"),
    ],
)
def test_wrong_input_gets_one_line(
    overrides: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(training.make_config(tmp_path / "run").to_dict()))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    result = run(str(file), *overrides)
    assert result.exit_code == 2, result.output
    assert text in result.stderr
    assert result.stderr.strip().count("\n") == 0
    assert isinstance(result.exception, SystemExit)
