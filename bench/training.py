# SPDX-License-Identifier: Apache-2.0
"""Times training steps of a whole video transformer, with torch's attention and with ours.

    python bench/training.py [--only REGEX] [--out FOLDER] [--steps N]
    python bench/training.py --device cpu --workload tiny --out /tmp/training   tries the benchmark

What ``sparline train`` does in a step, by its own trainer: one clip's latents, bf16 mixed
precision, checkpointed and compiled blocks, AdamW, clipping, the moving average, all in float32.
The model has the shape of Wan 2.1 1.3B and random weights, which cost what trained ones do. A row
is the median of the steps after the first two; memory is the allocator's peak over all of them.
Writes ``FOLDER``/<device>.training.json, which tools/training_estimate.py shows beside what it
computes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from clock import describe_machine, slug
from model import SHAPES, Shape
from safetensors.torch import save_file

from sparline import train

#: Steps that are not timed: they compile, and make the optimizer's state.
WARM_UP = 2
METHODS: dict[str, dict[str, Any]] = {
    "torch": {"name": "original"},
    "dense": {"name": "dense"},
    "sla 95 %": {"name": "sla", "block_q": 128, "keep_ratio": 0.05},
    "sla2 95 %": {"name": "sla2", "block_q": 128, "keep_ratio": 0.05},
    "sla2 97 %": {"name": "sla2", "block_q": 128, "keep_ratio": 0.03},
    "sla2 97 %, blocks of 64 x 32": {
        "name": "sla2",
        "block_q": 64,
        "block_k": 32,
        "keep_ratio": 0.03,
    },
}


def write_model(shape: Shape, folder: Path, device: torch.device) -> None:
    """Random weights and one clip, as a user would have them."""
    shape.build(device).float().save_pretrained(folder / "model")
    inputs = shape.inputs(device, seed=0)
    (folder / "clips").mkdir()
    tensors = {
        "clip.latents": inputs["hidden_states"][0].float().cpu(),
        "clip.text_embeds": inputs["encoder_hidden_states"][0].float().cpu(),
    }
    save_file(tensors, str(folder / "clips" / "clips.safetensors"))


def measure(
    name: str, shape: Shape, folder: Path, device: torch.device, num_steps: int
) -> dict[str, Any]:
    method = dict(METHODS[name])
    if method["name"] == "sla2":
        method["num_alphas"] = -(-shape.grid.length // method["block_q"])
    is_cuda = device.type == "cuda"
    config = train.from_dict(
        {
            "output_dir": str(folder / re.sub(r"\W+", "-", name)),
            "method": method,
            "model": {
                "path": str(folder / "model"),
                "gradient_checkpointing": True,
                "compile": is_cuda,
                "alpha_start": "mass",  # the quickest; any start costs the same afterwards
            },
            "data": {"source": "latents", "path": str(folder / "clips"), "caption_dropout": 0.0},
            "training": {"mixed_precision": "bf16" if is_cuda else "no"},
            "logging": {"report_to": "none"},
        }
    )
    torch._dynamo.reset()
    gc.collect()  # the row before
    trainer = train.Trainer(config, device=str(device))
    times, losses = [], []
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP + num_steps):
        begin = time.perf_counter()
        losses.append(trainer.train_step()[0])  # waits for the device: it returns the loss
        if is_cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    found = {
        "method": name,
        "options": method,
        "workload": shape.name,
        "N": shape.grid.length,
        "batch": 1,
        "ms": round(statistics.median(times[WARM_UP:]), 1),
        "spread_ms": round((max(times[WARM_UP:]) - min(times[WARM_UP:])) / 2, 1),
        "peak_bytes": torch.cuda.max_memory_allocated() if is_cuda else None,
        "losses": [round(loss, 5) for loss in losses],
    }
    trainer.log.close()
    trainer.loader.close()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--workload", default="wan1.3b-480p", choices=sorted(SHAPES))
    add("--only", metavar="REGEX", help=f"of {', '.join(METHODS)}")
    add("--steps", type=int, default=5)
    add("--device", default="cuda")
    add("--commit", default=os.environ.get("SPARLINE_COMMIT"), help="where there is no git")
    add("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    names = [name for name in METHODS if args.only is None or re.search(args.only, name)]
    if not names:
        raise SystemExit(f"--only: {args.only!r} matches none of {', '.join(METHODS)}")
    device, shape = torch.device(args.device), SHAPES[args.workload]
    machine = describe_machine(device, args.commit)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{slug(machine)}.training.json"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_model(shape, Path(folder), device)
        for name in names:
            rows.append(measure(name, shape, Path(folder), device, args.steps))
            path.write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n")
            peak = rows[-1]["peak_bytes"]
            memory = "" if peak is None else f"  {peak / 2**30:.1f} GiB"
            words = "{method:<30} {ms:9.1f} ± {spread_ms:.1f} ms".format(**rows[-1])
            print(words + memory, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
