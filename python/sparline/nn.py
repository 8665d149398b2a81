# SPDX-License-Identifier: Apache-2.0
"""Modules that hold a method's learned tensors, and the drop-in ``SparseLinearAttention``."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import functional, methods
from .reference import Weights
from .tokens import make_axes

#: What ``SLA2.alpha_evidence`` fits alpha to.
AlphaFit = Literal["output", "mass"]
#: A fitted alpha keeps this distance from 0 and 1.
LEAST_ALPHA = 0.01
#: sigmoid is 0 and 1 there, in float32.
_ALL = 100.0

__all__ = ["SLA", "SLA2", "VSA", "Attention", "SparseLinearAttention", "module_for"]


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


class Attention(nn.Module):
    """``sparline.attention`` with a method and its learned tensors.

    Casting such a module (``model.to(torch.bfloat16)``) is safe: weights are cast to float32 at
    every call.
    """

    def __init__(self, method: methods.Method, head_dim: int, num_heads: int | None) -> None:
        super().__init__()
        self.method = method
        self.head_dim = head_dim
        self.num_heads = num_heads

    def weights(self) -> Weights:
        """The parameters in the form that ``sparline.attention`` takes."""
        return Weights()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, heads: slice | None = None, **arguments: Any
    ) -> Any:
        """Arguments and result as in ``sparline.attention``, without ``method`` and ``weights``.

        ``heads`` says which of the module's heads q, k and v hold, where heads are spread over
        processes.
        """
        weights = self.weights() if heads is None else _of_heads(self.weights(), heads)
        return functional.attention(q, k, v, method=self.method, weights=weights, **arguments)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, method={self.method}"


class SLA(Attention):
    """``sparline.attention`` with the learned tensors of an ``sparline.SLA`` method.

    Parameters, float32: ``proj_l.weight`` and ``proj_l.bias``, zero (with
    ``combine="projection"``); ``feature_map_q.{weight,bias}`` and ``feature_map_k.{weight,bias}``,
    identity and zero (hedgehog maps).
    """

    method: methods.SLA

    def __init__(
        self,
        head_dim: int,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        method: methods.SLA = methods.SLA(),  # noqa: B008 (frozen)
    ) -> None:
        _check_kind("SLA", method, methods.SLA)
        super().__init__(method, head_dim, num_heads)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.proj_l = _zero_projection(head_dim) if method.combine == "projection" else None
        self.feature_map_q, self.feature_map_k = _feature_maps(
            method, head_dim, num_heads, self.num_kv_heads
        )

    def weights(self) -> Weights:
        proj = self.proj_l
        return Weights(
            proj_weight=None if proj is None else proj.weight,
            proj_bias=None if proj is None else proj.bias,
            **_feature_weights(self.feature_map_q, self.feature_map_k),
        )


class SLA2(Attention):
    """``sparline.attention`` with the learned tensors of an ``sparline.SLA2`` method.

    Parameters, float32: ``router.proj_q.weight`` and ``router.proj_k.weight`` (D, D), or
    (H, D, D) with ``router_per_head``, identity: the router starts as SLA's, and is frozen while
    it is hard. ``alpha_logit`` (H, T), alpha = sigmoid of it, 0.9; ``init_alpha`` fits it to a
    sample instead. Feature maps as in ``SLA``.
    """

    method: methods.SLA2

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        method: methods.SLA2 = methods.SLA2(),  # noqa: B008 (frozen)
    ) -> None:
        _check_kind("SLA2", method, methods.SLA2)
        super().__init__(method, head_dim, num_heads)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.router = Router(head_dim, num_heads if method.router_per_head else None)
        num_alphas = 1 if method.alpha_shape == "head" else method.num_alphas
        self.alpha_logit = nn.Parameter(
            torch.full((num_heads, num_alphas), functional.DEFAULT_ALPHA_LOGIT)
        )
        self.feature_map_q, self.feature_map_k = _feature_maps(
            method, head_dim, num_heads, self.num_kv_heads
        )
        self.router.requires_grad_(method.router_mode != "hard")

    def weights(self) -> Weights:
        return Weights(
            alpha_logit=self.alpha_logit,
            router_q=self.router.proj_q.weight,
            router_k=self.router.proj_k.weight,
            **_feature_weights(self.feature_map_q, self.feature_map_k),
        )

    def is_frozen(self, name: str) -> bool:
        """Whether nothing can train this parameter now: the router's, while it is hard."""
        return name.startswith("router.") and self.method.router_mode == "hard"

    def set_stage(self, stage: int) -> None:
        """1: the soft router and alpha train, on q, k, v of the dense model. 2: the hard router is
        frozen, alpha trains with the rest of the model (SLA2, section 7)."""
        if stage not in (1, 2):
            raise ValueError(f"SLA2.set_stage: stage must be 1 or 2, got {stage!r}.")
        mode = "soft" if stage == 1 else "hard"
        self.method = dataclasses.replace(self.method, router_mode=mode)
        self.router.requires_grad_(stage == 1)
        self.alpha_logit.requires_grad_(True)

    def init_alpha(
        self, q: Tensor, k: Tensor, v: Tensor, *, fit: AlphaFit = "output", **arguments: Any
    ) -> None:
        """Sets alpha from one sample: ``set_alpha`` of its ``alpha_evidence``."""
        self.set_alpha(*self.alpha_evidence(q, k, v, fit=fit, **arguments))

    @torch.no_grad()
    def alpha_evidence(
        self, q: Tensor, k: Tensor, v: Tensor, *, fit: AlphaFit = "output", **arguments: Any
    ) -> tuple[Tensor, Tensor]:
        """What a sample says of alpha: numerators and denominators (H, T), float32, means over the
        batch and the rows of each value's stretch. Those of several samples add up.

        ``"output"``: least squares. With d = o_s - o_l and o the dense output, alpha = <o - o_l, d>
        / <d, d> brings alpha o_s + (1 - alpha) o_l as near to o as it can.
        ``"mass"``: what alpha stands for where o_l is exact, the share of the dense softmax that
        falls on critical blocks (SLA2, section 4). It is lower: o_l is not exact.

        Arguments as in ``forward``. One sequence, without protected spans.
        """
        if fit not in ("output", "mass"):
            raise ValueError(f'SLA2.alpha_evidence: fit must be "output" or "mass", got {fit!r}.')
        segments = {"cu_seqlens_q", "cu_seqlens_k", "protected_q", "protected_k"}
        if given := sorted(segments & set(arguments)):
            raise ValueError(
                f"SLA2.alpha_evidence: it measures one sequence without protected spans, got "
                f"{', '.join(given)}. Pass the sequences one by one."
            )
        hard = dataclasses.replace(self.method, router_mode="hard", low_bit=None)
        # Over smoothed keys as well: the mean key would shift one lse against the other.
        every = dataclasses.replace(hard, keep_ratio=1.0)
        weights = self.weights()

        def run(method: methods.SLA2, logit: float) -> tuple[Tensor, Tensor]:
            fixed = weights._replace(alpha_logit=torch.full_like(self.alpha_logit, logit))
            options = {**arguments, "weights": fixed, "return_lse": True}
            o, lse = functional.attention(q, k, v, method=method, **options)
            return o, lse

        o_s, lse_s = run(hard, _ALL)
        o, lse = run(every, _ALL)
        if fit == "mass":
            top, bottom = (lse_s - lse).exp(), torch.ones_like(lse)
        else:
            o_l = run(hard, -_ALL)[0].float()
            d = o_s.float() - o_l
            top, bottom = ((o.float() - o_l) * d).sum(-1), d.square().sum(-1)
            if arguments.get("layout") == "bnhd":
                top, bottom = top.transpose(1, 2), bottom.transpose(1, 2)
        return self._by_stretch(top, arguments), self._by_stretch(bottom, arguments)

    def _by_stretch(self, values: Tensor, arguments: dict[str, Any]) -> Tensor:
        """(B, H, N) in memory order to means (H, T)."""
        mean = values.mean(dim=0)
        if self.method.alpha_shape == "block" and (grid := arguments.get("grid")) is not None:
            length = mean.shape[1]
            axes = make_axes("alpha", self.method.recipe, length, length, grid, None, None, (), ())
            mean = mean if axes.order is None else mean[:, axes.order.to(mean.device)]
        return nn.functional.adaptive_avg_pool1d(mean, self.alpha_logit.shape[1])

    @torch.no_grad()
    def set_alpha(self, numerators: Tensor, denominators: Tensor) -> None:
        """alpha = numerator / denominator, (H, T), within 0.01 and 0.99 so that it can still learn;
        a value of which nothing is known, 0 / 0, stays as it is."""
        for given in (numerators, denominators):
            if given.shape != self.alpha_logit.shape:
                raise ValueError(
                    f"SLA2.set_alpha: sums must have the shape {tuple(self.alpha_logit.shape)} of "
                    f"alpha_logit, got {tuple(given.shape)}. Add up what alpha_evidence returns."
                )
        alpha = (numerators / denominators).clamp(LEAST_ALPHA, 1.0 - LEAST_ALPHA)
        self.alpha_logit.copy_(torch.where(denominators > 0.0, alpha.logit(), self.alpha_logit))


