# SPDX-License-Identifier: Apache-2.0
"""Methods: validation, presets, names, dictionaries."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

import sparline
from sparline import BLASST, SLA, SLA2, VSA, Dense, DynSparse, LowBit, VMoBA
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
        ({"selection": "top"}, ValueError, "one of top_k, top_p, union, intersection"),
        ({"keep_mass": 98}, ValueError, r"keep_mass must lie in \[0, 1\], got 98"),
        ({"min_similarity": 1.5}, ValueError, r"min_similarity must lie in \[-1, 1\]"),
        ({"min_similarity": float("nan")}, ValueError, "got nan"),
        ({"token_order": "zigzag"}, ValueError, "one of raster, cubes, hilbert"),
        ({"cube": (4, 4)}, ValueError, "three positive ints"),
        ({"cube": (4, 0, 4)}, ValueError, r"got \(4, 0, 4\)"),
        ({"low_bit": 8}, TypeError, "low_bit must be sparline.LowBit, True or None, got 8"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        SLA(**options)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SLA2(alpha_shape="row"), "one of block, head, token"),
        (lambda: SLA2(router_mode="gumbel"), "one of hard, soft, straight_through"),
        (lambda: SLA2(temperature=0.0), "temperature must be positive and finite, got 0.0"),
        (lambda: SLA2(low_bit=True, router_mode="soft"), "low_bit needs router_mode='hard'"),
        (lambda: DynSparse(0.0), "log_threshold must be negative, got 0.0"),
        (lambda: BLASST(float("nan")), "log_threshold must be negative, got nan"),
        (lambda: BLASST(2.0), "BLASST: log_threshold must be negative"),
        (lambda: DynSparse(-1.0, decide_rows=24), "0 or a multiple of 16 rows, got 24"),
        (lambda: DynSparse(-1.0, tile_order="random"), "one of ascending, reverse, diagonal_first"),
        (lambda: DynSparse.from_budget(0.0, 100), "p_real must be positive and finite, got 0.0"),
        (lambda: DynSparse.from_budget(9.0, 64), "log_threshold must be negative"),
        (lambda: VSA(cube=(2, 2, 2)), r"cube must hold 16 to 128 tokens, got \(2, 2, 2\) with 8"),
        (lambda: VSA(cube=(8, 8, 8)), "with 512"),
        (lambda: VSA(token_order="raster"), "token_order must be 'cubes'"),
        (lambda: VSA(num_cubes=0), "num_cubes must be at least 1"),
        (lambda: VMoBA(mode="block"), "one of query_head, head_global, overall"),
        (lambda: VMoBA(partition="4d"), "one of cycle, 1d, 2d, 3d"),
        (lambda: VMoBA(threshold=1.1), r"threshold must lie in \[0, 1\]"),
        (lambda: VMoBA(box_3d=(0, 1, 1)), "three positive ints"),
        (lambda: VMoBA(token_order="hilbert"), "token_order must be 'raster'"),
        (lambda: LowBit(q_rows=8), "q_rows must be 0 or a multiple of 16"),
        (lambda: LowBit(p_range=449.0), r"p_range must lie in \(0, 448\]"),
        (lambda: LowBit(v_range=0.0), "got 0.0"),
    ],
)
def test_wrong_options_of_other_methods(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_low_bit_forms() -> None:
    """True, a dictionary and LowBit mean the same; so does False and None."""
    forms = (True, {}, LowBit(), {"q_rows": 0, "p_range": 448.0})
    assert len({Dense(low_bit=form) for form in forms}) == 1  # type: ignore[arg-type]
    assert Dense(low_bit=False) == Dense()  # type: ignore[arg-type]


def test_budget() -> None:
    """lambda = ln P + ln(B_c / L), against the published pairs."""
    published = DynSparse.from_budget(1.46, 75600, block_k=128)
    assert published.log_threshold == pytest.approx(-6.0, abs=0.01)
    assert published.block_k == 128
    small = DynSparse.from_budget(0.105, 27280, block_k=32, tile_order="reverse")
    assert small.log_threshold == pytest.approx(-9.0, abs=0.01)
    assert small.tile_order == "reverse"


def test_layers_take_turns() -> None:
    """VMoBA's partition cycles over layers; other methods are the same in all of them."""
    method = VMoBA()
    assert [method.for_layer(n).partition for n in range(4)] == ["1d", "2d", "3d", "1d"]
    assert VMoBA(partition="2d").for_layer(0).partition == "2d"
    assert method.recipe == method.for_layer(0).recipe
    for other in (Dense(), SLA(), SLA2(), VSA(), DynSparse(-1.0)):
        assert other.for_layer(5) == other


OPTIONS = {"dynsparse": {"log_threshold": -6.0}, "blasst": {"log_threshold": -6.0}}


@pytest.mark.parametrize("name", sparline.METHODS)
def test_every_method_by_name(name: str) -> None:
    """It is found, hashes, has a recipe, and survives a dictionary and JSON."""
    method = sparline.method(name, **OPTIONS.get(name, {}))
    assert isinstance(method, sparline.METHODS[name])
    assert {method: 1}[method] == 1
    assert method.recipe.block_q >= 16
    data = json.loads(json.dumps(method.to_dict()))
    assert from_dict(data) == method
    if name == "linear":  # has nothing to quantise
        with pytest.raises(ValueError, match="low_bit needs a sparse branch"):
            sparline.method(name, low_bit=True)
        return
    quantised = sparline.method(name, low_bit={"q_rows": 16}, **OPTIONS.get(name, {}))
    assert quantised.low_bit == LowBit(q_rows=16)
    assert from_dict(json.loads(json.dumps(quantised.to_dict()))) == quantised


def test_in_loop_methods_need_a_threshold() -> None:
    for name in ("dynsparse", "blasst"):
        with pytest.raises(ValueError, match="needs log_threshold"):
            sparline.method(name)


def test_presets_of_block_selection() -> None:
    hybrid, sparge, top_p = SLA.hybrid(), SLA.sparge(), SLA.top_p(keep_mass=0.3)
    assert (hybrid.selection, hybrid.keep_ratio, hybrid.keep_mass) == ("union", 0.03, 0.2)
    assert (sparge.selection, sparge.keep_mass, sparge.min_similarity) == ("top_p", 0.98, 0.6)
    assert sparge.longest_prefix
    assert (top_p.selection, top_p.keep_mass, top_p.longest_prefix) == ("top_p", 0.3, False)
    assert all(m.combine == "sparse" for m in (hybrid, sparge, top_p))
    assert sparline.method("hybrid") == hybrid
    assert sparline.method("sparge") == sparge
    assert sparline.method("vmoba_block") == VMoBA(pool_queries=True)


def test_smoothing_follows_low_bits() -> None:
    """Free where nothing but the softmax sees the keys; the linear branch decides for itself."""
    assert Dense(low_bit=True).recipe.smooth_k  # type: ignore[arg-type]
    assert not Dense().recipe.smooth_k
    assert SLA(combine="sparse", low_bit=True).recipe.smooth_k  # type: ignore[arg-type]
    assert not SLA(low_bit=True).recipe.smooth_k  # type: ignore[arg-type]
    assert SLA(smooth_k="all").recipe.smooth_k
    assert SLA2().recipe.smooth_k


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
    with pytest.raises(ValueError, match=r"name must be one of dense, sla, .* got None"):
        from_dict({})
    with pytest.raises(ValueError, match="name must be 'sla', got 'dense'"):
        SLA.from_dict({"name": "dense"})
