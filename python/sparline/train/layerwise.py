# SPDX-License-Identifier: Apache-2.0
"""Layer by layer against the dense model: what its attention sees and gives, where SLA2's alpha
starts by it, and how far from it a method is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

import sparline
from sparline.integrations.diffusers import WanSparseAttnProcessor

from . import data
from .config import Config
from .distributed import World
from .objective import noised_at, predict

#: Noised clips on which alpha is measured: noise levels evenly over the range.
ALPHA_CLIPS = 4
#: Streams of draws beside those of a fine-tuning run and of the router's.
_ALPHA, _HELD_OUT = 101, 103


@dataclass(frozen=True)
class Call:
    """What a layer's attention saw: q, k, v (B, N, H, D), and the dense o."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    options: dict[str, Any]  # of sparline.attention: layout, grid, backend

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.q, self.k, self.v, self.o))


OnCall = Callable[[int, Call], None]


class _Tap(sparline.nn.Attention):
    """Dense attention in a method's place, that shows what it sees."""

    def __init__(self, layer: int, attention: sparline.nn.Attention, on_call: OnCall) -> None:
        super().__init__(attention.method, attention.head_dim, attention.num_heads)
        self._layer, self._on_call = layer, on_call

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        # The processors' layout is bnhd.
        q_rows, k_rows, v_rows = (x.transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(q_rows, k_rows, v_rows).transpose(1, 2)
        self._on_call(self._layer, Call(q, k, v, o, options))
        return o


def attentions(transformer: Any) -> dict[int, sparline.nn.Attention]:
    """The modules that ``sparline.apply`` put into the model, by block."""
    found = {n: block.attn1.processor for n, block in enumerate(transformer.blocks)}
    return {n: p.attention for n, p in found.items() if isinstance(p, WanSparseAttnProcessor)}


@contextlib.contextmanager
def tapped(transformer: Any, on_call: OnCall) -> Iterator[None]:
    """Within, a model with our processors computes dense attention, and ``on_call(layer, call)``
    sees every call of it."""
    own = attentions(transformer)
    try:
        for n, attention in own.items():
            transformer.blocks[n].attn1.processor.attention = _Tap(n, attention, on_call)
        yield
    finally:
        for n, attention in own.items():
            transformer.blocks[n].attn1.processor.attention = attention


@torch.no_grad()
def fit_alpha(transformer: Any, source: data.Source, config: Config, world: World) -> None:
    """Fits every SLA2 layer's alpha to dense attention on a few noised clips, as
    ``model.alpha_start`` says. Other methods are left alone."""
    layers = attentions(transformer)
    modules = {n: m for n, m in layers.items() if isinstance(m, sparline.nn.SLA2)}
    fit = config.model.alpha_start
    if not modules or fit == "constant":
        return
    sums = {
        n: torch.zeros(2, *m.alpha_logit.shape, device=world.device) for n, m in modules.items()
    }

    def on_call(layer: int, call: Call) -> None:
        found = modules[layer].alpha_evidence(
            call.q, call.k, call.v, fit=cast(sparline.nn.AlphaFit, fit), **call.options
        )
        sums[layer] += torch.stack(found)

    was_training = transformer.training
    transformer.eval()
    with tapped(transformer, on_call):
        for n, draw in enumerate(data.draws(data.mix(config.seed, _ALPHA), 0, ALPHA_CLIPS)):
            batch = data.collate([source.load(draw)], world.device)
            sigma = torch.tensor([(n + 0.5) / ALPHA_CLIPS], device=world.device)
            predict(transformer, noised_at(batch, sigma, [draw]), config.training.mixed_precision)
    transformer.train(was_training)
    for n, module in modules.items():
        module.set_alpha(*world.mean(sums[n]))  # one value on all ranks, whatever they round


@torch.no_grad()
def attention_error(
    transformer: Any, source: data.Source, config: Config, world: World, count: int
) -> float:
    """Mean over layers and ``count`` clips, at as many noise levels, of |o - dense|^2 / |dense|^2,
    for the methods and learned tensors that the model's layers have; SLA2's router is hard. The
    same number on all ranks."""
    layers = attentions(transformer)
    found: list[Tensor] = []

    def on_call(layer: int, call: Call) -> None:
        o = layers[layer](call.q, call.k, call.v, **call.options).float()
        dense = call.o.float()
        found.append((o - dense).square().sum() / dense.square().sum())

    for n, draw in enumerate(data.draws(data.mix(config.seed, _HELD_OUT), 0, count)):
        batch = data.collate([source.load(draw)], world.device)
        sigma = torch.tensor([(n + 0.5) / count], device=world.device)
        with tapped(transformer, on_call):
            predict(transformer, noised_at(batch, sigma, [draw]), config.training.mixed_precision)
    return world.mean(torch.stack(found).mean()).item()
