# SPDX-License-Identifier: Apache-2.0
"""Errors that need no clock, on Gaussian inputs and on tensors captured from the bundled model.

python bench/quality.py      writes bench/results/quality.json; bench/report.py renders it

The captured tensors are q, k and v of six layers and steps of one dense generation from noise, as
`sparline inspect --save-qkv` saves them.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparline
from sparline.bench import describe_machine
from sparline.inspect.capture import Sample, load_sample
from sparline.methods import SLA, SLA2, Dense, LowBit, Method

OUT = Path(__file__).resolve().parent / "results" / "quality.json"


def relative_l1(actual: Tensor, exact: Tensor) -> float:
    return ((actual - exact).abs().sum() / exact.abs().sum()).item()


def cosine(actual: Tensor, exact: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(actual.flatten(), exact.flatten(), dim=0).item()


# Low-bit ----------------------------------------------------------------------------------------


def low_bit_rows(samples: list[Sample]) -> list[dict[str, Any]]:
    """Dense attention with the low-bit forward against the same in float32."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 8, 2048, 128, generator=rng) for _ in range(3))
    bias = 4.0 * torch.randn(1, 8, 1, 128, generator=rng)
    cases: list[tuple[str, Method, list[tuple[Tensor, Tensor, Tensor]]]] = [
        ("Gaussian, N 2048, D 128", Dense(low_bit=LowBit(p_range=p, v_range=r)), [(q, k, v)])
        for p, r in ((448.0, 448.0), (224.0, 4.5), (448.0, 2.25))
    ]
    cases.append(("the same, a scale for 32 rows", Dense(low_bit=LowBit(q_rows=32)), [(q, k, v)]))
    cases.append(("the same, k with a bias of std 4", Dense(low_bit=LowBit()), [(q, k + bias, v)]))
    unsmoothed = SLA(keep_ratio=1.0, smooth_k="none", block_q=128, low_bit=LowBit())
    cases.append(("the same, k not smoothed", unsmoothed, [(q, k + bias, v)]))
    captured = [(s.q.transpose(1, 2), s.k.transpose(1, 2), s.v.transpose(1, 2)) for s in samples]
    cases.append(("the bundled model, captured", Dense(low_bit=LowBit()), captured))
    rows = []
    for inputs, method, tensors in cases:
        errors = []
        for one in tensors:
            o = sparline.attention(*one, method=method)
            exact = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in one))
            errors.append((relative_l1(o.double(), exact), cosine(o.double(), exact)))
        assert method.low_bit is not None
        rows.append(
            {
                "inputs": inputs,
                "p_range": method.low_bit.p_range,
                "v_range": method.low_bit.v_range,
                "q_rows": method.low_bit.q_rows or 128,
                "smooth_k": method.recipe.smooth_k,
                "relative_l1": statistics.mean(e[0] for e in errors),
                "cosine": statistics.mean(e[1] for e in errors),
            }
        )
    return rows


# Token order ------------------------------------------------------------------------------------


def token_order_rows(samples: list[Sample]) -> list[dict[str, Any]]:
    """Recall of the dense softmax and error of block-sparse attention, by token order."""
    rows = []
    for keep_ratio in (0.20, 0.10, 0.05):
        for order in ("raster", "cubes", "hilbert"):
            recalls, errors, sla2 = [], [], []
            for s in samples:
                given: dict[str, Any] = {"layout": "bnhd", "grid": s.grid}
                sparse = SLA.sparse_only(keep_ratio=keep_ratio, token_order=order, smooth_k="none")
                exact, full = sparline.attention(
                    s.q, s.k, s.v, method=Dense(), layout="bnhd", return_lse=True
                )
                o, lse = sparline.attention(s.q, s.k, s.v, method=sparse, return_lse=True, **given)
                recalls.append((lse - full).exp().mean().item())
                errors.append(relative_l1(o, exact))
                learned = SLA2(keep_ratio=keep_ratio, token_order=order, block_q=64)
                module = sparline.nn.SLA2(s.q.shape[3], s.q.shape[2], method=learned)
                module.init_alpha(s.q, s.k, s.v, **given)
                with torch.no_grad():
                    sla2.append(relative_l1(module(s.q, s.k, s.v, **given), exact))
            rows.append(
                {
                    "keep_ratio": keep_ratio,
                    "order": order,
                    "recall": statistics.mean(recalls),
                    "sparse_relative_l1": statistics.mean(errors),
                    "sla2_relative_l1": statistics.mean(sla2),
                }
            )
    return rows


def capture(folder: Path) -> list[Sample]:
    """q, k and v of layers 0, 3 and 7 in the first and the last of four steps."""
    command = [sys.executable, "-m", "sparline.cli", "inspect", "--steps", "4", "--layers", "0,3,7"]
    command += ["--at-steps", "0,3", "--methods", "dense", "--out", str(folder), "--save-qkv"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return [load_sample(path) for path in sorted((folder / "qkv").glob("*.safetensors"))]


def main() -> int:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        samples = capture(Path(folder))
    report = {
        "machine": describe_machine(),
        "samples": [s.name for s in samples],
        "low_bit": low_bit_rows(samples),
        "token_order": token_order_rows(samples),
    }
    OUT.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {OUT}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
