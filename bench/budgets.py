# SPDX-License-Identifier: Apache-2.0
"""The least time that each stage of a pass can take on a device: the bytes that it must move over
the copy rate, or its products over the rate of a matrix product, whichever is longer.

A stage is what kernels do together, found by their names. Bytes count every operand once, through
device memory; products count what is asked for, at full blocks.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

#: Bytes of an element of q, k, v, o and of a state; of a float32.
E, F32 = 2, 4


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one profiled pass; letters as in docs/math.md, heads taken together."""

    heads: int  # B H
    n: int  # rows of a head
    d: int
    t_m: int
    t_n: int
    density: float  # share of the score elements in the softmax
    p_v: float  # share of tiles whose p v is computed, where q k^T is computed of more
    combine: str

    @staticmethod
    def of(entry: dict[str, Any]) -> Shape:
        block_q, block_k = map(int, entry["blocks"].split("x"))
        skipped = entry["tile_sparsity"]
        density = 1.0 if skipped is not None else 1.0 - entry["sparsity"]
        return Shape(
            heads=entry["B"] * entry["H"],
            n=entry["N"],
            d=entry["D"],
            t_m=math.ceil(entry["N"] / block_q),
            t_n=math.ceil(entry["N"] / block_k),
            density=density,
            p_v=density if skipped is None else 1.0 - skipped,
            combine=entry["combine"],
        )

    @property
    def rows(self) -> float:
        """Bytes of one (B, H, N, D) tensor."""
        return self.heads * self.n * self.d * E

    @property
    def pairs(self) -> float:
        """Pairs of blocks."""
        return self.heads * self.t_m * self.t_n

    @property
    def product(self) -> float:
        """Operations of one N x N x D product over the critical blocks."""
        return 2.0 * self.density * self.heads * self.n**2 * self.d

    @property
    def second_product(self) -> float:
        """The same over the tiles that a skip rule keeps."""
        return self.product * self.p_v / self.density

    @property
    def feature_product(self) -> float:
        """Operations of one N x D x D product."""
        return 2.0 * self.heads * self.n * self.d**2

    @property
    def state(self) -> float:
        """Bytes of (h, z) of one block of each head."""
        return self.heads * self.d * (self.d + 8.0) * E

    @property
    def has_projection(self) -> bool:
        return self.combine == "projection"


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    kernels: str  # a pattern of the names of its kernels
    bytes: Callable[[Shape], float]
    operations: Callable[[Shape], float] = lambda s: 0.0


FORWARD = [
    Stage("block tables", r"block_table", lambda s: 0.0),
    Stage("pooling of q and k", r"^pool|block_sums|^mean_kernel", lambda s: 2 * s.rows),
    Stage(
        "scores of blocks",
        r"^product_kernel|^fold_kernel|^route_tile|scores",
        lambda s: s.pairs * F32,
        lambda s: 2.0 * s.pairs * s.d,
    ),
    Stage("selection", r"select|top_k", lambda s: s.pairs * (F32 + 1)),
    Stage("low-bit codes", r"quantise|value_steps", lambda s: 2 * s.rows + 2 * s.rows / E),
    Stage(
        "learned feature maps",
        r"hedgehog",
        lambda s: 4 * s.rows,
        lambda s: 2 * s.feature_product,
    ),
    Stage(
        "sparse branch",
        r"sparse_(fwd|forward|low_bit)|attend",
        lambda s: 4 * s.rows,
        lambda s: s.product + s.second_product,
    ),
    Stage(
        "states of key blocks",
        r"key_states",
        lambda s: 2 * s.rows + s.t_n * s.state,
        lambda s: s.feature_product,
    ),
    Stage("linear weights", r"linear_weights", lambda s: s.pairs * (1 + E)),
    Stage(
        "sums of states",
        r"aggregate|sum_states",
        lambda s: (s.t_m + s.t_n) * s.state + s.pairs * E,
        lambda s: 2.0 * s.pairs * s.d * (s.d + 1),
    ),
    Stage(  # states stay in L2
        "states of key blocks and their sums",
        r"linear_sums",
        lambda s: 2 * s.rows + s.t_m * s.state + s.pairs,
        lambda s: (
            (2 if s.has_projection else 1) * s.feature_product + 2.0 * s.pairs * s.d * (s.d + 1)
        ),
    ),
    Stage(
        "linear branch and combination",
        r"linear_(combine|fwd|forward)",
        lambda s: 3 * s.rows + s.t_m * s.state,
        lambda s: (2 if s.has_projection else 1) * s.feature_product,
    ),
]

