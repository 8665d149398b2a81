# SPDX-License-Identifier: Apache-2.0
"""Sparsity and FLOPs, against numbers worked out by hand and against the published ratios."""

import pytest
import torch

import sparline
from sparline import SLA, Dense
from sparline.accounting import block_sparsity, element_sparsity, flops
from sparline.reference import Segment

WAN = {"num_heads": 12, "num_queries": 32760, "head_dim": 128}


def test_block_and_element_sparsity() -> None:
    """30 queries and 40 keys in blocks of 16: a 2 x 3 map with short last blocks."""
    block_class = torch.tensor([[1, 0, -1], [0, -1, 1]], dtype=torch.int8)[None, None]
    method = SLA(block_q=16, block_k=16)
    assert block_sparsity(block_class) == pytest.approx(1 - 2 / 6)
    critical = 16 * 16 + 14 * 8
    assert element_sparsity(block_class, method, 30, 40) == pytest.approx(1 - critical / 1200)


def test_sparsity_counts_every_block() -> None:
    """Protected and foreign blocks are in the denominator too."""
    q, k = torch.randn(1, 1, 64, 8), torch.randn(1, 1, 64, 8)
    method = SLA(keep_ratio=0.25, block_q=16, block_k=16)
    block_class = sparline.route(q, k, method=method, cu_seqlens_q=[0, 32, 64], backend="reference")
    assert block_sparsity(block_class) == pytest.approx(1 - 4 / 16)


def test_full_attention() -> None:
    full = flops(Dense(), **WAN)
    assert full.total == full.full == 4 * 12 * 32760**2 * 128
    assert full.ratio == 1.0
    assert flops(Dense(), **WAN, direction="backward").total == 2.5 * full.total
    assert flops(Dense(), **WAN, direction="both").total == 3.5 * full.total


def test_linear_share() -> None:
    """The linear branch costs about D / N of full attention: 0.39 % at N = 32 760."""
    count = flops(SLA.linear_only(), **WAN)
    assert count.linear / count.full == pytest.approx(0.0039, rel=0.02)
    assert count.sparse == count.router == count.aggregate == count.projection == 0


def test_sla_by_hand() -> None:
    method = SLA(keep_ratio=0.25, negligible_ratio=0.25, block_q=16, block_k=16)
    count = flops(method, batch=2, num_heads=4, num_kv_heads=2, num_queries=64, head_dim=8)
    q_heads, kv_heads, n, d, blocks = 8, 4, 64, 8, 4
    assert count.full == 4 * n * n * d * q_heads
    assert count.sparse == 4 * d * q_heads * (n * 16)  # one block of four
    assert count.linear == q_heads * (2 * n * d * d + 2 * n * d) + kv_heads * (
        2 * n * d * d + n * d
    )
    assert count.aggregate == d * (d + 1) * q_heads * blocks * 2  # two blocks in, two blocks out
    assert count.projection == 2 * q_heads * n * d * d
    assert count.router == (q_heads + kv_heads) * n * d + 2 * q_heads * blocks * blocks * d
    assert count.feature_map == 0
    hedgehog = SLA(feature_map="hedgehog", block_q=16, block_k=16)
    count = flops(hedgehog, num_heads=2, num_queries=64, head_dim=8)
    assert count.feature_map == 2 * 2 * (64 + 64) * 64
    assert count.linear == 2 * (2 * 64 * 16 * 8 * 2 + 3 * 64 * 16)


def test_published_ratio() -> None:
    """SLA at 95 %: 2.74T of 52.75T, 5.2 % of full attention."""
    count = flops(SLA(keep_ratio=0.05, block_q=64), **WAN)
    kernel = count.sparse + count.linear
    assert kernel / count.full == pytest.approx(2.74 / 52.75, rel=0.03)


def test_achieved_counts_match_the_ratios() -> None:
    """With whole blocks a routed map gives the numbers that the ratios promise."""
    method = SLA(keep_ratio=0.3, negligible_ratio=0.2, block_q=16, block_k=16)
    q = torch.randn(1, 2, 160, 8)
    block_class = sparline.route(q, q, method=method, backend="reference")
    shape = {"num_heads": 2, "num_queries": 160, "head_dim": 8}
    assert flops(method, **shape, block_class=block_class) == flops(method, **shape)
    for scope in ("complement", "all"):
        other = SLA(**{**method.__dict__, "linear_scope": scope})
        assert flops(other, **shape, block_class=block_class) == flops(other, **shape)


def test_packed_full_attention_counts_sequences() -> None:
    segments = [Segment(0, 30, 0), Segment(30, 100, 1)]
    shape = {"num_heads": 1, "num_queries": 100, "head_dim": 8}
    count = flops(Dense(), **shape, query_segments=segments, key_segments=segments)
    assert count.full == 4 * 8 * (30**2 + 70**2)


def test_direction_is_checked() -> None:
    with pytest.raises(ValueError, match="direction must be"):
        flops(Dense(), **WAN, direction="fwd")
