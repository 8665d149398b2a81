# SPDX-License-Identifier: Apache-2.0
"""Modules: state dicts, casts, copies, and equality with the public drop-in module.

The public module's arithmetic is emulated here operation by operation, with its roundings, from its
published behaviour; nothing of it is imported.
"""

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from numeric import relative_l2
from torch import Tensor

import sparline
from sparline import SLA
from sparline.nn import SparseLinearAttention

BLOCKS = {"block_q": 16, "block_k": 16}


def qkv(
    length: int, dtype: torch.dtype, heads: int = 2, d: int = 32, requires_grad: bool = False
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(1, heads, length, d, generator=generator)
        .to(dtype)
        .requires_grad_(requires_grad)
        for _ in range(3)
    ]


def randomise(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


# The public module, one rounding after the other.


def public_map(q: Tensor, k: Tensor, topk: float, block_q: int, block_k: int) -> tuple[Tensor, int]:
    """Its score matrix on the incoming dtype, and its count (clamped to 1, as ours)."""
    dtype = q.dtype
    k = k - k.mean(dim=2, keepdim=True)

    def pool(x: Tensor, rows: int) -> Tensor:
        return torch.stack([part.float().mean(dim=2) for part in x.split(rows, dim=2)], 2).to(dtype)

    score = pool(q, block_q) @ pool(k, block_k).mT
    return score, min(score.shape[-1], max(1, int(topk * score.shape[-1])))


def public_linear_main(q: Tensor, k: Tensor, v: Tensor, phi: Any) -> Tensor:
    """Its main branch: linear attention over every key, each step rounded to 16 bits."""
    dtype = q.dtype
    phi_q, phi_k = phi(q.float()).to(dtype), phi(k.float()).to(dtype)
    kv = (phi_k.mT.float() @ v.float()).to(dtype)
    ks = phi_k.float().sum(dim=2, keepdim=True).to(dtype)
    numerator = (phi_q.float() @ kv.float()).to(dtype)
    product = (phi_q.float() * ks.float()).to(dtype)
    denominator = (product.float().sum(dim=-1, keepdim=True).to(dtype).float() + 1e-5).to(dtype)
    return (numerator.float() / denominator.float()).to(dtype)


def public_linear_sla1(
    q: Tensor, k: Tensor, v: Tensor, phi: Any, block_map: Tensor, block_q: int, block_k: int
) -> Tensor:
    """Its SLA-1 branch: h and z of a block in 16 bits; total minus critical in float32."""
    dtype = q.dtype
    phi_q, phi_k = phi(q.float()).to(dtype), phi(k.float()).to(dtype)
    parts = list(zip(phi_k.split(block_k, 2), v.split(block_k, 2), strict=True))
    h = torch.stack([(f.mT.float() @ x.float()).to(dtype) for f, x in parts], dim=2).float()
    z = torch.stack([f.float().sum(dim=2).to(dtype) for f, _ in parts], dim=2).float()
    rest = (block_map != 1).float()
    rows = []
    for i, f in enumerate(phi_q.split(block_q, 2)):
        numerator = f.float() @ torch.einsum("bhj,bhjfd->bhfd", rest[:, :, i], h)
        denominator = f.float() @ torch.einsum("bhj,bhjf->bhf", rest[:, :, i], z)[..., None]
        rows.append(torch.where(rest[:, :, i].any(-1)[..., None, None], numerator / denominator, 0))
    return torch.cat(rows, dim=2).to(dtype)


def public_sparse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax in float32 over the kept keys, stored in 16 bits."""
    s = (q.float() @ k.float().mT) * q.shape[-1] ** -0.5
    return (s.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ v.float()).to(q.dtype)


PHI = {
    "softmax": lambda x: x.softmax(dim=-1),
    "elu": lambda x: torch.nn.functional.elu(x) + 1,
    "relu": torch.relu,
}


@pytest.mark.parametrize("incoming", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("linear_branch", ["main", "sla1"])
@pytest.mark.parametrize("feature_map", list(PHI))
def test_drop_in_equals_the_public_module(
    feature_map: str, linear_branch: str, incoming: torch.dtype
) -> None:
    length, topk, block_q, block_k = 300, 0.34, 64, 64
    module = SparseLinearAttention(32, topk, feature_map, linear_branch=linear_branch)
    randomise(module)
    q, k, v = qkv(length, incoming)
    o, density = module(q, k, v, return_sparsity=True)
    block_map = sparline.route(q, k, method=module.method)

    # Any map that keeps everything above the cut and fills up from the ties is the public one.
    score, count = public_map(q, k, topk, block_q, block_k)
    kept = block_map == 1
    assert (kept.sum(dim=-1) == count).all()
    assert density == count / score.shape[-1]
    cut = score.float().topk(count, dim=-1).values[..., -1:]
    slack = 2e-2 * score.float().abs().amax() if incoming == torch.bfloat16 else 1e-5
    assert (score.float()[kept] >= (cut - slack).expand_as(score)[kept]).all()
    assert (score.float()[~kept] <= (cut + slack).expand_as(score)[~kept]).all()

    q, k, v = (x.bfloat16() for x in (q, k, v))
    mask = kept.repeat_interleave(block_q, dim=2)[:, :, :length]
    mask = mask.repeat_interleave(block_k, dim=3)[..., :length]
    o_s = public_sparse(q, k, v, mask)
    phi = PHI[feature_map]
    if linear_branch == "main":
        o_l = public_linear_main(q, k, v, phi)
    else:
        o_l = public_linear_sla1(q, k, v, phi, block_map, block_q, block_k)

    # Each branch alone, then the sum with the projection.
    kwargs = {"method": module.method, "block_map": block_map}
    ours_s = sparline.attention(q, k, v, **kwargs)  # without weights: o_s
    ours_l = sparline.attention(
        q,
        k,
        v,
        block_map=block_map,
        method=SLA.from_dict({**module.method.to_dict(), "combine": "linear"}),
    )
    exact_s = public_sparse(q.float(), k.float(), v.float(), mask)
    assert (ours_s.float() - exact_s).abs().max() <= 2e-2 * exact_s.abs().max()
    assert relative_l2(ours_s, exact_s) <= 5e-3
    assert relative_l2(ours_l, o_l) <= 2e-2
    weight, bias = module.proj_l.weight.bfloat16(), module.proj_l.bias.bfloat16()
    public = o_s + torch.nn.functional.linear(o_l, weight, bias)
    assert o.dtype == incoming
    assert relative_l2(o, public) <= 2e-2


def test_drop_in_starts_as_the_sparse_branch() -> None:
    module = SparseLinearAttention(32, 0.3)
    q, k, v = qkv(200, torch.bfloat16)
    method = SLA.from_dict({**module.method.to_dict(), "combine": "sparse"})
    assert torch.equal(module(q, k, v), sparline.attention(q, k, v, method=method))


def test_drop_in_state_dict() -> None:
    state = SparseLinearAttention(32, 0.3).state_dict()
    assert {key: (x.dtype, tuple(x.shape)) for key, x in state.items()} == {
        "proj_l.weight": (torch.float32, (32, 32)),
        "proj_l.bias": (torch.float32, (32,)),
    }
    assert all((x == 0).all() for x in state.values())


def test_drop_in_trains() -> None:
    """Gradients reach q, k, v and the projection in the public module's dtypes."""
    module = SparseLinearAttention(32, 0.3)
    randomise(module)
    q, k, v = qkv(150, torch.float32, requires_grad=True)
    module(q, k, v).square().sum().backward()
    for x in (q, k, v, module.proj_l.weight, module.proj_l.bias):
        assert x.grad is not None
        assert x.grad.dtype == torch.float32
        assert x.grad.abs().sum() > 0


def test_drop_in_float16_and_bnhd() -> None:
    module = SparseLinearAttention(32, 0.3, use_bf16=False)
    swapped = SparseLinearAttention(32, 0.3, use_bf16=False, layout="bnhd")
    q, k, v = qkv(150, torch.float32)
    expected = module(q, k, v).transpose(1, 2)
    assert torch.equal(swapped(*(x.transpose(1, 2) for x in (q, k, v))), expected)


def test_drop_in_keeps_a_block() -> None:
    """topk x blocks below one keeps one block, where the public module returns NaN."""
    q, k, v = qkv(100, torch.float32)
    o, density = SparseLinearAttention(32, 0.01)(q, k, v, return_sparsity=True)
    assert o.isfinite().all()
    assert density == 0.5  # one of two


@pytest.mark.parametrize("topk", [-0.1, 1.1, float("nan")])
def test_drop_in_refuses_ratios(topk: float) -> None:
    with pytest.raises(ValueError, match="keep_ratio must lie in"):
        SparseLinearAttention(32, topk)


def test_drop_in_refuses_cross_attention() -> None:
    q, k, v = qkv(100, torch.float32)
    with pytest.raises(ValueError, match="self-attention"):
        SparseLinearAttention(32, 0.3)(q, k[:, :, :50], v[:, :, :50])


def test_drop_in_refuses_hedgehog() -> None:
    with pytest.raises(NotImplementedError, match="hedgehog"):
        SparseLinearAttention(32, 0.3, "hedgehog")


MODULES = {
    "drop-in": lambda: SparseLinearAttention(32, 0.3),
    "sla": lambda: sparline.nn.SLA(32, method=SLA(keep_ratio=0.3, **BLOCKS)),
    "hedgehog": lambda: sparline.nn.SLA(
        32, num_heads=2, method=SLA(keep_ratio=0.3, feature_map="hedgehog", **BLOCKS)
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_module_round_trips(name: str) -> None:
    """State dict through a file, deepcopy and pickle all give the same function."""
    module = MODULES[name]()
    randomise(module)
    q, k, v = qkv(100, torch.float32)
    expected = module(q, k, v)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = MODULES[name]()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for other in (fresh, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(q, k, v), expected)


@pytest.mark.parametrize("name", MODULES)
def test_module_survives_a_cast(name: str) -> None:
    """model.to(bfloat16) also casts the weights; the module runs on, with bfloat16's rounding."""
    module = MODULES[name]()
    randomise(module)
    q, k, v = qkv(100, torch.bfloat16)
    expected = module(q, k, v)
    assert relative_l2(module.to(torch.bfloat16)(q, k, v), expected) < 1e-2


def test_hedgehog_module_keys_and_start() -> None:
    """Identity maps at first: phi(x) = [softmax(x), softmax(-x)]."""
    module = MODULES["hedgehog"]()
    assert set(module.state_dict()) == {
        *("proj_l.weight", "proj_l.bias"),
        *(f"feature_map_{side}.{name}" for side in "qk" for name in ("weight", "bias")),
    }
    assert torch.equal(module.feature_map_q.weight, torch.eye(32).expand(2, -1, -1))
    assert not module.feature_map_k.bias.any()


def test_hedgehog_module_learns() -> None:
    module = MODULES["hedgehog"]()
    randomise(module)
    q, k, v = qkv(100, torch.float32)
    module(q, k, v).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_hedgehog_module_needs_heads() -> None:
    with pytest.raises(ValueError, match="num_heads"):
        sparline.nn.SLA(32, method=SLA(feature_map="hedgehog"))


def test_module_passes_segments_on() -> None:
    module = MODULES["sla"]()
    randomise(module)
    q, k, v = qkv(100, torch.float32)
    segments = {"cu_seqlens_q": [0, 30, 100], "protected_q": [(0, 4)], "protected_k": [(0, 4)]}
    o = module(q, k, v, **segments)
    expected = sparline.attention(
        q, k, v, method=module.method, weights=module.weights(), **segments
    )
    assert torch.equal(o, expected)
    parts = [module(*(x[:, :, rows] for x in (q, k, v))) for rows in (slice(30, 100),)]
    torch.testing.assert_close(o[:, :, 30:], parts[0])


def test_methods_copy_and_pickle() -> None:
    for name, cls in sparline.METHODS.items():
        is_in_loop = issubclass(cls, (sparline.DynSparse, sparline.BLASST))
        method = sparline.method(name, **({"log_threshold": -5.0} if is_in_loop else {}))
        for other in (
            copy.deepcopy(method),
            pickle.loads(pickle.dumps(method)),
            sparline.methods.from_dict(method.to_dict()),
        ):
            assert other == method
            assert hash(other) == hash(method)


def test_numpy_ratio_is_a_ratio() -> None:
    """Ratios from a numpy sweep are numbers too."""
    assert SLA(keep_ratio=float(np.float64(0.25))) == SLA(keep_ratio=0.25)
