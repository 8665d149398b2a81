# SPDX-License-Identifier: Apache-2.0
"""Train the bundled demo model: a small Wan transformer on short real clips, dense attention.

    python examples/train_demo_model.py --prepare scenes.npz           # once; needs the wheels
    python examples/train_demo_model.py --data scenes.npz --out run    # again and again, resumes
    python examples/train_demo_model.py --data scenes.npz --out run --export weights

Flow matching: x_sigma = (1 - sigma) clip + sigma noise, the model predicts noise - clip, the loss
is the mean square, sigma is logit-normal. One class in ten is dropped, for classifier-free
guidance. Evaluation is on fixed held-out clips, fixed noise and evenly spaced sigma.

Everything random in step n comes from generators seeded with (seed, n), so a run that is killed
and resumed takes the same steps as one that is not, and there is no generator state to save. The
checkpoint holds the model, its moving average, the optimizer and the step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from PIL import Image
from torch import Tensor

from sparline.demo.data import ClipSource, load_scenes, save_scenes
from sparline.demo.pipeline import TRANSFORMER_CONFIG, DemoPipeline, class_embeddings

EVAL_BATCH = 8
EVAL_CLIPS_PER_CLASS = 8


@dataclass
class State:
    """What a checkpoint holds."""

    model: WanTransformer3DModel
    average: WanTransformer3DModel
    optimizer: torch.optim.Optimizer
    step: int = 0


def main() -> None:
    args = parse_args()
    if args.prepare is not None:
        save_scenes(args.prepare, load_scenes())
        print(f"wrote {args.prepare}")
        return
    start = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)

    scenes = load_scenes(args.data)
    shape = {"frames": args.frames, "size": args.size, "scenes": scenes, "device": device}
    train, held_out = ClipSource("train", **shape), ClipSource("val", **shape)
    state = make_state(args, device)
    log = Log(args.out / "log.jsonl")
    if (args.out / "checkpoint.pt").exists():
        load_checkpoint(args.out / "checkpoint.pt", state, device)
        log.drop_after(state.step)
        print(f"resumed at step {state.step}", flush=True)
    else:
        log.write(event="start", parameters=sum(p.numel() for p in state.model.parameters()))

    with fastest_attention(args, device):
        if state.step < args.steps:
            run(args, state, train, held_out, log, device, start)
        if args.export is not None:
            export(args.export, state.average, train.names, args)
            print(f"wrote {args.export}")


def run(
    args: argparse.Namespace,
    state: State,
    train: ClipSource,
    held_out: ClipSource,
    log: Log,
    device: torch.device,
    start: float,
) -> None:
    """Train until `args.steps` or `args.max_minutes` since `start` (seconds, monotonic)."""
    table = class_embeddings(torch.arange(-1, len(train.names)), state.model.config.text_dim)
    table = table.to(device)  # row 0 is "no class"
    if device.type == "cuda" and not args.no_compile:
        state.model.compile_repeated_blocks(fullgraph=True)
    parameters = list(state.model.parameters())
    averages = list(state.average.parameters())
    deadline = start + 60.0 * args.max_minutes
    tick, tick_step, loss_sum = time.monotonic(), state.step, torch.zeros((), device=device)

    while state.step < args.steps and time.monotonic() < deadline:
        step = state.step
        learning_rate = args.learning_rate * schedule(step, args.warmup, args.steps)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate

        clips, class_ids = train.batch(args.batch, seeded("cpu", args.seed, step, 0))
        rng = seeded(device, args.seed, step, 1)
        noise = torch.randn(clips.shape, generator=rng, device=device)
        sigma = torch.sigmoid(
            args.sigma_mean + args.sigma_std * torch.randn(len(clips), generator=rng, device=device)
        )
        dropped = torch.rand(len(clips), generator=rng, device=device) < args.class_dropout
        text = table[torch.where(dropped, 0, class_ids + 1)]
        loss = flow_loss(state.model, clips, noise, sigma, text).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        decay = min(args.average_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(averages, parameters, 1.0 - decay)
        state.step += 1
        loss_sum += loss.detach()

        if state.step % args.log_every == 0 or state.step == args.steps:
            mean = loss_sum.item() / (state.step - tick_step)
            spent_ms = 1e3 * (time.monotonic() - tick) / (state.step - tick_step)
            log.write(
                step=state.step, loss=mean, lr=learning_rate, grad_norm=norm.item(), ms=spent_ms
            )
            if not math.isfinite(mean):
                raise SystemExit(f"train: the loss is {mean} at step {state.step}; lower the rate")
            tick, tick_step = time.monotonic(), state.step
            loss_sum.zero_()
        if state.step % args.eval_every == 0 or state.step == args.steps:
            log.write(step=state.step, **evaluate(state.average, held_out, table))
            tick, tick_step = time.monotonic(), state.step
            loss_sum.zero_()
        if state.step % args.sample_every == 0 or state.step == args.steps:
            draw_samples(args.out / f"samples_{state.step:06d}.png", state.average, train, args)
            tick, tick_step = time.monotonic(), state.step
            loss_sum.zero_()
        if state.step % args.checkpoint_every == 0:
            save_checkpoint(args.out / "checkpoint.pt", state)
    save_checkpoint(args.out / "checkpoint.pt", state)
    print(f"stopped at step {state.step} of {args.steps}", flush=True)


def flow_loss(
    model: WanTransformer3DModel, clips: Tensor, noise: Tensor, sigma: Tensor, text: Tensor
) -> Tensor:
    """Flow-matching loss per clip (B,) at noise levels `sigma` (B,) in [0, 1]."""
    level = sigma[:, None, None, None, None]
    noised = (1.0 - level) * clips + level * noise
    with torch.autocast(clips.device.type, torch.bfloat16, enabled=clips.is_cuda):
        velocity = model(noised, 1000.0 * sigma, text, return_dict=False)[0]
    return F.mse_loss(velocity.float(), noise - clips, reduction="none").mean((1, 2, 3, 4))


@torch.no_grad()
def evaluate(model: WanTransformer3DModel, source: ClipSource, table: Tensor) -> dict[str, float]:
    """Held-out loss of the averaged weights: over all scenes, and over the real clips alone.

    Clip i gets noise level i * 37 mod count, evenly spaced: 37 is coprime to the counts used, so
    every class meets levels from the whole range.
    """
    count = EVAL_CLIPS_PER_CLASS * len(source.names)
    clips, class_ids = source.fixed(count)
    rng = torch.Generator().manual_seed(1)
    noise = torch.randn(clips.shape, generator=rng).to(clips.device)
    sigma = ((torch.arange(count) * 37 % count + 0.5) / count).to(clips.device)
    losses = torch.cat(
        [
            flow_loss(model, clips[part], noise[part], sigma[part], table[class_ids[part] + 1])
            for part in torch.arange(count, device=clips.device).split(EVAL_BATCH)
        ]
    )
    from_clips = class_ids >= len(source.names) - 3
    return {
        "held_out_loss": losses.mean().item(),
        "held_out_loss_clips": losses[from_clips].mean().item(),
        "held_out_loss_photos": losses[~from_clips].mean().item(),
    }


def draw_samples(
    path: Path, model: WanTransformer3DModel, source: ClipSource, args: argparse.Namespace
) -> None:
    """One generated clip per class, a row each, as a PNG."""
    pipeline = DemoPipeline(model, make_scheduler(args), list(source.names))
    pipeline.set_progress_bar_config(disable=True)
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        frames = pipeline(
            source.names,
            num_frames=args.frames,
            height=args.size,
            width=args.size,
            num_inference_steps=args.sample_steps,
            generator=torch.Generator().manual_seed(0),
        ).frames  # (B, T, H, W, 3)
    rows = frames.transpose(0, 2, 1, 3, 4).reshape(
        len(frames) * args.size, args.frames * args.size, 3
    )
    partial = path.with_suffix(".partial.png")
    Image.fromarray((rows * 255).round().astype(np.uint8)).save(partial)
    os.replace(partial, path)


def make_scheduler(args: argparse.Namespace) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=args.shift)


def make_state(args: argparse.Namespace, device: torch.device) -> State:
    torch.manual_seed(args.seed)
    config = dict(TRANSFORMER_CONFIG)
    config.update(num_layers=args.layers, num_attention_heads=args.heads, ffn_dim=args.ffn)
    model = WanTransformer3DModel(**config).to(device)
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    average = WanTransformer3DModel(**config).to(device).requires_grad_(False)
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=args.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        fused=device.type == "cuda",
    )
    return State(model, average, optimizer)


def schedule(step: int, warmup: int, total: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to one hundredth."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return 0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def seeded(device: str | torch.device, seed: int, step: int, stream: int) -> torch.Generator:
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step) * 2 + stream)


@contextlib.contextmanager
def fastest_attention(args: argparse.Namespace, device: torch.device) -> Iterator[None]:
    """Prefer whichever of torch's fused attentions is faster on this GPU at the training shape."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if device.type != "cuda" or args.attention == "default":
        yield
        return
    candidates = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    if args.attention == "flash":
        candidates.pop(0)
    tokens = args.frames * (args.size // 2) ** 2
    q = torch.randn(args.batch, tokens, args.heads, 64, device=device, dtype=torch.bfloat16)
    q = q.transpose(1, 2).requires_grad_()

    def time_ms(backend: SDPBackend) -> float:
        """Forward and backward; infinite where the backend refuses the shape."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        try:
            with sdpa_kernel(backend):
                for repeat in range(7):
                    if repeat == 2:
                        begin.record()
                    out = F.scaled_dot_product_attention(q, q, q)
                    torch.autograd.grad(out, q, out)
        except RuntimeError as error:
            print(f"{backend.name}: {error}", flush=True)
            return math.inf
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 5

    spent_ms = {backend: time_ms(backend) for backend in candidates}
    order = sorted(spent_ms, key=lambda backend: spent_ms[backend])
    print({backend.name: round(spent_ms[backend], 2) for backend in order}, "ms", flush=True)
    fallback = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order + fallback, set_priority=True):
        yield


class Log:
    """JSON lines, one per event; a resumed run first drops what lies after its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, **entry: Any) -> None:
        line = json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in entry.items()})
        with self.path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def drop_after(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a line that a kill cut short
                if json.loads(line).get("step", 0) <= step:
                    kept.append(line + "\n")
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, self.path)


