# SPDX-License-Identifier: Apache-2.0
"""The one list of cases, the random case generator, and how a case becomes tensors and calls.

A case prints as one pastable line: ``check_case(Case(...))`` in a Python shell repeats a failure.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import oracle
import torch
from numeric import assert_relative
from torch import Tensor

import sparline
from sparline import SLA, Dense, SLAWeights

Spans = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Case:
    method: Dense | SLA
    batch: int = 1
    num_heads: int = 2
    num_kv_heads: int = 2
    num_queries: int = 80
    num_keys: int = 80
    head_dim: int = 16
    dtype: str = "float32"
    layout: str = "bhnd"
    padded: bool = False  # rows of q, k, v are followed by NaN: views into wider memory
    scale: float | None = None
    cu_q: tuple[int, ...] | None = None
    cu_k: tuple[int, ...] | None = None
    protected_q: Spans = ()
    protected_k: Spans = ()
    block_map: str = "route"  # or "random": the caller's own map, empty rows included
    bias: bool = True  # of the projection and of the hedgehog maps
    seed: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def segments(self) -> dict[str, Any]:
        return {
            "cu_seqlens_q": None if self.cu_q is None else list(self.cu_q),
            "cu_seqlens_k": None if self.cu_k is None else list(self.cu_k),
            "protected_q": self.protected_q,
            "protected_k": self.protected_k,
        }

    @property
    def tokens(self) -> tuple[oracle.Tokens, oracle.Tokens]:
        m = self.method
        return (
            oracle.Tokens(self.num_queries, m.block_q, self.cu_q, self.protected_q),
            oracle.Tokens(self.num_keys, m.block_k, self.cu_k, self.protected_k),
        )


_PACKS: dict[str, Any] = {"cu_q": (0, 37, 37, 80), "cu_k": (0, 20, 61, 80)}
_SPANS: dict[str, Any] = {"protected_q": ((0, 7),), "protected_k": ((0, 7), (70, 80))}
_SMALL: dict[str, Any] = {"block_q": 16, "block_k": 16, "keep_ratio": 0.3, "negligible_ratio": 0.25}

CASES: dict[str, Case] = {
    "dense": Case(Dense(block_q=32, block_k=16)),
    "dense-cross": Case(Dense(), num_queries=33, num_keys=150, head_dim=64),
    "dense-packed": Case(Dense(block_q=16, block_k=16), **_PACKS),
    **{
        f"sla-{feature_map}-{scope}": Case(
            SLA(feature_map=feature_map, linear_scope=scope, **_SMALL)
        )
        for feature_map in sparline.methods.FEATURE_MAPS
        for scope in sparline.methods.LINEAR_SCOPES
    },
    "sla-paper": Case(SLA.paper(), num_queries=300, num_keys=300, head_dim=64),
    "sla1": Case(SLA.sla1(keep_ratio=0.2), num_queries=300, num_keys=300, head_dim=128),
    "sla-main": Case(SLA.sla_main(keep_ratio=0.2), num_queries=300, num_keys=300, head_dim=40),
    "sum": Case(SLA(combine="sum", **_SMALL)),
    "sparse": Case(SLA(combine="sparse", **_SMALL)),
    "linear": Case(SLA.linear_only(block_q=16, block_k=16)),
    "linear-marginal": Case(SLA(combine="linear", **_SMALL)),
    "linear-plus-sparse": Case(SLA.linear_plus_sparse(block_q=16, block_k=16, keep_ratio=0.3)),
    "gqa": Case(SLA(**_SMALL), num_heads=4, batch=2),
    "gqa-hedgehog": Case(SLA(feature_map="hedgehog", **_SMALL), num_heads=4, num_kv_heads=1),
    "bnhd": Case(SLA(**_SMALL), layout="bnhd", batch=2),
    "padded": Case(SLA(**_SMALL), padded=True, layout="bnhd"),
    "one-token": Case(SLA(), num_queries=1, num_keys=1),
    "few-keys": Case(SLA(), num_queries=70, num_keys=3, head_dim=4),
    "cross": Case(SLA(**_SMALL), num_queries=21, num_keys=107),
    "packed": Case(SLA(**_SMALL), **_PACKS),
    "protected": Case(SLA(**_SMALL), **_SPANS),
    "packed-protected": Case(SLA(**_SMALL), **_PACKS, **_SPANS),
    "packed-protected-all": Case(SLA.sla_main(keep_ratio=0.3, block_k=16), **_PACKS, **_SPANS),
    "packed-protected-hedgehog": Case(
        SLA(feature_map="hedgehog_exp", linear_scope="complement", **_SMALL), **_PACKS, **_SPANS
    ),
    "own-map": Case(SLA(**_SMALL), block_map="random"),
    "own-map-complement": Case(
        SLA(linear_scope="complement", combine="sum", **_SMALL), block_map="random", **_SPANS
    ),
    "smooth-all": Case(SLA(smooth_k="all", **_SMALL), **_PACKS),
    "scale": Case(SLA(**_SMALL), scale=0.7),
    "no-bias": Case(SLA(feature_map="hedgehog", **_SMALL), bias=False),
    "bfloat16": Case(SLA(**_SMALL), dtype="bfloat16"),
    "float16": Case(SLA(**_SMALL), dtype="float16", layout="bnhd"),
}


def random_case(rng: random.Random) -> Case:
    """Any legal small case: ragged, packed, protected, grouped, strided, every option."""

    def maybe(probability: float) -> bool:
        return rng.random() < probability

    def length() -> int:
        return rng.randint(1, rng.choice([20, 70, 70, 130, 130, 260]))

    def spans(n: int) -> Spans:
        cuts = sorted(rng.randint(0, n) for _ in range(2 * rng.randint(1, 2)))
        return tuple(zip(cuts[0::2], cuts[1::2], strict=True))

    num_queries = length()
    num_keys = num_queries if maybe(0.5) else length()
    block_q, block_k = (rng.choice([16, 17, 24, 32, 48, 64, 100, 128]) for _ in range(2))
    if maybe(0.1):
        method: Dense | SLA = Dense(block_q=block_q, block_k=block_k)
    else:
        feature_map = rng.choice(sparline.methods.FEATURE_MAPS)
        # Smoothed keys have both signs, and the identity map is for non-negative rows.
        smooth_k = rng.choice(["router", "router", "none", "all"])
        method = SLA(
            keep_ratio=rng.choice([0.0, 0.1, 0.3, 0.5, 1.0, round(rng.random(), 3)]),
            negligible_ratio=rng.choice([0.0, 0.1, 0.3, round(rng.random(), 3)]),
            feature_map=feature_map,
            linear_scope=rng.choice(sparline.methods.LINEAR_SCOPES),
            block_q=block_q,
            block_k=block_k,
            count_rounding=rng.choice(sparline.methods.COUNT_ROUNDINGS),
            smooth_k="router" if feature_map == "identity" else smooth_k,
            epsilon=rng.choice([None, None, 1e-3]),
            combine=rng.choice(["projection", "projection", "sum", "sparse", "linear"]),
        )
    num_kv_heads = rng.choice([1, 1, 2, 3])
    group = rng.choice([1, 1, 2, 3]) if num_kv_heads < 3 else 1
    cu_q = cu_k = None
    if maybe(0.25):
        inner = rng.randint(0, 2)
        cu_q = (0, *sorted(rng.randint(0, num_queries) for _ in range(inner)), num_queries)
        cu_k = (0, *sorted(rng.randint(0, num_keys) for _ in range(inner)), num_keys)
    head_dim = rng.choice([4, 6, 8, 10, 12, 16, 20, 32, 40, 64, 64, 96, 128])
    return Case(
        method,
        batch=rng.choice([1, 1, 1, 2]),
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        num_queries=num_queries,
        num_keys=num_keys,
        head_dim=head_dim,
        dtype=rng.choice(["float32", "float32", "float32", "bfloat16", "float16"]),
        layout=rng.choice(["bhnd", "bnhd"]),
        padded=maybe(0.3),
        scale=rng.choice([None, None, 1.5 * head_dim**-0.5]),
        cu_q=cu_q,
        cu_k=cu_k,
        protected_q=spans(num_queries) if maybe(0.2) else (),
        protected_k=spans(num_keys) if maybe(0.3) else (),
        block_map="random" if isinstance(method, SLA) and maybe(0.3) else "route",
        bias=maybe(0.7),
        seed=rng.randrange(1 << 30),
    )


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Tensors of a case, q, k, v and d_o in its layout."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_o: Tensor
    weights: SLAWeights
    block_map: Tensor | None


def make_inputs(case: Case, dtype: torch.dtype | None = None) -> Inputs:
    """Gaussian tensors, kept away from where the linear branch is ill-conditioned.

    The identity map gets non-negative rows (nothing else keeps its denominator positive). The relu
    map gets no tiny positive numbers: one alone in its row is a tiny denominator, and rounding
    errors grow by its inverse. Rows without a positive number remain, and follow the empty rule.
    """
    generator = torch.Generator().manual_seed(case.seed)
    dtype = dtype or case.torch_dtype
    method = case.method

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    feature_map = method.feature_map if isinstance(method, SLA) else ""

    def rows(num_heads: int, length: int, *, is_feature: bool = False) -> Tensor:
        shape = (case.batch, num_heads, length, case.head_dim)
        if case.layout == "bnhd":
            shape = (case.batch, length, num_heads, case.head_dim)
        x = randn(*shape)
        if is_feature and feature_map == "identity":
            x = x.abs()
        if is_feature and feature_map == "relu":
            x = torch.where(x.abs() < 0.1, x.sign() * 0.1, x)
        x = x.to(case.torch_dtype).to(dtype)  # the values that the case's own dtype can hold
        if case.padded:
            wide = torch.full((*shape[:3], case.head_dim + 8), float("nan"), dtype=dtype)
            wide[..., : case.head_dim] = x
            x = wide[..., : case.head_dim]
        return x

    q = rows(case.num_heads, case.num_queries, is_feature=True)
    k = rows(case.num_kv_heads, case.num_keys, is_feature=True)
    v = rows(case.num_kv_heads, case.num_keys)
    d_o = rows(case.num_heads, case.num_queries)
    weights = SLAWeights()
    d = case.head_dim
    if isinstance(method, SLA) and method.combine == "projection":
        weights = weights._replace(proj_weight=randn(d, d) / d**0.5)
        if case.bias:
            weights = weights._replace(proj_bias=randn(d))
    if isinstance(method, SLA) and method.has_feature_weights:
        for side, heads in (("q", case.num_heads), ("k", case.num_kv_heads)):
            fields = {
                f"feature_weight_{side}": 0.5 * torch.eye(d) + 0.3 * randn(heads, d, d) / d**0.5
            }
            if case.bias:
                fields[f"feature_bias_{side}"] = 0.3 * randn(heads, d)
            weights = weights._replace(**fields)
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weights = SLAWeights(*(w if w is None else w.float().to(weight_dtype) for w in weights))
    block_map = None
    if case.block_map == "random":
        q_tokens, k_tokens = case.tokens
        block_map = torch.randint(
            -1,
            2,
            (case.batch, case.num_heads, q_tokens.num_blocks, k_tokens.num_blocks),
            generator=generator,
            dtype=torch.int8,
        )
        block_map[0, 0, 0] = -1  # nothing critical, nothing marginal
        block_map[-1, -1, -1] = 0
    return Inputs(q, k, v, d_o, weights, block_map)


@dataclasses.dataclass(frozen=True)
class Result:
    o: Tensor
    lse: Tensor
    gradients: dict[str, Tensor]  # of q, k, v and every weight that is there


def _require_grad(inputs: Inputs) -> tuple[dict[str, Tensor], SLAWeights]:
    """Leaves for autograd with the same strides, by name."""
    leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in ("q", "k", "v")}
    weights = {
        name: None if w is None else w.detach().clone().requires_grad_()
        for name, w in inputs.weights._asdict().items()
    }
    leaves.update((name, w) for name, w in weights.items() if w is not None)
    return leaves, SLAWeights(**weights)


def run(case: Case, inputs: Inputs, backend: str, block_map: Tensor | None = None) -> Result:
    """Forward and backward through the public API."""
    leaves, weights = _require_grad(inputs)
    o, lse = sparline.attention(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        method=case.method,
        layout=case.layout,
        scale=case.scale,
        block_map=inputs.block_map if block_map is None else block_map,
        weights=weights,
        return_lse=True,
        backend=backend,
        **case.segments,
    )
    gradients = torch.autograd.grad(o, list(leaves.values()), inputs.d_o)
    return Result(o.detach(), lse, dict(zip(leaves, gradients, strict=True)))


def run_oracle(case: Case, inputs: Inputs, block_map: Tensor | None) -> Result:
    """Forward and backward of the dense oracle, in the dtype of q."""
    leaves, weights = _require_grad(inputs)
    dtype = inputs.q.dtype
    q, k, v = (leaves[name] for name in ("q", "k", "v"))
    if case.layout == "bnhd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    method = case.method
    q_tokens, k_tokens = case.tokens
    if isinstance(method, SLA) and method.smooth_k == "all":
        k = smoothed(k, k_tokens)
    options: dict[str, Any] = {"combine": "sparse"}
    if isinstance(method, SLA):
        cast = [None if w is None else w.to(dtype) for w in weights]
        options = {
            "combine": method.combine,
            "feature_map": method.feature_map,
            "scope": method.linear_scope,
            "epsilon": method.epsilon
            if method.epsilon is not None
            else (1e-5 if method.linear_scope == "all" else 0.0),
            "proj_weight": cast[0],
            "proj_bias": cast[1],
            "feature_weights": cast[2:],
        }
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    o, lse = oracle.attend(q, k, v, block_map, q_tokens, k_tokens, scale=scale, **options)
    if case.layout == "bnhd":
        o = o.transpose(1, 2)
    gradients = torch.autograd.grad(o, list(leaves.values()), inputs.d_o, materialize_grads=True)
    return Result(o.detach(), lse, dict(zip(leaves, gradients, strict=True)))


def smoothed(k: Tensor, tokens: oracle.Tokens) -> Tensor:
    """k (B, H_kv, N_k, D) minus the mean key of its sequence."""
    same = torch.from_numpy(tokens.sequence[:, None] == tokens.sequence).to(k.dtype)
    return k - (same / same.sum(dim=1, keepdim=True)) @ k


def route(case: Case, inputs: Inputs, backend: str) -> Tensor | None:
    """The map that a call of this case uses: its own, the backend's, or none."""
    if inputs.block_map is not None:
        return inputs.block_map
    if not isinstance(case.method, SLA) or not case.method.needs_block_map:
        return None
    return sparline.route(
        inputs.q,
        inputs.k,
        method=case.method,
        layout=case.layout,
        scale=case.scale,
        backend=backend,
        **case.segments,
    )


