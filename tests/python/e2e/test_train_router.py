# SPDX-License-Identifier: Apache-2.0
"""SLA2's first stage at toy size: the router learns what dense attention does, and nothing else
moves."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")

import training

import sparline
from sparline import train
from sparline.integrations.diffusers import learned_parameters
from sparline.train.layerwise import Call, attentions, tapped
from sparline.train.loop import Trainer
from sparline.train.router import RouterTrainer, _Ring

pytestmark = pytest.mark.e2e

ROUTER: dict[str, Any] = {
    "keep_ratios": [0.25, 0.125],
    "steps": 16,
    "learning_rate": 1e-2,
    "alpha_learning_rate": 1e-2,
    "buffer_samples": 3,
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make(folder: Path, alpha_start: str = "mass", **sections: Any) -> RouterTrainer:
    """From a worse alpha than the fitted one, which leaves too little for a toy's few steps."""
    router = {**ROUTER, **sections.pop("router", {})}
    sections["model"] = {"alpha_start": alpha_start}
    config = training.make_config(folder, task="router", router=router, **sections)
    trainer = RouterTrainer(config)
    _sharpen(trainer)
    return trainer


def _sharpen(trainer: RouterTrainer) -> None:
    """An untrained model attends evenly, and has no blocks to choose: make it attend sharply."""
    rng = torch.Generator().manual_seed(3)
    for block in trainer.transformer.blocks:
        for linear in (block.attn1.to_q, block.attn1.to_k):
            linear.weight.copy_(torch.randn(linear.weight.shape, generator=rng))
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            norm.weight.mul_(3.0)


def silent(done: int, total: int, words: str) -> None:
    pass


def test_the_router_learns_and_the_model_stays(tmp_path: Path) -> None:
    trainer = make(tmp_path / "run", router={"steps": 40})
    others = {
        n: p.clone() for n, p in trainer.transformer.named_parameters() if "attention." not in n
    }
    seen: list[tuple[int, int, str]] = []
    summary = trainer.run(lambda *told: seen.append(told))
    assert seen[0][:2] == (1, 80)
    assert seen[-1][:2] == (80, 80)
    for keep_ratio, errors in summary.errors.items():
        assert errors.trained < 0.99 * errors.before, keep_ratio
        assert errors.kept == errors.trained == errors.fitted  # alpha_start fits nothing
    losses = [float(words.split()[-1]) for _, _, words in seen[:40]]
    assert sum(losses[20:]) < 0.98 * sum(losses[:20])
    for name, p in trainer.transformer.named_parameters():
        if name in others:
            assert torch.equal(p, others[name])
    told = [json.loads(x) for x in (tmp_path / "run" / "router.jsonl").read_text().splitlines()]
    assert [line["keep_ratio"] for line in told] == [0.25, 0.125]
    assert "relative square error" in summary.words()[0]


def test_each_ratio_starts_from_the_one_before(tmp_path: Path) -> None:
    first = make(tmp_path / "one", router={"keep_ratios": [0.25], "steps": 40})
    first.run(silent)
    both = make(tmp_path / "both", router={"keep_ratios": [0.25, 0.125], "steps": 40})
    states = both.run(silent).states
    a = load_file(tmp_path / "one" / "router-0.25.safetensors")
    b = load_file(states[0.25])
    c = load_file(states[0.125])
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert any(not torch.equal(value, c[name]) for name, value in b.items())
    eye = torch.eye(training.HEAD_DIM)
    name = next(n for n in b if n.endswith("proj_q.weight"))
    assert (c[name] - b[name]).norm() < (c[name] - eye).norm()


@pytest.mark.filterwarnings("error")
def test_stage_2_takes_what_stage_1_learned(tmp_path: Path) -> None:
    state = make(tmp_path / "router").run(silent).states[0.125]
    method = {**training.METHOD, "keep_ratio": 0.125}
    config = training.make_config(tmp_path / "run", method=method, model={"state": str(state)})
    trainer = Trainer(config)
    learned = load_file(state)
    names = dict(learned_parameters(trainer.transformer))
    for name, value in learned.items():
        assert torch.equal(names[name], value), name
    layer = next(iter(attentions(trainer.transformer).values()))
    assert layer.method == sparline.method("sla2", **config.method.options)


def test_the_best_for_the_hard_router_is_kept(tmp_path: Path) -> None:
    """Too high a rate makes all that is trained worse than what was there."""
    settings = {"steps": 4, "learning_rate": 3.0, "alpha_learning_rate": 3.0}
    trainer = make(tmp_path / "run", "output", router=settings)
    summary = trainer.run(silent)
    eye = torch.eye(training.HEAD_DIM)
    for keep_ratio, errors in summary.errors.items():
        assert errors.kept == errors.before < min(errors.trained, errors.fitted)
        state = load_file(summary.states[keep_ratio])
        assert all(torch.equal(x, eye) for name, x in state.items() if "router" in name)
    assert trainer._error() == summary.errors[0.125].kept
    assert "worse" in summary.words()[0]
    # Each ratio has an alpha of its own, fitted to it.
    a, b = (load_file(summary.states[ratio]) for ratio in (0.25, 0.125))
    name = next(n for n in a if n.endswith("alpha_logit"))
    assert not torch.equal(a[name], b[name])


def test_alpha_is_fitted_again_behind_the_router(tmp_path: Path) -> None:
    """A rate that only moves alpha away is undone by the fit."""
    settings = {"steps": 4, "learning_rate": 1e-5, "alpha_learning_rate": 3.0}
    errors = make(tmp_path / "run", "output", router=settings).run(silent).errors[0.25]
    assert errors.trained > 1.02 * errors.before
    assert errors.kept == errors.fitted <= errors.before