class VSA(Attention):
    """``sparline.attention`` with the gates of an ``sparline.VSA`` method, linear maps of the layer
    input.

    Parameters: ``gate_coarse.weight`` and ``.bias``, zero, so that a dense model starts from its
    block-sparse self; ``gate_fine`` likewise where ``has_fine_gate``, starting at 1.
    """

    method: methods.VSA

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        hidden_dim: int,
        method: methods.VSA = methods.VSA(),  # noqa: B008 (frozen)
        *,
        has_fine_gate: bool = False,
    ) -> None:
        _check_kind("VSA", method, methods.VSA)
        super().__init__(method, head_dim, num_heads)
        self.gate_coarse = _zero_gate(hidden_dim, num_heads * head_dim)
        self.gate_fine = _zero_gate(hidden_dim, num_heads * head_dim) if has_fine_gate else None
        if self.gate_fine is not None:
            nn.init.ones_(self.gate_fine.bias)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        hidden_states: Tensor | None = None,
        heads: slice | None = None,
        **arguments: Any,
    ) -> Any:
        """``hidden_states`` (B, N, hidden_dim) is the input of the layer; the rest is as in
        ``Attention``."""
        if hidden_states is None:
            raise TypeError(
                "sparline.nn.VSA: hidden_states must be given: the gates are maps of the layer "
                "input. Pass hidden_states=x, (B, N, hidden_dim)."
            )
        is_bhnd = arguments.get("layout", "bhnd") == "bhnd"
        num_heads = q.shape[1 if is_bhnd else 2]

        def gate(linear: nn.Linear | None) -> Tensor | None:
            if linear is None:
                return None
            rows = slice(None)
            if heads is not None:
                rows = slice(heads.start * self.head_dim, heads.stop * self.head_dim)
            weight, bias = (x[rows].to(hidden_states.dtype) for x in (linear.weight, linear.bias))
            values = nn.functional.linear(hidden_states, weight, bias)
            values = torch.unflatten(values, -1, (num_heads, self.head_dim))
            return values.transpose(1, 2) if is_bhnd else values

        return functional.attention(
            q,
            k,
            v,
            method=self.method,
            gate_coarse=gate(self.gate_coarse),
            gate_fine=gate(self.gate_fine),
            **arguments,
        )


