# SPDX-License-Identifier: Apache-2.0
"""The fine-tuning loop: any method, one process or many, resumable to the bit.

Everything random in step n follows from (seed, n), so that a run that is killed and resumed takes
the steps of one that is not. A checkpoint holds the weights that are trained, their average, the
optimizer and the step.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, data, export, setup
from .config import Config, OptimizerConfig, TrainError
from .distributed import World, local, whole
from .layerwise import fit_alpha
from .objective import add_noise, held_out_losses, losses

#: ``on_progress(done, total, words)``
Progress = Callable[[int, int, str], None]


def be_silent(done: int, total: int, words: str) -> None:
    """No progress."""


@dataclass(frozen=True)
class Summary:
    """What a run did."""

    step: int
    is_done: bool  # all steps, not stopped by time or a signal
    loss: float | None  # of the last step taken here
    held_out_loss: float | None
    nonfinite_steps: int  # skipped
    skipped_samples: int
    exported: Path | None

    def words(self) -> list[str]:
        """A few lines for the user."""
        told = [f"step {self.step}" + ("" if self.is_done else ", stopped early; resumable")]
        if self.loss is not None:
            told.append(f"loss {self.loss:.4f}")
        if self.held_out_loss is not None:
            told.append(f"held-out loss {self.held_out_loss:.4f}")
        if self.nonfinite_steps:
            told.append(f"{self.nonfinite_steps} steps skipped: not finite")
        if self.skipped_samples:
            told.append(f"{self.skipped_samples} files skipped: see the warnings above")
        return [", ".join(told), *([f"  {self.exported}"] if self.exported else [])]


class Trainer:
    """One run. Every process of torchrun makes one and calls ``run``."""

    def __init__(self, config: Config, *, device: str | None = None) -> None:
        self.config = config
        self.folder = Path(config.output_dir)
        check_reporter(config)
        self.world = world = World.start(config.distributed, device)
        transformer = setup.load_transformer(config.model).to(world.device)
        self.source, self.held_out = setup.make_sources(config, transformer, world.device)
        self.teacher = None
        if config.loss.kind == "teacher_mse":
            self.teacher = copy.deepcopy(transformer).eval().requires_grad_(False)
        setup.add_method(transformer, config, world.device)
        if config.model.state is None:
            fit_alpha(transformer, self.source, config, world)
        setup.add_lora(transformer, config)
        setup.parameter_groups(transformer, config)  # says early what cannot be trained
        if config.model.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        if config.model.compile:
            transformer.compile_repeated_blocks()
        for model in (transformer, self.teacher):
            if model is not None:
                world.split_sequence(model)
                world.shard(model)
        self.transformer = transformer.train()
        self.groups = setup.parameter_groups(transformer, config)
        self.parameters = dict(setup.trained(self.groups))
        self.optimizer = _make_optimizer(self.groups, config.optimizer, world.device)
        training = config.training
        self.average = Average(self.parameters, training.ema_decay) if training.use_ema else None
        self.step = 0
        self.nonfinite_steps = 0
        self._nonfinite_in_a_row = 0
        self._stop = False
        self._pipeline: Any = None  # for samples; loaded with the first
        self.log = Log(self.folder / "log.jsonl", config, world)
        self._resume()
        self.loader = data.Loader(
            self.source,
            config.data.train_batch_size,
            data.mix(config.seed, 0),
            world.device,
            world.data_rank,
            world.num_data_ranks,
            # The demo renders its clips on the device, where threads only get into the way.
            0 if config.data.source == "demo" else config.data.dataloader_num_workers,
        )

    # The loop -----------------------------------------------------------------------------------

    def run(self, on_progress: Progress = be_silent) -> Summary:
        """Trains to the last step, ``training.max_minutes`` or a signal; leaves a checkpoint, and
        after the last step an export."""
        config, total = self.config, self.config.training.max_train_steps
        deadline = time.monotonic() + 60.0 * (config.training.max_minutes or math.inf)
        loss, held_out, exported = None, None, None
        started = self.step
        watch = _Watch(self.step)
        with self._signals():
            while self.step < total and not self._must_stop(deadline):
                loss, norm = self.train_step()
                on_progress(self.step, total, f"loss {loss:.4f}")
                if self._is_due(config.logging.logging_steps):
                    self.log.write(
                        self.step,
                        loss=loss,
                        grad_norm=norm,
                        ms=watch.lap_ms(self.step),
                        learning_rate=self.optimizer.param_groups[0]["lr"],
                        nonfinite_steps=self.nonfinite_steps,
                        skipped_samples=len(self.source.skipped),
                    )
                with watch.paused():
                    if self._is_due(config.logging.validation_steps):
                        held_out = self.validate()
                    if self._is_due(config.logging.sample_steps):
                        self.draw_samples()
                    steps = config.checkpoint.checkpointing_steps
                    if steps and self.step % steps == 0 and self.step < total:
                        self.save_checkpoint()
            if self.step > started or not checkpoint.list_checkpoints(self.folder):
                self.save_checkpoint()
            if self.step >= total:
                exported = self.export(self.folder / "final")
        self.log.close()
        self.loader.close()
        return Summary(
            self.step,
            self.step >= total,
            loss,
            held_out,
            self.nonfinite_steps,
            len(self.source.skipped),
            exported,
        )

    def train_step(self) -> tuple[float, float]:
        """One optimizer step; (loss, gradient norm before clipping), means over all ranks. A step
        that is not finite changes no weight."""
        config = self.config
        accumulation = config.training.gradient_accumulation_steps
        share = schedule(config.optimizer, self.step, config.training.max_train_steps)
        for group, settings in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = settings.learning_rate * share
        total = torch.zeros((), device=self.world.device)
        for micro in range(accumulation):
            number = self.step * accumulation + micro
            batch = self.loader.batch(number)
            self.world.check_tokens(self.transformer, batch.latents)
            noised = add_noise(
                batch,
                self.loader.draws(number),
                config.loss,
                self.source.null_text,
                config.data.caption_dropout,
            )
            self.world.sync_gradients(self.transformer, micro == accumulation - 1)
            loss = losses(
                self.transformer, noised, config.training.mixed_precision, self.teacher
            ).mean()
            # Under Ulysses a rank's gradient is that of its own tokens: the mean over ranks, which
            # follows, must become a sum.
            torch.autograd.backward(loss * (self.world.ulysses_degree / accumulation))
            total += loss.detach() / accumulation
        if not self.world.is_sharded:
            self.world.average_gradients(list(self.parameters.values()))
        norm = self._clip_gradients(config.optimizer.max_grad_norm)
        mean = self.world.mean(total).item()
        if math.isfinite(mean) and math.isfinite(norm):
            self.optimizer.step()
            self._nonfinite_in_a_row = 0
            if self.average is not None:
                self.average.update(self.step)
        else:
            self._skip_step(mean, norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return mean, norm

    def _clip_gradients(self, max_norm: float) -> float:
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients)).item()
        if max_norm and norm > max_norm:
            torch._foreach_mul_([local(g) for g in gradients], max_norm / norm)
        return norm

    def _skip_step(self, loss: float, norm: float) -> None:
        self.nonfinite_steps += 1
        self._nonfinite_in_a_row += 1
        self.log.write(self.step, event="skipped", loss=loss, grad_norm=norm)
        limit = self.config.training.max_nonfinite_steps
        if self._nonfinite_in_a_row >= limit:
            raise TrainError(
                f"train: losses and gradients must be finite, and {limit} steps in a row were not "
                f"(step {self.step}: loss {loss}, gradient norm {norm}). The last checkpoint is "
                "from before them: resume it with a lower optimizer.learning_rate, or look at the "
                "clips of these steps."
            )

    def _is_due(self, steps: int) -> bool:
        is_last = self.step == self.config.training.max_train_steps
        return steps > 0 and (self.step % steps == 0 or is_last)

    def _must_stop(self, deadline: float) -> bool:
        return self.world.any(self._stop or time.monotonic() >= deadline)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM, which schedulers send before they kill, and Ctrl-C end the run after its
        step."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            self._stop = True

        before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # What is made on the way --------------------------------------------------------------------

    def validate(self) -> float | None:
        """The held-out loss of the averaged weights, over all noise levels; None without clips."""
        if self.held_out is None:
            return None
        found = self.held_out_losses()
        mean = sum(loss for _, loss in found) / len(found)
        fifths: dict[str, float] = {}
        for n in range(5):
            part = [loss for sigma, loss in found if n <= 5 * sigma < n + 1]
            if part:
                fifths[f"held_out_loss_{n / 5:.1f}_{(n + 1) / 5:.1f}"] = sum(part) / len(part)
        self.log.write(self.step, held_out_loss=mean, **fifths)
        return mean

    def held_out_losses(self, count: int | None = None) -> list[tuple[float, float]]:
        """(sigma, loss) of every held-out clip, of the averaged weights."""
        if self.held_out is None:
            raise TrainError(
                "train: a held-out loss needs held-out clips. Set data.validation_path=FOLDER."
            )
        batch_size = self.config.data.train_batch_size
        count = count or self.config.logging.validation_batches * batch_size
        with self.averaged():
            return held_out_losses(
                self.transformer,
                self.held_out,
                count,
                batch_size,
                self.world,
                self.config.training.mixed_precision,
            )

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within, the model has the averaged weights, where an average is kept."""
        return contextlib.nullcontext() if self.average is None else self.average.swapped()

    def draw_samples(self) -> Path | None:
        """A sheet of generated clips, ``samples/step-N.png``; None where the model came without its
        pipeline."""
        from . import samples

        if self._pipeline is None:
            self._pipeline = setup.load_pipeline(self.config.model, self.transformer)
        if self._pipeline is None:
            return None
        with self.averaged():
            clips = samples.generate(self._pipeline, self.transformer, self.config)
        if not self.world.is_main:
            return None
        path = self.folder / "samples" / f"step-{self.step:06d}.png"
        samples.write_sheet(path, clips)
        self.log.image(self.step, path)
        return path

    def export(self, folder: Path) -> Path:
        """Writes the averaged weights in diffusers' layout; see ``export.write``."""
        with self.averaged():
            export.write(self.transformer, folder, self.config, self.world)
        return folder

    # State --------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The tensors of a checkpoint, sharing memory with the run."""
        kept = {
            name: p.detach()
            for name, p in self.transformer.named_parameters()
            if name in self.parameters or setup.PROCESSOR in name
        }
        moments = {
            name: dict(self.optimizer.state[parameter])
            for name, parameter in self.parameters.items()
        }
        average = {} if self.average is None else self.average.tensors
        return {"weights": kept, "optimizer": moments, "average": average}

    def save_checkpoint(self) -> Path:
        about = {
            "step": self.step,
            "nonfinite_steps": self.nonfinite_steps,
            "nonfinite_in_a_row": self._nonfinite_in_a_row,
            "num_ranks": self.world.size,
            "config": self.config.to_dict(),
        }
        keep = self.config.checkpoint.checkpoints_total_limit
        return checkpoint.save(self.folder, self.step, self.state(), about, self.world, keep)

    def _resume(self) -> None:
        path = checkpoint.find(self.folder, self.config.checkpoint.resume_from_checkpoint)
        if path is None:
            self.log.start()
            return
        about = checkpoint.read_about(path)
        ours = json.loads(json.dumps(self.config.to_dict()))
        for section in ("task", "method", "lora"):
            if about["config"][section] != ours[section]:
                raise TrainError(
                    f"train: {path} was made with {section} {about['config'][section]}, and this "
                    f"run has {ours[section]}. Choose another output_dir, or set "
                    "checkpoint.resume_from_checkpoint=none."
                )
        checkpoint.load(path, self.state(), self.world)
        self.step = int(about["step"])
        self.nonfinite_steps = int(about["nonfinite_steps"])
        self._nonfinite_in_a_row = int(about["nonfinite_in_a_row"])
        self.log.resume(self.step)

    def close(self) -> None:
        """Leaves the other processes."""
        self.world.close()


