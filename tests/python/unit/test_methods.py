# SPDX-License-Identifier: Apache-2.0
"""Methods: validation, presets, names, dictionaries."""

import dataclasses
from typing import Any

import pytest

import sparline
from sparline import SLA, Dense
from sparline.methods import from_dict


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"keep_ratio": 1.5}, ValueError, r"keep_ratio must lie in \[0, 1\], got 1.5"),
        ({"keep_ratio": -0.1}, ValueError, "got -0.1"),
        ({"keep_ratio": float("nan")}, ValueError, "got nan"),
        ({"keep_ratio": True}, TypeError, "must be a number"),
        ({"keep_ratio": "5%"}, TypeError, "got '5%'"),
        ({"negligible_ratio": 2}, ValueError, "negligible_ratio must lie in"),
        ({"feature_map": "elu"}, ValueError, "one of softmax, elu1, .* got 'elu'"),
        ({"linear_scope": "none"}, ValueError, "one of marginal, complement, all"),
        ({"block_q": 8}, ValueError, r"block_q must lie in \[16, 128\] rows, got 8"),
        ({"block_k": 256}, ValueError, "got 256"),
        ({"block_q": 64.0}, TypeError, "must be an int"),
        ({"count_rounding": "up"}, ValueError, "one of floor, round, ceil"),
        ({"smooth_k": True}, ValueError, "one of router, all, none"),
        ({"combine": "add"}, ValueError, "one of projection, sum, sparse, linear"),
        ({"epsilon": -1e-5}, ValueError, "epsilon must be finite and not negative"),
        ({"epsilon": float("inf")}, ValueError, "epsilon must be finite"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        SLA(**options)


def test_presets() -> None:
    paper, sla1, main = SLA.paper(), SLA.sla1(), SLA.sla_main()
    assert (paper.linear_scope, paper.keep_ratio, paper.negligible_ratio) == ("marginal", 0.05, 0.1)
    assert (sla1.linear_scope, sla1.negligible_ratio, sla1.resolved_epsilon) == ("complement", 0, 0)
    assert (main.linear_scope, main.negligible_ratio, main.resolved_epsilon) == ("all", 0, 1e-5)
    assert all((m.block_q, m.block_k) == (64, 64) for m in (paper, sla1, main))
    assert SLA.sla1(keep_ratio=0.1, negligible_ratio=0.2).negligible_ratio == 0.2


def test_epsilon_follows_the_scope() -> None:
    assert SLA(linear_scope="marginal").resolved_epsilon == 0.0
    assert SLA(linear_scope="all").resolved_epsilon == 1e-5
    assert SLA(linear_scope="all", epsilon=0.0).resolved_epsilon == 0.0


def test_frozen_and_hashable() -> None:
    method = SLA()
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.keep_ratio = 0.1  # type: ignore[misc]
    assert {method: 1}[SLA()] == 1
    assert Dense() != SLA()


def test_registry() -> None:
    assert sparline.method("dense") == Dense()
    assert sparline.method("sla", keep_ratio=0.1) == SLA(keep_ratio=0.1)
    assert set(sparline.METHODS) >= {"dense", "sla", "sla1", "sla_main", "sparse", "linear"}
    with pytest.raises(ValueError, match=r"name must be one of dense, sla, .* got 'slaa'"):
        sparline.method("slaa")
    with pytest.raises(ValueError, match="dense has no option keep_ratio"):
        sparline.method("dense", keep_ratio=0.1)


def test_dictionaries() -> None:
    data = SLA(keep_ratio=0.2).to_dict()
    assert data["name"] == "sla"
    assert from_dict(data) == SLA.from_dict(data) == SLA(keep_ratio=0.2)
    assert from_dict({"name": "dense"}) == Dense()
    with pytest.raises(ValueError, match="unknown option topk"):
        from_dict({"name": "sla", "topk": 0.1})
    with pytest.raises(ValueError, match="name must be one of dense, sla, got None"):
        from_dict({})
    with pytest.raises(ValueError, match="name must be 'sla', got 'dense'"):
        SLA.from_dict({"name": "dense"})
