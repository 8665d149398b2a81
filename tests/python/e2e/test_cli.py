# SPDX-License-Identifier: Apache-2.0
"""The command line on a tiny model: what it writes, and one clear line for wrong input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

diffusers = pytest.importorskip("diffusers")

import sparline  # noqa: E402
from sparline import video  # noqa: E402
from sparline.cli import app  # noqa: E402

pytestmark = pytest.mark.e2e

SIZE = ["--frames", "4", "--height", "32", "--width", "32", "--steps", "2"]


def transformer(channels: int = 3) -> Any:
    torch.manual_seed(0)
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=channels,
        text_dim=128,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=64,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with an untrained Wan transformer over pixels."""
    folder = tmp_path_factory.mktemp("model")
    transformer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight frames of 48 x 40 in which a square moves."""
    frames = np.full((8, 40, 48, 3), 60, np.uint8)
    for t, frame in enumerate(frames):
        frame[10:20, 4 * t : 4 * t + 10] = (220, 180, 40)
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    video.write_clip(path, frames)
    return path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_generate_writes_clip_and_sheet(model: str, tmp_path: Path) -> None:
    result = run("generate", "--model", model, *SIZE, "--out", str(tmp_path / "new" / "folder"))
    assert result.exit_code == 0, result.output
    names = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert names == {"sla.mp4", "sheet.png", "results.json"}


def test_compare_at_equal_seeds(model: str, tmp_path: Path) -> None:
    methods = "original,dense,sla:keep_ratio=0.2,sla:keep_ratio=1.0"
    result = run("generate", "--model", model, *SIZE, "--compare", methods, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "compare.mp4").stat().st_size > 0
    report = json.loads((tmp_path / "results.json").read_text())
    original, dense, sparse, everything = report["results"]
    assert original["psnr_db"] is None
    assert dense["psnr_db"] > 50  # our dense kernel against torch's
    assert everything["psnr_db"] > 50
    assert sparse["psnr_db"] < dense["psnr_db"]
    assert 0.7 < sparse["sparsity"] < 0.9
    assert original["sparsity"] == dense["sparsity"] == everything["sparsity"] == 0.0
    for row in report["results"]:
        assert row["step_s"] > 0
        assert 0 < row["attention_share"] < 1


def test_regenerates_a_clip(model: str, clip: Path, tmp_path: Path) -> None:
    arguments = ["--init-video", str(clip), "--strength", "0.5", "--gif", "--out", str(tmp_path)]
    result = run("generate", "--model", model, *SIZE, *arguments)
    assert result.exit_code == 0, result.output
    assert {p.name for p in tmp_path.iterdir()} == {
        "sla.gif",
        "compare.gif",
        "sheet.png",
        "results.json",
    }


def test_learned_state_is_used(model: str, tmp_path: Path) -> None:
    transformer = diffusers.WanTransformer3DModel.from_pretrained(model)
    sparline.apply(transformer, sparline.SLA(keep_ratio=0.2))
    for _, parameter in sparline.integrations.diffusers.learned_parameters(transformer):
        torch.nn.init.normal_(parameter, std=0.3)
    state = tmp_path / "state.safetensors"
    sparline.save_state(transformer, state)
    arguments = ["generate", "--model", model, *SIZE, "--set", "keep_ratio=0.2"]
    assert run(*arguments, "--out", str(tmp_path / "a")).exit_code == 0
    result = run(*arguments, "--state", str(state), "--out", str(tmp_path / "b"))
    assert result.exit_code == 0, result.output
    plain, learned = (video.read_clip(tmp_path / x / "sla.mp4", 4, 32, 32) for x in "ab")
    assert video.psnr(plain, learned) < 60


def test_a_fine_tuned_model_brings_its_weights_and_method(model: str, tmp_path: Path) -> None:
    tuned_model = diffusers.WanTransformer3DModel.from_pretrained(model)
    torch.nn.init.normal_(tuned_model.proj_out.weight, std=0.05)
    final = tmp_path / "final"
    tuned_model.save_pretrained(final / "transformer")
    sparline.apply(tuned_model, sparline.SLA2(keep_ratio=0.3, num_alphas=2))
    state = final / "sparline.safetensors"
    sparline.save_state(tuned_model, state)
    base = ["generate", "--model", model, *SIZE]
    methods = f"original,{final},original"
    out = tmp_path / "out"
    result = run(*base, "--compare", methods, "--out", str(out))
    assert result.exit_code == 0, result.output
    first, tuned, last = json.loads((out / "results.json").read_text())["results"]
    assert tuned["label"] == str(final)
    assert tuned["sparsity"] > 0.5
    assert tuned["psnr_db"] < 40
    assert last["psnr_db"] > 60  # the model itself was left alone
    assert first["sparsity"] == last["sparsity"] == 0.0
    # The same as the training guide's two lines.
    loaded = diffusers.WanTransformer3DModel.from_pretrained(final / "transformer")
    loaded.save_pretrained(tmp_path / "alone")
    own = ["generate", "--model", str(tmp_path / "alone"), *SIZE, "--state", str(state)]
    own += ["--method", "sla2:keep_ratio=0.3:num_alphas=2"]
    result = run(*own, "--out", str(tmp_path / "own"))
    assert result.exit_code == 0, result.output
    (clip,) = (tmp_path / "own").glob("sla2*.mp4")
    (same,) = out.glob("*final.mp4")
    assert video.psnr(*(video.read_clip(x, 4, 32, 32) for x in (clip, same))) > 60
    result = run(*base, "--method", str(final), "--dense-steps", "2", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert json.loads((out / "results.json").read_text())["results"][0]["sparsity"] == 0.0
    arguments = ["--method", str(final), "--dense-layers", "0", "--out", str(out)]
    assert_one_line(run(*base, *arguments), "was tuned with layers of its own")
    arguments = ["--method", str(final), "--state", str(state), "--out", str(out)]
    assert_one_line(run(*base, *arguments), "brings what it learned")


def test_fine_tuned_models_that_cannot_be_used(model: str, tmp_path: Path) -> None:
    base = ["generate", "--model", model, *SIZE, "--out", str(tmp_path / "out")]
    assert_one_line(run(*base, "--method", f"{tmp_path}/no"), "must be a fine-tuned model")
    other = tmp_path / "other" / "transformer"
    transformer(channels=4).save_pretrained(other)
    assert_one_line(run(*base, "--method", str(other.parent)), "in_channels is 3, got 4")
    broken = tmp_path / "broken" / "transformer"
    diffusers.WanTransformer3DModel.from_pretrained(model).save_pretrained(broken)
    (weights,) = broken.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    result = run(*base, "--method", str(broken.parent))
    assert result.exit_code == 2
    assert "cannot be loaded" in result.output.strip().splitlines()[-1]  # below the progress bar


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--method", "slb"], "must be one of original, dense, sla.* got 'slb'"),
        (["--set", "keep=0.1"], "no method of 'sla' has the option keep"),
        (["--set", "keep_ratio"], "key=value, got 'keep_ratio'"),
        (["--set", "keep_ratio=1.5"], r"keep_ratio must lie in \[0, 1\], got 1.5"),
        (["--method", "sla:speed=9"], "no option speed"),
        (["--prompt", "unicorn"], "--prompt: it must be one of .* got 'unicorn'"),
        (["--height", "33"], "--height: it must be a positive multiple of 2, got 33"),
        (["--init-video", "nowhere.mp4"], "there is no file nowhere.mp4"),
        (["--init-video", __file__], "must be a video file"),
        (["--dense-layers", "9"], "dense_layers must name blocks of the model, which has 2, got 9"),
        (["--dense-layers", "first"], "--dense-layers: it reads 0,1,-1, got 'first'"),
        (["--state", "nowhere.safetensors"], "there is no file nowhere.safetensors"),
        (["--out", f"{__file__}/folder"], "nothing can be written"),
        (["--compare", ","], "name at least one method"),
    ],
)
def test_wrong_input_gets_one_line(
    arguments: list[str], text: str, model: str, tmp_path: Path
) -> None:
    base = ["generate", "--model", model, *SIZE, "--out", str(tmp_path)]
    assert_one_line(run(*base, *arguments), text)


def test_clip_that_is_too_short(model: str, clip: Path, tmp_path: Path) -> None:
    arguments = ["--init-video", str(clip), "--frames", "9", "--height", "32", "--width", "32"]
    result = run("generate", "--model", model, *arguments, "--out", str(tmp_path))
    assert_one_line(result, "at least 9 frames, got 8")


def test_bad_strength(model: str, clip: Path, tmp_path: Path) -> None:
    arguments = ["--init-video", str(clip), "--strength", "0", "--out", str(tmp_path)]
    result = run("generate", "--model", model, *SIZE, *arguments)
    assert_one_line(result, r"--strength: it must lie in \(0, 1\], got 0.0")


def test_model_that_is_not_there(tmp_path: Path) -> None:
    assert_one_line(run("generate", "--model", str(tmp_path / "x")), "there is no folder")
    (tmp_path / "config.json").write_text("{}")
    assert_one_line(run("generate", "--model", str(tmp_path)), "cannot be loaded")


def test_latent_transformer_without_its_vae(tmp_path: Path) -> None:
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=16, text_dim=16, ffn_dim=16, num_layers=1
    )
    model.save_pretrained(tmp_path)
    result = run("generate", "--model", str(tmp_path))
    assert_one_line(result, "bare transformer of 16 latent channels.*whole pipeline")


def test_model_of_another_kind() -> None:
    from sparline.generate import InputError, Job, check_job

    class Pipeline:
        transformer = torch.nn.Linear(2, 2)

    job = Job("a cat", num_frames=1, height=2, width=2, steps=1, guidance=1.0, seed=0)
    for pipeline in (Pipeline(), object()):
        with pytest.raises(InputError, match=r"--model: .*WanTransformer3DModel"):
            check_job(pipeline, job)


def test_doctor_and_explain() -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for word in ("torch", "library", "cpu:", "bundled demo model", "backend: cpu"):
        assert word in result.output
    result = run("explain", "dense", "--shape", "1,2,256,16", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "256 queries x 256 keys" in " ".join(result.output.split())
    for arguments, text in (
        (["--shape", "1,2"], "--shape: it reads B,H,N,D"),
        (["--dtype", "int8"], "--dtype"),
        (["--shape", "1,2,64,7"], "head_dim"),
    ):
        assert_one_line(run("explain", "sla", *arguments), text)


def test_bench_checks_times_and_appends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparline import bench

    tiny = bench.Workload("cpu-8k", "tiny", (2, 8, 8), 2, 16)
    monkeypatch.setitem(bench.WORKLOADS, "cpu-8k", tiny)
    monkeypatch.setattr(bench, "sgemm_gflops", lambda: 100.0)  # seconds on a busy machine
    for _ in range(2):
        result = run("bench", "--suite", "quick", "--repetitions", "2", "--out", str(tmp_path))
        assert result.exit_code == 0, result.output
    (path,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["method"] for row in rows] == ["sdpa", "dense", "sla"] * 2
    wanted = "suite method pass workload B H N D dtype sparsity blocks scope inputs ms ms_kernel"
    wanted += " baseline baseline_ms ratio extra_bytes device torch commit date"
    assert set(wanted.split()) <= set(rows[0])
    assert_one_line(run("bench", "--workload", "cpu-9k"), "--workload")
    assert_one_line(run("bench", "--suite", "gpu"), "--suite")


def assert_one_line(result: Result, text: str) -> None:
    assert result.exit_code == 2, result.output
    lines = result.output.strip().splitlines()
    assert len(lines) == 1, result.output
    assert lines[0].startswith("sparline: ")
    assert re.search(text, lines[0]), lines[0]
