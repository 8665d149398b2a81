# SPDX-License-Identifier: Apache-2.0
"""Edges of the family where one part meets another."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

import sparline
from sparline import SLA, SLA2, VSA, DynSparse, Grid, LowBit, VMoBA, Weights
from sparline.accounting import block_sparsity, flops
from sparline.calibration import calibrate
from sparline.generate import InputError, parse_variants


def qkv(length: int = 64, heads: int = 2, dim: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, length, dim, generator=generator) for _ in range(3)]


def test_vmoba_ranks_what_comes_in_under_autocast(backend: str) -> None:
    """The gate is not a product that autocast rounds."""
    q, k, v = (x.bfloat16() for x in qkv(72))
    method = VMoBA(partition="3d", box_3d=(2, 3, 3), num_chunks=2, block_q=16, block_k=16)
    given: dict[str, Any] = {"method": method, "grid": Grid(2, 6, 6), "backend": backend}
    plain = sparline.attention(q, k, v, **given)
    with torch.autocast("cpu", torch.bfloat16):
        cast = sparline.attention(q.float(), k.float(), v.float(), **given)
    torch.testing.assert_close(cast.float(), plain.float())


@pytest.mark.parametrize("mode", ["query_head", "head_global", "overall"])
def test_nan_stays_in_its_head(mode: str, backend: str) -> None:
    method = VMoBA(mode=mode, partition="1d", frames_1d=1, block_q=16, block_k=16)
    q, k, v = qkv()
    given: dict[str, Any] = {"method": method, "grid": Grid(4, 4, 4), "backend": backend}
    before = sparline.attention(q, k, v, **given)
    q[0, 0, 5] = math.nan
    after = sparline.attention(q, k, v, **given)
    assert after[0, 1].isfinite().all()
    if mode != "overall":  # there heads are ranked together, and choose anew
        torch.testing.assert_close(after[0, 1], before[0, 1])


def test_a_soft_map_is_counted_as_computed() -> None:
    q, k, _ = qkv(128)
    method = SLA2(router_mode="soft", keep_ratio=0.25, block_q=16, block_k=16)
    soft = sparline.route(q, k, method=method)
    assert soft.is_floating_point()
    assert block_sparsity(soft) == 0.0
    shape = {"num_heads": 2, "num_queries": 128, "head_dim": 16}
    counted = flops(method, **shape, block_class=soft)
    assert counted == flops(method, **shape)
    assert counted.sparse == counted.full


def test_kept_ratio_counts_the_linear_sums() -> None:
    method = SLA(selection="top_p", negligible_ratio=0.0, block_q=16, block_k=16)
    shape = {"num_heads": 1, "num_queries": 160, "head_dim": 8}
    counted = flops(method, **shape, kept_ratio=0.3)
    # Ten key blocks: three critical, seven in scope, so three are subtracted for each of ten rows.
    assert counted.aggregate == pytest.approx(8 * 9 * 10 * 3)


@pytest.mark.parametrize(
    ("grid", "text"),
    [
        (None, "needs it"),
        (Grid(4, 4, 5), "must account for every token"),
        (Grid(2, 6, 6, prefix=-8), "ints that are not negative"),
        ((8, 8), "grid must be sparline.Grid"),
        ("4x4x4", "grid must be sparline.Grid"),
        (Grid(4, 4, 4.0), "grid must be sparline.Grid"),  # type: ignore[arg-type]
    ],
)
def test_grids_are_checked(grid: Any, text: str, backend: str) -> None:
    q, k, v = qkv()
    for method in (VSA(), VMoBA(), SLA(token_order="hilbert")):
        with pytest.raises(ValueError, match=text):
            sparline.attention(q, k, v, method=method, grid=grid, backend=backend)


def test_an_empty_sequence_has_a_grid() -> None:
    q, k, v = qkv()
    for method in (VSA(), VMoBA(partition="1d"), SLA(token_order="cubes")):
        whole = sparline.attention(q, k, v, method=method, grid=(4, 4, 4))
        packed = sparline.attention(
            q, k, v, method=method, grid=[Grid(0, 4, 4), Grid(4, 4, 4)], cu_seqlens_q=[0, 0, 64]
        )
        torch.testing.assert_close(packed, whole)


def test_an_order_made_in_inference_mode_trains() -> None:
    """What is cached for a grid is no tensor of the mode it was made in."""
    grid, method = Grid(2, 4, 7), SLA(token_order="hilbert", block_q=16, block_k=16)
    q, k, v = qkv(grid.length)
    with torch.inference_mode():
        sparline.attention(q, k, v, method=method, grid=grid, backend="reference")
    q.requires_grad_()
    o = sparline.attention(q, k, v, method=method, grid=grid, backend="reference")
    o.sum().backward()
    assert q.grad is not None


def test_compiles_for_one_grid_after_another() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: Grid) -> torch.Tensor:
        method = SLA(keep_ratio=0.3, token_order="cubes", block_q=16, block_k=16)
        return sparline.attention(q, k, v, method=method, grid=grid)

    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    for grid in (Grid(2, 6, 8), Grid(3, 4, 9), Grid(4, 8, 5)):
        tensors = qkv(grid.length)
        torch.testing.assert_close(compiled(*tensors, grid), attend(*tensors, grid))


def test_feature_weights_without_a_projection(backend: str) -> None:
    """The projection at its zero: o = o_s, whatever the feature map's weights."""
    q, k, v = qkv()
    method = SLA(feature_map="hedgehog", keep_ratio=0.5, block_q=16, block_k=16)
    eye = torch.eye(16).expand(2, 16, 16)
    weights = Weights(feature_weight_q=eye, feature_weight_k=eye)
    sparse = dataclasses.replace(method, combine="sparse", feature_map="softmax")
    expected = sparline.attention(q, k, v, method=sparse, backend=backend)
    for given in (weights, None):
        o = sparline.attention(q, k, v, method=method, weights=given, backend=backend)
        torch.testing.assert_close(o, expected)


