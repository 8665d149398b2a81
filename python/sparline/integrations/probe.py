# SPDX-License-Identifier: Apache-2.0
"""How much of a model's time is self-attention, and how sparse it was."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import sparline
from sparline.accounting import block_sparsity


class AttentionProbe(TorchFunctionMode):
    """Within ``with AttentionProbe(transformer) as probe:`` every self-attention call is timed and
    counted.

    A call is the operator from q, k and v to o: ``scaled_dot_product_attention`` where the model
    keeps its own attention (told apart from cross-attention by equal lengths), ours where
    ``sparline.apply`` replaced it. Meant for eager models; on a GPU it waits for the device at each
    call.
    """

    def __init__(self, *models: nn.Module | None) -> None:
        super().__init__()
        self.seconds = 0.0
        self.calls = 0
        self._sparsity_sum = 0.0
        self._start = 0.0
        self._sparsity: dict[nn.Module, float] = {}  # of each layer, from its first call
        modules = (module for model in models if model is not None for module in model.modules())
        self._modules = [module for module in modules if isinstance(module, sparline.nn.Attention)]
        self._handles: list[Any] = []

    @property
    def sparsity(self) -> float:
        """``achieved_sparsity``, the mean over calls; dense calls count as 0."""
        return self._sparsity_sum / self.calls if self.calls else 0.0

    def __enter__(self) -> AttentionProbe:
        for module in self._modules:
            self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after))
        cast(Any, super()).__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        cast(Any, super()).__exit__(kind, error, trace)
        while self._handles:
            self._handles.pop().remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q = kwargs["query"] if "query" in kwargs else args[0]
        k = kwargs["key"] if "key" in kwargs else args[1]
        if q.shape[-2] != k.shape[-2]:
            return func(*args, **kwargs)
        start = _now(q)
        o = func(*args, **kwargs)
        self._count(_now(q) - start, 0.0)
        return o

    def _before(
        self, module: sparline.nn.Attention, args: tuple[Tensor, ...], options: dict[str, Any]
    ) -> None:
        if module not in self._sparsity:
            self._sparsity[module] = achieved_sparsity(module, args, options)
        self._start = _now(args[0])

    def _after(
        self, module: sparline.nn.Attention, args: tuple[Tensor, ...], output: Tensor
    ) -> None:
        self._count(_now(output) - self._start, self._sparsity[module])

    def _count(self, seconds: float, sparsity: float) -> None:
        self.seconds += seconds
        self.calls += 1
        self._sparsity_sum += sparsity


def achieved_sparsity(
    module: sparline.nn.Attention, qkv: tuple[Tensor, ...], options: dict[str, Any]
) -> float:
    """The share of tiles that the call leaves out of its softmax: blocks that no router kept, or
    tiles that an in-loop method skipped after q k^T."""
    options = {key: value for key, value in options.items() if key != "hidden_states"}
    recipe = module.method.recipe
    with torch.no_grad():
        if recipe.skip is not None:
            return sparline.tile_statistics(*qkv, method=module.method, **options).sparsity
        if recipe.router is not None:
            weights, (q, k, _) = module.weights(), qkv
            return block_sparsity(
                sparline.route(q, k, method=module.method, weights=weights, **options)
            )
    return 1.0 if recipe.combine == "linear" else 0.0  # linear attention keeps no block


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