def check_case(case: Case, backend: str = "cpu") -> None:
    """Map, forward and backward of one case against the float64 oracle, by the relative rule."""
    inputs = make_inputs(case)
    exact_inputs = make_inputs(case, torch.float64)
    before = [x.clone() for x in (inputs.q, inputs.k, inputs.v)]
    block_map = route(case, inputs, backend)
    if block_map is not None and inputs.block_map is None:
        check_route(case, exact_inputs, block_map)
    actual = run(case, inputs, backend, block_map)
    for name, x, copy in zip("qkv", (inputs.q, inputs.k, inputs.v), before, strict=True):
        assert torch.equal(x, copy), f"{name} was written to"
    exact = run_oracle(case, exact_inputs, block_map)
    same_precision = run_oracle(case, inputs, block_map)
    dtype = case.torch_dtype
    assert actual.o.dtype == dtype
    assert_relative("o", actual.o, exact.o, same_precision.o, dtype)
    assert actual.lse.dtype == torch.float32
    rounds_keys = isinstance(case.method, SLA) and case.method.smooth_k == "all"
    lse_dtype = dtype if rounds_keys else torch.float32
    rounded = exact.lse.to(lse_dtype)
    assert_relative("lse", actual.lse, exact.lse, rounded, lse_dtype, magnitude=1.0)
    # d_o . v and d_o . o nearly cancel in dS; so do the two terms of dphi, over a denominator that
    # has a smallest feature of 0.1 in it (make_inputs).
    is_relu = isinstance(case.method, SLA) and case.method.feature_map == "relu"
    magnitude = case.head_dim**0.5 * (10.0 if is_relu else 1.0)
    for name, gradient in actual.gradients.items():
        assert_relative(
            f"d_{name}",
            gradient,
            exact.gradients[name],
            same_precision.gradients[name],
            dtype,
            magnitude=magnitude,
        )


def check_route(case: Case, exact_inputs: Inputs, block_map: Tensor) -> None:
    """Counts and order of a routed map; near-ties within float32 rounding may fall either way."""
    method = case.method
    assert isinstance(method, SLA)
    q, k = exact_inputs.q, exact_inputs.k
    if case.layout == "bnhd":
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    q_tokens, k_tokens = case.tokens
    if method.smooth_k == "all":
        k = smoothed(k, k_tokens).to(case.torch_dtype).double()
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    scores = oracle.pooled_scores(q, k, q_tokens, k_tokens, scale)
    oracle.check_map(
        block_map,
        scores,
        q_tokens,
        k_tokens,
        keep_ratio=method.keep_ratio,
        negligible_ratio=method.negligible_ratio,
        rounding=method.count_rounding,
        tolerance=1e-5 * scale * case.head_dim**0.5,
    )