def _make_optimizer(
    groups: list[setup.Group], config: OptimizerConfig, device: torch.device
) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(
        [
            {
                "params": list(group.parameters.values()),
                "lr": group.learning_rate,
                "weight_decay": group.weight_decay,
            }
            for group in groups
        ],
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=device.type == "cuda",
    )
    # The moments exist from the start, so that a checkpoint always has the same tensors.
    for group in groups:
        for parameter in group.parameters.values():
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=device if device.type == "cuda" else None),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }
    return optimizer


def schedule(config: OptimizerConfig, step: int, total: int) -> float:
    """Share of the peak rate: linear warm-up, then constant or a cosine."""
    if step < config.lr_warmup_steps:
        return (step + 1) / config.lr_warmup_steps
    if config.lr_scheduler == "constant":
        return 1.0
    progress = (step - config.lr_warmup_steps) / max(1, total - config.lr_warmup_steps)
    falling = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.lr_min_ratio + (1.0 - config.lr_min_ratio) * falling


class Average:
    """Exponential moving average of parameters, float32, sharded as they are."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = parameters, decay
        self.tensors: dict[str, Tensor] = {
            name: p.detach().clone().float() for name, p in parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self._decay, (1 + step) / (10 + step))
        ours, theirs = self._pairs()
        torch._foreach_lerp_(ours, [p.float() for p in theirs], 1.0 - decay)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Within, parameters and averages have changed places."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, parameter in zip(*self._pairs(), strict=True):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        ours = [local(t) for t in self.tensors.values()]
        return ours, [local(p.detach()) for p in self._parameters.values()]


# What is written down ---------------------------------------------------------------------------


def check_reporter(config: Config) -> None:
    """Raises TrainError, before the long work, if what shall be reported to is not installed."""
    if config.logging.report_to == "none":
        return
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as missing:
        raise TrainError(
            f"train: logging.report_to=tensorboard needs tensorboard ({missing}). Run: pip install "
            "'sparline[train]', or set logging.report_to=none; log.jsonl is written anyway."
        ) from missing


class Log:
    """``log.jsonl``, a line for each event, and tensorboard; of the main process alone."""

    def __init__(self, path: Path, config: Config, world: World) -> None:
        self._path, self._config, self._is_main = path, config, world.is_main
        self._board: Any = None

    def start(self) -> None:
        """A new run."""
        if self._is_main:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text("")
        self._open(0)
        self.write(0, event="start", config=self._config.to_dict())

    def resume(self, step: int) -> None:
        """Drops what lies after ``step``: those steps will be taken again."""
        if self._is_main and self._path.exists():
            kept = []
            for line in self._path.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # a line that a kill cut short
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
            partial = self._path.with_suffix(".partial")
            partial.write_text("".join(kept))
            os.replace(partial, self._path)
        self._open(step)
        self.write(step, event="resume")

    def write(self, step: int, **entry: Any) -> None:
        if not self._is_main:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **entry}) + "\n")
        if self._board is not None:
            for name, value in entry.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, step)

    def image(self, step: int, path: Path) -> None:
        if self._board is not None:
            import numpy as np
            from PIL import Image

            self._board.add_image("samples", np.asarray(Image.open(path)), step, dataformats="HWC")

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

    def _open(self, step: int) -> None:
        if self._is_main and self._config.logging.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            folder = str(self._path.parent / "tensorboard")
            self._board = SummaryWriter(folder, purge_step=step)


class _Watch:
    """Time of a training step, without what is done between steps."""

    def __init__(self, step: int) -> None:
        self._step, self._since, self._pause = step, time.perf_counter(), 0.0

    def lap_ms(self, step: int) -> float:
        """Mean time of a step since the last lap."""
        now = time.perf_counter()
        spent_ms = 1e3 * (now - self._since - self._pause) / max(1, step - self._step)
        self._step, self._since, self._pause = step, now, 0.0
        return spent_ms

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._pause += time.perf_counter() - begin
