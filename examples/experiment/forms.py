# SPDX-License-Identifier: Apache-2.0
"""What each way of putting the two branches together can give: why some methods win back little.

    python examples/experiment/forms.py --data scenes.npz [--fit 32] [--held-out 8] [--out FILE]

The dense model runs on noised clips. For q, k, v of each layer, o_s is the output of the sparse
branch, o_l that of the linear branch and o the dense one. The few numbers of a form, such as SLA's
projection, are fitted to o by least squares over training clips, for each layer; what is told is
|form - o|^2 / |o|^2 on held-out clips, mean over layers and clips. The model itself is not trained,
so this is what a form brings, not what training makes of it.

Writes bench/results/training/forms.json, which render.py shows in docs/quality.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparline
from sparline import train
from sparline.bench import describe_machine
from sparline.methods import SLA
from sparline.train import data, layerwise, objective, setup

OUT = Path(__file__).resolve().parents[2] / "bench" / "results" / "training" / "forms.json"
KEEP_RATIOS = (0.10, 0.05, 0.03)
BLOCK_Q = 128
#: Linear branches: feature map, which keys, and whether the map sees keys less their mean.
BRANCHES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax, keys less their mean": {"smooth_k": "all"},
    "elu + 1": {"feature_map": "elu1"},
    "relu": {"feature_map": "relu"},
    "softmax, over every block": {"linear_scope": "all"},
}
#: Of the mean diagonal, added to it: a projection that follows its few clips too closely is worse
#: on others. The best on the held-out clips is told, in favour of the forms that have one.
RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1)
#: Forms, as the page shows them; m is the true mass of a row's critical blocks.
SPARSE = "o_s"
SHARED = "o_s + o_l Wᵀ + b"
PER_HEAD = "o_s + o_l Wᵀ + b, of each head"
MASS = "m o_s + (1 − m) o_l"
MASS_AND_MAP = "m o_s + o_l Wᵀ + b"
ALPHA_HEAD = "α o_s + (1 − α) o_l, α of a head"
ALPHA_BLOCK = "α o_s + (1 − α) o_l, α of a head and query block"
ALPHA_AND_MAP = "α o_s + o_l Wᵀ + b, α of a head"


@dataclasses.dataclass(frozen=True)
class Parts:
    """Of one call, (H, N, D) or (H, N): both branches, the dense output, and the share of its
    softmax that falls on critical blocks."""

    o_s: Tensor
    o_l: Tensor
    o: Tensor
    mass: Tensor


def parts_of(call: layerwise.Call, branches: dict[str, SLA]) -> dict[str, Parts]:
    """By branch, which share all but o_l. ``call`` holds one clip."""

    def run(method: sparline.Method, **more: Any) -> Any:
        return sparline.attention(call.q, call.k, call.v, method=method, **call.options, **more)

    o, lse = run(sparline.Dense(), return_lse=True)
    first = next(iter(branches.values()))
    o_s, lse_s = run(dataclasses.replace(first, combine="sparse"), return_lse=True)
    mass = (lse_s - lse).exp()[0].float()
    by_head = [x[0].transpose(0, 1).float() for x in (o_s, o)]
    return {
        name: Parts(
            by_head[0],
            run(dataclasses.replace(method, combine="linear"))[0].transpose(0, 1).float(),
            by_head[1],
            mass,
        )
        for name, method in branches.items()
    }


# Forms ------------------------------------------------------------------------------------------


class Fit:
    """The numbers of every form for one layer and branch, from sums over calls."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, parts: Parts) -> None:
        x = with_one(parts.o_l)
        o, o_s, o_l = (y.double() for y in (parts.o, parts.o_s, parts.o_l))
        found = {
            "x x": x.mT @ x,
            "x o": x.mT @ o,
            "x o_s": x.mT @ o_s,
            "x m o_s": x.mT @ (parts.mass[..., None] * o_s),
            "top": by_block(((o - o_l) * (o_s - o_l)).sum(-1)),
            "bottom": by_block((o_s - o_l).square().sum(-1)),
        }
        before = self._sums
        self._sums = {key: y + before[key] if before else y for key, y in found.items()}

    def alpha(self, is_by_block: bool) -> Tensor:
        """(H, query blocks), or (H, 1)."""
        top, bottom = self._sums["top"], self._sums["bottom"]
        if not is_by_block:
            top, bottom = top.sum(1, keepdim=True), bottom.sum(1, keepdim=True)
        return (top / bottom).clamp(0.0, 1.0)

    def projected(self, parts: Parts, ridge: float) -> Iterator[tuple[str, Tensor]]:
        """Outputs (H, N, D) of the forms with a projection, for one call."""
        x, sums = with_one(parts.o_l), self._sums
        alpha, mass = self.alpha(is_by_block=False)[..., None], parts.mass[..., None]
        for form, o_s, seen in (
            (SHARED, parts.o_s, sums["x o_s"]),
            (PER_HEAD, parts.o_s, sums["x o_s"]),
            (MASS_AND_MAP, mass * parts.o_s, sums["x m o_s"]),
            (ALPHA_AND_MAP, alpha * parts.o_s, alpha * sums["x o_s"]),
        ):
            gram, moments = sums["x x"], sums["x o"] - seen
            if form != PER_HEAD:
                gram, moments = gram.sum(0), moments.sum(0)
            yield form, o_s + x @ solve(gram, moments, ridge)

    def blended(self, parts: Parts) -> Iterator[tuple[str, Tensor]]:
        """Outputs (H, N, D) of the others, for one call."""
        rows = parts.o_s.shape[1]
        per_row = self.alpha(is_by_block=True).repeat_interleave(BLOCK_Q, 1)[:, :rows]
        yield SPARSE, parts.o_s
        for form, share in (
            (MASS, parts.mass),
            (ALPHA_HEAD, self.alpha(is_by_block=False)),
            (ALPHA_BLOCK, per_row),
        ):
            yield form, parts.o_l + share[..., None] * (parts.o_s - parts.o_l)