BACKWARD = [
    Stage("block tables", r"block_table", lambda s: 0.0),
    Stage("pooling of k", r"^pool|block_sums", lambda s: s.rows),
    Stage("means of k and d_k", r"^mean_kernel", lambda s: s.heads * s.t_n * s.d * F32),
    Stage("lse and delta of rows", r"row_stats", lambda s: 2 * s.rows),
    Stage(
        "learned feature maps",
        r"hedgehog",
        lambda s: 4 * s.rows,
        lambda s: 2 * s.feature_product,
    ),
    Stage(
        "states of key blocks",
        r"key_states",
        lambda s: 2 * s.rows + s.t_n * s.state,
        lambda s: s.feature_product,
    ),
    Stage("linear weights", r"linear_weights|transpose", lambda s: s.pairs * (1 + E)),
    Stage(
        "sums of states, both ways",
        r"aggregate|sum_states",
        lambda s: 2 * (s.t_m + s.t_n) * s.state + 2 * s.pairs * E,
        lambda s: 4.0 * s.pairs * s.d * (s.d + 1),
    ),
    Stage(
        "linear branch, query side",
        r"linear_backward_query",
        lambda s: 4 * s.rows + 2 * s.t_m * s.state,
        lambda s: (5 if s.has_projection else 3) * s.feature_product,
    ),
    Stage(
        "linear branch, key side",
        r"linear_backward_key",
        lambda s: 4 * s.rows + s.t_n * s.state,
        lambda s: 2 * s.feature_product,
    ),
    Stage(
        "gradients of weights",
        r"linear_backward_weight",
        lambda s: 2 * s.rows,
        lambda s: s.feature_product,
    ),
    Stage(
        "gradient of the soft map, linear part",
        r"linear_backward_map",
        lambda s: (s.t_m + s.t_n) * s.state + s.pairs * F32,
        lambda s: 2.0 * s.pairs * s.d * (s.d + 1),
    ),
    Stage("d_q by rows", r"^rows_kernel", lambda s: 5 * s.rows, lambda s: 3 * s.product),
    Stage(
        "d_k and d_v by columns",
        r"^columns_kernel",
        lambda s: 6 * s.rows,
        lambda s: 4 * s.product,
    ),
]


@dataclasses.dataclass
class Line:
    """One stage of one pass: what it took, and its floor in microseconds."""

    name: str
    kernels: list[str]
    launches: float
    us: float
    floor_us: float | None
    bound: str


def budget(entry: dict[str, Any], copy_tbs: float, gemm_tflops: float) -> list[Line]:
    """The stages of a profiled pass that took any time, in their order; other kernels last."""
    shape = Shape.of(entry)
    if entry["tile_sparsity"] is not None and entry["pass"] == "bwd":
        shape = dataclasses.replace(shape, density=shape.p_v)  # skipped tiles take no part
    left = list(entry["kernels"])
    lines = []
    for stage in FORWARD if entry["pass"] == "fwd" else BACKWARD:
        found = [k for k in left if re.search(stage.kernels, k["kernel"])]
        left = [k for k in left if k not in found]
        if not found:
            continue
        memory_us = stage.bytes(shape) / copy_tbs / 1e6
        product_us = stage.operations(shape) / gemm_tflops / 1e6
        if entry["low_bit"] and stage.name == "sparse branch":
            product_us /= 2  # eight bits: twice the rate
        lines.append(
            Line(
                stage.name,
                [k["kernel"] for k in found],
                sum(k["launches"] for k in found),
                sum(k["us"] for k in found),
                max(memory_us, product_us),
                "products" if product_us > memory_us else "bytes",
            )
        )
    if left:
        names = [k["kernel"] for k in left]
        us = sum(k["us"] for k in left)
        lines.append(Line("other", names, sum(k["launches"] for k in left), us, None, ""))
    return lines