class Router(nn.Module):
    """SLA2's learned router: y = x W^T on pooled queries and pooled keys, identity at first."""

    def __init__(self, head_dim: int, num_heads: int | None) -> None:
        super().__init__()
        self.proj_q = _Matrix(head_dim, num_heads)
        self.proj_k = _Matrix(head_dim, num_heads)


class _Matrix(nn.Module):
    """W (D, D), or (H, D, D)."""

    def __init__(self, head_dim: int, num_heads: int | None) -> None:
        super().__init__()
        identity = torch.eye(head_dim, dtype=torch.float32)
        if num_heads is not None:
            identity = identity.expand(num_heads, -1, -1)
        self.weight = nn.Parameter(identity.clone())


def module_for(
    method: methods.Method, *, head_dim: int, num_heads: int, hidden_dim: int
) -> Attention:
    """The module that holds what ``method`` learns; one without parameters if that is nothing."""
    if isinstance(method, methods.SLA):
        return SLA(head_dim, num_heads, method=method)
    if isinstance(method, methods.SLA2):
        return SLA2(head_dim, num_heads, method=method)
    if isinstance(method, methods.VSA):
        return VSA(head_dim, num_heads, hidden_dim, method=method)
    return Attention(method, head_dim, num_heads)


def _check_kind(owner: str, method: object, kind: type[methods.Method]) -> None:
    if not isinstance(method, kind):
        raise TypeError(
            f"sparline.nn.{owner}: method must be sparline.{kind.__name__}, got {method!r}. "
            "module_for(method, ...) makes the module of any method."
        )


def _feature_maps(
    method: methods.Method, head_dim: int, num_heads: int | None, num_kv_heads: int | None
) -> tuple[HeadwiseLinear | None, HeadwiseLinear | None]:
    if not method.recipe.has_feature_weights:
        return None, None
    if num_heads is None or num_kv_heads is None:
        raise ValueError(
            f"sparline.nn: feature_map {method.recipe.feature_map!r} has weights per head and "
            "needs num_heads, got None. Pass the number of query heads."
        )
    return HeadwiseLinear(num_heads, head_dim), HeadwiseLinear(num_kv_heads, head_dim)


def _feature_weights(
    map_q: HeadwiseLinear | None, map_k: HeadwiseLinear | None
) -> dict[str, Tensor | None]:
    return {
        "feature_weight_q": None if map_q is None else map_q.weight,
        "feature_bias_q": None if map_q is None else map_q.bias,
        "feature_weight_k": None if map_k is None else map_k.weight,
        "feature_bias_k": None if map_k is None else map_k.bias,
    }


def _of_heads(weights: Weights, heads: slice) -> Weights:
    """What is learned per head, of some heads; a router may be shared by all."""
    names = ("feature_weight_q", "feature_bias_q", "feature_weight_k", "feature_bias_k")
    tensors = {name: getattr(weights, name) for name in (*names, "alpha_logit")}
    for name in ("router_q", "router_k"):
        router = getattr(weights, name)
        if router is not None and router.ndim == 3:
            tensors[name] = router
    return weights._replace(**{n: t[heads] for n, t in tensors.items() if t is not None})


def _zero_gate(hidden_dim: int, inner_dim: int) -> nn.Linear:
    gate = nn.Linear(hidden_dim, inner_dim, dtype=torch.float32)
    nn.init.zeros_(gate.weight)
    nn.init.zeros_(gate.bias)
    return gate


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
            weights=Weights(proj_weight=self.proj_l.weight, proj_bias=self.proj_l.bias),
            backend=self.backend,
        ).to(q.dtype)
        if not return_sparsity:
            return o
        num_blocks = block_map.shape[3]
        return o, min(num_blocks, max(1, int(self.topk * num_blocks))) / num_blocks

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, method={self.method}, dtype={self.dtype}"
