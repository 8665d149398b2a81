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
from sparline import SLA, Dense, SLAWeights
from sparline.functional import make_segments
from sparline.reference import Segment

BLOCKS = {"block_q": 16, "block_k": 16}


def qkv(num_queries: int = 40, num_keys: int = 50, d: int = 8) -> list[Tensor]:
    return [torch.randn(1, 2, n, d) for n in (num_queries, num_keys, num_keys)]


def segments_of(n_q: int, n_k: int, **options: Any) -> tuple[list[Segment], list[Segment]]:
    q, k, _ = qkv(n_q, n_k)
    names = ("cu_seqlens_q", "cu_seqlens_k", "protected_q", "protected_k")
    defaults = (None, None, (), ())
    args = [options.get(name, default) for name, default in zip(names, defaults, strict=True)]
    return make_segments("test", q, k, *args)


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
        ({"method": "sla"}, TypeError, "method must be sparline.Dense or sparline.SLA, got 'sla'"),
        ({"layout": "nhd"}, ValueError, 'layout must be "bhnd" or "bnhd", got \'nhd\''),
        ({"scale": 0.0}, ValueError, "scale must be positive and finite, got 0.0"),
        ({"scale": float("nan")}, ValueError, "scale must be positive"),
        ({"backend": "gpu"}, ValueError, "backend must be None, 'cpu', 'reference', got 'gpu'"),
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
        ({"block_map": torch.zeros(2, 2)}, TypeError, "block_map must be int8"),
        (
            {"block_map": torch.zeros(3, 3, dtype=torch.int8)},
            ValueError,
            r"broadcast to \(B, H, T_m, T_n\) = \(1, 2, 3, 4\), got \(3, 3\)",
        ),
        (
            {"method": Dense(), "block_map": torch.zeros(1, 1, dtype=torch.int8)},
            ValueError,
            "Dense takes no block_map",
        ),
        (
            {"weights": SLAWeights(proj_weight=torch.zeros(4, 4))},
            ValueError,
            r"proj_weight must have shape \(8, 8\), got \(4, 4\)",
        ),
        ({"weights": SLAWeights(proj_bias=torch.zeros(8))}, ValueError, "needs proj_weight"),
        (
            {"method": Dense(), "weights": SLAWeights(proj_weight=torch.zeros(8, 8))},
            ValueError,
            "does not use it",
        ),
        (
            {"weights": SLAWeights(feature_weight_q=torch.zeros(2, 8, 8))},
            ValueError,
            "does not use it",
        ),
        ({"method": SLA(feature_map="hedgehog")}, ValueError, "need feature_weight_q"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], text: str) -> None:
    q, k, v = qkv()
    with pytest.raises(error, match=text):
        sparline.attention(q, k, v, **{"method": SLA(**BLOCKS), **options})


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
        torch.ops.sparline.route(q, k, [], [], "blocks=16")


def test_route_wants_a_router() -> None:
    q, k, _ = qkv()
    with pytest.raises(TypeError, match="Dense attention has no block map"):
        sparline.route(q, k, method=Dense())


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


def test_own_map_equals_routing(backend: str) -> None:
    q, k, v = qkv()
    method = SLA(keep_ratio=0.4, combine="sum", **BLOCKS)
    block_map = sparline.route(q, k, method=method, backend=backend)
    assert torch.equal(
        sparline.attention(q, k, v, method=method, block_map=block_map, backend=backend),
        sparline.attention(q, k, v, method=method, backend=backend),
    )


def test_without_weights_the_projection_is_zero(backend: str) -> None:
    q, k, v = qkv()
    method = SLA(keep_ratio=0.4, **BLOCKS)
    sparse = SLA(keep_ratio=0.4, combine="sparse", **BLOCKS)
    o = sparline.attention(q, k, v, method=method, backend=backend)
    assert torch.equal(o, sparline.attention(q, k, v, method=sparse, backend=backend))
    weights = SLAWeights(torch.zeros(8, 8), torch.zeros(8))
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
