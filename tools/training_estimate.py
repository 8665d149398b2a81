# SPDX-License-Identifier: Apache-2.0
"""Renders a part of docs/training.md: memory and work of a training step of Wan 2.1, computed, and
what steps measured by bench/training.py take.

Parameters are those of the host's own model class, and activations are what its autograd keeps of
one block, both counted on tensors without data at the true length. Work counts multiply-adds as two
(sparline.accounting). The computed time is the work over a sustained rate that is assumed.

python tools/training_estimate.py [--check]      --check fails if the page is not what would be
                                                 written
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sparline
from sparline.accounting import flops
from sparline.methods import Method

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "training.md"
RESULTS = ROOT / "bench" / "results"
START, END = (f"<!-- {word}: tools/training_estimate.py -->\n" for word in ("from here", "to here"))

TEXT_TOKENS = 512
#: float32: weights, gradients, two moments, and the moving average.
STATE_BYTES = 4 * (1 + 1 + 2 + 1)
#: Blocks whose weights FSDP holds whole at a time: the one that runs and the one that is fetched.
GATHERED_BLOCKS = 2
ASSUMED_TFLOPS = 350.0
GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Model:
    name: str
    num_heads: int
    num_layers: int
    ffn_dim: int
    grid: tuple[int, int, int]
    #: (GPUs, Ulysses degree)
    layouts: tuple[tuple[int, int], ...]

    @property
    def num_tokens(self) -> int:
        frames, height, width = self.grid
        return frames * height * width

    def build(self) -> Any:
        return WanTransformer3DModel(
            num_attention_heads=self.num_heads,
            attention_head_dim=128,
            num_layers=self.num_layers,
            ffn_dim=self.ffn_dim,
        )


MODELS = (
    Model("1.3B, 480p", 12, 30, 8960, (21, 30, 52), ((1, 1), (2, 1), (4, 4), (8, 4))),
    Model("14B, 480p", 40, 40, 13824, (21, 30, 52), ((8, 8), (16, 8), (64, 8))),
    Model("14B, 720p", 40, 40, 13824, (21, 45, 80), ((8, 8), (16, 8), (64, 8))),
)
SPARSE = sparline.SLA2(keep_ratio=0.03)


def block_bytes(model: Model, num_tokens: int) -> int:
    """What autograd keeps of one block, of ``num_tokens`` tokens in bf16, weights left out."""
    with torch.device("meta"):
        transformer = dataclasses.replace(model, num_layers=1).build()
        # SLA keeps what SLA2 does, but for alpha's few values, and runs on fake tensors.
        sparline.apply(transformer, sparline.SLA.sla_main(keep_ratio=0.03, block_q=128))
    with FakeTensorMode():  # of the CPU: autocast knows no tensors on "meta"
        for module in transformer.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(weight.shape))
        block = transformer.blocks[0].train()
        weights = {p.untyped_storage()._cdata for p in transformer.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        dim = model.num_heads * 128
        states = torch.randn(1, num_tokens, dim, dtype=torch.bfloat16, requires_grad=True)
        text = torch.randn(1, TEXT_TOKENS, dim, dtype=torch.bfloat16)
        rotary = tuple(torch.randn(1, num_tokens, 1, 128) for _ in range(2))
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with torch.autocast("cpu", torch.bfloat16), hooks:
            out = block(states, text, torch.randn(1, 6, dim), rotary)
        del out
    return sum(kept.values())


def count(model: Model) -> tuple[int, int]:
    """Parameters of the whole model and of one block."""
    with torch.device("meta"):
        transformer = model.build()
    block = sum(p.numel() for p in transformer.blocks[0].parameters())
    return sum(p.numel() for p in transformer.parameters()), block


def step_flops(model: Model, method: Method | None, block_parameters: int) -> float:
    """Of one clip: forward, the forward again (checkpointed activations), backward."""
    n = model.num_tokens
    products = 2.0 * block_parameters * n  # a forward of the linear maps; those of text are few
    shape = {"num_heads": model.num_heads, "num_queries": n, "head_dim": 128}
    forward = flops(method or sparline.Dense(), **shape)
    both = flops(method or sparline.Dense(), **shape, direction="both")
    cross = 4.0 * n * TEXT_TOKENS * 128 * model.num_heads * 4.5
    return model.num_layers * (4.0 * products + forward.total + both.total + cross)


def table() -> str:
    lines = [
        f"| model | GPUs | Ulysses | clips a step | GiB a GPU | PFLOP a GPU: dense, SLA2 97 % "
        f"| s a step at {ASSUMED_TFLOPS:.0f} TFLOP/s: dense, SLA2 97 % |\n",
        "|---|---:|---:|---:|---:|---:|---:|\n",
    ]
    for model in MODELS:
        total, block = count(model)
        dense, sparse = (step_flops(model, method, block) for method in (None, SPARSE))
        for num_gpus, degree in model.layouts:
            own_tokens = model.num_tokens // degree
            dim = model.num_heads * 128
            gathered = 4 * GATHERED_BLOCKS * block if num_gpus > 1 else 0
            inputs = 2 * own_tokens * dim * model.num_layers  # of blocks, in bf16
            needed = STATE_BYTES * total / num_gpus + gathered + inputs
            needed += block_bytes(model, own_tokens)
            work = [x / degree / 1e15 for x in (dense, sparse)]
            seconds = [1e3 * x / ASSUMED_TFLOPS for x in work]
            cells = [
                f"{model.name}, {model.num_tokens:,} tokens".replace(",", " ").replace("  ", ", "),
                f"{num_gpus}",
                f"{degree}",
                f"{num_gpus // degree}",
                f"{needed / GIB:.0f}" + ("" if needed < 72 * GIB else " (not on 80 GB)"),
                f"{work[0]:.1f}, {work[1]:.1f}",
                f"{seconds[0]:.1f}, {seconds[1]:.1f}",
            ]
            lines.append("| " + " | ".join(cells) + " |\n")
    return "".join(lines)


def measured() -> str:
    """What bench/training.py found, on each device and number of GPUs."""
    parts = []
    reports = [json.loads(path.read_text()) for path in RESULTS.glob("*.training.json")]
    for told in sorted(reports, key=order):
        rows = told["rows"]
        num_gpus = rows[0].get("gpus", 1)
        device = f"one {told['device']}" if num_gpus == 1 else f"{num_gpus} {told['device']}"
        parts.append(
            f"\nMeasured by `{'python' if num_gpus == 1 else 'torchrun'} bench/training.py`: steps "
            f"of `sparline train` on {device}, {rows[0]['workload']}, {rows[0]['N']} tokens, "
            "random weights, blocks checkpointed"
            + (" and compiled" if rows[0].get("compiled", True) else ", not compiled")
            + (", weights sharded (FSDP2), NCCL" if num_gpus > 1 else "")
            + f", torch {told['torch']}, commit {told['commit']}.\n\n"
        )
        parts.append(alone(rows) if num_gpus == 1 else together(rows))
    return "".join(parts)


def order(report: dict[str, Any]) -> tuple[str, bool, int]:
    """By device, then compiled before not, then by number of GPUs."""
    row = report["rows"][0]
    return report["device"], not row.get("compiled", True), row.get("gpus", 1)


def alone(rows: list[dict[str, Any]]) -> str:
    lines = ["| attention | s a step | times as fast | GiB |\n|---|---:|---:|---:|\n"]
    lines += [f"| {row['method']} | {cells(row, rows)} |\n" for row in rows]
    return "".join(lines)


def together(rows: list[dict[str, Any]]) -> str:
    lines = [
        "Under Ulysses diffusers computes the forward of torch's attention once more in its "
        "backward, which favours the others.\n\n",
        "| Ulysses | clips a step | attention | s a step | times as fast | GiB a GPU | s a clip |\n"
        "|---:|---:|---|---:|---:|---:|---:|\n",
    ]
    lines += [
        f"| {row['ulysses']} | {row['batch']} | {row['method']} | {cells(row, rows)} "
        f"| {row['ms'] / row['batch'] / 1e3:.2f} |\n"
        for row in rows
    ]
    return "".join(lines)


def cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Seconds, times as fast as torch's attention in the same layout, memory."""
    degree = row.get("ulysses", 1)
    bases = (r["ms"] for r in rows if (r["method"], r.get("ulysses", 1)) == ("torch", degree))
    base = next(bases, None)
    ratio = "" if base is None else f"{base / row['ms']:.2f}"
    memory = f"{row['peak_bytes'] / GIB:.1f}" if row["peak_bytes"] else ""  # of a GPU
    return f"{row['ms'] / 1e3:.2f} ± {row['spread_ms'] / 1e3:.2f} | {ratio} | {memory}"


def main() -> int:
    text = PAGE.read_text()
    head, rest = text.split(START)
    _, tail = rest.split(END)
    rendered = f"{head}{START}\n{table()}{measured()}\n{END}{tail}"
    if "--check" in sys.argv[1:]:
        if rendered == text:
            return 0
        print(f"{PAGE} is not what {Path(__file__).name} gives; run it")
        return 1
    PAGE.write_text(rendered)
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