@pytest.mark.parametrize("alpha_start", ["mass", "output"])
def test_a_killed_ratio_goes_on_to_the_bit(tmp_path: Path, alpha_start: str) -> None:
    settings: dict[str, Any] = {
        "router": {"keep_ratios": [0.25, 0.125], "steps": 9},
        "checkpoint": {"checkpointing_steps": 5},
    }
    whole = make(tmp_path / "whole", alpha_start, **settings).run(silent)

    def kill(done: int, total: int, words: str) -> None:
        if done == 9 + 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "killed", alpha_start, **settings).run(kill)
    steps: list[int] = []
    resumed = make(tmp_path / "killed", alpha_start, **settings)
    summary = resumed.run(lambda done, *_: steps.append(done))
    assert steps == [15, 16, 17, 18]
    assert summary.errors[0.125] == whole.errors[0.125]
    a, b = load_file(whole.states[0.125]), load_file(summary.states[0.125])
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    names = {path.name for path in (tmp_path / "killed").iterdir()}
    assert names == {"router-0.25.safetensors", "router-0.125.safetensors", "router.jsonl"}
    told = [json.loads(x) for x in (tmp_path / "killed" / "router.jsonl").read_text().splitlines()]
    assert [line["keep_ratio"] for line in told] == [0.25, 0.125]


def test_what_is_not_a_number_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(tmp_path / "run", router={"keep_ratios": [0.25], "steps": 2})

    def spoil(*arguments: Any) -> None:
        for module in trainer.layers.values():
            module.alpha_logit.data.fill_(float("nan"))

    monkeypatch.setattr(trainer, "_train", spoil)
    summary = trainer.run(silent)
    errors = summary.errors[0.25]
    assert math.isnan(errors.trained)
    assert errors.kept == errors.before == trainer._error()
    assert all(x.isfinite().all() for x in load_file(summary.states[0.25]).values())


def test_a_model_in_16_bits_teaches_float32_routers(tmp_path: Path) -> None:
    settings = {"keep_ratios": [0.25], "steps": 2}
    trainer = make(tmp_path / "run", router=settings, training={"mixed_precision": "bf16"})
    assert trainer.transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    state = load_file(trainer.run(silent).states[0.25])
    assert {value.dtype for value in state.values()} == {torch.float32}
    eye = torch.eye(training.HEAD_DIM)
    routers = [value for name, value in state.items() if "router" in name]
    assert all(not torch.equal(value, eye) for value in routers)


def test_a_finished_ratio_is_not_trained_again(tmp_path: Path) -> None:
    make(tmp_path / "run", router={"keep_ratios": [0.25]}).run(silent)
    seen: list[str] = []
    summary = make(tmp_path / "run").run(lambda a, b, words: seen.append(words))
    assert len(seen) == ROUTER["steps"]
    assert all("k 0.125" in words for words in seen)
    assert set(summary.states) == {0.25, 0.125}


def test_layers_take_turns_where_memory_is_short(tmp_path: Path) -> None:
    # q, k, v and o of 256 tokens, 2 heads of 16, float32, three samples: one layer at a time.
    one_layer = 4 * 256 * 2 * 16 * 4 * 3
    settings = {"keep_ratios": [0.25], "steps": 4}
    seen: list[tuple[int, int]] = []
    trainer = make(tmp_path / "turns", router={**settings, "max_buffer_bytes": one_layer})
    trainer.run(lambda done, total, _: seen.append((done, total)))
    assert seen == [(n, 8) for n in range(1, 9)]
    for module in attentions(trainer.transformer).values():
        assert isinstance(module, sparline.nn.SLA2)
        assert not torch.equal(module.router.proj_q.weight, torch.eye(training.HEAD_DIM))
    trainer = make(tmp_path / "no", router={**settings, "max_buffer_bytes": one_layer - 1})
    with pytest.raises(
        train.TrainError, match=re.escape(f"{one_layer} bytes (3 of q, k, v and o)")
    ):
        trainer.run(silent)


def test_the_ring_holds_the_newest_of_its_layers() -> None:
    ring = _Ring([0, 2], 2)
    for n in range(4):
        value = torch.full((1,), float(n))
        for layer in range(3):
            ring.add(layer, Call(value, value, value, value, {}))
    rng = torch.Generator().manual_seed(0)
    assert {float(call.q) for call in ring.choose(2, 40, rng)} == {2.0, 3.0}
    assert set(ring._calls) == {0, 2}


def test_a_tapped_model_is_the_dense_one(tmp_path: Path) -> None:
    trainer = make(tmp_path / "run")
    rng = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 3, 4, 16, 16, generator=rng),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 4, 32, generator=rng),
    }
    layers: list[int] = []
    sparse = trainer.transformer(**inputs).sample
    with torch.no_grad(), tapped(trainer.transformer, lambda layer, _: layers.append(layer)):
        dense = trainer.transformer(**inputs).sample
    assert layers == [0, 1]
    assert torch.equal(trainer.transformer(**inputs).sample, sparse)
    expected = sparline.restore(trainer.transformer)(**inputs).sample
    torch.testing.assert_close(dense, expected)
    assert not torch.allclose(sparse, expected, atol=1e-4)


def test_low_bit_waits_for_stage_2(tmp_path: Path) -> None:
    with pytest.raises(train.TrainError, match="trains in 16 bits"):
        make(tmp_path / "run", method={**training.METHOD, "low_bit": True})
