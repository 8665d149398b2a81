# SPDX-License-Identifier: Apache-2.0
"""What ways to compute the linear branch of a forward cost beside each other, on one device, in one
run: why it is what it is.

    python bench/linear_ways.py [--workload wan1.3b-480p,hunyuan-720p] [--ratios 0.10,0.05,0.01]
    python bench/linear_ways.py --device cpu --workload tiny --out /tmp/ways    tries the benchmark

With h_j the state of key block j, query block i needs H_i, the sum over its marginal blocks:

complement  ours: all H_i of a head are one matrix product, of the map's complement and the states.
            Its time is the operator's less that of the sparse branch alone, the map given to both.
gather      H_i = total - the sum of h_j over critical blocks, states read from L2, in bf16 or e4m3.
            Only that sum is timed (triton_gather.py): making the states and the product phi(q) H_i
            come on top.
products    (phi(q) phi(k)^T) v of the critical blocks, taken off phi(q) total, beside the sparse
            branch, which has k and v at hand. Two more products a critical tile, for which stands
            what the sparse branch takes for twice the blocks, less its time: a little too much, as
            these have exponentials and loads too. Making phi(k) and the total come on top.

Writes ``FOLDER``/<device>.linear_ways.json, which bench/report.py renders.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from clock import Clock, ceilings, describe_machine, slug
from inputs import make_inputs
from suites import BLOCKS, workload_of
from torch import Tensor

import sparline
from sparline import SLA, Weights
from sparline.bench import Workload, learned_weights

#: Input sets that take turns.
SETS = 2
STATE_DTYPES = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}


# The gather -------------------------------------------------------------------------------------


def gather(states: Tensor, totals: Tensor, lists: Tensor, sums: Tensor) -> None:
    """sums (H, T_m, W) bf16 = totals (H, W) float32 less states (H, T_n, W) of the critical blocks,
    lists (H, T_m, count) int32."""
    if states.is_cuda:
        from triton_gather import launch  # Triton comes with torch's builds for GPUs

        launch(states, totals, lists, sums)
        return
    for head in range(states.shape[0]):  # to try the benchmark
        critical = states[head].float()[lists[head].long()].sum(dim=1)
        sums[head] = (totals[head] - critical).bfloat16()


def critical_lists(block_map: Tensor) -> Tensor:
    """(H, T_m, count) int32 of a map (1, H, T_m, T_n) whose rows have one count."""
    count = int((block_map[0, 0, 0] == 1).sum())
    return (block_map[0] == 1).int().topk(count, dim=2).indices.int()


def states_of(k: Tensor, v: Tensor, block_k: int) -> Tensor:
    """phi(k_j)^T v_j (H, T_n, D D), float32, phi softmax; the last block may be short."""
    phi, length = k[0].float().softmax(dim=-1), k.shape[2]
    padding = (0, 0, 0, -length % block_k)
    blocks = [
        torch.nn.functional.pad(x, padding).unflatten(1, (-1, block_k)) for x in (phi, v[0].float())
    ]
    return (blocks[0].mT @ blocks[1]).flatten(2)


# The run ----------------------------------------------------------------------------------------


class Ways:
    """Times of every way on one workload."""

    def __init__(self, workload: Workload, device: torch.device, repetitions: int) -> None:
        self.workload, self.clock = workload, Clock(device, repetitions)
        self.sets = [make_inputs(workload, "gaussian", device, seed) for seed in range(SETS)]
        host = learned_weights(SLA.sla1(**BLOCKS), workload.heads, workload.head_dim)
        self.weights = Weights(*(None if w is None else w.to(device) for w in host))
        self.states = [states_of(k, v, BLOCKS["block_k"]) for _, k, v in self.sets]

    def time(self, runs: list[Callable[[], Any]]) -> float:
        return round(self.clock.time(runs)["ms"], 4)

    @torch.no_grad()
    def measure(self, ratio: float) -> dict[str, Any]:
        """Milliseconds at one ratio of critical blocks."""
        method, sparse = SLA.sla1(keep_ratio=ratio, **BLOCKS), SLA.sparse_only(**BLOCKS)
        maps = [sparline.route(q, k, method=method) for q, k, _ in self.sets]
        lists = [critical_lists(m) for m in maps]
        num_blocks = maps[0].shape[3]
        doubled = min(1.0, (2 * lists[0].shape[2] + 0.5) / num_blocks)  # exactly twice the blocks
        twice = [
            sparline.route(q, k, method=SLA.sla1(keep_ratio=doubled, **BLOCKS))
            for q, k, _ in self.sets
        ]

        def attention(method: SLA, maps: list[Tensor], weights: Weights) -> float:
            given = {"method": method, "weights": weights}
            pairs = zip(self.sets, maps, strict=True)
            return self.time(
                [partial(sparline.attention, *s, block_map=m, **given) for s, m in pairs]
            )

        whole = attention(method, maps, self.weights)
        alone = attention(sparse, maps, Weights())
        told = {
            "keep_ratio": ratio,
            "critical_blocks": lists[0].shape[2],
            "operator_ms": whole,
            "sparse_ms": alone,
            "complement_ms": round(whole - alone, 4),
            "products_ms": round(attention(sparse, twice, Weights()) - alone, 4),
        }
        for name, dtype in STATE_DTYPES.items():
            told[f"gather_{name}_ms"] = self.time(self.gathers(lists, dtype))
        return told

    def gathers(self, lists: list[Tensor], dtype: torch.dtype) -> list[Callable[[], Any]]:
        runs: list[Callable[[], Any]] = []
        for states, own in zip(self.states, lists, strict=True):
            sums = torch.empty(
                *own.shape[:2], states.shape[2], dtype=torch.bfloat16, device=states.device
            )
            runs.append(partial(gather, states.to(dtype), states.sum(dim=1), own, sums))
        return runs


def ratios_of(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--workload", default="wan1.3b-480p,hunyuan-720p", help="with commas")
    add("--ratios", type=ratios_of, default=[0.10, 0.05, 0.03, 0.02, 0.01], help="with commas")
    add("--repetitions", type=int, default=20)
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--commit", default=os.environ.get("SPARLINE_COMMIT"), help="where there is no git")
    add("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    workloads = [workload_of(name) for name in args.workload.split(",")]
    device = torch.device(args.device)
    machine = {**describe_machine(device, args.commit), **ceilings(device)}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{slug(machine)}.linear_ways.json"
    rows = []
    for workload in workloads:
        ways = Ways(workload, device, args.repetitions)
        shape = {"workload": workload.name, "H": workload.heads, "N": workload.length}
        for ratio in args.ratios:
            rows.append({**shape, "D": workload.head_dim, **ways.measure(ratio)})
            print(rows[-1], flush=True)
            path.write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n")
        del ways  # before the next one's states
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
