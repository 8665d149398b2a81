# SPDX-License-Identifier: Apache-2.0
"""Times training steps of a whole video transformer, with torch's attention and with ours.

    python bench/training.py [--only REGEX] [--out FOLDER] [--steps N]
    torchrun --standalone --nproc_per_node=2 bench/training.py --ulysses 2,1
    python bench/training.py --device cpu --workload tiny --out /tmp/training   tries the benchmark

What ``sparline train`` does in a step, by its own trainer: one clip's latents a data-parallel rank,
bf16 mixed precision, checkpointed and compiled blocks, AdamW, clipping, the moving average, all in
float32. The model has the shape of Wan 2.1 1.3B and random weights, which cost what trained ones
do. A row is the median of the steps after the first two; memory is the allocator's peak over all of
them. Of several GPUs both are the slowest's and the fullest's; each method runs at every degree of
sequence parallelism that ``--ulysses`` names, its weights sharded over all of them.
Writes ``FOLDER``/<device>[-x<GPUs>][-eager].training.json, which tools/training_estimate.py shows
beside what it computes.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
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
    """Random weights, the same in every run, and one clip, as a user would have them."""
    torch.manual_seed(0)
    shape.build(device).float().save_pretrained(folder / "model")
    inputs = shape.inputs(device, seed=0)
    (folder / "clips").mkdir()
    tensors = {
        "clip.latents": inputs["hidden_states"][0].float().cpu(),
        "clip.text_embeds": inputs["encoder_hidden_states"][0].float().cpu(),
    }
    save_file(tensors, str(folder / "clips" / "clips.safetensors"))


def measure(
    name: str,
    ulysses: int,
    shape: Shape,
    folder: Path,
    device: torch.device,
    num_steps: int,
    is_compiled: bool,
) -> dict[str, Any]:
    method = dict(METHODS[name])
    if method["name"] == "sla2":
        method["num_alphas"] = -(-shape.grid.length // method["block_q"])
    is_cuda = device.type == "cuda"
    is_compiled = is_compiled and is_cuda
    config = train.from_dict(
        {
            "output_dir": str(folder / re.sub(r"\W+", "-", f"{name} {ulysses}")),
            "method": method,
            "model": {
                "path": str(folder / "model"),
                "gradient_checkpointing": True,
                "compile": is_compiled,
                "alpha_start": "mass",  # the quickest; any start costs the same afterwards
            },
            "data": {"source": "latents", "path": str(folder / "clips"), "caption_dropout": 0.0},
            "training": {"mixed_precision": "bf16" if is_cuda else "no"},
            "distributed": {"ulysses_degree": ulysses},
            "logging": {"report_to": "none"},
        }
    )
    torch._dynamo.reset()
    gc.collect()  # the row before
    trainer = train.Trainer(config, device=device.type)
    times, losses = [], []
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP + num_steps):
        trainer.world.wait()
        begin = time.perf_counter()
        losses.append(trainer.train_step()[0])  # waits for the device: it returns the loss
        if is_cuda:
            torch.cuda.synchronize()
        times.append(most(1e3 * (time.perf_counter() - begin), device))
    peak = most(float(torch.cuda.max_memory_allocated()), device) if is_cuda else None
    found = {
        "method": name,
        "options": method,
        "workload": shape.name,
        "N": shape.grid.length,
        "gpus": trainer.world.size,
        "ulysses": ulysses,
        "batch": trainer.world.num_data_ranks,
        "compiled": is_compiled,
        "ms": round(statistics.median(times[WARM_UP:]), 1),
        "spread_ms": round((max(times[WARM_UP:]) - min(times[WARM_UP:])) / 2, 1),
        "peak_bytes": None if peak is None else int(peak),
        "losses": [round(loss, 5) for loss in losses],
    }
    trainer.log.close()
    trainer.loader.close()
    return found


def most(value: float, device: torch.device) -> float:
    """The greatest over all ranks."""
    if not dist.is_initialized():
        return value
    told = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return told.item()


@contextlib.contextmanager
def joined(kind: str) -> Iterator[tuple[torch.device, int, int]]:
    """(device, rank, size) of this process among those that torchrun started, if it did."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield torch.device(kind), 0, 1
        return
    device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else None
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device is None else "nccl", device_id=device)
    yield device or torch.device(kind), dist.get_rank(), size
    # Not behind an error: the group would wait for ranks that wait for this one.
    dist.barrier()
    dist.destroy_process_group()


def shared_folder(rank: int, size: int) -> str:
    """One that all ranks know; the first of them made it."""
    names = [tempfile.mkdtemp(prefix="sparline-training-") if rank == 0 else None]
    if size > 1:
        dist.broadcast_object_list(names)
    assert names[0] is not None
    return names[0]


def run_rows(
    args: argparse.Namespace, names: list[str], device: torch.device, rank: int, size: int
) -> None:
    shape = SHAPES[args.workload]
    machine = describe_machine(device, args.commit)
    args.out.mkdir(parents=True, exist_ok=True)
    kind = (f"-x{size}" if size > 1 else "") + ("-eager" if args.eager else "")
    path = args.out / f"{slug(machine)}{kind}.training.json"
    rows: list[dict[str, Any]] = []
    folder = Path(shared_folder(rank, size))
    try:
        if rank == 0:
            write_model(shape, folder, device)
        wait_for_all()
        for ulysses in args.ulysses:
            for name in names:
                settings = {"num_steps": args.steps, "is_compiled": not args.eager}
                rows.append(measure(name, ulysses, shape, folder, device, **settings))
                wait_for_all()  # nobody reads of the folder any more
                if rank == 0:
                    path.write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n")
                    print(words_of(rows[-1]), flush=True)
    finally:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def words_of(row: dict[str, Any]) -> str:
    peak = row["peak_bytes"]
    layout = f"  {row['gpus']} GPUs, Ulysses {row['ulysses']}" if row["gpus"] > 1 else ""
    memory = "" if peak is None else f"  {peak / 2**30:.1f} GiB"
    return "{method:<30} {ms:9.1f} ± {spread_ms:.1f} ms".format(**row) + layout + memory


def degrees(text: str) -> list[int]:
    """Numbers with commas."""
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--workload", default="wan1.3b-480p", choices=sorted(SHAPES))
    add("--only", metavar="REGEX", help=f"of {', '.join(METHODS).replace('%', '%%')}")
    add("--steps", type=int, default=5)
    add("--ulysses", type=degrees, default=[1], help="GPUs that share a clip; several with commas")
    add("--eager", action="store_true", help="blocks are not compiled")
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--commit", default=os.environ.get("SPARLINE_COMMIT"), help="where there is no git")
    add("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    names = [name for name in METHODS if args.only is None or re.search(args.only, name)]
    if not names:
        raise SystemExit(f"--only: {args.only!r} matches none of {', '.join(METHODS)}")
    with joined(args.device) as (device, rank, size):
        run_rows(args, names, device, rank, size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
