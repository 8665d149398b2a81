# SPDX-License-Identifier: Apache-2.0
"""The front end: arguments, errors, segments, backends."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sparline
from sparline import BLASST, SLA, SLA2, VSA, Dense, DynSparse, Grid, LowBit, VMoBA, Weights
from sparline.methods import Method
from sparline.reference import Segment
from sparline.tokens import make_axes

BLOCKS = {"block_q": 16, "block_k": 16}


def qkv(num_queries: int = 40, num_keys: int = 50, d: int = 8) -> list[Tensor]:
    return [torch.randn(1, 2, n, d) for n in (num_queries, num_keys, num_keys)]


def segments_of(n_q: int, n_k: int, **options: Any) -> tuple[list[Segment], list[Segment]]:
    names = ("cu_seqlens_q", "cu_seqlens_k", "protected_q", "protected_k")
    defaults = (None, None, (), ())
    args = [options.get(name, default) for name, default in zip(names, defaults, strict=True)]
    axes = make_axes("test", SLA().recipe, n_q, n_k, None, *args)
    return axes.query_segments, axes.key_segments


def test_no_segments() -> None:
    assert segments_of(10, 20) == ([], [])


def test_packs_and_spans_become_segments() -> None:
    q, k = segments_of(
        10, 12, cu_seqlens_q=[0, 4, 10], cu_seqlens_k=[0, 5, 12], protected_k=[(3, 7)]
    )
    assert q == [Segment(0, 4, 0), Segment(4, 10, 1)]
    assert k == [
        Segment(0, 3, 0),
        Segment(3, 5, 0, True),  # the span is cut where the sequence ends
        Segment(5, 7, 1, True),
        Segment(7, 12, 1),
    ]


def test_empty_sequences_and_spans() -> None:
    q, k = segments_of(10, 10, cu_seqlens_q=torch.tensor([0, 0, 10, 10]), protected_q=[(5, 5)])
    assert q == [Segment(0, 10, 1)]
    assert k == [Segment(0, 10, 1)]


def test_overlapping_spans() -> None:
    q, _ = segments_of(10, 10, protected_q=[(2, 6), (4, 8)])
    assert [(s.begin, s.end, s.is_protected) for s in q] == [
        (0, 2, False),
        (2, 4, True),
        (4, 6, True),
        (6, 8, True),
        (8, 10, False),
    ]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"method": "sla"}, TypeError, "method must be a sparline method, got 'sla'"),
        ({"layout": "nhd"}, ValueError, 'layout must be "bhnd" or "bnhd", got \'nhd\''),
        ({"scale": 0.0}, ValueError, "scale must be positive and finite, got 0.0"),
        ({"scale": float("nan")}, ValueError, "scale must be positive"),
        (
            {"backend": "gpu"},
            ValueError,
            "backend must be None, 'cuda', 'cpu', 'reference', got",
        ),
        ({"cu_seqlens_k": [0, 50]}, ValueError, "cu_seqlens_k needs cu_seqlens_q"),
        ({"cu_seqlens_q": [0, 40]}, ValueError, "cu_seqlens_k must rise from 0 to .* 50"),
        ({"cu_seqlens_q": [0, 30, 20, 40]}, ValueError, r"must rise .* got \[0, 30, 20, 40\]"),
        (
            {"cu_seqlens_q": torch.tensor([0.0, 40.0])},
            ValueError,
            "one-dimensional integer CPU tensor",
        ),
        (
            {"cu_seqlens_q": [0, 40], "cu_seqlens_k": [0, 20, 50]},
            ValueError,
            "same number of sequences, got 1 and 2",
        ),
        ({"protected_q": [(30, 41)]}, ValueError, r"<= 40, got \(30, 41\)"),
        ({"block_map": torch.zeros(2, 2).long()}, TypeError, "block_map must be int8"),
        (
            {"block_map": torch.zeros(3, 4)},
            ValueError,
            "soft block_map needs linear_scope='complement', got 'marginal'",
        ),
        (
            {"block_map": torch.zeros(3, 3, dtype=torch.int8)},
            ValueError,
            r"broadcast to \(B, H, T_m, T_n\) = \(1, 2, 3, 4\), got \(3, 3\)",
        ),
        (
            {"method": Dense(), "block_map": torch.zeros(1, 1, dtype=torch.int8)},
            ValueError,
            "dense takes no block_map",
        ),
        (
            {"weights": Weights(proj_weight=torch.zeros(4, 4))},
            ValueError,
            r"proj_weight must have shape \(8, 8\), got \(4, 4\)",
        ),
        ({"weights": Weights(proj_bias=torch.zeros(8))}, ValueError, "needs proj_weight"),
        (
            {"method": Dense(), "weights": Weights(proj_weight=torch.zeros(8, 8))},
            ValueError,
            "does not use it",
        ),
        (
            {"weights": Weights(feature_weight_q=torch.zeros(2, 8, 8))},
            ValueError,
            "does not use it",
        ),
        (
            {"method": SLA(feature_map="hedgehog", combine="sum")},
            ValueError,
            "need feature_weight_q",
        ),
        (
            {"method": DynSparse(-2.0), "block_map": torch.ones(1, 1, dtype=torch.bool)},
            ValueError,
            "dynsparse takes no block_map",
        ),
        ({"weights": Weights(alpha_logit=torch.zeros(2, 1))}, ValueError, "does not use it"),
        (
            {"method": SLA2(), "weights": Weights(alpha_logit=torch.zeros(3, 1))},
            ValueError,
            r"alpha_logit must have shape \(H, T\) with H = 2, got \(3, 1\)",
        ),
        (
            {"method": SLA2(), "weights": Weights(router_q=torch.zeros(8, 8))},
            ValueError,
            "router_q and router_k go together",
        ),
        (
            {
                "method": SLA2(),
                "weights": Weights(router_q=torch.zeros(3, 8, 8), router_k=torch.zeros(3, 8, 8)),
            },
            ValueError,
            r"router_q must have shape \(8, 8\) or \(2, 8, 8\), got \(3, 8, 8\)",
        ),
        ({"gate_fine": torch.ones(1, 2, 40, 8)}, ValueError, "belong to VSA"),
        ({"method": VSA()}, ValueError, r"token_order='cubes'\) and needs it"),
        ({"method": VMoBA()}, ValueError, "needs it. Pass grid="),
        ({"method": Dense(token_order="hilbert")}, ValueError, "needs it. Pass grid="),
        ({"method": VSA(), "grid": Grid(4, 2, 5)}, ValueError, "cross-attention has no grid"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], text: str) -> None:
    q, k, v = qkv()
    with pytest.raises(error, match=text):
        sparline.attention(q, k, v, **{"method": SLA(**BLOCKS), **options})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"grid": Grid(4, 2, 4)}, r"account for every token .* sequences of \[40\] queries"),
        ({"grid": [Grid(4, 2, 5)] * 2}, "account for every token"),
        ({"grid": [Grid(4, 2, 2), Grid(3, 2, 4)], "cu_seqlens_q": [0, 20, 40]}, "every token"),
        (
            {"grid": Grid(4, 2, 5), "gate_coarse": torch.ones(1, 1, 40, 8)},
            r"gate_coarse must have the shape of q, \(1, 2, 40, 8\)",
        ),
    ],
)
def test_wrong_grids(options: dict[str, Any], text: str) -> None:
    q, k, v = qkv(40, 40)
    with pytest.raises(ValueError, match=text):
        sparline.attention(q, k, v, method=VSA(), **options)


def test_grid_forms(backend: str) -> None:
    """A plain tuple is a grid; one grid serves every packed sequence."""
    q, k, v = qkv(40, 40)
    call: dict[str, Any] = {"method": VMoBA(**BLOCKS), "backend": backend}
    o = sparline.attention(q, k, v, grid=Grid(2, 4, 5), **call)
    assert torch.equal(o, sparline.attention(q, k, v, grid=(2, 4, 5), **call))
    packs = {"cu_seqlens_q": [0, 20, 40]}
    o = sparline.attention(q, k, v, grid=[Grid(2, 2, 5)] * 2, **packs, **call)
    assert torch.equal(o, sparline.attention(q, k, v, grid=(2, 2, 5), **packs, **call))


def test_wrong_tensors(backend: str) -> None:
    q, k, v = qkv()
    call = {"method": Dense(), "backend": backend}
    with pytest.raises(ValueError, match="four dimensions"):
        sparline.attention(q[0], k[0], v[0], **call)
    with pytest.raises(ValueError, match="agree in batch and head_dim"):
        sparline.attention(q, k, v[:, :, :3], **call)
    with pytest.raises(ValueError, match="multiple of the key/value heads"):
        sparline.attention(q.repeat(1, 2, 1, 1)[:, :3], k, v, **call)
    with pytest.raises(ValueError, match="no dimension may be empty"):
        sparline.attention(q[:, :, :0], k, v, **call)
    with pytest.raises(TypeError, match="one floating dtype"):
        sparline.attention(q, k.half(), v, **call)
    with pytest.raises(TypeError, match="one floating dtype"):
        sparline.attention(q.int(), k.int(), v.int(), **call)


def test_kernels_say_what_they_take() -> None:
    q, k, v = qkv()
    with pytest.raises(TypeError, match=r'float64. Cast q, k and v, or pass backend="reference"'):
        sparline.attention(q.double(), k.double(), v.double(), method=Dense())
    with pytest.raises(RuntimeError, match=r"head_dim must be .* got 7"):
        sparline.attention(q[..., :7], k[..., :7], v[..., :7], method=Dense())
    wide = [torch.randn(1, 2, 8, 40).mT for _ in range(3)]
    with pytest.raises(RuntimeError, match="unit stride in its last dimension"):
        sparline.attention(*wide, method=Dense())
    with pytest.raises(RuntimeError, match="spec: a key must be known"):
        torch.ops.sparline.route(q, k, *[None] * 4, [], [], "blocks=16")


def test_what_does_not_go_together(backend: str) -> None:
    q, k, v = qkv()
    soft = {"block_map": torch.rand(3, 4), "backend": backend}
    for method in (SLA2(low_bit=True, **BLOCKS), SLA(combine="sparse", low_bit=True, **BLOCKS)):
        with pytest.raises(ValueError, match="a soft block_map needs 16 bits"):
            sparline.attention(q, k, v, method=method, **soft)
    with pytest.raises(ValueError, match=r"decide_rows must be at most block_q = 16, got 32"):
        DynSparse(-2.0, decide_rows=32, **BLOCKS)
    wide = Dense(low_bit=LowBit(q_rows=32), **BLOCKS)
    with pytest.raises(ValueError, match=r"low_bit.q_rows must be at most block_q = 16, got 32"):
        sparline.attention(q, k, v, method=wide, backend=backend)


@pytest.mark.parametrize("method", [Dense(), DynSparse(-2.0), BLASST(-2.0), SLA.linear_only()])
def test_route_wants_a_router(method: Method) -> None:
    q, k, _ = qkv()
    with pytest.raises(TypeError, match="method must have a router"):
        sparline.route(q, k, method=method)


def test_statistics_want_a_skip_rule() -> None:
    q, k, v = qkv(40, 40)
    for method in (Dense(), SLA(), VSA()):
        with pytest.raises(TypeError, match="must skip inside the loop"):
            sparline.tile_statistics(q, k, v, method=method, grid=Grid(1, 5, 8))


def test_tile_statistics(backend: str) -> None:
    """Two blocks of keys, the second far below the first for all rows but one."""
    q = torch.ones(1, 1, 32, 4)
    k = torch.ones(1, 1, 32, 4)
    k[:, :, 16:] = -1.0
    q[:, :, 20] = -1.0  # prefers the second block
    v = torch.randn(1, 1, 32, 4)
    method = DynSparse(-3.0, decide_rows=16, block_q=32, block_k=16)
    call: dict[str, Any] = {"method": method, "scale": 1.0, "backend": backend}
    statistics = sparline.tile_statistics(q, k, v, recall=True, **call)
    assert statistics.visited.tolist() == [[2]]
    assert statistics.skipped.tolist() == [[0.5]]
    assert statistics.sparsity == 0.25
    assert statistics.row_votes.tolist() == [[[31.0]]]
    assert statistics.kept_bits.flatten().tolist() == [0b01, 0b11]
    o, lse = sparline.attention(q, k, v, return_lse=True, **call)
    assert torch.equal(statistics.lse, lse)
    torch.testing.assert_close(lse[0, 0, 0].exp(), torch.tensor(16 * torch.e**4))
    assert statistics.recall is not None
    kept = 1 / (1 + torch.e**-8)
    torch.testing.assert_close(statistics.recall[0, 0, :16], torch.full((16,), kept))
    torch.testing.assert_close(statistics.recall[0, 0, 16:], torch.ones(16))
    torch.testing.assert_close(o[0, 0, :16], v[0, 0, :16].mean(dim=0).expand(16, -1))
    without = sparline.tile_statistics(q, k, v, **call)
    assert without.recall is None


def test_soft_maps_come_from_the_router(backend: str) -> None:
    """route returns what attention uses: a floating map in training, with a gradient."""
    q, k, v = qkv()
    router_q, router_k = torch.eye(8, requires_grad=True), torch.eye(8, requires_grad=True)
    weights = Weights(router_q=router_q, router_k=router_k)
    method = SLA2(keep_ratio=0.5, router_mode="soft", **BLOCKS)
    call: dict[str, Any] = {"method": method, "weights": weights, "backend": backend}
    soft = sparline.route(q, k, **call)
    assert soft.shape == (1, 2, 3, 4)
    torch.testing.assert_close(soft.sum(dim=-1), torch.full((1, 2, 3), 2.0), atol=1e-4, rtol=0)
    with_map = sparline.attention(q, k, v, block_map=soft, **call)
    torch.testing.assert_close(sparline.attention(q, k, v, **call), with_map)
    with_map.square().sum().backward()
    assert router_q.grad is not None
    assert router_q.grad.abs().sum() > 0


def test_straight_through_is_hard_ahead(backend: str) -> None:
    """Exactly: where everything is critical the linear branch stays empty, and alpha 1."""
    q, k, v = qkv()
    options: dict[str, Any] = {"keep_ratio": 0.9, "count_rounding": "ceil", **BLOCKS}
    results = [
        sparline.attention(q, k, v, method=SLA2(router_mode=mode, **options), backend=backend)
        for mode in ("hard", "straight_through")
    ]
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-5)
    maps = [
        sparline.route(q, k, method=SLA2(router_mode=mode, **options), backend=backend)
        for mode in ("hard", "straight_through")
    ]
    assert torch.equal((maps[0] == 1).float(), maps[1])


def test_block_map_forms(backend: str) -> None:
    """bool, broadcast and full int8 maps mean the same."""
    q, k, v = qkv()
    method = SLA(combine="sum", linear_scope="complement", **BLOCKS)
    keep = torch.rand(3, 4) > 0.5
    results = [
        sparline.attention(q, k, v, method=method, block_map=block_map, backend=backend)
        for block_map in (keep, keep.to(torch.int8), keep.to(torch.int8).expand(1, 2, 3, 4))
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    "method",
    [
        SLA(keep_ratio=0.4, combine="sum", **BLOCKS),
        SLA(keep_ratio=0.4, combine="sum", smooth_k="all", **BLOCKS),
        SLA2(keep_ratio=0.4, **BLOCKS),
        SLA2(keep_ratio=0.4, low_bit=LowBit(), **BLOCKS),
    ],
    ids=["sla", "smooth-all", "sla2", "low-bit-sla2"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_map_equals_routing(method: Method, dtype: torch.dtype, backend: str) -> None:
    """In outputs and gradients, wherever the mean key was found."""
    q, k, v = (x.to(dtype).requires_grad_() for x in qkv())
    call: dict[str, Any] = {"method": method, "cu_seqlens_q": [0, 9, 40], "backend": backend}
    call["cu_seqlens_k"] = [0, 20, 50]
    block_map = sparline.route(q, k + 1, **call)
    results = []
    for own in (block_map, None):
        o, lse = sparline.attention(q, k + 1, v, block_map=own, return_lse=True, **call)
        results.append((o, lse, *torch.autograd.grad(o.float().square().sum(), (q, k, v))))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_without_weights_the_projection_is_zero(backend: str) -> None:
    q, k, v = qkv()
    method = SLA(keep_ratio=0.4, **BLOCKS)
    sparse = SLA(keep_ratio=0.4, combine="sparse", **BLOCKS)
    o = sparline.attention(q, k, v, method=method, backend=backend)
    assert torch.equal(o, sparline.attention(q, k, v, method=sparse, backend=backend))
    weights = Weights(torch.zeros(8, 8), torch.zeros(8))
    torch.testing.assert_close(
        o, sparline.attention(q, k, v, method=method, weights=weights, backend=backend)
    )


def test_output_keeps_the_layout(backend: str) -> None:
    """A (B, N, H, D) call gives a (B, N, H, D) result in the same memory order, without copies."""
    q, k, v = (x.transpose(1, 2).contiguous() for x in qkv())
    o, lse = sparline.attention(
        q, k, v, method=Dense(), layout="bnhd", return_lse=True, backend=backend
    )
    assert o.shape == q.shape
    assert lse.shape == (1, 2, 40)
    if backend != "reference":
        assert o.stride() == q.stride()


@pytest.mark.parametrize("name", sparline.METHODS)
def test_explain_every_method(name: str) -> None:
    options = {"log_threshold": -2.0} if name in ("dynsparse", "blasst") else {}
    q, k, _ = qkv(40, 40)
    text = sparline.explain(q, k, method=sparline.method(name, **options), grid=Grid(2, 4, 5))
    assert "backend: cpu" in text


def test_explain() -> None:
    q, k, _ = qkv()
    text = sparline.explain(q, k, method=SLA(**BLOCKS))
    assert "backend: cpu" in text
    assert "3 x 4 of 16 x 16 rows" in text
    assert "workspace_bytes" in text


def test_environment_forces_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARLINE_BACKEND", "reference")
    q, k, v = (x.double() for x in qkv())
    assert sparline.attention(q, k, v, method=Dense()).dtype == torch.float64


def run_python(code: str, **environment: str) -> str:
    source = Path(sparline.__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(source), **environment}
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    return result.stdout + result.stderr


def test_import_without_the_library() -> None:
    """The package imports, the reference works, and everything else says what to do."""
    output = run_python(
        "import torch, sparline\n"
        "q = torch.ones(1, 1, 4, 4)\n"
        "print(sparline.attention(q, q, q, method=sparline.Dense(), backend='reference').sum())\n"
        "sparline.attention(q, q, q, method=sparline.Dense())\n",
        SPARLINE_LIBRARY="/nowhere/_C.so",
    )
    assert "tensor(16.)" in output
    assert "ImportError: sparline: the compiled operators are not available" in output
    assert "/nowhere/_C.so does not load" in output
    assert 'pass backend="reference"' in output


def test_import_is_light() -> None:
    """diffusers and the command line's dependencies are not needed to import the package."""
    output = run_python(
        "import sys, sparline; print(sorted({'diffusers', 'typer', 'av'} & set(sys.modules)))"
    )
    assert output.strip() == "[]"


def test_public_names() -> None:
    for name in sparline.__all__:
        if name not in ("apply", "restore", "save_state", "load_state"):  # need diffusers
            assert getattr(sparline, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'sage'"):
        _ = sparline.sage