def save_checkpoint(path: Path, state: State) -> None:
    """Write to a neighbour and rename, so that a kill leaves the old checkpoint or the new one."""
    partial = path.with_suffix(".partial")
    torch.save(
        {
            "model": state.model.state_dict(),
            "average": state.average.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "step": state.step,
        },
        partial,
    )
    os.replace(partial, path)


def load_checkpoint(path: Path, state: State, device: torch.device) -> None:
    saved = torch.load(path, map_location=device, weights_only=True)
    state.model.load_state_dict(saved["model"])
    state.average.load_state_dict(saved["average"])
    state.optimizer.load_state_dict(saved["optimizer"])
    state.step = saved["step"]


def export(
    target: Path,
    average: WanTransformer3DModel,
    names: tuple[str, ...],
    args: argparse.Namespace,
) -> None:
    """Write the averaged weights in bf16 and diffusers' layout, in shards under 16 MiB."""
    model = WanTransformer3DModel.from_config(average.config)
    model.load_state_dict(average.state_dict())
    for weight in model.parameters():
        weight.data = weight.data.to(torch.bfloat16)
    pipeline = DemoPipeline(model, make_scheduler(args), list(names))
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial, max_shard_size="12MB")
    for file in partial.rglob("*"):  # keep what else lies in the target, such as the model card
        if file.is_file():
            final = target / file.relative_to(partial)
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, final)
    shutil.rmtree(partial)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--prepare", type=Path, metavar="FILE", help="collect the scenes into FILE, then stop")
    add("--data", type=Path, metavar="FILE", help="scenes from --prepare; default: the wheels")
    add("--out", type=Path, default=Path("demo-run"), help="checkpoint, log and samples")
    add("--export", type=Path, metavar="DIR", help="write the averaged weights, bf16, afterwards")
    add("--max-minutes", type=float, default=math.inf, help="stop, resumable, after this long")
    add("--steps", type=int, default=16_000)
    add("--batch", type=int, default=8)
    add("--learning-rate", type=float, default=1e-3)
    add("--warmup", type=int, default=500, help="steps of linear warm-up")
    add("--average-decay", type=float, default=0.9995, help="of the moving average of the weights")
    add("--class-dropout", type=float, default=0.1)
    add("--sigma-mean", type=float, default=0.2, help="sigma = sigmoid(normal(mean, std))")
    add("--sigma-std", type=float, default=1.2)
    add("--shift", type=float, default=2.0, help="of the exported scheduler's timesteps")
    add("--seed", type=int, default=0)
    add("--frames", type=int, default=8)
    add("--size", type=int, default=64, help="height and width, pixels")
    add("--layers", type=int, default=TRANSFORMER_CONFIG["num_layers"])
    add("--heads", type=int, default=TRANSFORMER_CONFIG["num_attention_heads"])
    add("--ffn", type=int, default=TRANSFORMER_CONFIG["ffn_dim"])
    add("--log-every", type=int, default=100, help="steps")
    add("--eval-every", type=int, default=1000, help="steps")
    add("--sample-every", type=int, default=4000, help="steps")
    add("--sample-steps", type=int, default=30, help="Euler steps of a sample sheet")
    add("--checkpoint-every", type=int, default=2000, help="steps")
    add("--attention", choices=("fastest", "flash", "default"), default="fastest", help="on a GPU")
    add("--no-compile", action="store_true", help="do not torch.compile the blocks on the GPU")
    return parser.parse_args()


if __name__ == "__main__":
    main()
