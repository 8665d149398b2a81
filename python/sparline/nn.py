# SPDX-License-Identifier: Apache-2.0
"""Modules that hold a method's learned tensors: ``SLA``, and ``SparseLinearAttention``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import functional, methods
from .functional import Lengths, Spans
from .reference import SLAWeights

__all__ = ["SLA", "SparseLinearAttention"]


def _zero_projection(head_dim: int) -> nn.Linear:
    """W and b of the linear branch, float32 and zero: o = o_s until training moves them."""
    projection = nn.Linear(head_dim, head_dim, dtype=torch.float32)
    nn.init.zeros_(projection.weight)
    nn.init.zeros_(projection.bias)
    return projection


class HeadwiseLinear(nn.Module):
    """y = x W^T + b with W and b per head, inside a hedgehog feature map; identity at first."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        identity = torch.eye(head_dim, dtype=torch.float32)
        self.weight = nn.Parameter(identity.expand(num_heads, -1, -1).clone())  # (heads, D, D)
        self.bias = nn.Parameter(
            torch.zeros(num_heads, head_dim, dtype=torch.float32)
        )  # (heads, D)


class SLA(nn.Module):
    """``sparline.attention`` with the learned tensors of an ``sparline.SLA`` method.

    Parameters, float32: ``proj_l.weight`` and ``proj_l.bias``, zero (with
    ``combine="projection"``); ``feature_map_q.{weight,bias}`` and ``feature_map_k.{weight,bias}``,
    identity and zero (hedgehog maps). Casting the module (``model.to(torch.bfloat16)``) is safe:
    weights are cast to float32 at every call.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        method: methods.SLA = methods.SLA(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        if not isinstance(method, methods.SLA):
            raise TypeError(
                f"sparline.nn.SLA: method must be sparline.SLA, got {method!r}. Dense attention "
                "has no weights: call sparline.attention."
            )
        self.head_dim = head_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.method = method
        self.proj_l = _zero_projection(head_dim) if method.combine == "projection" else None
        self.feature_map_q: HeadwiseLinear | None = None
        self.feature_map_k: HeadwiseLinear | None = None
        if method.has_feature_weights:
            if num_heads is None or self.num_kv_heads is None:
                raise ValueError(
                    f"sparline.nn.SLA: feature_map {method.feature_map!r} has weights per head "
                    "and needs num_heads, got None. Pass the number of query heads."
                )
            self.feature_map_q = HeadwiseLinear(num_heads, head_dim)
            self.feature_map_k = HeadwiseLinear(self.num_kv_heads, head_dim)

    def weights(self) -> SLAWeights:
        """The parameters in the form that ``sparline.attention`` takes."""
        proj, map_q, map_k = self.proj_l, self.feature_map_q, self.feature_map_k
        return SLAWeights(
            proj_weight=None if proj is None else proj.weight,
            proj_bias=None if proj is None else proj.bias,
            feature_weight_q=None if map_q is None else map_q.weight,
            feature_bias_q=None if map_q is None else map_q.bias,
            feature_weight_k=None if map_k is None else map_k.weight,
            feature_bias_k=None if map_k is None else map_k.bias,
        )

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layout: str = "bhnd",
        scale: float | None = None,
        block_map: Tensor | None = None,
        cu_seqlens_q: Lengths | None = None,
        cu_seqlens_k: Lengths | None = None,
        protected_q: Spans = (),
        protected_k: Spans = (),
        backend: str | None = None,
    ) -> Tensor:
        """Arguments and result as in ``sparline.attention``."""
        return functional.attention(
            q,
            k,
            v,
            method=self.method,
            layout=layout,
            scale=scale,
            block_map=block_map,
            weights=self.weights(),
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            protected_q=protected_q,
            protected_k=protected_k,
            backend=backend,
        )

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, method={self.method}"


class SparseLinearAttention(nn.Module):
    """Drop-in for the public ``sparse_linear_attention.SparseLinearAttention``.

    The call, the state-dict keys, the initial values and the semantics are the public module's.
    q, k and v (B, H, L, D) share one shape. The block map is made on their incoming dtype; the
    attention itself runs on bfloat16 (float16 with ``use_bf16=False``) copies, and the result has
    the incoming dtype. Differences, on purpose: at least one block is always kept (the public
    module keeps none and returns NaN when ``topk`` x blocks < 1), ties go to the lower index, and
    intermediate results are not rounded to 16 bits.

    Args:
        head_dim: D.
        topk: fraction of the key blocks that each query block attends exactly, in [0, 1].
        feature_map: "softmax", "elu" or "relu".
        BLKQ: rows of a query block.
        BLKK: rows of a key block.
        use_bf16: compute on bfloat16 copies, else on float16 ones.
        tie_feature_map_qk: without effect, as in the public module.
        linear_branch: which published branch to follow: "main" (linear attention over every key,
            epsilon 1e-5) or "sla1" (over the blocks that are not critical, no epsilon).
        layout: "bhnd", or "bnhd" for hosts that pass (B, L, H, D).
        backend: as in ``sparline.attention``.
    """

    def __init__(
        self,
        head_dim: int,
        topk: float,
        feature_map: str = "softmax",
        BLKQ: int = 64,
        BLKK: int = 64,
        use_bf16: bool = True,
        tie_feature_map_qk: bool = True,
        *,
        linear_branch: str = "main",
        layout: str = "bhnd",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        feature_maps = {"softmax": "softmax", "elu": "elu1", "relu": "relu"}
        if feature_map not in feature_maps:
            raise NotImplementedError(
                f"SparseLinearAttention: feature_map must be one of {', '.join(feature_maps)}, "
                f"got {feature_map!r}. The hedgehog maps are in sparline.nn.SLA."
            )
        presets = {"main": methods.SLA.sla_main, "sla1": methods.SLA.sla1}
        if linear_branch not in presets:
            raise ValueError(
                f"SparseLinearAttention: linear_branch must be one of {', '.join(presets)}, got "
                f"{linear_branch!r}. They name the two published branches."
            )
        self.head_dim = head_dim
        self.topk = topk
        self.dtype = torch.bfloat16 if use_bf16 else torch.float16
        self.tie_feature_map_qk = tie_feature_map_qk
        self.linear_branch = linear_branch
        self.layout = layout
        self.backend = backend
        self.method = presets[linear_branch](
            keep_ratio=topk, feature_map=feature_maps[feature_map], block_q=BLKQ, block_k=BLKK
        )
        self.proj_l = _zero_projection(head_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, return_sparsity: bool = False) -> Any:
        """o in the shape and dtype of q; with ``return_sparsity`` (o, density).

        The second value keeps the public module's name and meaning: critical blocks / blocks, a
        *density*.
        """
        if not (q.shape == k.shape == v.shape):
            raise ValueError(
                "SparseLinearAttention: q, k and v must have one shape (self-attention), got "
                f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}. Use sparline.attention "
                "for cross-attention or grouped heads."
            )
        block_map = functional.route(
            q, k, method=self.method, layout=self.layout, backend=self.backend
        )
        o = functional.attention(
            q.to(self.dtype),
            k.to(self.dtype),
            v.to(self.dtype),
            method=self.method,
            layout=self.layout,
            block_map=block_map,
            weights=SLAWeights(proj_weight=self.proj_l.weight, proj_bias=self.proj_l.bias),
            backend=self.backend,
        ).to(q.dtype)
        if not return_sparsity:
            return o
        num_blocks = block_map.shape[3]
        return o, min(num_blocks, max(1, int(self.topk * num_blocks))) / num_blocks

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, method={self.method}, dtype={self.dtype}"