def with_one(o_l: Tensor) -> Tensor:
    return torch.nn.functional.pad(o_l.double(), (0, 1), value=1.0)


def by_block(x: Tensor) -> Tensor:
    """(H, N) to sums (H, query blocks)."""
    return torch.stack([part.sum(-1) for part in torch.split(x, BLOCK_Q, dim=1)], dim=1)


def solve(gram: Tensor, moments: Tensor, ridge: float) -> Tensor:
    size = gram.shape[-1]
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    solution: Tensor = torch.linalg.solve(gram + ridge * mean * torch.eye(size).to(gram), moments)
    return solution


# The run ----------------------------------------------------------------------------------------


@torch.no_grad()
def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    config = train.from_dict(
        {
            "model": {"path": args.model},
            "data": {"path": str(args.data), **args.clip},
            "training": {"mixed_precision": "no" if args.device == "cpu" else "bf16"},
        }
    )
    device = torch.device(args.device)
    model = setup.load_transformer(config.model).to(device).eval().requires_grad_(False)
    sources = setup.make_sources(config, model, device)
    sparline.apply(model, sparline.Dense())
    branches = {
        ratio: {
            name: SLA(keep_ratio=ratio, negligible_ratio=0.0, block_q=BLOCK_Q, **options)
            for name, options in BRANCHES.items()
        }
        for ratio in args.ratios
    }
    fits: dict[tuple[float, str, int], Fit] = {}
    errors: dict[tuple[float, str, str, float], list[float]] = {}

    def fit(layer: int, call: layerwise.Call) -> None:
        for ratio, methods in branches.items():
            for name, parts in parts_of(call, methods).items():
                fits.setdefault((ratio, name, layer), Fit()).add(parts)

    def look(layer: int, call: layerwise.Call) -> None:
        for ratio, methods in branches.items():
            for name, parts in parts_of(call, methods).items():
                fitted = fits[ratio, name, layer]
                found = [(0.0, *pair) for pair in fitted.blended(parts)]
                found += [(x, *pair) for x in RIDGES for pair in fitted.projected(parts, x)]
                for ridge, form, o in found:
                    error = (o - parts.o).square().sum() / parts.o.square().sum()
                    errors.setdefault((ratio, name, form, ridge), []).append(error.item())

    seeds = (data.mix(config.seed, 201), objective.HELD_OUT_SEED)
    for source, seed, count, on_call in zip(
        sources, seeds, (args.fit, args.held_out), (fit, look), strict=True
    ):
        assert source is not None
        for n, draw in enumerate(data.draws(seed, 0, count)):
            begin = time.perf_counter()
            batch = data.collate([source.load(draw)], device)
            sigma = torch.tensor([(n + 0.5) / count], device=device)
            with layerwise.tapped(model, on_call):
                noised = objective.noised_at(batch, sigma, [draw])
                objective.predict(model, noised, config.training.mixed_precision)
            print(f"{on_call.__name__} {n + 1}: {time.perf_counter() - begin:.0f} s", flush=True)
    return sum_up(errors)


def sum_up(errors: dict[tuple[float, str, str, float], list[float]]) -> list[dict[str, Any]]:
    """A row for each form, with the ridge that is best for it."""
    best: dict[tuple[float, str, str], dict[str, Any]] = {}
    for (ratio, branch, form, ridge), found in errors.items():
        mean = sum(found) / len(found)
        key = (ratio, branch, form)
        if key not in best or mean < best[key]["error"]:
            row = {"keep_ratio": ratio, "branch": branch, "form": form, "error": round(mean, 5)}
            best[key] = {**row, "ridge": ridge or None}
    return list(best.values())


def size_of(text: str) -> dict[str, int]:
    frames, height, width = map(int, text.split("x"))
    return {"num_frames": frames, "height": height, "width": width}


def ratios_of(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="scenes, by train_demo_model.py --prepare")
    add("--model", default=None, help="a transformer; the bundled one, if not given")
    add("--clip", type=size_of, default=size_of("8x64x64"), help="frames x height x width, pixels")
    add("--ratios", type=ratios_of, default=KEEP_RATIOS, help="of blocks that stay, with commas")
    add("--fit", type=int, default=32, help="training clips")
    add("--held-out", type=int, default=8, help="held-out clips")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=OUT)
    args = parser.parse_args()
    clip = args.clip
    report = {
        "machine": describe_machine(),
        "tokens": clip["num_frames"] * math.prod(clip[side] // 2 for side in ("height", "width")),
        "fit_clips": args.fit,
        "held_out_clips": args.held_out,
        "rows": measure(args),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
