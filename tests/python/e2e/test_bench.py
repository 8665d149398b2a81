# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of whole models, of their training and of captured tensors, at the smallest, and
their pages."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sparline

BENCH = Path(__file__).resolve().parents[3] / "bench"

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def run(script: str, *arguments: str, launcher: Sequence[str] = ()) -> str:
    pytest.importorskip("diffusers")
    done = subprocess.run(
        [sys.executable, *launcher, str(BENCH / script), *arguments],
        env={**os.environ, "SPARLINE_COMMIT": "test"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("script", ["counters", "gpu", "linear_ways", "model", "training"])
def test_help(script: str) -> None:
    assert "--out" in run(f"{script}.py", "--help")


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What renders the pages; bench/ is no package."""
    monkeypatch.syspath_prepend(str(BENCH))
    import report_captured
    import report_model

    return report_model.render_model, report_captured.render_captured


def test_model(tmp_path: Path, pages: Any) -> None:
    """Every attention, eager and in one graph for each block."""
    tiny = ["--device", "cpu", "--workload", "tiny", "--repetitions", "5", "--compiler", "eager"]
    run("model.py", *tiny, "--out", str(tmp_path))
    (path,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = ["cudnn", "sdpa", "dense", "sla2", "sla", "dynsparse"]
    assert [(r["mode"], r["method"]) for r in rows] == [
        (mode, name) for mode in ("eager", "compiled") for name in names
    ]
    for row in rows:
        assert row["suite"] == "model"
        assert row["ms"] > 0.0
        assert row["baseline"] in ("cudnn", "sdpa")
        assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["ms"], rel=1e-2)
    assert "random" in pages[0](rows, None)


def test_page_of_a_model(tmp_path: Path, pages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a GPU have stages and kernels, and a target."""
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(str(BENCH))
    import model

    shape, found = model.SHAPES["wan1.3b-480p"], []
    machine = {"kernels": "sm90", "commit": "1234567"}
    for name, mode, ms in (("cudnn", "compiled", 500.0), ("sla2", "compiled", 160.0)):
        row = next(r for r in model.rows_of([mode]) if r.name == name)
        spans = [
            ("void sparline::cuda::sparse_forward_kernel<int>(int)", 3e4),
            ("cudnn_generated_fort_native_sdpa_sm90", 8e3),
            ("nvjet_sm90_tst", 1.1e5),
        ]
        told = model.finish(
            {
                **model.describe(row, shape, SimpleNamespace(sparsity=0.97)),
                **{"ms": ms, "spread_ms": 0.1},
                "kernel_times": [
                    {"stage": model.stage_of(k, us, math.inf), "kernel": k, "launches": 1, "us": us}
                    for k, us in spans
                ],
            },
            {"cudnn": 500.0},
        )
        model.write_kernels(tmp_path / "kernels.json", machine, told)
        found.append({**told, **machine})
    assert found[1]["stages_ms"]["self-attention"] == 30.0
    assert found[1]["stages_ms"]["cross-attention"] == 8.0
    assert found[1]["stages_ms"]["idle"] == 12.0
    page = pages[0](found, json.loads((tmp_path / "kernels.json").read_text()))
    assert "| SLA2 at 97 %, compiled | ≥ 2.5× cudnn | 3.12× (met) |" in page
    assert "`sparline::cuda::sparse_forward_kernel<int>(int)` | 1 | 30.0 |" in page
    assert "| 1234567 |" in page


def test_captured(tmp_path: Path, pages: Any) -> None:
    out = tmp_path / "captured.json"
    small = ["--device", "cpu", "--grids", "2x8x16", "--layers", "0,-1", "--settings", "1"]
    run("captured.py", *small, "--out", str(out), "--plot", str(tmp_path / "captured.png"))
    report = json.loads(out.read_text())
    (entry,) = report["grids"]
    assert entry["tokens"] == 256
    assert {(s["layer"], s["level"]) for s in entry["samples"]} == {
        (layer, level) for layer in (0, 7) for level in (0.2, 0.5, 0.8)
    }
    for sample in entry["samples"]:
        dense = next(e for e in sample["errors"] if e["method"] == "dense")
        assert dense["relative_l1"] < 1e-5
    for row in entry["in_loop"]:
        for how in ("one", "each"):
            assert all(0.0 <= share <= 1.0 for share in row[how].values())
        # No rule skips more of whole tiles than their true mass allows.
        assert max(row["each"].values()) <= row["best_each"] + 0.02
    assert (tmp_path / "captured.png").stat().st_size > 10_000
    assert "In-loop skipping at equal recall" in pages[1](report)


def test_captured_inputs(pages: Any) -> None:
    """A layer of the bundled model for each input set, the model's last ones after its first."""
    pytest.importorskip("diffusers")
    import inputs
    import suites

    small = suites.Workload("small", "", (2, 8, 16), 4, 64)
    cpu = torch.device("cpu")
    layers = [inputs.make_inputs(small, "captured", cpu, seed) for seed in range(9)]
    for q, k, v in layers:
        for x in (q, k, v):
            assert x.shape == (1, 4, 256, 64)
            assert x.dtype == torch.bfloat16
            assert x.is_contiguous()
            assert x.isfinite().all()
        assert not torch.equal(q, k)
    assert all(torch.equal(a, b) for a, b in zip(layers[0], layers[8], strict=True))
    assert not any(torch.equal(layers[0][0], layers[n][0]) for n in range(1, 8))

    rows = suites.rows_of(["captured"], None, quick=False)
    assert {row.inputs for row in rows} == {"captured"}
    assert {row.name for row in rows} >= {"cudnn", "dense", "sla", "sla2", "dynsparse", "blasst"}


#: Columns of ncu, their units, and one launch.
NCU = {
    "ID": ("", "0"),
    "Kernel Name": ("", "void sparline::cuda::sparse_forward_sm90_kernel<Traits<int>>(Params)"),
    "gpu__time_duration.sum": ("ns", "1,234,000"),
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "40.4"),
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": ("%", "61.2"),
    "dram__bytes.sum": ("Mbyte", "200"),
    "l1tex__m_xbar2l1tex_read_bytes.sum": ("byte", "1,500,000,000"),
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": ("inst", "3"),
    "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio": ("inst", "1"),
    "smsp__average_warps_issue_stalled_selected_per_issue_active.ratio": ("inst", "1"),
}


def test_counters_of_what_ncu_prints(pages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import counters
    import report_counters

    table = [list(NCU), *zip(*NCU.values(), strict=True)]
    lines = [",".join(f'"{cell}"' for cell in line) for line in table]
    (found,) = counters.kernels_of("\n".join(["==PROF== Connected", *lines, "==PROF== Done"]))
    assert found["kernel"] == "sparse_forward_sm90_kernel"
    wanted = {"us": 1234.0, "tensor_pct": 61.2, "l2_pct": 40.4, "memory_pct": None}
    wanted |= {"memory_bytes": 2e8, "l2_to_sm_bytes": 1.5e9}
    assert {key: found[key] for key in wanted} == pytest.approx(wanted)
    assert found["metrics"]["tensor_pct"].startswith("sm__pipe_tensor_cycles_active")
    assert found["stalls"] == {"barrier": 0.75, "wait": 0.25}
    report = {"commit": "1234567", "workload": "tiny", "rows": [{"case": "SLA", **found}]}
    page = report_counters.render_counters(report)
    row = (
        "| SLA | `sparse_forward_sm90_kernel` | 1234 | 61 % | 40 % |  | 0.20 | 1.50 | barrier 75 %"
    )
    assert row in page


def test_linear_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums by gathering are those of the complement, and a row of the page for each ratio."""
    tiny = ["--device", "cpu", "--workload", "tiny", "--ratios", "0.2,0.1", "--repetitions", "2"]
    run("linear_ways.py", *tiny, "--out", str(tmp_path))
    (path,) = tmp_path.glob("*.linear_ways.json")
    report = json.loads(path.read_text())
    assert [row["critical_blocks"] for row in report["rows"]] == [2, 1]

    monkeypatch.syspath_prepend(str(BENCH))
    import linear_ways
    import report_ways

    page = report_ways.render_ways(report)
    assert "tiny (H 2, N 640, D 64)" in page
    assert f"| 80% | 2 | {report['rows'][0]['sparse_ms']:.3f} | " in page

    q, k, v = (torch.randn(1, 2, 600, 16) for _ in range(3))
    method = sparline.SLA.sla1(keep_ratio=0.3, block_q=128, block_k=64)
    block_map = sparline.route(q, k, method=method)
    lists, states = linear_ways.critical_lists(block_map), linear_ways.states_of(k, v, 64)
    sums = torch.full((2, 5, 16 * 16), math.nan, dtype=torch.bfloat16)
    linear_ways.gather(states, states.sum(dim=1), lists, sums)
    marginal = (block_map[0] != 1).repeat_interleave(64, 2)[..., :600].double()
    phi = k[0].double().softmax(dim=-1)
    exact = torch.einsum("hin,hnf,hnd->hifd", marginal, phi, v[0].double()).flatten(2)
    torch.testing.assert_close(sums.double(), exact, atol=0.02, rtol=0.02)


def test_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ["--device", "cpu", "--workload", "tiny", "--steps", "3"]
    run("training.py", *tiny, "--eager", "--only", "^torch|97 %$", "--out", str(tmp_path))
    (path,) = tmp_path.glob("*-eager.training.json")
    told = json.loads(path.read_text())
    assert [row["method"] for row in told["rows"]] == ["torch", "sla2 97 %"]
    for row in told["rows"]:
        assert row["ms"] > 0.0
        assert len(row["losses"]) == 5  # two of them not timed
        assert all(0.0 < loss < 10.0 for loss in row["losses"])
        assert row["peak_bytes"] is None  # of a GPU
    told["rows"][0]["peak_bytes"] = 3 << 30
    path.write_text(json.dumps(told))

    monkeypatch.syspath_prepend(str(BENCH.parent / "tools"))
    import training_estimate

    monkeypatch.setattr(training_estimate, "RESULTS", tmp_path)
    page = training_estimate.measured()
    assert f"one {told['device']}, tiny, 64 tokens" in page
    assert "blocks checkpointed, not compiled" in page
    assert "| torch | " in page
    assert "| 1.00 | 3.0 |" in page
    assert page.endswith("|  |\n")


def test_training_of_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layouts as asked for; a shared clip gives one process's losses, two clips others."""
    tiny = ["--device", "cpu", "--workload", "tiny", "--steps", "1", "--only", "97 %$"]
    run("training.py", *tiny, "--out", str(tmp_path))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run("training.py", *tiny, "--ulysses", "2,1", "--out", str(tmp_path), launcher=torchrun)
    one, two = sorted(tmp_path.glob("*.training.json"), key=lambda path: len(path.name))
    assert two.name.endswith("-x2.training.json")
    (alone,) = json.loads(one.read_text())["rows"]
    told = json.loads(two.read_text())
    shared, apart = told["rows"]
    assert [(row["gpus"], row["ulysses"], row["batch"]) for row in told["rows"]] == [
        (2, 2, 1),
        (2, 1, 2),
    ]
    assert shared["losses"] == pytest.approx(alone["losses"], rel=1e-3)
    assert apart["losses"] != pytest.approx(alone["losses"], rel=1e-3)

    monkeypatch.syspath_prepend(str(BENCH.parent / "tools"))
    import training_estimate

    monkeypatch.setattr(training_estimate, "RESULTS", tmp_path)
    page = training_estimate.measured()
    assert f"one {told['device']}, tiny, 64 tokens" in page
    assert f"on 2 {told['device']}, tiny, 64 tokens" in page
    assert "| 2 | 1 | sla2 97 % | " in page
    assert "| 1 | 2 | sla2 97 % | " in page
    assert page.endswith(f"| {apart['ms'] / 2e3:.2f} |\n")
