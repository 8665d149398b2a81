# SPDX-License-Identifier: Apache-2.0
"""Where tokens stand: the grid of a video, orders of its tokens, segments and blocks of an axis.

An order says which row of memory stands at which position; blocks are cut from positions. The
kernels read rows through it, so nothing is copied. Text tokens before (``prefix``) and after
(``suffix``) the grid stay where they are.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from .methods import ChunkRouter, Recipe
from .reference import Block, Segment, make_blocks

Lengths = Sequence[int] | Tensor
Spans = Iterable[tuple[int, int]]


class Grid(NamedTuple):
    """Tokens of one sequence: ``prefix`` of text, frames x height x width with the width fastest,
    ``suffix`` of text."""

    frames: int
    height: int
    width: int
    prefix: int = 0
    suffix: int = 0

    @property
    def length(self) -> int:
        return self.prefix + self.frames * self.height * self.width + self.suffix


#: One grid for all sequences, or one for each; a plain tuple of ints stands for a Grid.
Grids = Grid | Sequence[int] | Sequence[Grid]


class Axes(NamedTuple):
    """How the rows of queries and keys are ordered and cut."""

    query_segments: list[Segment]  # of positions; [] is one sequence with nothing protected
    key_segments: list[Segment]
    order: Tensor | None = (
        None  # int64 (N) on the CPU, of both axes: the row at each position; None: as stored
    )
    order_key: tuple[int, ...] | None = None  # what the order follows from, for order_on
    chunk_ends: tuple[int, ...] | None = None  # positions where chunks end; ChunkRouter only


class Rows(NamedTuple):
    """The blocks of one axis and, for each row in memory, the block that it is in."""

    blocks: list[Block]
    block_of_row: Tensor  # int64 (N)
    counts: Tensor  # float32 (T): rows of each block
    sequence: Tensor  # int64 (T)
    is_protected: Tensor  # bool (T)
    even_rows: int  # of each block, but for a shorter last one; 0 where they differ
    order: Tensor | None  # int64 (N): the row at each position; None: as stored

    @property
    def begins(self) -> Tensor:
        """The first position of each block, int64 (T)."""
        counts = self.counts.long()
        return counts.cumsum(dim=0) - counts


# Tensors of positions, kept ---------------------------------------------------------------------

P = ParamSpec("P")
R = TypeVar("R")


def kept(build: Callable[P, R]) -> Callable[P, R]:
    """Makes a function of plain values, that returns tensors, keep what it returned.

    Tensors of positions follow from sizes, segments and grids. Made at every call they would cost a
    copy to the device, which waits for it and which a CUDA graph cannot capture. torch.compile
    takes them for constants. Nobody may write to them.
    """
    keep = functools.lru_cache(maxsize=64)(build)

    # In a tuple, whose parts torch.compile tells apart: two constant tensors of one function would
    # bear one name.
    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def constant(*args: P.args, **kwargs: P.kwargs) -> tuple[R]:
        # Tensors of a transform or of a fake mode, and inference tensors, are of no use afterwards.
        in_transform = torch._C._functorch.peek_interpreter_stack() is not None
        if in_transform or torch._guards.detect_fake_mode() is not None:
            return (build(*args, **kwargs),)
        with torch.inference_mode(False):
            return (keep(*args, **kwargs),)  # type: ignore[arg-type]

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        result: R = constant(*args, **kwargs)[0]
        return result

    return call


def plain(numbers: Iterable[int]) -> tuple[int, ...]:
    """Numbers that dynamic shapes made symbols become constants."""
    if not torch.compiler.is_compiling():
        return tuple(numbers)
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    return tuple([int(guard_scalar(n)) for n in numbers])


def segment_numbers(segments: Iterable[Segment]) -> tuple[int, ...]:
    """Segments as plain numbers, which functions that are ``kept`` take."""
    return plain(itertools.chain.from_iterable(segments))


def blocks_of(numbers: tuple[int, ...], length: int, block_rows: int) -> list[Block]:
    """The blocks of an axis from ``segment_numbers``."""
    segments = [
        Segment(begin, end, sequence, bool(is_protected))
        for begin, end, sequence, is_protected in zip(*[iter(numbers)] * 4, strict=True)
    ]
    return make_blocks(segments, length, block_rows)


def rows_of(
    segments: Sequence[Segment],
    length: int,
    block_rows: int,
    order_key: tuple[int, ...] | None,
    device: torch.device,
) -> Rows:
    """An axis of ``length`` rows, cut into blocks."""
    length, block_rows = plain((length, block_rows))
    tables = _row_tables(segment_numbers(segments), length, block_rows, order_key, device)
    order = None if order_key is None else order_on(order_key, device, torch.int64)
    return Rows(make_blocks(segments, length, block_rows), *tables, order)


@kept
def _row_tables(
    segments: tuple[int, ...],
    length: int,
    block_rows: int,
    order_key: tuple[int, ...] | None,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """What ``Rows`` knows of its blocks."""
    blocks = blocks_of(segments, length, block_rows)
    sizes = torch.tensor([b.end - b.begin for b in blocks], device="cpu")
    block_of_row = torch.repeat_interleave(torch.arange(len(blocks), device="cpu"), sizes)
    if order_key is not None:
        block_of_position = block_of_row
        block_of_row = torch.empty_like(block_of_position)
        block_of_row[_constant_order(*order_key)[0]] = block_of_position
    *inner, last = sizes.tolist()
    even_rows = inner[0] if inner and {*inner} == {max(inner[0], last)} else 0
    sequence = torch.tensor([b.sequence for b in blocks], device="cpu")
    is_protected = torch.tensor([b.is_protected for b in blocks], device="cpu")
    return (
        block_of_row.to(device),
        sizes.float().to(device),
        sequence.to(device),
        is_protected.to(device),
        even_rows if inner else last,
    )


@kept
def order_on(order_key: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The row at each position, on a device."""
    order, _ = _constant_order(*order_key)
    assert order is not None
    return order.to(device, dtype)


