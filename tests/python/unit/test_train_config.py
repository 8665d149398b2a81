# SPDX-License-Identifier: Apache-2.0
"""Configurations: files, overrides, and one clear sentence for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")

import sparline
from sparline import train


def test_yaml_and_overrides(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "run.yaml"
    path.write_text(
        """
output_dir: run
method: {name: sla2, keep_ratio: 0.05, cube: [2, 4, 4], low_bit: true}
optimizer: {learning_rate: 1e-4}   # YAML 1.1 reads a word
model: {dense_layers: [0, -1]}
parameters: {alpha: {learning_rate: 1.0e-2}}
"""
    )
    config = train.load_config(
        path,
        ["method.keep_ratio=0.03", "seed=7", "router.keep_ratios=[0.1,0.05]", "data.path=null"],
    )
    assert config.method.make() == sparline.SLA2(keep_ratio=0.03, cube=(2, 4, 4), low_bit=True)
    assert config.optimizer.learning_rate == 1e-4
    assert config.model.dense_layers == (0, -1)
    assert config.parameters.alpha.learning_rate == 1e-2
    assert config.router.keep_ratios == (0.1, 0.05)
    assert (config.seed, config.data.path, config.output_dir) == (7, None, "run")


def test_json_needs_no_yaml_and_dictionaries_return(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"method": {"name": "vsa", "num_cubes": 3}, "seed": 3}))
    config = train.load_config(path, ["training.max_minutes=1.5"])
    assert train.from_dict(config.to_dict()) == config
    assert train.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_another_method_drops_the_options_of_the_one_before() -> None:
    data = {"method": {"name": "sla2", "alpha_shape": "head"}}
    for overrides in (
        ["method.name=sla_main", "method.keep_ratio=0.1"],
        ["method.keep_ratio=0.1", "method.name=sla_main"],
    ):
        config = train.from_dict(data, overrides)
        assert config.method.make() == sparline.SLA.sla_main(keep_ratio=0.1)
    assert train.from_dict(data, ["method.name=original"]).method.make() is None


@pytest.mark.parametrize(
    ("data", "overrides", "text"),
    [
        ({}, ["optimiser.learning_rate=1"], "no key optimiser.*nearest is optimizer.learning_rate"),
        ({}, ["learning_rate=1"], "no key learning_rate. The nearest is optimizer.learning_rate"),
        ({"training": {"max_steps": 3}}, [], "no key training.max_steps.*training.max_train_steps"),
        ({}, ["method.keep=0.1"], "sla2 has no option method.keep.*nearest is method.keep_ratio"),
        ({}, ["method.keep_ratio=5"], r"keep_ratio must lie in \[0, 1\], got 5"),
        ({}, ["method.name=slb"], "method.name must be one of original, dense, sla.*got 'slb'"),
        ({}, ["method.name=dynsparse", "method.log_threshold=-6"], "nothing of it is learned"),
        ({}, ["seed=first"], "seed must be of type int, got 'first'"),
        ({}, ["training.use_ema=1"], "training.use_ema must be of type bool, got 1"),
        ({}, ["seed"], "overrides read key=value, got 'seed'"),
        ({"data": 3}, [], "data must be a section of keys, got 3"),
        ({}, ["data.source=disk"], "data.source must be one of demo, clips, latents, got 'disk'"),
        ({}, ["data.source=clips"], "needs data.path"),
        ({}, ["optimizer.learning_rate=NaN"], "learning_rate must be at least 0, got nan"),
        ({}, ["data.caption_dropout=2"], "caption_dropout must be at most 1"),
        ({}, ["loss.flow_shift=0"], "flow_shift must be positive"),
        ({}, ["task=router", "method.name=sla"], "trains SLA2's router, got method.name=sla"),
        ({}, ["task=router", "lora.rank=4"], "trains no weights of the model, got lora.rank=4"),
    ],
)
def test_what_is_wrong(data: dict[str, Any], overrides: list[str], text: str) -> None:
    with pytest.raises(train.TrainError, match=text):
        train.from_dict(data, overrides)


EXAMPLES = sorted((Path(__file__).parents[3] / "examples" / "train").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_whole(path: Path) -> None:
    pytest.importorskip("yaml")
    config = train.load_config(path, ["data.path=latents"])
    method = config.method.make()
    assert method is not None
    assert (method.recipe.block_q, method.recipe.block_k) == (128, 64)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(train.TrainError, match="must be a readable configuration file"):
        train.load_config(tmp_path / "nowhere.yaml")
    for name, text, message in (
        ("a.json", "{", "must be JSON"),
        ("b.json", "[1]", "must hold a mapping"),
        ("c.yaml", "a: [", "must be YAML"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(train.TrainError, match=message):
            train.load_config(tmp_path / name)
