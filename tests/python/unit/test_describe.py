# SPDX-License-Identifier: Apache-2.0
"""``sparline explain``: every method says its maths, options and cost, and they are right."""

import re

import pytest

import sparline
from sparline.accounting import flops
from sparline.describe import explain
from sparline.generate import InputError

NEEDS = {"dynsparse": ["log_threshold=-6.0"], "blasst": ["log_threshold=-6.0"]}


@pytest.mark.parametrize("name", list(sparline.METHODS))
def test_every_method_explains_itself(name: str) -> None:
    text = explain(name, NEEDS.get(name, []), "1,4,8192,64")
    method = sparline.method(name, **({"log_threshold": -6.0} if name in NEEDS else {}))
    for section in ("maths", "options", "learned", "cost at 1,4,8192,64", "plan"):
        assert f"\n{section}\n" in text, section
    for option, value in method.to_dict().items():
        if option != "name":
            line = next(x for x in text.splitlines() if x.strip().startswith(f"{option} ="))
            assert str(value) in line
            assert len(line.split("=", 1)[1].strip()) > len(str(value)), f"{option}: no text"
    assert "backend: cpu" in text


def test_maths_follows_the_options() -> None:
    def maths(*arguments: object) -> str:
        return explain(*arguments, "1,4,8192,64").split("\noptions\n")[0]  # type: ignore[arg-type]

    assert "C_i = the 0.1 T_n best j" in maths("sla", ["keep_ratio=0.1"])
    assert "o = o_s + o_l W^T + b" in maths("sla", [])
    assert "E_i = {j not in C_i}" in maths("sla1", [])
    assert "a = sigmoid(logit) for each head" in maths("sla2", ["alpha_shape=head"])
    assert "SoftTop-k" in maths("sla2", ["router_mode=soft"])
    assert "running maximum" in maths("blasst", ["log_threshold=-3"])
    assert "boxes of 2 x 4 x 8" in maths("sparse", ["token_order=cubes", "cube=2x4x8"])
    assert "int8" in maths("dense", ["low_bit=True"])


def test_cost_is_the_accounting() -> None:
    text = explain("sla2", [], "1,12,32760,128")
    counted = flops(sparline.SLA2(), num_heads=12, num_queries=32760, head_dim=128)
    found = re.search(r"forward +([\d.e+]+) GFLOP, ([\d.]+)% of dense", text)
    assert found is not None
    assert float(found[1]) == pytest.approx(counted.total / 1e9, rel=1e-3)
    assert float(found[2]) == pytest.approx(100 * counted.ratio, abs=0.01)


def test_what_explain_refuses() -> None:
    for arguments, text in {
        ("vsa", (), "1,4,100,64"): "--grid: this method needs the token grid",
        ("sla", (), "1,4,100"): "--shape: it reads B,H,N,D",
        ("sla", (), "1,4,0,64"): "--shape: sizes must be positive",
        ("nothing", (), "1,4,64,64"): "method: it must be one of",
        ("dynsparse", (), "1,4,64,64"): "needs log_threshold",
        ("original", (), "1,4,64,64"): "the model's own attention",
    }.items():
        with pytest.raises(InputError, match=re.escape(text)):
            explain(arguments[0], list(arguments[1]), arguments[2])
    with pytest.raises(InputError, match="must hold the 100 tokens"):
        explain("vsa", [], "1,4,100,64", grid="4,5,6")
    assert "boxes of 4 x 4 x 4" in explain("vsa", [], "1,4,120,64", grid="4,5,6")