# Orders of a grid -------------------------------------------------------------------------------

Places = np.ndarray[Any, np.dtype[np.int64]]


def cube_order(shape: tuple[int, int, int], cube: tuple[int, int, int]) -> tuple[Places, list[int]]:
    """Tokens box by box: the row at each position, and the number of tokens of each box.

    Boxes stand in the order (t, h, w), and so do the tokens inside one. Those at the far ends of
    the grid are as small as they have to be.
    """
    t, h, w = (axis.ravel() for axis in np.indices(shape))
    num_h, num_w = -(-shape[1] // cube[1]), -(-shape[2] // cube[2])
    box = ((t // cube[0]) * num_h + h // cube[1]) * num_w + w // cube[2]
    return np.argsort(box, kind="stable"), np.bincount(box).tolist()


def hilbert_order(shape: tuple[int, int, int]) -> Places:
    """Tokens along a Hilbert curve through the smallest cube of side 2^n that holds the grid.

    The curve's place of a token is Skilling's transform of its coordinates (AIP Conf. Proc. 707,
    2004), computed for all tokens at once.
    """
    bits = max(1, max(side - 1 for side in shape).bit_length())
    x = [axis.ravel() for axis in np.indices(shape)]
    for bit in range(bits - 1, 0, -1):
        low = (1 << bit) - 1
        for axis in range(3):
            is_set = (x[axis] >> bit) & 1 == 1
            swapped = (x[0] ^ x[axis]) & low
            first = np.where(is_set, x[0] ^ low, x[0] ^ swapped)
            if axis > 0:
                x[axis] = np.where(is_set, x[axis], x[axis] ^ swapped)
            x[0] = first
    x[1] = x[1] ^ x[0]
    x[2] = x[2] ^ x[1]
    flip = np.zeros_like(x[0])
    for bit in range(bits - 1, 0, -1):
        flip = np.where((x[2] >> bit) & 1 == 1, flip ^ ((1 << bit) - 1), flip)
    place = np.zeros_like(x[0])
    for bit in range(bits - 1, -1, -1):
        for axis in range(3):
            place = place << 1 | (((x[axis] ^ flip) >> bit) & 1)
    return np.argsort(place, kind="stable")


# A call's axes ----------------------------------------------------------------------------------


def make_axes(
    caller: str,
    recipe: Recipe,
    num_queries: int,
    num_keys: int,
    grid: Grids | None,
    cu_seqlens_q: Lengths | None,
    cu_seqlens_k: Lengths | None,
    protected_q: Spans,
    protected_k: Spans,
) -> Axes:
    """Packed sequences, protected spans and the recipe's token order as segments and an order."""
    if cu_seqlens_q is None and cu_seqlens_k is not None:
        raise ValueError(
            f"{caller}: cu_seqlens_k needs cu_seqlens_q. Pass both, or cu_seqlens_q alone when "
            "they are equal."
        )
    spans_q, spans_k = list(protected_q), list(protected_k)
    is_plain = cu_seqlens_q is None and not spans_q and not spans_k
    if is_plain and not recipe.needs_grid:
        return Axes([], [])
    offsets_q = _offsets(caller, "cu_seqlens_q", cu_seqlens_q, num_queries)
    offsets_k = _offsets(
        caller, "cu_seqlens_k", cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, num_keys
    )
    if len(offsets_q) != len(offsets_k):
        raise ValueError(
            f"{caller}: cu_seqlens_q and cu_seqlens_k must hold the same number of sequences, got "
            f"{len(offsets_q) - 1} and {len(offsets_k) - 1}. Use zero-length sequences to align "
            "them."
        )
    order: Tensor | None = None
    order_key: tuple[int, ...] | None = None
    borders: list[int] = []
    if recipe.needs_grid:
        grids = _check_grids(caller, recipe, grid, offsets_q, offsets_k)
        order_key = _order_key(recipe, grids)
        order, constant_borders = _constant_order(*order_key)
        borders = list(constant_borders)
    cuts_blocks = recipe.has_cube_blocks
    cuts_keys = cuts_blocks or isinstance(recipe.router, ChunkRouter)
    query_segments = _cut(caller, "protected_q", offsets_q, spans_q, borders if cuts_blocks else ())
    key_segments = _cut(caller, "protected_k", offsets_k, spans_k, borders if cuts_keys else ())
    if is_plain and not cuts_blocks:
        query_segments = []
    if is_plain and not cuts_keys:
        key_segments = []
    chunk_ends = None
    if isinstance(recipe.router, ChunkRouter):
        chunk_ends = plain((*borders, num_keys))
    key = None if order is None else order_key
    return Axes(query_segments, key_segments, order, key, chunk_ends)


def _check_grids(
    caller: str,
    recipe: Recipe,
    grid: Grids | None,
    offsets_q: list[int],
    offsets_k: list[int],
) -> list[Grid]:
    if grid is None:
        raise ValueError(
            f"{caller}: this method orders or partitions the token grid (token_order="
            f"{recipe.token_order!r}) and needs it. Pass grid=sparline.Grid(frames, height, width)."
        )
    given: list[Any] = [grid] if _is_one(grid) else list(grid)
    grids = [_to_grid(caller, item) for item in given]
    if len(grids) == 1:
        grids = grids * (len(offsets_q) - 1)
    lengths = [b - a for a, b in itertools.pairwise(offsets_q)]
    if offsets_q != offsets_k or [g.length for g in grids] != lengths:
        raise ValueError(
            f"{caller}: grid must account for every token of each sequence, got {grids} for "
            f"sequences of {lengths} queries and "
            f"{[b - a for a, b in itertools.pairwise(offsets_k)]} keys. Grid(frames, height, "
            "width, prefix, suffix) holds prefix + frames x height x width + suffix tokens; "
            "cross-attention has no grid."
        )
    return grids


def _is_one(grid: object) -> bool:
    """One grid, as opposed to one for each sequence."""
    return not isinstance(grid, (list, tuple)) or not grid or not isinstance(grid[0], (list, tuple))


def _to_grid(caller: str, grid: object) -> Grid:
    numbers = grid if isinstance(grid, (list, tuple)) else ()
    if not 3 <= len(numbers) <= 5 or any(
        isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers
    ):
        raise ValueError(
            f"{caller}: grid must be sparline.Grid(frames, height, width, prefix, suffix) with "
            f"ints that are not negative, got {grid!r}. Count tokens, after patching."
        )
    return Grid(*numbers)


def _order_key(recipe: Recipe, grids: Sequence[Grid]) -> tuple[int, ...]:
    """What the order of all sequences follows from, in plain numbers."""
    box = recipe.cube if recipe.token_order == "cubes" else (-1, -1, -1)
    if isinstance(recipe.router, ChunkRouter):
        box = recipe.router.chunk
    return plain([*box, *itertools.chain(*grids)])


@kept
def _constant_order(*numbers: int) -> tuple[Tensor | None, tuple[int, ...]]:
    """The order of all sequences on the CPU, and the positions where boxes or text begin."""
    order, borders = _box_order((numbers[0], numbers[1], numbers[2]), numbers[3:])
    return None if order is None else torch.from_numpy(order), borders


def _box_order(
    box: tuple[int, int, int], numbers: tuple[int, ...]
) -> tuple[Places | None, tuple[int, ...]]:
    """Tokens box by box, a side of 0 taking the whole axis, or along a curve if sides are -1.
    ``numbers`` holds the five of each grid."""
    orders, sizes, begin = [], [], 0
    for grid in (Grid(*numbers[n : n + 5]) for n in range(0, len(numbers), 5)):
        shape = (grid.frames, grid.height, grid.width)
        text = np.arange(grid.length)
        if box != (-1, -1, -1):
            sides = [side or max(whole, 1) for side, whole in zip(box, shape, strict=True)]
            order, boxes = cube_order(shape, (sides[0], sides[1], sides[2]))
        else:
            order, boxes = hilbert_order(shape), [math.prod(shape)]
        end = grid.length - grid.suffix
        orders.append(
            begin + np.concatenate([text[: grid.prefix], grid.prefix + order, text[end:]])
        )
        sizes += [grid.prefix, *boxes, grid.suffix]
        begin += grid.length
    borders = tuple(b for b in dict.fromkeys(itertools.accumulate(sizes)) if 0 < b < begin)
    joined = np.concatenate(orders)
    return (None if np.array_equal(joined, np.arange(begin)) else joined), borders


def _offsets(caller: str, name: str, lengths: Lengths | None, length: int) -> list[int]:
    if lengths is None:
        return [0, length]
    if isinstance(lengths, Tensor):
        if lengths.device.type != "cpu" or lengths.is_floating_point() or lengths.dim() != 1:
            raise ValueError(
                f"{caller}: {name} must be a list of ints or a one-dimensional integer CPU "
                f"tensor, got a {lengths.dtype} tensor of shape {tuple(lengths.shape)} on "
                f"{lengths.device}. Convert it once with .tolist()."
            )
        lengths = [int(offset) for offset in lengths.tolist()]
    offsets = list(lengths)
    if (
        len(offsets) < 2
        or offsets[0] != 0
        or offsets[-1] != length
        or any(a > b for a, b in itertools.pairwise(offsets))
    ):
        raise ValueError(
            f"{caller}: {name} must rise from 0 to the number of rows, {length}, got {offsets}. "
            "It holds the start of every packed sequence and the end of the last."
        )
    return offsets


def _cut(
    caller: str,
    name: str,
    offsets: list[int],
    spans: list[tuple[int, int]],
    borders: Iterable[int],
) -> list[Segment]:
    """Segments between all borders; a span that crosses sequences is cut at their border."""
    length = offsets[-1]
    for begin, end in spans:
        if not 0 <= begin <= end <= length:
            raise ValueError(
                f"{caller}: {name} must hold spans 0 <= begin <= end <= {length}, got ({begin}, "
                f"{end}). Spans count rows of the whole axis, packed sequences included."
            )
    spans = [(begin, end) for begin, end in spans if begin < end]
    rows = sorted({row for span in spans for row in span} | set(borders))
    segments = []
    for sequence, (first, last) in enumerate(itertools.pairwise(offsets)):
        inside = [first, *(row for row in rows if first < row < last), last]
        for begin, end in itertools.pairwise(dict.fromkeys(inside)):
            is_protected = any(a <= begin and end <= b for a, b in spans)
            segments.append(Segment(begin, end, sequence, is_protected))
    return segments
