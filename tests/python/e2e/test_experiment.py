# SPDX-License-Identifier: Apache-2.0
"""examples/experiment at toy size: every kind of row, in pieces, and the page that comes of it."""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("yaml")

import training
import yaml

import sparline

pytestmark = pytest.mark.e2e

FOLDER = Path(__file__).parents[3] / "examples" / "experiment"
BLOCKS = {"block_q": 16, "block_k": 16}
ROWS: list[dict[str, Any]] = [
    {
        "name": "dense",
        "words": "dense",
        "method": {"name": "original"},
        "has_ratio": False,
        "seeds": 2,
        "keep": True,
    },
    {"name": "sparse", "words": "sparse only", "method": {"name": "sparse", **BLOCKS}, "seeds": 2},
    {
        "name": "sla2",
        "words": "SLA2",
        "method": {"name": "sla2", "num_alphas": 16, "low_bit": True, **BLOCKS},
        "router": "raster",  # which is trained in 16 bits all the same
        "set": ["parameters.alpha.learning_rate=0.1"],
    },
    {"name": "linear", "words": "linear", "method": {"name": "linear"}, "has_ratio": False},
    {
        "name": "vsa",
        "words": "VSA",
        "method": {"name": "vsa", "cube": [2, 4, 4]},
        "density_by": "num_cubes",
    },
    {
        "name": "vmoba",
        "words": "VMoBA",
        "method": {"name": "vmoba", "partition": "3d", "box_3d": [2, 4, 4], **BLOCKS},
        "density_by": "threshold",
    },
    {
        "name": "free_top_p",
        "words": "top-p",
        "method": {"name": "top_p", **BLOCKS},
        "density_by": "keep_mass",
        "is_free": True,
    },
    {
        "name": "free_dynsparse",
        "words": "DynSparse",
        "method": {"name": "dynsparse", "decide_rows": 16, **BLOCKS},
        "density_by": "log_threshold",
        "is_free": True,
    },
]
PIECES = [
    "start",
    "dense-seed0",
    "router-raster",
    "sparse-0.25-seed0",
    "sla2-0.25-seed0",
    "linear-seed0",
    "vsa-0.25-seed0",
    "vmoba-0.25-seed0",
    "free_top_p-0.25-seed0",
    "free_dynsparse-0.25-seed0",
    "dense-seed1",
    "sparse-0.25-seed1",
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"experiment_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.insert(0, str(FOLDER))  # as for a script that is run: it imports its neighbours
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the toy's configuration, model and scenes."""
    folder = tmp_path_factory.mktemp("experiment")
    settings = {
        "name": "toy",
        "ratios": [0.25],
        "start": {"training": {"max_train_steps": 3}},
        "train": {
            "model": {"path": str(training.save_model(folder / "model"))},
            "data": {**training.SIZE, "train_batch_size": 2},
            "optimizer": {"learning_rate": 1e-2},
            "training": {"max_train_steps": 6, "ema_decay": 0.5},
            "logging": {"logging_steps": 2, "validation_steps": 3, "validation_batches": 2},
        },
        "router": {"router": {"keep_ratios": [0.25], "steps": 3, "buffer_samples": 2}},
        "evaluation": {
            "held_out_clips": 6,
            "prompts": ["one"],
            "seeds": 1,
            "steps": 2,
            "guidance": 1.0,
            "strength": 0.6,
        },
        "rows": ROWS,
    }
    training.save_scenes(folder / "scenes.npz")
    (folder / "toy.yaml").write_text(yaml.safe_dump(settings))
    return folder


def run(toy: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    command = ["experiment", str(toy / "toy.yaml"), "--out", str(toy / "out"), "--device", "cpu"]
    command += ["--data", str(toy / "scenes.npz")]
    monkeypatch.setattr(sys, "argv", [*command, *options])
    code: int = load("experiment").main()
    return code


def test_all_pieces_and_the_page(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In turns: one piece whose time runs out, one by name, then the rest.
    assert run(toy, monkeypatch, "--only", "dense-seed0") == 0
    assert "dense-seed0 needs start" in capsys.readouterr().out
    assert run(toy, monkeypatch, "--minutes", "0") == 0
    assert "0 of 12 pieces are done" in capsys.readouterr().out
    assert run(toy, monkeypatch, "--only", "start") == 0
    start = (toy / "out" / "toy" / "start" / "result.json").read_bytes()
    assert run(toy, monkeypatch) == 0
    assert "12 of 12 pieces are done" in capsys.readouterr().out
    assert (toy / "out" / "toy" / "start" / "result.json").read_bytes() == start

    text = (toy / "out" / "toy" / "results.jsonl").read_text()
    results = {r["piece"]: r for r in map(json.loads, text.splitlines())}
    assert list(results) == PIECES
    *errors, kept = results["router-raster"]["errors"]["0.25"]  # before, trained, fitted
    assert len(errors) == 3
    assert kept == min(errors) > 0
    for name, r in results.items():
        if name in ("start", "router-raster"):
            continue
        assert len(r["held_out"]) == 6, name
        assert r["held_out_loss"] == pytest.approx(statistics.fmean(x for _, x in r["held_out"]))
        if "dense" not in name:
            assert r["noise_psnr_db"] > 5, name
            assert 0 <= r["clip_ssim"] <= 1, name
            cosines = r["attention_cosine"].values()
            assert all(0.5 < x <= 1.0001 for x in cosines), (name, cosines)
    for name in ("sparse-0.25-seed0", "sla2-0.25-seed0", "vsa-0.25-seed0"):
        assert results[name]["density"] == pytest.approx(0.25), name
    for name in ("free_top_p-0.25-seed0", "vmoba-0.25-seed0"):  # found by search
        assert results[name]["density"] == pytest.approx(0.25, abs=0.1), name
    assert results["dense-seed0"]["density"] == 1.0
    assert results["sparse-0.25-seed0"]["held_out"] != results["sparse-0.25-seed1"]["held_out"]
    assert {r["steps"] for r in results.values() if r["kind"] == "train"} == {6}
    curve = results["sla2-0.25-seed0"]["held_out_curve"]
    assert [step for step, _ in curve] == [3, 6]
    folder = toy / "out" / "toy"
    assert (folder / "dense-seed0" / "final" / "transformer").is_dir()
    assert not (folder / "sparse-0.25-seed0" / "final").exists()  # only rows that ask for it
    assert not list(folder.rglob("checkpoint-*"))
    assert not list(folder.glob("*.claim"))

    page = toy / "quality.md"
    store = toy / "store"
    command = ["render", "--page", str(page), "--store", str(store)]
    render = load("render")
    monkeypatch.setattr(sys, "argv", [*command, str(folder / "results.jsonl")])
    assert render.main() == 0
    words = page.read_text()
    for row in ROWS:
        assert f"| {row['words']} |" in words
    assert "### 75 % sparsity" in words
    assert f"| 75 % | {errors[0]:.4f} | {errors[1]:.4f} | {errors[2]:.4f} | {kept:.4f} |" in words
    assert (toy / "quality-toy.png").stat().st_size > 10_000
    monkeypatch.setattr(sys, "argv", [*command, "--check"])
    assert render.main() == 0
    page.write_text(words.replace("dense", "tense", 1))
    assert render.main() == 1


def test_a_row_that_fails_costs_no_other(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = yaml.safe_load((toy / "toy.yaml").read_text())
    del settings["start"]
    wrong = {"name": "wrong", "words": "wrong", "method": {"name": "vsa", "cube": [1, 2, 2]}}
    settings["rows"] = [ROWS[0], wrong, ROWS[1]]
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(settings))
    command = ["experiment", str(tmp_path / "toy.yaml"), "--out", str(tmp_path), "--device", "cpu"]
    command += ["--data", str(toy / "scenes.npz"), "--only", "*-seed0"]
    monkeypatch.setattr(sys, "argv", command)
    assert load("experiment").main() == 1
    told = capsys.readouterr()
    assert "wrong-0.25-seed0 FAILED" in told.out
    assert "got (1, 2, 2) with 4" in told.err
    assert "2 of 5 pieces are done" in told.out


def test_two_processes_share_the_pieces(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load("experiment")
    monkeypatch.setattr(sys, "argv", ["experiment", str(toy / "toy.yaml"), "--out", str(tmp_path)])
    one, two = (module.Experiment(toy / "toy.yaml", module.parse_args()) for _ in range(2))
    one.folder.mkdir()
    piece = one.all_pieces()[0]
    assert [p.name for p in one.all_pieces()] == PIECES
    assert one.claim(piece)
    assert not two.claim(piece)
    one.claim_file(piece).unlink()
    assert two.claim(piece)
    needs = {p.name: one.needs(p) for p in one.all_pieces()}
    assert needs["start"] == []
    assert needs["sla2-0.25-seed0"] == ["start", "router-raster"]
    assert needs["free_top_p-0.25-seed0"] == ["start", "dense-seed0"]


@pytest.mark.parametrize("name", ["short", "long"])
def test_the_committed_experiments_are_whole(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every configuration parses, every method of a row exists, and lengths are as announced."""
    module = load("experiment")
    monkeypatch.setattr(sys, "argv", ["experiment", f"{name}.yaml", "--out", str(tmp_path)])
    experiment = module.Experiment(Path(f"{name}.yaml"), module.parse_args())
    assert experiment.folder == tmp_path / f"{name}-textures"  # without scenes
    monkeypatch.setattr(experiment, "scenes", lambda: tmp_path / "scenes.npz")
    monkeypatch.setattr(
        experiment, "search", lambda row, *_: -1.0 if "log" in row.density_by else 0.5
    )
    assert experiment.grid.length == {"short": 8192, "long": 36864}[name]
    for piece in experiment.all_pieces():
        if piece.row is None:
            continue
        method = experiment.at_density(piece.row, piece.ratio)
        if piece.kind == "train":
            config = experiment.config(piece, method)
            made = config.method.make()
        else:
            made = sparline.method(method["name"], **module.without_name(method))
        if piece.row.density_by == "num_cubes":
            assert isinstance(made, sparline.VSA)
            assert made.num_cubes is not None
            cubes = experiment.grid.length / 64
            assert made.num_cubes / cubes == pytest.approx(piece.ratio, rel=0.25)


def test_a_router_fits_one_method() -> None:
    make, check = load("experiment").Row, load("experiment").check_routers
    method = {"name": "sla2", "keep_ratio": 0.1}
    rows = [make("a", "a", method, router="one")]
    check([*rows, make("b", "b", {**method, "low_bit": True}, router="one")])
    check([*rows, make("b", "b", {**method, "token_order": "cubes"}, router="two")])
    for wrong in (
        make("b", "b", {**method, "token_order": "cubes"}, router="one"),
        make("b", "b", method, router="one", is_free=True),
    ):
        with pytest.raises(SystemExit, match="b cannot start from the router one"):
            check([*rows, wrong])


def test_a_row_is_compared_with_dense_from_its_own_start() -> None:
    render = load("render")

    def result(row: str, loss: float, start: float | None, ratio: float | None) -> dict[str, Any]:
        told = {"row": row, "ratio": ratio, "seed": 0, "is_free": False}
        told["held_out"] = [(0.1, loss), (0.9, loss)]
        return told if start is None else {**told, "start_loss": start}

    results = [
        result("dense", 1.0, None, None),
        result("sparse", 2.0, None, 0.05),
        result("dense", 4.0, 0.5, None),
        result("sla2", 6.0, 0.5, 0.05),
        result("vsa", 6.0, 0.7, 0.05),
    ]
    assert render.delta(results[1], results) == (100.0, 0.0)
    assert render.delta(results[3], results) == (50.0, 0.0)
    assert render.gap_closed(results[3], results) == 0.5
    assert render.delta(results[4], results) is None  # there is no dense from that start


def test_forms_are_least_squares() -> None:
    """Each form of the branches against a solution of its own in float64, two calls together."""
    forms = load("forms")
    heads, rows, dim, block = 2, 300, 4, forms.BLOCK_Q

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    fit, calls = forms.Fit(), []
    for _ in range(2):
        o_s, o_l, noise = (draw(heads, rows, dim) for _ in range(3))
        mass = draw(heads, rows).sigmoid()
        o = 0.6 * o_s + o_l @ draw(dim, dim) + 0.1 * noise
        calls.append(forms.Parts(o_s, o_l, o, mass))
        fit.add(calls[-1])
    o_s, o_l, o = (torch.cat([getattr(c, n) for c in calls], 1) for n in ("o_s", "o_l", "o"))
    mass = torch.cat([c.mass for c in calls], 1)[..., None]
    x = torch.cat([o_l, torch.ones_like(o_l[..., :1])], dim=-1)

    def mapped(missed: torch.Tensor, of_head: bool = False) -> torch.Tensor:
        if of_head:
            return x @ torch.linalg.lstsq(x, missed).solution
        return x @ torch.linalg.lstsq(x.flatten(0, 1), missed.flatten(0, 1)).solution

    d = o_s - o_l
    alpha = (((o - o_l) * d).sum((1, 2)) / d.square().sum((1, 2))).clamp(0, 1)[:, None, None]
    by_block = torch.empty(heads, rows, 1, dtype=torch.float64)
    for at in range(0, rows, block):
        part = [y.unflatten(1, (2, rows))[:, :, at : at + block] for y in (o - o_l, d)]
        found = (part[0] * part[1]).sum((1, 2, 3)) / part[1].square().sum((1, 2, 3))
        by_block[:, at : at + block] = found.clamp(0, 1)[:, None, None]
    by_block = by_block.repeat(1, 2, 1)
    wanted = {
        forms.SPARSE: o_s,
        forms.SHARED: o_s + mapped(o - o_s),
        forms.PER_HEAD: o_s + mapped(o - o_s, of_head=True),
        forms.MASS: mass * o_s + (1 - mass) * o_l,
        forms.MASS_AND_MAP: mass * o_s + mapped(o - mass * o_s),
        forms.ALPHA_HEAD: alpha * o_s + (1 - alpha) * o_l,
        forms.ALPHA_AND_MAP: alpha * o_s + mapped(o - alpha * o_s),
        forms.ALPHA_BLOCK: by_block * o_s + (1 - by_block) * o_l,
    }
    for n, call in enumerate(calls):
        given = dict([*fit.projected(call, 0.0), *fit.blended(call)])
        assert given.keys() == wanted.keys()
        for form, found in given.items():
            exact = wanted[form][:, n * rows : (n + 1) * rows]
            torch.testing.assert_close(found, exact, atol=1e-9, rtol=0, msg=form)


def test_parts_of_a_call() -> None:
    """Branches and mass against dense arithmetic in float64."""
    forms = load("forms")
    q, k, v = (torch.randn(1, 96, 2, 16) for _ in range(3))
    o = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    method = sparline.SLA(keep_ratio=0.5, negligible_ratio=0.0, **BLOCKS)
    call = forms.layerwise.Call(q, k, v, o.transpose(1, 2), {"layout": "bnhd"})
    parts = forms.parts_of(call, {"": method})[""]
    rows = [x[0].transpose(0, 1) for x in (q, k, v)]
    critical = sparline.route(*(x[None] for x in rows[:2]), method=method)[0] == 1
    critical = critical.repeat_interleave(16, 1).repeat_interleave(16, 2)
    q, k, v = (x.double() for x in rows)
    p = (q @ k.mT / 4).softmax(dim=-1)
    mass = (p * critical).sum(-1)
    linear = (q.softmax(dim=-1) @ k.softmax(dim=-1).mT) * ~critical
    for found, exact in (
        (parts.o, p @ v),
        (parts.mass, mass),
        (parts.o_s, (p * critical) @ v / mass[..., None]),
        (parts.o_l, linear @ v / linear.sum(-1, keepdim=True)),
    ):
        torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=0)


def test_forms_of_a_model_and_their_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forms, render = load("forms"), load("render")
    given = training.make_config(tmp_path / "run")
    out = tmp_path / "forms.json"
    command = ["forms", "--data", str(given.data.path), "--model", str(given.model.path)]
    command += ["--clip", "4x16x16", "--ratios", "0.5", "--fit", "2", "--held-out", "2"]
    monkeypatch.setattr(forms, "BLOCK_Q", 16)
    monkeypatch.setattr(sys, "argv", [*command, "--device", "cpu", "--out", str(out)])
    assert forms.main() == 0
    told = json.loads(out.read_text())
    assert told["tokens"] == 256
    assert len(told["rows"]) == 8 * len(forms.BRANCHES)
    for row in told["rows"]:
        assert 0.0 < row["error"] < 10.0
        assert (row["ridge"] is not None) == ("Wᵀ" in row["form"])
    assert set(render.PUBLISHED_FORMS) == {forms.SHARED, forms.ALPHA_BLOCK}
    page = render.page({}, told)
    assert "256 tokens" in page
    error = next(r["error"] for r in told["rows"] if r["form"] == forms.SPARSE)
    assert f"| o_s | {error:.3f} |" in page
    assert page.count("| relu | ") == len(render.PUBLISHED_FORMS)
