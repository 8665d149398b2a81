# SPDX-License-Identifier: Apache-2.0
"""Ten thousand calls of every method, with changing shapes, on two streams at once.

With ``SPARLINE_GPU_SOAK=1`` alone; under a minute. Every result must have the bits of a first call
of the same inputs that ran alone.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Iterator
from typing import Any

import cases
import pytest
import torch
from cases import Case, Inputs, make_inputs
from harness import find_case, large_names, move, random_names
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("SPARLINE_GPU_SOAK") != "1", reason="SPARLINE_GPU_SOAK is not 1"
    ),
]
CALLS, RANDOM_CASES = 10_000, 150
#: Of the calls, those with a backward.
BACKWARD_SHARE = 0.2
#: Calls between two looks at what was found; at most as many are in flight.
ROUND = 250


@dataclasses.dataclass
class Job:
    """One configuration on the device, and what it gave alone."""

    name: str
    case: Case
    inputs: Inputs
    expected: list[Tensor]  # o, lse, then gradients

    @staticmethod
    def make(name: str) -> Job:
        case = find_case(name)
        job = Job(name, case, move(make_inputs(case), torch.device("cuda")), [])
        torch.cuda.synchronize()
        job.expected = job.run(backward=True)
        torch.cuda.synchronize()
        return job

    def run(self, backward: bool) -> list[Tensor]:
        if backward:
            result = cases.run(self.case, self.inputs, None)
            return [result.o, result.lse, *result.gradients.values()]
        with torch.no_grad():
            return list(cases.attend(self.case, self.inputs, None))

    def poison(self, backward: bool) -> None:
        """Leaves NaN in the memory that the call is about to be given, results and workspace."""
        wanted = self.expected if backward else self.expected[:2]
        sizes = [x.numel() * x.element_size() for x in wanted]
        blocks = [
            torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")
            for size in (*sizes, sum(sizes), 4 * sum(sizes))
        ]
        del blocks


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    yield [Job.make(name) for name in (*large_names(), *random_names(RANDOM_CASES, "soak"))]
    torch.cuda.empty_cache()


def test_ten_thousand_calls_on_two_streams(jobs: list[Job], tell: Any) -> None:
    for job in jobs:
        assert not any(x.isnan().any() for x in job.expected), f"{job.name}: {job.case}"
    rng = random.Random(0)
    streams = [torch.cuda.Stream() for _ in range(2)]
    # Differing elements of each job, by stream: one counter would itself be a race.
    wrong = [torch.zeros(len(jobs), dtype=torch.int64, device="cuda") for _ in streams]
    torch.cuda.synchronize()
    for call in range(CALLS):
        n, side = rng.randrange(len(jobs)), rng.randrange(2)
        job, backward = jobs[n], rng.random() < BACKWARD_SHARE
        with torch.cuda.stream(streams[side]):
            job.poison(backward)
            for actual, expected in zip(job.run(backward), job.expected, strict=False):
                wrong[side][n] += (actual != expected).sum()  # NaN differs from itself
        if call % ROUND == ROUND - 1 or call == CALLS - 1:
            torch.cuda.synchronize()
            found = sum(wrong).nonzero()[:, 0].tolist()  # type: ignore[union-attr]
            assert not found, f"call {call}: {[(jobs[i].name, jobs[i].case) for i in found[:3]]}"
    tell([f"soak: {CALLS} calls of {len(jobs)} configurations on two streams, all the same bits"])
