# SPDX-License-Identifier: Apache-2.0
"""Every method by name in a tiny Wan: it runs, it gets the grid, it trains, it saves and loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from test_diffusers import inputs, run, sparse_layers, tiny_wan

import sparline
from sparline.integrations.diffusers import learned_parameters

#: Settings for a grid of 2 x 8 x 8 tokens.
OPTIONS: dict[str, dict[str, Any]] = {
    "dynsparse": {"log_threshold": -0.5, "block_q": 16, "block_k": 16},
    "blasst": {"log_threshold": -1e-3, "block_q": 16, "block_k": 16},
    "sparge": {"block_q": 16, "block_k": 16, "min_similarity": -1.0, "keep_mass": 0.3},
    "vsa": {"cube": (2, 2, 4), "keep_ratio": 0.25},
    "vmoba": {"block_q": 16, "block_k": 16, "frames_1d": 1, "box_3d": (1, 4, 4)},
    "vmoba_block": {"block_q": 16, "block_k": 16, "frames_1d": 1, "box_3d": (1, 4, 4)},
}


def method(name: str, **options: Any) -> sparline.Method:
    blocks = {"block_q": 16, "block_k": 16}
    return sparline.method(name, **{**OPTIONS.get(name, blocks), **options})


@pytest.mark.parametrize("name", list(sparline.METHODS))
def test_every_method_in_a_model(name: str) -> None:
    model = tiny_wan()
    before = run(model)
    sparline.apply(model, method(name))
    assert sparse_layers(model) == [0, 1]
    after = run(model)
    assert after.isfinite().all()
    if name == "dense":
        torch.testing.assert_close(after, before)
    else:
        assert not torch.allclose(after, before, atol=1e-4)
    sparline.restore(model)
    torch.testing.assert_close(run(model), before)


KEEPS_ALL: dict[str, sparline.Method] = {
    "cubes": method("sparse", keep_ratio=1.0, token_order="cubes", cube=(2, 2, 4)),
    "hilbert": method("sparse", keep_ratio=1.0, token_order="hilbert"),
    "vsa": method("vsa", keep_ratio=1.0),  # its coarse gate starts at zero
    "vmoba": method("vmoba", num_chunks=128),
    "dynsparse": method("dynsparse", log_threshold=float("-inf"), token_order="cubes"),
}


@pytest.mark.parametrize("key", list(KEEPS_ALL))
def test_keeping_everything_is_dense(key: str) -> None:
    """The grid that the model's hook finds is the right one, for every shape of the latents."""
    model = tiny_wan()
    for shape in ((1, 4, 2, 16, 16), (1, 4, 3, 12, 20)):
        arguments = {**inputs(), "hidden_states": torch.randn(shape)}
        with torch.no_grad():
            sparline.restore(model)
            before = model(**arguments)[0]
            sparline.apply(model, KEEPS_ALL[key])
            after = model(**arguments)[0]
        torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_vmoba_cycles_through_its_partitions() -> None:
    model = tiny_wan(num_layers=4)
    sparline.apply(model, method("vmoba"))
    found = [block.attn1.processor.attention.method.partition for block in model.blocks]
    assert found == ["1d", "2d", "3d", "1d"]


@pytest.mark.parametrize("name", ["sla", "sla2", "vsa"])
def test_learned_tensors_train_save_and_load(name: str, tmp_path: Path) -> None:
    model = tiny_wan()
    sparline.apply(model, method(name))
    model.train()
    model(**inputs())[0].square().sum().backward()
    frozen = [key for key, p in learned_parameters(model) if p.grad is None]
    # The hard router is frozen; everything else learns.
    assert all(".router." in key for key in frozen)
    assert bool(frozen) == (name == "sla2")
    model.eval()
    with torch.no_grad():
        for _, parameter in learned_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = run(model)
    sparline.save_state(model, tmp_path / "state.safetensors")
    other = tiny_wan()
    sparline.load_state(other, tmp_path / "state.safetensors")
    assert other.blocks[0].attn1.processor.attention.method == method(name)
    torch.testing.assert_close(run(other), expected)


