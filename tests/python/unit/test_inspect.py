# SPDX-License-Identifier: Apache-2.0
"""What ``sparline inspect`` measures, against float64 and by hand; and what it captures."""

from __future__ import annotations

import html.parser
import json
import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

import sparline
from sparline import density as density_module
from sparline.demo.pipeline import TRANSFORMER_CONFIG, DemoPipeline
from sparline.generate import InputError, Job
from sparline.inspect import (
    Capture,
    Sample,
    Settings,
    inspect_pipeline,
    load_sample,
    save_sample,
    write_report,
)
from sparline.inspect import measure as measure_module
from sparline.inspect import report as report_module

TINY = {
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "num_layers": 3,
    "ffn_dim": 32,
    "text_dim": 64,
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tensors this small run slower on several threads; conftest puts the number back."""
    torch.set_num_threads(1)


def make_sample(
    grid: sparline.Grid, heads: int = 2, head_dim: int = 16, gain: float = 1.5
) -> Sample:
    """Tokens attend to their neighbours in the grid: q = k is a smooth random field."""
    axes = [torch.arange(side) / side for side in grid[:3]]
    places = torch.cartesian_prod(*axes)
    waves = 2.5 * torch.randn(3, heads * head_dim)
    field = (places @ waves + 6.3 * torch.rand(heads * head_dim)).cos() * gain
    k = field.unflatten(-1, (heads, head_dim))[None]
    q = k + 0.2 * torch.randn_like(k)
    return Sample("transformer", 3, 1, 700.0, grid, q, k, torch.randn_like(k))


def dense_weights(sample: Sample) -> Tensor:
    """(H, N, N) in float64."""
    q, k = (x[0].transpose(0, 1).double() for x in (sample.q, sample.k))
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)


# Mass and recall --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["raster", "cubes", "hilbert"])
def test_block_mass_is_the_regrouped_softmax(order: str) -> None:
    sample = make_sample(sparline.Grid(3, 6, 9))  # 162 tokens: a short last block
    method = sparline.SLA(token_order=order, block_q=32, block_k=16)
    mass, blocks = measure_module.block_mass(sample, method)
    assert blocks == list(range(6))
    rows = torch.arange(162)
    if order == "cubes":
        t, h, w = np.unravel_index(rows.numpy(), (3, 6, 9))
        rows = torch.from_numpy(np.lexsort((w, h, t, w // 4, h // 4, t // 4)))
    elif order == "hilbert":
        rows = torch.from_numpy(sparline.tokens.hilbert_order((3, 6, 9)))
    weights = dense_weights(sample)[:, rows][:, :, rows]
    for i in range(6):
        for j in range(11):
            part = weights[:, 32 * i : 32 * i + 32, 16 * j : 16 * j + 16].sum(-1).mean(-1)
            torch.testing.assert_close(mass[:, i, j].double(), part, atol=1e-6, rtol=1e-4)


def test_long_sequences_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = make_sample(sparline.Grid(2, 16, 16))
    whole, _ = measure_module.block_mass(sample, sparline.SLA(block_q=16))
    monkeypatch.setattr(measure_module, "QUERY_BLOCKS", 4)
    some, blocks = measure_module.block_mass(sample, sparline.SLA(block_q=16))
    assert blocks == [4, 12, 20, 28]
    torch.testing.assert_close(some, whole[:, blocks])


def test_recall_of_routers() -> None:
    recall = measure_module.measure_recall(make_sample(sparline.Grid(8, 16, 16)))
    assert recall.sparsity == sorted(recall.sparsity)
    assert recall.random == pytest.approx([1 - s for s in recall.sparsity])
    for order in ("raster", "cubes", "hilbert"):
        top_k, oracle = np.array(recall.top_k[order]), np.array(recall.oracle[order])
        assert (top_k <= oracle + 1e-6).all()
        assert (np.diff(oracle, axis=0) <= 1e-6).all()  # fewer blocks, less mass
        assert (oracle.mean(axis=1) > recall.random).all()
        assert oracle.max() <= 1 + 1e-5
    # Neighbours in space are together in a cube, and apart in rows of 16.
    assert np.mean(recall.top_k["cubes"][5]) > np.mean(recall.top_k["raster"][5]) + 0.05


def test_recall_finds_planted_blocks() -> None:
    """Every block of 64 attends one other block: a single block is enough at any sparsity."""
    codes = 30 * F.one_hot(torch.arange(16), 16).float()
    k = codes.repeat_interleave(64, dim=0)[None, :, None]
    q = codes.roll(5, dims=0).repeat_interleave(64, dim=0)[None, :, None]
    sample = Sample("transformer", 0, 0, 1.0, sparline.Grid(1, 32, 32), q, k, torch.randn_like(k))
    recall = measure_module.measure_recall(sample)
    assert np.allclose(recall.top_k["raster"], 1.0, atol=1e-4)
    assert np.allclose(recall.oracle["raster"], 1.0, atol=1e-4)


# Rank -------------------------------------------------------------------------------------------


def rank_of(sample: Sample, method: sparline.SLA) -> dict[str, measure_module.Rank]:
    classes = sparline.route(sample.q, sample.k, method=method, layout="bnhd")[0]
    return measure_module.measure_rank(sample, method, classes)


def test_rank_of_even_and_of_sharp_weights() -> None:
    sample = make_sample(sparline.Grid(1, 16, 16))
    even = Sample(*[getattr(sample, n) for n in ("model", "step", "layer", "timestep", "grid")],
                  torch.zeros_like(sample.q), sample.k, sample.v)  # fmt: skip
    everything = rank_of(even, sparline.SLA(keep_ratio=0.25))["all"]
    assert everything.effective == pytest.approx([1.0, 1.0], rel=1e-3)
    assert everything.stable == pytest.approx([1.0, 1.0], rel=1e-6)
    assert everything.energy[0] == pytest.approx([1.0, 1.0], rel=1e-6)

    codes = 50 * torch.eye(256)[None, :, None]
    sharp = Sample("transformer", 0, 0, 1.0, sparline.Grid(1, 16, 16), codes, codes, codes)
    everything = rank_of(sharp, sparline.SLA(keep_ratio=0.25))["all"]
    assert everything.effective == pytest.approx([256.0], rel=1e-3)
    assert everything.energy[-1] == pytest.approx([1.0])


def test_rank_against_singular_values() -> None:
    sample = make_sample(sparline.Grid(1, 16, 12), gain=3.0)
    method = sparline.SLA(keep_ratio=0.34, negligible_ratio=0.34)
    classes = sparline.route(sample.q, sample.k, method=method, layout="bnhd")[0]
    rank = measure_module.measure_rank(sample, method, classes)
    pixels = classes.repeat_interleave(64, dim=1).repeat_interleave(64, dim=2)
    for name, mask in (
        ("all", torch.ones_like(pixels)),
        ("critical", pixels == 1),
        ("marginal", pixels == 0),
    ):
        values = torch.linalg.svdvals(dense_weights(sample) * mask)
        energy = values.square().cumsum(-1) / values.square().sum(-1, keepdim=True)
        found = rank[name]
        torch.testing.assert_close(
            torch.tensor(found.energy, dtype=torch.float64),
            energy[:, [r - 1 for r in found.ranks]].mT,
            atol=1e-5,
            rtol=1e-4,
        )
        stable = values.square().sum(-1) / values[:, 0].square()
        assert found.stable == pytest.approx(stable.tolist(), rel=1e-4)


# Methods at a density ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", sparline.METHODS)
def test_every_method_comes_to_the_density(name: str) -> None:
    sample = make_sample(sparline.Grid(8, 12, 16))
    tuned = density_module.tune(name, sample, 0.25)
    assert 0 < tuned.flops < 1.3
    o = tuned.run(sample)
    assert o.shape == sample.q.shape
    assert o.isfinite().all()
    if name == "dense":
        assert tuned.density == 1.0
    elif name == "linear":
        assert tuned.density == 0.0
    elif name in ("dynsparse", "blasst"):  # a whole tile decides: it may not come down
        assert tuned.density == pytest.approx(0.25, abs=0.05) or "=-0.001" in tuned.setting
        assert tuned.flops == pytest.approx(0.5 + tuned.density / 2)
    else:
        assert tuned.density == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("name", ["sla", "sla2", "sparse", "top_p", "vsa"])
def test_everything_kept_is_dense(name: str) -> None:
    sample = make_sample(sparline.Grid(4, 8, 8))
    (error,) = measure_module.measure_errors(sample, [name], 1.0)
    assert error.density == 1.0
    assert max(error.relative_l1) < 2e-3  # SLA2's alpha stays below 1
    assert min(error.cosine) > 0.999


def test_errors_by_hand() -> None:
    sample = make_sample(sparline.Grid(4, 8, 8))
    (error,) = measure_module.measure_errors(sample, ["sparse"], 0.25)
    v = sample.v[0].transpose(0, 1).double()
    dense = dense_weights(sample) @ v
    classes = sparline.route(
        sample.q, sample.k, method=sparline.SLA.sparse_only(keep_ratio=0.25), layout="bnhd"
    )[0]
    mask = (classes == 1).repeat_interleave(64, dim=1).repeat_interleave(64, dim=2)
    weights = dense_weights(sample) * mask
    o = weights / weights.sum(-1, keepdim=True) @ v
    l1 = (o - dense).abs().sum((1, 2)) / dense.abs().sum((1, 2))
    assert error.relative_l1 == pytest.approx(l1.tolist(), rel=1e-4)
    cosine = (o * dense).sum((1, 2)) / (o.norm(dim=(1, 2)) * dense.norm(dim=(1, 2)))
    assert error.cosine == pytest.approx(cosine.tolist(), rel=1e-4)


def test_density_of_chunks_counts_rows() -> None:
    """v tells which chunk a value came from, so that o tells which chunks a row attended."""
    sample = make_sample(sparline.Grid(8, 8, 8), heads=1)
    chunk = torch.arange(512) // 64
    method = sparline.VMoBA(partition="1d", frames_1d=1, num_chunks=2)
    v = F.one_hot(chunk, 16).float()[None, :, None]
    o = sparline.attention(sample.q, sample.k, v, method=method, layout="bnhd", grid=sample.grid)
    attended = (o[0, :, 0, :8] > 0).sum().item() / (512 * 8)
    assert density_module.kept_share(method, sample) == pytest.approx(attended)


def test_skipped_shares() -> None:
    sample = make_sample(sparline.Grid(8, 8, 16), gain=3.0)
    rates = [
        np.mean(density_module.skipped_shares(sparline.BLASST(log_threshold=t), sample))
        for t in (-1e4, -8.0, -4.0, -0.1)
    ]
    assert rates[0] == 0.0
    assert rates == sorted(rates)
    assert rates[-1] > 0.2
    method = sparline.DynSparse(log_threshold=-4.0)
    assert density_module.skipped_shares(method, sample, 8) == density_module.skipped_shares(
        method, sample
    )
    assert 0 <= np.mean(density_module.skipped_shares(method, sample, 2)) <= 1


def test_a_method_that_fails_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, sample: Sample) -> Tensor:
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(density_module.Tuned, "run", broken)
    with pytest.raises(NotImplementedError, match="no kernel"):
        measure_module.measure_errors(make_sample(sparline.Grid(1, 8, 8)), ["sla"], 0.25)


# Capture ----------------------------------------------------------------------------------------


def make_pipeline() -> DemoPipeline:
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(**{**TRANSFORMER_CONFIG, **TINY})
    pipeline = DemoPipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=2.0))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: DemoPipeline, capture: Capture, guidance: float = 1.0) -> None:
    def end_step(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        capture.end_step(step + 1)
        return tensors

    with capture:
        pipeline(
            "coffee",
            num_frames=2,
            height=16,
            width=12,
            num_inference_steps=3,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=end_step,
        )


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_captured_tensors_are_those_of_the_model(guidance: float) -> None:
    pipeline = make_pipeline()
    seen: list[tuple[int, int, float]] = []
    attended: list[Tensor] = []
    expected: list[Tensor] = []

    def on_sample(sample: Sample) -> None:
        assert sample.grid == sparline.Grid(2, 8, 6)
        assert sample.q.shape == sample.k.shape == sample.v.shape == (1, 96, 2, 12)
        seen.append((sample.step, sample.layer, sample.timestep))
        q, k, v = (x.transpose(1, 2) for x in (sample.q, sample.k, sample.v))
        expected.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    capture = Capture({"transformer": pipeline.transformer}, [0, 2], [0, 2], on_sample)
    for layer in (0, 2):
        projection = pipeline.transformer.blocks[layer].attn1.to_out[0]
        projection.register_forward_pre_hook(
            lambda module, args: attended.append(args[0][-1:].detach())
        )
    generate(pipeline, capture, guidance)
    assert [(step, layer) for step, layer, _ in seen] == [(0, 0), (0, 2), (2, 0), (2, 2)]
    assert seen[0][2] > seen[2][2] > 0
    del attended[2:4]  # the step that was not looked at
    for o, wanted in zip(attended, expected, strict=True):
        torch.testing.assert_close(o, wanted)


def test_nothing_is_kept() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def on_sample(sample: Sample) -> None:
        assert not any(ref() is not None for ref in alive)
        alive.extend(weakref.ref(x.untyped_storage()) for x in (sample.q, sample.k, sample.v))

    pipeline = make_pipeline()
    generate(pipeline, Capture({"transformer": pipeline.transformer}, [0, 1], [0, 1], on_sample))
    assert len(alive) == 12
    assert not pipeline.transformer._forward_pre_hooks


def test_attention_that_bypasses_torch_is_named() -> None:
    pipeline = make_pipeline()
    sparline.apply(pipeline, sparline.SLA(keep_ratio=0.5))
    capture = Capture({"transformer": pipeline.transformer}, [0], [1], lambda sample: None)
    with pytest.raises(RuntimeError, match=r"blocks\.1\.attn1 must attend through torch"):
        generate(pipeline, capture)


def test_saved_samples_come_back(tmp_path: Path) -> None:
    sample = make_sample(sparline.Grid(2, 4, 4))
    back = load_sample(save_sample(sample, tmp_path))
    assert back.name == sample.name == "transformer-step3-layer1"
    assert (back.grid, back.timestep) == (sample.grid, 700.0)
    for name in "qkv":
        assert torch.equal(getattr(back, name), getattr(sample, name))
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        load_sample(tmp_path / "x.safetensors")
    sparline.apply(pipeline := make_pipeline(), sparline.SLA())
    sparline.save_state(pipeline, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="must be a file of format 'sparline-qkv-1', got 'sparl"):
        load_sample(tmp_path / "x.safetensors")


# Settings and report ----------------------------------------------------------------------------


def test_choices_are_checked() -> None:
    def parse(methods: str | None = None, ratio: float = 0.1, steps: str = "") -> Settings:
        return Settings.parse(Path("x"), methods, ratio, steps, "0,-1", save=False)

    assert parse("sla, vsa").methods == ("sla", "vsa")
    assert parse().methods == tuple(sparline.METHODS)
    assert parse().layers == (0, -1)
    for arguments, text in (
        ({"methods": "sla,slb"}, "--methods: name some of dense, sla.*got 'sla,slb'"),
        ({"methods": ","}, "--methods"),
        ({"ratio": 0.0}, r"--keep-ratio: it must lie in \(0, 1\], got 0.0"),
        ({"steps": "first"}, "--at-steps: it reads 0,1,-1, got 'first'"),
    ):
        with pytest.raises(InputError, match=text):
            parse(**arguments)
    job = Job("coffee", num_frames=2, height=16, width=12, steps=2, guidance=1.0, seed=0)
    for settings, text in (
        (Settings(Path("x"), layers=(3,)), "--layers: there are 3, counted from 0.*got 3"),
        (Settings(Path("x"), at_steps=(-3,)), "--at-steps: there are 2.*got -3"),
    ):
        with pytest.raises(InputError, match=text):
            inspect_pipeline(make_pipeline(), "tiny", job, settings, lambda *_: None)


def test_settings_of_many_calls_in_a_few_words() -> None:
    told = ["blocks=64x64 threshold=0.25 partition=1d", "blocks=64x64 threshold=0.5 partition=3d"]
    found = report_module._setting_range([*told, "blocks=64x64 threshold=0.125 partition=1d"])
    assert found == "blocks=64x64, threshold=0.125 to 0.5, partition=1d|3d"
    assert report_module._setting_range(["", ""]) == ""


class Page(html.parser.HTMLParser):
    """Checks that elements close in order, and collects what a browser would fetch."""

    VOID = ("meta", "img", "link", "br", "input", "hr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.ids += [value or "" for name, value in attributes if name == "id"]
        self.links += [v or "" for n, v in attributes if n in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_is_one_whole_page(tmp_path: Path) -> None:
    methods = ("dense", "sla", "linear")
    measurements = [
        measure_module.measure_sample(
            Sample("transformer", step, layer, 1.0, s.grid, s.q, s.k, s.v), methods, 0.25
        )
        for step, layer in ((0, 0), (0, 2), (1, 0))
        for s in [make_sample(sparline.Grid(2, 8, 16))]
    ]
    clip = np.zeros((4, 16, 16, 3), np.uint8)
    written = write_report(tmp_path, measurements, {"model": "<tiny & odd>"}, 0.25, clip)
    assert all(path.stat().st_size > 0 for path in written)
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {
        *(f"maps-step{s}-layer{n}.png" for s, n in ((0, 0), (0, 2), (1, 0))),
        *(f"{name}.png" for name in ("recall", "errors", "skipping", "rank")),
    }
    text = written[0].read_text()
    assert "{{" not in text
    assert "&lt;tiny &amp; odd&gt;" in text
    page = Page()
    page.feed(text)
    assert not page.open
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith(("#", "data:")) for link in page.links)

    told = json.loads(written[1].read_text())
    assert told["format"] == "sparline-inspect-1"
    first = told["measurements"][0]
    assert "maps" not in first
    assert [e["method"] for e in first["errors"]] == list(methods)
    for head in range(2):
        assert sum(first["class_mass"][name][head] for name in first["class_mass"]) == (
            pytest.approx(1.0, abs=1e-5)
        )
