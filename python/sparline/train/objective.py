# SPDX-License-Identifier: Apache-2.0
"""What is minimised: flow matching, or the distance to a frozen dense copy.

x_sigma = (1 - sigma) x + sigma e for latents x and noise e; the model predicts the velocity e - x
from x_sigma, the timestep 1000 sigma and the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import LossConfig
from .data import Batch, Draw, Source, collate, draws, mix
from .distributed import World

#: Streams of randomness of one draw.
_NOISE, _LEVEL, _DROPOUT = 1, 2, 3
TIMESTEPS = 1000.0
GOLDEN = 0.5 * (5**0.5 - 1.0)
HELD_OUT_SEED = 1


class Noised(NamedTuple):
    """What the model sees, and what it should say."""

    latents: Tensor  # x_sigma, (B, C, T, H, W)
    sigma: Tensor  # (B,)
    text: Tensor  # (B, L, D)
    velocity: Tensor  # e - x, like latents


def add_noise(
    batch: Batch,
    draws: Sequence[Draw],
    loss: LossConfig,
    null_text: Tensor | None = None,
    caption_dropout: float = 0.0,
) -> Noised:
    """Noise, noise levels and dropped captions of a batch: each clip's follow from its draw
    alone."""
    sigma = torch.tensor([_draw_level(loss, draw) for draw in draws])
    text = batch.text
    if caption_dropout > 0.0:
        assert null_text is not None
        rolls = [torch.rand((), generator=_rng("cpu", draw, _DROPOUT)) for draw in draws]
        dropped = torch.stack(rolls) < caption_dropout
        dropped = dropped.to(text.device, non_blocking=True)[:, None, None]
        text = torch.where(dropped, null_text.to(text), text)
    return noised_at(batch._replace(text=text), sigma.to(batch.latents.device), draws)


def noised_at(batch: Batch, sigma: Tensor, draws: Sequence[Draw]) -> Noised:
    """A batch at given noise levels (B,)."""
    x = batch.latents
    noise = torch.stack(
        [torch.randn(x.shape[1:], generator=_rng(x.device, d, _NOISE), device=x.device)
         for d in draws]
    )  # fmt: skip
    level = sigma[:, None, None, None, None]
    return Noised((1.0 - level) * x + level * noise, sigma, batch.text, noise - x)


def _draw_level(loss: LossConfig, draw: Draw) -> float:
    rng = _rng("cpu", draw, _LEVEL)
    if loss.weighting_scheme == "uniform":
        sigma = torch.rand((), generator=rng, dtype=torch.float64)
    else:
        normal = torch.randn((), generator=rng, dtype=torch.float64)
        sigma = torch.sigmoid(loss.logit_mean + loss.logit_std * normal)
    return float(loss.flow_shift * sigma / (1.0 + (loss.flow_shift - 1.0) * sigma))


def _rng(device: str | torch.device, draw: Draw, stream: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(mix(draw.seed, stream))


def predict(model: Any, noised: Noised, mixed_precision: str = "no") -> Tensor:
    """The velocity that the model predicts, float32."""
    device_type = noised.latents.device.type
    with torch.autocast(device_type, torch.bfloat16, enabled=mixed_precision == "bf16"):
        velocity = model(
            hidden_states=noised.latents,
            timestep=TIMESTEPS * noised.sigma,
            encoder_hidden_states=noised.text,
            return_dict=False,
        )[0]
    return velocity.float()  # type: ignore[no-any-return]


def losses(
    model: Any, noised: Noised, mixed_precision: str = "no", teacher: Any | None = None
) -> Tensor:
    """The loss of each clip, (B,): the mean square error of the predicted velocity, against the
    true one or, with a ``teacher``, against what that predicts."""
    target = noised.velocity
    if teacher is not None:
        with torch.no_grad():
            target = predict(teacher, noised, mixed_precision)
    velocity = predict(model, noised, mixed_precision)
    return F.mse_loss(velocity, target, reduction="none").mean((1, 2, 3, 4))


@torch.no_grad()
def held_out_losses(
    model: Any, source: Source, count: int, batch_size: int, world: World, mixed_precision: str
) -> list[tuple[float, float]]:
    """(sigma, flow-matching loss) of ``count`` held-out clips: the same clips, noise and evenly
    spaced levels at every call, on any number of ranks."""
    was_training = model.training
    model.eval()
    # Multiples of the golden ratio: neighbours in the folder meet levels from the whole range.
    rank_of = torch.tensor([GOLDEN * (n + 1) % 1.0 for n in range(count)]).argsort().argsort()
    levels = (rank_of.double() + 0.5) / count
    drawn = draws(HELD_OUT_SEED, 0, count)
    found = torch.zeros(count, dtype=torch.float64)
    parts = list(range(0, count, batch_size))
    for turn in range(0, len(parts), world.num_data_ranks):
        # Sharded ranks must all run; one without a part of its own repeats the last.
        own = turn + world.data_rank
        first = parts[min(own, len(parts) - 1)]
        part = drawn[first : first + batch_size]
        batch = collate([source.load(draw) for draw in part], world.device)
        sigma = levels[first : first + batch_size].float().to(world.device)
        values = losses(model, noised_at(batch, sigma, part), mixed_precision)
        if own < len(parts):
            found[first : first + batch_size] = values.double().cpu()
    model.train(was_training)
    total = world.mean(found.to(world.device)).cpu() * world.num_data_ranks
    return list(zip(levels.tolist(), total.tolist(), strict=True))