def test_stages_of_sla2() -> None:
    """Stage 1 trains the router and alpha on q, k and v of the dense model; stage 2 freezes it."""
    torch.manual_seed(0)
    module = sparline.nn.SLA2(16, 2, method=method("sla2", keep_ratio=0.25, num_alphas=8))
    q, k, v = (torch.randn(1, 2, 128, 16) for _ in range(3))
    teacher = sparline.attention(q, k, v, method=sparline.Dense())
    module.init_alpha(q, k, v)
    module.set_stage(1)
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-2)
    losses = []
    for _ in range(30):
        loss = (module(q, k, v) - teacher).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in module.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    module.set_stage(2)
    assert not any(p.requires_grad for p in module.router.parameters())
    assert module.alpha_logit.requires_grad
    assert module(q, k, v).isfinite().all()


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_alpha_is_fitted_to_the_dense_output(layout: str) -> None:
    """Against least squares in float64; samples add up; no other alpha is nearer."""
    torch.manual_seed(0)
    small = method("sla2", keep_ratio=0.5, num_alphas=6)
    module = sparline.nn.SLA2(16, 2, method=small)
    top = bottom = torch.zeros(())
    evidence = torch.zeros(2, 2, 6)
    for _ in range(2):
        q, k, v = (torch.randn(2, 2, 96, 16) for _ in range(3))
        given = [x.transpose(1, 2) if layout == "bnhd" else x for x in (q, k, v)]
        evidence += torch.stack(module.alpha_evidence(*given, layout=layout))
        critical = sparline.route(q, k, method=small).repeat_interleave(16, 2)
        critical = critical.repeat_interleave(16, 3) == 1
        q, k, v = q.double(), k.double(), v.double()
        k = k - k.mean(dim=2, keepdim=True)  # SLA2 smooths keys, its feature map sees them so
        scores = q @ k.mT / 4
        o = scores.softmax(dim=-1) @ v
        o_s = scores.masked_fill(~critical, -torch.inf).softmax(dim=-1) @ v
        linear = (q.softmax(dim=-1) @ k.softmax(dim=-1).mT) * ~critical
        o_l = linear @ v / linear.sum(dim=-1, keepdim=True)
        d = o_s - o_l
        top = top + ((o - o_l) * d).sum(dim=(0, 3)).unflatten(1, (6, -1)).sum(dim=2)
        bottom = bottom + d.square().sum(dim=(0, 3)).unflatten(1, (6, -1)).sum(dim=2)
    module.set_alpha(*evidence)
    alpha = (top / bottom).clamp(0.01, 0.99)
    torch.testing.assert_close(module.alpha_logit.sigmoid().double(), alpha, atol=1e-4, rtol=1e-4)


def test_alpha_of_which_nothing_is_known_stays() -> None:
    module = sparline.nn.SLA2(16, 2, method=method("sla2", num_alphas=3))
    before = module.alpha_logit.clone()
    found = torch.tensor([0.0, 1.0, 5.0]).expand(2, 3)
    module.set_alpha(found, torch.tensor([0.0, 4.0, 4.0]).expand(2, 3))
    assert torch.equal(module.alpha_logit[:, 0], before[:, 0])
    torch.testing.assert_close(module.alpha_logit[0, 1:].sigmoid(), torch.tensor([0.25, 0.99]))
    with pytest.raises(ValueError, match=r"must have the shape \(2, 3\) .* got \(3,\)"):
        module.set_alpha(found[0], found[0])
    with pytest.raises(ValueError, match='fit must be "output" or "mass"'):
        module.init_alpha(*(torch.randn(1, 2, 48, 16) for _ in range(3)), fit="mean")


def test_alpha_starts_as_the_mass_on_critical_blocks() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 96, 16) for _ in range(3))
    for shape, num in (("block", 6), ("head", 1), ("token", 96)):
        small = method("sla2", keep_ratio=0.5, alpha_shape=shape, num_alphas=num)
        module = sparline.nn.SLA2(16, 2, method=small)
        module.init_alpha(q, k, v, fit="mass")
        critical = sparline.route(q, k, method=small).repeat_interleave(16, 2)
        critical = critical.repeat_interleave(16, 3) == 1
        p = (q.double() @ (k.double()).mT / 4).softmax(dim=-1)
        mass = (p * critical).sum(dim=-1).mean(dim=0).unflatten(1, (num, -1)).mean(dim=2)
        torch.testing.assert_close(
            module.alpha_logit.sigmoid().double(), mass, atol=1e-4, rtol=1e-4
        )
