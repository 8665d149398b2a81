# SPDX-License-Identifier: Apache-2.0
"""The gather of bench/linear_ways.py, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

#: Elements of a state that one program adds up.
TILE = 4096


@triton.jit
def gather(  # type: ignore[no-untyped-def]
    states, totals, lists, sums, num_blocks, width, COUNT: tl.constexpr, SIZE: tl.constexpr
):
    tile, row, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_rows = tl.num_programs(1)
    places = tile * SIZE + tl.arange(0, SIZE)
    left = tl.load(totals + head * width + places)
    own = lists + (head * num_rows + row) * COUNT
    for n in range(COUNT):
        at = (head * num_blocks + tl.load(own + n)).to(tl.int64)
        left -= tl.load(states + at * width + places).to(tl.float32)
    at = (head * num_rows + row).to(tl.int64)
    tl.store(sums + at * width + places, left.to(tl.bfloat16))


def launch(states: Tensor, totals: Tensor, lists: Tensor, sums: Tensor) -> None:
    """As linear_ways.gather; W is a multiple of TILE. Programs of a head follow one another and
    share its states in L2."""
    heads, num_rows, count = lists.shape
    width = states.shape[2]
    grid = (width // TILE, num_rows, heads)
    gather[grid](states, totals, lists, sums, states.shape[1], width, count, SIZE=TILE)
