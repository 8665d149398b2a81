# SPDX-License-Identifier: Apache-2.0
"""SLA2's first stage: router and alpha learn, layer by layer, to give what dense attention gives.

The dense model is a source of data. It runs on noised clips; q, k and v of each layer go into a
ring of a few samples, and a step of training takes some of them:

    minimise  mean square of  dense(q, k, v) - SLA2(q, k, v; soft router, alpha)

with SoftTop-k at temperature 0.1 in place of top-k (SLA2, section 6). The ratios k follow one
another, each from what the one before learned. What the soft router learns need not suit the hard
one: of what a ratio began with and what it learned, the one that is nearer to dense on held-out
clips is kept. What is in the ring at step n follows from n, so a resumed run refills it and goes on
to the bit.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import sparline

from . import data, setup
from .config import Config, TrainError
from .distributed import World
from .layerwise import Call, attention_error, attentions, fit_alpha, tapped
from .objective import add_noise, noised_at, predict

#: A stream of draws beside those of a fine-tuning run.
_TRAIN = 102


# Stage 1 ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RouterErrors:
    """``attention_error`` on held-out clips, with the hard router, of one ratio: before its
    training, after it, and with alpha fitted once more behind it to the hard router (where
    ``model.alpha_start`` fits it). Before is what the ratio before left, its alpha fitted to this
    one where that is nearer to dense."""

    before: float
    trained: float
    fitted: float

    @property
    def kept(self) -> float:
        """Of what is kept: the least of them."""
        return min(x for x in (self.before, self.trained, self.fitted) if math.isfinite(x))


@dataclass(frozen=True)
class RouterSummary:
    """What a router run did, for each ratio."""

    states: dict[float, Path]  # files of sparline.save_state
    errors: dict[float, RouterErrors]  # of ratios trained here

    def words(self) -> list[str]:
        """A few lines for the user."""
        told = []
        for keep_ratio, path in self.states.items():
            told.append(f"  {path}")
            if keep_ratio in self.errors:
                errors = self.errors[keep_ratio]
                told[-1] += (
                    f": relative square error {errors.before:.4f} -> {errors.kept:.4f}, hard router"
                )
                if errors.kept == errors.before:
                    told[-1] += f"; what was trained is worse, {errors.trained:.4f}, and not kept"
        return told


@dataclass(frozen=True)
class _Candidate:
    """Learned tensors of every layer, and their error."""

    error: float
    learned: dict[int, dict[str, Tensor]]


class RouterTrainer:
    """SLA2's stage 1 on a model. ``run`` trains every ratio that has no state file yet."""

    def __init__(self, config: Config, *, device: str | None = None) -> None:
        self.config = config
        self.folder = Path(config.output_dir)
        self.world = World.start(config.distributed, device)
        if self.world.ulysses_degree > 1:
            raise TrainError(
                "train: task=router trains layers on whole sequences, got distributed."
                f"ulysses_degree={self.world.ulysses_degree}. Set it to 1."
            )
        # Nothing of the model is trained: its weights need no more bits than they are used with.
        is_16_bit = config.training.mixed_precision == "bf16"
        dtype = torch.bfloat16 if is_16_bit else torch.float32
        self.transformer = setup.load_transformer(config.model, dtype).to(self.world.device)
        sources = setup.make_sources(config, self.transformer, self.world.device)
        self.source, self.held_out = sources[0], sources[1] or sources[0]
        setup.add_method(self.transformer, config, self.world.device)
        self.transformer.eval().requires_grad_(False)
        self.layers = {
            n: cast(sparline.nn.SLA2, m) for n, m in attentions(self.transformer).items()
        }
        if config.model.state is None:
            fit_alpha(self.transformer, self.source, config, self.world)

    def run(self, on_progress: Callable[[int, int, str], None]) -> RouterSummary:
        states: dict[float, Path] = {}
        errors: dict[float, RouterErrors] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        ratios = self.config.router.keep_ratios
        for number, keep_ratio in enumerate(ratios):
            path = self.folder / f"router-{keep_ratio:g}.safetensors"
            self._set_ratio(keep_ratio)
            if path.is_file():
                _load_learned(self.transformer, path)
            else:
                errors[keep_ratio] = self._train_best(keep_ratio, number, on_progress)
                self._save(path, keep_ratio, errors[keep_ratio])
            states[keep_ratio] = path
            self.world.wait()
        return RouterSummary(states, errors)

    def close(self) -> None:
        """Leaves the other processes."""
        self.world.close()

    # One ratio ----------------------------------------------------------------------------------

    def _train_best(
        self, keep_ratio: float, number: int, on_progress: Callable[[int, int, str], None]
    ) -> RouterErrors:
        """Trains a ratio, and leaves the layers with the best that was found."""
        is_fitted = self.config.model.alpha_start == "output"
        candidates = [self._candidate()]
        if is_fitted and number:  # alpha suits the ratio before
            fit_alpha(self.transformer, self.source, self.config, self.world)
            candidates.append(self._candidate())
        before = self._choose(candidates)
        self._train(keep_ratio, number, on_progress)
        trained = self._candidate()
        fitted = trained
        if is_fitted:
            fit_alpha(self.transformer, self.source, self.config, self.world)
            fitted = self._candidate()
        self._choose([before, trained, fitted])
        return RouterErrors(before.error, trained.error, fitted.error)

    def _candidate(self) -> _Candidate:
        learned = {
            layer: {name: value.clone() for name, value in module.state_dict().items()}
            for layer, module in self.layers.items()
        }
        return _Candidate(self._error(), learned)

    def _choose(self, candidates: list[_Candidate]) -> _Candidate:
        """Loads the best; one whose error is not a number is never that."""
        best = min(candidates, key=lambda c: c.error if math.isfinite(c.error) else math.inf)
        for layer, module in self.layers.items():
            module.load_state_dict(best.learned[layer])
        return best

    def _train(
        self, keep_ratio: float, number: int, on_progress: Callable[[int, int, str], None]
    ) -> None:
        """Trains all layers, as many together as ``max_buffer_bytes`` has room for."""
        config = self.config.router
        per_layer = self._sample_bytes() * config.buffer_samples
        together = config.max_buffer_bytes // per_layer
        if together < 1:
            raise TrainError(
                f"train: router.max_buffer_bytes={config.max_buffer_bytes} must hold the samples "
                f"of one layer, {per_layer} bytes ({config.buffer_samples} of q, k, v and o). "
                "Raise it, or lower router.buffer_samples."
            )
        numbers = list(self.layers)
        passes = [numbers[i : i + together] for i in range(0, len(numbers), together)]
        total = config.steps * len(passes) * len(config.keep_ratios)
        for place, chosen in enumerate(passes):
            before = (number * len(passes) + place) * config.steps

            def show(step: int, loss: float, before: int = before) -> None:
                on_progress(before + step, total, f"k {keep_ratio:g}, loss {loss:.2e}")

            self._train_layers(chosen, show, self.folder / f"router-{keep_ratio:g}-{place}.partial")

    def _train_layers(
        self, chosen: Sequence[int], show: Callable[[int, float], None], saved: Path
    ) -> None:
        config = self.config.router
        modules = [self.layers[n] for n in chosen]
        for module in modules:
            module.set_stage(1)
        routers = [p for m in modules for p in m.router.parameters()]
        alphas = [m.alpha_logit for m in modules]
        maps = [f for m in modules for f in (m.feature_map_q, m.feature_map_k) if f is not None]
        for feature_map in maps:
            feature_map.requires_grad_(False)  # trained with the model, in stage 2
        rates = (config.learning_rate, config.alpha_learning_rate)
        optimizer = torch.optim.AdamW(
            [{"params": p, "lr": lr} for p, lr in zip((routers, alphas), rates, strict=True)],
            weight_decay=0.0,
        )
        parameters: list[nn.Parameter] = [*routers, *alphas]
        first = self._load_partial(saved, parameters, optimizer)
        ring = _Ring(chosen, config.buffer_samples)
        for step in range(max(0, first - config.buffer_samples + 1), config.steps):
            self._fill(ring, step)
            if step < first:
                continue
            falling = 0.5 * (1.0 + math.cos(math.pi * step / config.steps))
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr * falling
            rng = torch.Generator().manual_seed(data.mix(self.config.seed, _TRAIN, step))
            total = torch.zeros((), device=self.world.device)
            for n in chosen:
                for call in ring.choose(n, config.batch_samples, rng):
                    loss = _loss(self.layers[n], call) / (len(chosen) * config.batch_samples)
                    torch.autograd.backward(loss)
                    total += loss.detach()
            self.world.average_gradients(parameters)
            mean = self.world.mean(total).item()
            if not math.isfinite(mean):
                raise TrainError(
                    f"train: the loss of the router must be finite, got {mean} at step {step}. "
                    "Lower router.learning_rate and router.alpha_learning_rate."
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            show(step + 1, mean)
            every = self.config.checkpoint.checkpointing_steps
            if every and (step + 1) % every == 0 and step + 1 < config.steps:
                self._save_partial(saved, step + 1, parameters, optimizer)
        for module in modules:
            module.set_stage(2)

    def _fill(self, ring: _Ring, step: int) -> None:
        """Runs the dense model on one clip of this rank and keeps what its layers saw."""
        seed = data.mix(self.config.seed, _TRAIN)
        position = step * self.world.num_data_ranks + self.world.data_rank
        drawn = data.draws(seed, position, 1)
        batch = data.collate([self.source.load(drawn[0])], self.world.device)
        noised = add_noise(batch, drawn, self.config.loss)
        with torch.no_grad(), tapped(self.transformer, ring.add):
            predict(self.transformer, noised, self.config.training.mixed_precision)

    def _error(self) -> float:
        count = self.config.router.evaluation_samples
        return attention_error(self.transformer, self.held_out, self.config, self.world, count)

    def _sample_bytes(self) -> int:
        """Of q, k, v and o of one layer and clip."""
        sizes: list[int] = []
        draw = data.draws(0, 0, 1)
        batch = data.collate([self.source.load(draw[0])], self.world.device)
        sigma = torch.full((1,), 0.5, device=self.world.device)
        with torch.no_grad(), tapped(self.transformer, lambda _, c: sizes.append(c.num_bytes)):
            noised = noised_at(batch, sigma, draw)
            predict(self.transformer, noised, self.config.training.mixed_precision)
        return max(sizes)

    # Files --------------------------------------------------------------------------------------

    def _set_ratio(self, keep_ratio: float) -> None:
        for module in self.layers.values():
            module.method = dataclasses.replace(module.method, keep_ratio=keep_ratio)

    def _save(self, path: Path, keep_ratio: float, errors: RouterErrors) -> None:
        if not self.world.is_main:
            return
        line = {
            "keep_ratio": keep_ratio,
            "error_before": errors.before,
            "error_trained": errors.trained,
            "error_fitted": errors.fitted,
            "error_kept": errors.kept,
        }
        with (self.folder / "router.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        installed = self.transformer._sparline
        installed.method = dataclasses.replace(installed.method, keep_ratio=keep_ratio)
        sparline.save_state(self.transformer, path)
        for partial in self.folder.glob("*.partial"):
            partial.unlink()

    def _save_partial(
        self, path: Path, step: int, parameters: list[nn.Parameter], optimizer: Any
    ) -> None:
        if self.world.is_main:
            state = {
                "step": step,
                "parameters": [p.detach() for p in parameters],
                "optimizer": optimizer.state_dict(),
            }
            torch.save(state, f"{path}.writing")
            Path(f"{path}.writing").replace(path)
        self.world.wait()

    def _load_partial(self, path: Path, parameters: list[nn.Parameter], optimizer: Any) -> int:
        """Restores a ratio that was not finished; the step to go on from."""
        if self.config.checkpoint.resume_from_checkpoint == "none" or not path.is_file():
            return 0
        state = torch.load(path, map_location=self.world.device, weights_only=True)
        with torch.no_grad():
            for parameter, value in zip(parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])


def _loss(module: sparline.nn.SLA2, call: Call) -> Tensor:
    """The mean square of dense - SLA2, relative to that of dense: so that layers weigh alike."""
    o: Tensor = module(call.q, call.k, call.v, **call.options).float()
    dense = call.o.float()
    return (o - dense).square().mean() / dense.square().mean().clamp(min=1e-12)


def _load_learned(transformer: Any, path: Path) -> None:
    """The tensors of a state file whose method has another keep_ratio than the model was given."""
    installed = transformer._sparline
    first = next(iter(attentions(transformer).values()))
    installed.method = first.method
    sparline.load_state(transformer, path)


class _Ring:
    """The last few calls of each layer."""

    def __init__(self, layers: Sequence[int], size: int) -> None:
        self._calls: dict[int, list[Call]] = {n: [] for n in layers}
        self._size = size

    def add(self, layer: int, call: Call) -> None:
        if layer in self._calls:
            calls = self._calls[layer]
            calls.append(call)
            del calls[: -self._size]

    def choose(self, layer: int, count: int, rng: torch.Generator) -> list[Call]:
        """``count`` of them, with replacement."""
        calls = self._calls[layer]
        return [calls[int(torch.randint(len(calls), (), generator=rng))] for _ in range(count)]