def test_values_of_maps_are_checked() -> None:
    q, k, v = qkv()
    method = SLA2(block_q=16, block_k=16)
    for block_map in (torch.full((4, 4), 2, dtype=torch.int8), torch.tensor([[1.5]])):
        with pytest.raises(ValueError, match="must hold values from"):
            sparline.attention(q, k, v, method=method, block_map=block_map)
    with pytest.raises(ValueError, match="must hold values from"):
        sparline.attention(q, k, v, method=method, block_map=torch.tensor([[math.nan]]))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: SLA2(router_per_head="false"), TypeError, "must be True or False"),
        (lambda: VMoBA(window_2d=3), ValueError, "two positive ints"),
        (lambda: VMoBA(window_2d=(3, 0)), ValueError, "window_2d"),
        (lambda: LowBit(p_range="a"), TypeError, "must be a number"),
        (lambda: SLA(low_bit={"qrows": 1}), ValueError, "low_bit has no option qrows"),
        (lambda: SLA(low_bit=True, combine="linear"), ValueError, "low_bit needs a sparse"),
        (lambda: DynSparse(-1.0, decide_rows=32, block_q=16), ValueError, "at most block_q"),
        (lambda: SLA(low_bit=LowBit(q_rows=128)).recipe, ValueError, "at most block_q"),
    ],
)
def test_wrong_options(make: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


def test_flags_and_sizes_on_the_command_line() -> None:
    method = parse_variants("sla2:router_per_head=true,sparge:longest_prefix=false", [])
    assert method[0].method == SLA2(router_per_head=True)
    assert method[1].method == SLA.sparge(longest_prefix=False)
    boxes = parse_variants("vsa:cube=2x4x8", [])[0].method
    assert boxes == VSA(cube=(2, 4, 8))
    with pytest.raises(InputError, match="router_per_head must be True or False"):
        parse_variants("sla2:router_per_head=maybe", [])


def test_what_measures_one_sequence_says_so() -> None:
    q, k, v = qkv()
    module = sparline.nn.SLA2(16, 2, method=SLA2(block_q=16, block_k=16))
    with pytest.raises(ValueError, match="one sequence"):
        module.init_alpha(q, k, v, cu_seqlens_q=[0, 32, 64])
    with pytest.raises(ValueError, match="single sequences"):
        calibrate([(q, k, v)], cu_seqlens_q=[0, 32, 64])
