# SPDX-License-Identifier: Apache-2.0
"""``sparline inspect`` as a user runs it, and its report as a browser shows it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

import sparline  # noqa: E402
from sparline.cli import app  # noqa: E402

pytestmark = pytest.mark.e2e

SIZE = ["--frames", "4", "--height", "32", "--width", "32", "--steps", "2"]
FIGURES = {"maps-step0-layer1", "maps-step1-layer1", "recall", "errors", "skipping", "rank"}


@pytest.fixture(scope="session")
def chromium() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        text = "the report is not shown in a browser: there is no chromium (apt-get install it)"
        if os.environ.get("CI"):
            pytest.fail(text)
        pytest.skip(text)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with an untrained Wan transformer over pixels."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=3,
        out_channels=3,
        text_dim=128,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=64,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def reported(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the report of every method."""
    folder = tmp_path_factory.mktemp("reported") / "new"
    result = run("--model", model, *SIZE, "--layers", "-1", "--save-qkv", "--out", str(folder))
    assert result.exit_code == 0, result.output
    assert "report.html" in result.output
    return folder


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["inspect", *arguments])


def show(chromium: str, page: Path, folder: Path, *options: str) -> tuple[str, list[str], Path]:
    """The page in a headless browser: its document after scripts, its console, a screenshot."""
    screenshot = folder / "screenshot.png"
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--window-size=1320,5200", f"--user-data-dir={folder / 'profile'}"]
    command += ["--enable-logging=stderr", "--v=0", f"--screenshot={screenshot}", "--dump-dom"]
    shown = subprocess.run(
        [*command, *options, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    console = [line for line in shown.stderr.splitlines() if ":CONSOLE" in line]
    return shown.stdout, console, screenshot


def test_numbers_of_every_method_layer_step_and_head(reported: Path) -> None:
    told = json.loads((reported / "report.json").read_text())
    assert {path.stem for path in (reported / "figures").glob("*.png")} == FIGURES
    for key in ("model", "prompt", "clip", "steps", "device", "versions", "commit", "date"):
        assert told["run"][key]
    places = [(m["step"], m["layer"]) for m in told["measurements"]]
    assert places == [(0, 1), (1, 1)]
    for m in told["measurements"]:
        assert m["grid"] == [4, 16, 16, 0, 0]
        assert [e["method"] for e in m["errors"]] == list(sparline.METHODS)
        numbers: list[Any] = [m["recall"], m["skipping"], m["rank"], m["errors"]]
        flat = [float(n) for n in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", json.dumps(numbers))]
        assert np.isfinite(flat).all()
        for error in m["errors"]:
            assert len(error["relative_l1"]) == len(error["cosine"]) == 2
        assert max(m["errors"][0]["relative_l1"]) < 1e-4  # dense


def test_saved_tensors_give_the_same_numbers(reported: Path, tmp_path: Path) -> None:
    options = ["--methods", "sla,vsa", "--out", str(tmp_path)]
    result = run("--from-qkv", str(reported / "qkv"), *options)
    assert result.exit_code == 0, result.output
    ours, theirs = (
        json.loads((folder / "report.json").read_text())["measurements"]
        for folder in (tmp_path, reported)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a["recall"] == b["recall"]
        assert a["errors"] == [e for e in b["errors"] if e["method"] in ("sla", "vsa")]


def test_page_renders_without_a_word_on_the_console(
    reported: Path, chromium: str, tmp_path: Path
) -> None:
    document, console, screenshot = show(chromium, reported / "report.html", tmp_path)
    assert console == []
    assert document.count("<figure>") == len(FIGURES) + 1  # and the frames of the clip
    rows = document.partition('<table id="rows">')[2].partition("</table>")[0]
    assert rows.count("<tr>") == 1 + 2 * 2 * len(sparline.METHODS)

    picture = np.asarray(Image.open(screenshot).convert("RGB"))
    assert picture.shape[1] == 1320
    background = picture[2, 2]
    inked = (np.abs(picture.astype(int) - background).max(axis=2) > 8).mean(axis=1)
    # Something stands in nearly every stretch of 130 px, down to the end of the page.
    last = int(np.nonzero(inked)[0].max())
    assert last > 2000
    stretches = np.array_split(inked[:last], last // 130)
    assert np.mean([stretch.max() > 0 for stretch in stretches]) > 0.95
    colours = np.unique(picture[::7, ::7].reshape(-1, 3), axis=0)
    assert len(colours) > 200  # maps and plots, not text alone


def test_page_reads_in_the_dark(reported: Path, chromium: str, tmp_path: Path) -> None:
    dark = "--blink-settings=preferredColorScheme=0"
    _, console, screenshot = show(chromium, reported / "report.html", tmp_path, dark)
    assert console == []
    assert np.asarray(Image.open(screenshot).convert("L"))[2, 2] < 60


def test_tables_sort_and_filter(reported: Path, chromium: str, tmp_path: Path) -> None:
    clicks = """<script>
      document.querySelectorAll("#summary th button")[3].click();
      document.querySelectorAll("#summary th button")[3].click();
      const filter = document.querySelector("select[data-column='3']");
      filter.value = "vsa";
      filter.dispatchEvent(new Event("change"));
    </script></body>"""
    page = tmp_path / "clicked.html"
    page.write_text((reported / "report.html").read_text().replace("</body>", clicks))
    document, console, _ = show(chromium, page, tmp_path)
    assert console == []
    summary = document.partition('<table id="summary">')[2].partition("</table>")[0]
    assert 'aria-sort="descending"' in summary
    errors = [
        float(row.split("<td")[4].partition('data-value="')[2].partition('"')[0])
        for row in summary.split("<tr>")[2:]
    ]
    assert len(errors) == len(sparline.METHODS)
    assert errors == sorted(errors, reverse=True)
    rows = document.partition('<table id="rows">')[2].partition("</table>")[0]
    shown = [row for row in re.findall(r"<tr>.*?</tr>", rows) if "<td" in row]
    assert len(shown) == 4
    assert all(">vsa<" in row for row in shown)


def test_console_is_heard(chromium: str, tmp_path: Path) -> None:
    """The check above would notice a broken script and a request."""
    page = tmp_path / "broken.html"
    page.write_text("<p>text</p><script>missing()</script><script>console.error('no')</script>")
    _, console, _ = show(chromium, page, tmp_path)
    assert len(console) == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--methods", "sla,slb"], "--methods: name some of dense, .* got 'sla,slb'"),
        (["--keep-ratio", "0"], r"--keep-ratio: it must lie in \(0, 1\], got 0.0"),
        (["--layers", "2"], "--layers: there are 2, .* got 2"),
        (["--at-steps", "last"], "--at-steps: it reads 0,1,-1, got 'last'"),
        (["--prompt", "unicorn"], "--prompt: it must be one of"),
        (["--from-qkv", "nowhere"], "--from-qkv: nowhere holds no .safetensors"),
        (["--out", f"{__file__}/folder"], "nothing can be written"),
    ],
)
def test_wrong_input_gets_one_line(
    arguments: list[str], text: str, model: str, tmp_path: Path
) -> None:
    result = run("--model", model, *SIZE, "--out", str(tmp_path), *arguments)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.output.strip().splitlines() if line.startswith("sparline: ")]
    assert len(lines) == 1, result.output
    assert re.search(text, lines[0]), lines[0]
