# SPDX-License-Identifier: Apache-2.0
"""Sizes at which an index overflows: 256 K tokens, 65 536 heads, more than 2^31 elements.

With ``SPARLINE_GPU_HUGE=1`` alone; up to 60 GB of device memory, a few seconds each.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import sparline
from sparline import SLA, SLA2, Dense, DynSparse, Weights, reference
from sparline.methods import Method

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("SPARLINE_GPU_HUGE") != "1", reason="SPARLINE_GPU_HUGE is not 1"
    ),
]
BLOCKS: dict[str, Any] = {"block_q": 128, "block_k": 64}


@pytest.fixture(autouse=True)
def returned_memory() -> Iterator[None]:
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


def randn(*shape: int, seed: int) -> Tensor:
    rng = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=rng, device="cuda", dtype=torch.bfloat16)


def relative(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("combine", ["sparse", "projection", "blend"])
def test_256k_tokens(combine: str, tell: Any) -> None:
    """Eight query blocks from all over the sequence against float64; only they have an output
    gradient, so that they make all of d_k and d_v."""
    heads, length, head_dim = 2, 1 << 18, 64
    keep = 24 / (length // 64)
    method: Method = {
        "sparse": SLA.sparse_only(keep_ratio=keep, **BLOCKS),
        "projection": SLA.sla1(keep_ratio=keep, **BLOCKS),
        "blend": SLA2(keep_ratio=keep, **BLOCKS),
    }[combine]
    q, k, v, d_o = (randn(1, heads, length, head_dim, seed=n) for n in range(4))
    num_blocks = length // 128
    chosen = sorted({0, 1, 77, num_blocks // 3, num_blocks // 2, num_blocks - 1})
    rows = torch.cat([torch.arange(128 * i, 128 * i + 128, device="cuda") for i in chosen])
    mask = torch.zeros(length, 1, dtype=torch.bool, device="cuda").index_fill(0, rows, True)
    d_o = d_o * mask
    weights = Weights()
    if combine == "projection":
        w = torch.randn(head_dim, head_dim, device="cuda") / 8
        weights = Weights(proj_weight=w)
    block_map = sparline.route(q, k, method=method)
    assert ((block_map == 1).sum(dim=-1) == 24).all()

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o, lse = sparline.attention(*leaves, method=method, weights=weights, return_lse=True)
    actual = torch.autograd.grad(o, leaves, d_o)

    exact_leaves = [x.double().requires_grad_() for x in (q[:, :, rows], k, v)]
    alpha = torch.full((1, heads, len(rows)), 2.2, device="cuda", dtype=torch.float64)
    exact_weights = Weights(*(None if w is None else w.double() for w in weights))
    if combine == "blend":
        exact_weights = exact_weights._replace(alpha_logit=alpha)
    exact_o, exact_lse, _, _ = reference.attend(
        *exact_leaves, method.recipe, block_map[:, :, chosen], exact_weights
    )
    exact = torch.autograd.grad(exact_o, exact_leaves, d_o[:, :, rows].double())
    errors = {
        "o": relative(o[:, :, rows], exact_o),
        "lse": relative(lse[:, :, rows], exact_lse),
        "d_q": relative(actual[0][:, :, rows], exact[0]),
        "d_k": relative(actual[1], exact[1]),
        "d_v": relative(actual[2], exact[2]),
    }
    tell([f"256K tokens, {combine}: " + ", ".join(f"{k} {x:.1e}" for k, x in errors.items())])
    assert o.isfinite().all()
    assert max(errors.values()) < 1e-2
    assert errors["lse"] < 1e-5
    rest = ~mask[:, 0]
    assert (actual[0][:, :, rest] == 0).all()


@pytest.mark.parametrize(
    "method", [Dense(), SLA.sla1(keep_ratio=0.5, block_q=64), SLA2(block_q=64)]
)
def test_65536_heads(method: Method) -> None:
    """The first, a middle and the last batch item give the bits that they give alone. Blocks of 64
    queries, where there is a linear branch: with larger ones Hopper's kernels for it serve one
    short sequence and not 65536 of them, for whose ragged H_i there is no room."""
    batch, heads, length, head_dim = 1024, 64, 130, 64
    q, k, v, d_o = (randn(batch, heads, length, head_dim, seed=n) for n in range(4))
    weights = Weights()
    if isinstance(method, SLA):
        weights = Weights(proj_weight=torch.randn(head_dim, head_dim, device="cuda") / 8)

    def step(part: slice) -> list[Tensor]:
        leaves = [x[part].detach().requires_grad_() for x in (q, k, v)]
        o = sparline.attention(*leaves, method=method, weights=weights)
        return [o.detach(), *torch.autograd.grad(o, leaves, d_o[part])]

    whole = step(slice(0, batch))
    for item in (0, 511, batch - 1):
        part = slice(item, item + 1)
        for a, b in zip(whole, step(part), strict=True):
            assert torch.equal(a[part], b)
            assert b.isfinite().all()


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize(
    "method", [SLA.sla1(keep_ratio=16 / 2048, **BLOCKS), DynSparse(log_threshold=-1.0)]
)
def test_more_than_2_31_elements(method: Method, layout: str) -> None:
    """The first, a middle and the last head give the bits that they give alone."""
    is_dense = isinstance(method, DynSparse)  # computes q k^T of every tile
    heads, length, head_dim = (2080, 8192, 128) if is_dense else (136, 1 << 17, 128)
    shape = (1, heads, length, head_dim) if layout == "bhnd" else (1, length, heads, head_dim)
    axis = 1 if layout == "bhnd" else 2
    q, k, v, d_o = (randn(*shape, seed=n) for n in range(4))
    assert q.numel() > 1 << 31

    def step(part: slice) -> list[Tensor]:
        views = (x.narrow(axis, part.start, part.stop - part.start) for x in (q, k, v, d_o))
        *leaves, gradient = (x.detach() for x in views)
        leaves = [x.requires_grad_() for x in leaves]
        o = sparline.attention(*leaves, method=method, layout=layout)
        return [o.detach(), *torch.autograd.grad(o, leaves, gradient)]

    whole = step(slice(0, heads))
    for head in (0, heads // 2, heads - 1):
        for a, b in zip(whole, step(slice(head, head + 1)), strict=True):
            assert torch.equal(a.narrow(axis, head, 1), b)
            assert b.isfinite().all()
