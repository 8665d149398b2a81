# SPDX-License-Identifier: Apache-2.0
"""Tensors of positions: what they hold, and that they are made once."""

from __future__ import annotations

import pytest
import torch

import sparline
from sparline.reference import Segment
from sparline.tokens import make_axes, order_on, rows_of

CPU = torch.device("cpu")
GRID = sparline.Grid(2, 6, 5, prefix=3)


def axes_of(method: sparline.Method) -> sparline.tokens.Axes:
    return make_axes(
        "test", method.recipe, GRID.length, GRID.length, GRID, None, None, [(0, 3)], ()
    )


@pytest.mark.parametrize(
    ("segments", "length", "even_rows"),
    [
        ([], 100, 16),
        ([], 96, 16),
        ([], 10, 10),
        ([Segment(0, 16), Segment(16, 26)], 26, 16),
        ([Segment(0, 20), Segment(20, 40, 1)], 40, 0),
        ([Segment(0, 10), Segment(10, 26)], 26, 0),
    ],
)
def test_rows_of_tells_what_the_blocks_are(
    segments: list[Segment], length: int, even_rows: int
) -> None:
    rows = rows_of(segments, length, 16, None, CPU)
    sizes = [b.end - b.begin for b in rows.blocks]
    assert rows.even_rows == even_rows
    assert rows.counts.tolist() == sizes
    assert rows.begins.tolist() == [b.begin for b in rows.blocks]
    assert rows.sequence.tolist() == [b.sequence for b in rows.blocks]
    assert rows.block_of_row.tolist() == [i for i, n in enumerate(sizes) for _ in range(n)]


def test_rows_of_follows_the_order() -> None:
    axes = axes_of(sparline.SLA(token_order="cubes", cube=(2, 3, 5)))
    assert axes.order is not None
    rows = rows_of(axes.query_segments, GRID.length, 16, axes.order_key, CPU)
    assert rows.is_protected.tolist()[0]
    for i, block in enumerate(rows.blocks):
        assert (rows.block_of_row[axes.order[block.begin : block.end]] == i).all()


def test_tensors_of_positions_are_made_once() -> None:
    axes, again = (axes_of(sparline.SLA(token_order="hilbert")) for _ in range(2))
    assert axes.order is again.order
    assert axes.order_key == again.order_key
    first, second = (rows_of(a.query_segments, 63, 16, a.order_key, CPU) for a in (axes, again))
    assert first.block_of_row is second.block_of_row
    assert axes.order_key is not None
    assert order_on(axes.order_key, CPU, torch.int32) is order_on(
        again.order_key,
        CPU,
        torch.int32,
    )


def test_what_inference_made_serves_training() -> None:
    method = sparline.VSA(cube=(2, 3, 4))
    grid = sparline.Grid(3, 5, 7)  # a length that no other test has seen
    q = torch.randn(1, 2, grid.length, 8, dtype=torch.float64)
    with torch.inference_mode():
        wanted = sparline.attention(q, q, q, method=method, grid=grid, backend="reference")
    leaf = q.clone().requires_grad_()
    o = sparline.attention(leaf, q, q, method=method, grid=grid, backend="reference")
    o.sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(o.detach(), wanted)
