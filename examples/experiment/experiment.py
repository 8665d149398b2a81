# SPDX-License-Identifier: Apache-2.0
"""What sparse attention costs in quality, and what fine-tuning wins back: the whole experiment.

    python examples/experiment/experiment.py short.yaml --out run --data scenes.npz --minutes 9
    python examples/experiment/experiment.py long.yaml --out run --data scenes.npz --list
    python examples/experiment/render.py run/short/results.jsonl run/long/results.jsonl

Every row of the configuration is fine-tuned from one dense model, on the same clips with the same
noise, for the same steps, at each ratio of kept blocks; rows that need no training are run on the
dense model as it is. The work is cut into pieces, one for each row, ratio and seed, whose state
lies under --out: finished pieces are skipped, and one that --minutes interrupts goes on to the bit.
Only training is interrupted: what is measured of a piece after it may take a minute more.
With --processes each takes the next piece that is free; several on one GPU fill one another's gaps,
but then no step is timed: --time does that, in a run of one process for each GPU.
results.jsonl holds a line for each finished piece.

Scenes are those of examples/train_demo_model.py --prepare; without --data, generated textures, as
an experiment of its own, short-textures.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import logging
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measures
import numpy as np
import torch

import sparline
from sparline import density, train
from sparline.demo.data import save_scenes
from sparline.machine import describe_device
from sparline.methods import Method
from sparline.tokens import Grid
from sparline.train import layerwise, objective, setup
from sparline.train.distributed import World

HERE = Path(__file__).parent
#: Steps of a piece that is timed.
TIMED_STEPS = 60


@dataclasses.dataclass(frozen=True)
class Row:
    """One way of attending. ``density_by`` names the option that makes the density where that is
    not ``keep_ratio``."""

    name: str
    words: str
    method: dict[str, Any]
    has_ratio: bool = True
    density_by: str = "keep_ratio"
    router: str | None = None  # starts from what stage 1 learned under this name
    is_free: bool = False  # not trained
    seeds: int = 1  # at the first ratio; one at the others
    keep: bool = False  # the weights stay on disk
    set: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Piece:
    """Work that is done or not."""

    kind: str  # start, router, train, free, time
    row: Row | None = None
    ratio: float | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        if self.row is None:
            return self.kind
        if self.kind == "router":
            return f"router-{self.row.router}"
        if self.kind == "time":
            return f"time-{self.row.name}"
        ratio = "" if self.ratio is None else f"-{self.ratio:g}"
        return f"{self.row.name}{ratio}-seed{self.seed}"


class OutOfTime(Exception):
    """The budget is spent; what was done is on disk."""


class Experiment:
    def __init__(self, file: Path, args: argparse.Namespace) -> None:
        self.settings = read(file)
        # Another experiment on other clips.
        self.name: str = self.settings["name"] + ("-textures" if args.data is None else "")
        self.folder: Path = args.out / self.name
        self.rows = [
            Row(**{**row, "set": tuple(row.get("set", ()))}) for row in self.settings["rows"]
        ]
        check_routers(self.rows)
        self.deadline = time.monotonic() + 60.0 * args.minutes
        self.args = args
        self.device = torch.device(args.device)

    # What there is to do ------------------------------------------------------------------------

    def pieces(self) -> list[Piece]:
        """What was asked for."""
        only = self.args.only
        every = self.time_pieces() if self.args.time else self.all_pieces()
        return [
            p
            for p in every
            if not only or any(fnmatch.fnmatch(p.name, pattern) for pattern in only)
        ]

    def all_pieces(self) -> list[Piece]:
        """Everything, the most telling first."""
        found = [Piece("start")] if "start" in self.settings else []
        found += [Piece("train", row) for row in self.rows if row.name == "dense"]
        # One for each name, with the method of the first row that asks for it.
        routers: dict[str, Row] = {}
        for row in self.rows:
            if row.router is not None:
                routers.setdefault(row.router, row)
        found += [Piece("router", row) for row in routers.values()]
        for place, ratio in enumerate(self.settings["ratios"]):
            for row in self.rows:
                kind = "free" if row.is_free else "train"
                if row.has_ratio:
                    found.append(Piece(kind, row, ratio))
                elif place == 0 and row.name != "dense":
                    found.append(Piece(kind, row))
        first = self.settings["ratios"][0]
        for seed in range(1, max(row.seeds for row in self.rows)):
            for row in self.rows:
                if row.seeds > seed:
                    found.append(Piece("train", row, first if row.has_ratio else None, seed))
        return found

    def time_pieces(self) -> list[Piece]:
        """Steps of every trained row, at the first ratio."""
        first = self.settings["ratios"][0]
        return [
            Piece("time", row, first if row.has_ratio else None)
            for row in self.rows
            if not row.is_free
        ]

    def is_done(self, piece: Piece) -> bool:
        return (self.folder / piece.name / "result.json").is_file()

    def needs(self, piece: Piece) -> list[str]:
        """Names of the pieces that must be done before."""
        has_start = "start" in self.settings and piece.kind != "start"
        first = ["start"] if has_start else []
        if piece.kind != "router" and piece.row is not None and piece.row.router is not None:
            first.append(f"router-{piece.row.router}")
        return [*first, "dense-seed0"] if piece.kind == "free" else first

    def run(self) -> int:
        """Does what it can in its time; the number of pieces that failed."""
        failed: set[str] = set()
        while self.minutes_left() > 0.0:
            left = [p for p in self.pieces() if not self.is_done(p) and p.name not in failed]
            done = {p.name for p in self.all_pieces() if self.is_done(p)}
            ready = [p for p in left if done.issuperset(self.needs(p))]
            piece = next((p for p in ready if self.claim(p)), None)
            if piece is not None:
                try:
                    self.finish(piece)
                except OutOfTime:
                    break
                except Exception:  # one row that fails must not cost the others
                    failed.add(piece.name)
                    print(f"{piece.name} FAILED", flush=True)
                    traceback.print_exc()
                finally:
                    self.claim_file(piece).unlink(missing_ok=True)
            elif any(self.is_claimed(name) for p in left for name in self.needs(p)):
                time.sleep(1.0)  # until another GPU is done with what the rest waits for
            else:
                for p in left:
                    if p not in ready:
                        print(f"{p.name} needs {', '.join(self.needs(p))}", flush=True)
                break
        return len(failed)

    def claim_file(self, piece: Piece) -> Path:
        return self.folder / f"{piece.name}.claim"

    def is_claimed(self, name: str) -> bool:
        return (self.folder / f"{name}.claim").exists()

    def claim(self, piece: Piece) -> bool:
        """Whether this process, and no other, may do the piece."""
        try:
            self.claim_file(piece).touch(exist_ok=False)
        except FileExistsError:
            return False
        return not self.is_done(piece)

    def finish(self, piece: Piece) -> None:
        begin = time.monotonic()
        print(f"{piece.name} ...", flush=True)
        result = self.do(piece)
        result = {**self.describe(piece), **result, "minutes": minutes_since(begin)}
        (self.folder / piece.name).mkdir(exist_ok=True)
        write_json(self.folder / piece.name / "result.json", result)
        told = {k: result[k] for k in ("held_out_loss", "density", "ms") if k in result}
        print(f"{piece.name}: {told}, {result['minutes']:.1f} minutes", flush=True)

    def collect(self) -> None:
        """results.jsonl from all finished pieces, and once more with how alike their clips are to
        the dense row's of the same seed: that takes minutes, in which a machine may be lost."""
        self.write_results(lambda piece: {})
        self.write_results(self.compare_clips)
        pieces = self.all_pieces()
        print(f"{sum(map(self.is_done, pieces))} of {len(pieces)} pieces are done", flush=True)

    def write_results(self, more_of: Callable[[Piece], dict[str, float]]) -> None:
        lines = []
        for piece in [*self.all_pieces(), *self.time_pieces()]:
            if self.is_done(piece):
                result = json.loads((self.folder / piece.name / "result.json").read_text())
                lines.append(json.dumps({**result, **more_of(piece)}) + "\n")
        (self.folder / "results.jsonl").write_text("".join(lines))

    def minutes_left(self) -> float:
        return (self.deadline - time.monotonic()) / 60.0

    def describe(self, piece: Piece) -> dict[str, Any]:
        row = piece.row
        described = {
            "experiment": self.name,
            "piece": piece.name,
            "kind": piece.kind,
            "num_tokens": self.grid.length,
            "overrides": self.args.set,
            "data": "generated textures" if self.args.data is None else "scenes",
            "device": describe_device()
            if self.device.type == "cpu"
            else torch.cuda.get_device_name(),
            "torch": torch.__version__,
        }
        start = self.folder / "start" / "result.json"
        if piece.kind != "start" and start.is_file():  # which of several runs of it
            described["start_loss"] = json.loads(start.read_text())["held_out_loss"]
        if row is not None and piece.kind != "router":
            described |= {
                "row": row.name,
                "words": row.words,
                "is_free": row.is_free,
                "ratio": piece.ratio,
                "seed": piece.seed,
            }
        return described

    @property
    def grid(self) -> Grid:
        size = self.settings["train"]["data"]
        return Grid(size["num_frames"], size["height"] // 2, size["width"] // 2)

    # One piece ----------------------------------------------------------------------------------

    def do(self, piece: Piece) -> dict[str, Any]:
        if piece.kind == "start":
            return self.start(piece)
        if piece.kind == "router":
            return self.train_router(piece)
        if piece.kind == "free":
            return self.measure_free(piece)
        if piece.kind == "time":
            return self.time_steps(piece)
        return self.fine_tune(piece)

    def config(
        self,
        piece: Piece,
        method: dict[str, Any],
        *sections: dict[str, Any],
        last: tuple[str, ...] = (),
    ) -> train.Config:
        """The training configuration of a piece; overrides ``last`` win over all others."""
        merged = merge(self.settings["train"], *sections)
        merged = merge(
            merged,
            {
                "output_dir": str(self.folder / piece.name),
                "seed": piece.seed,
                "method": method,
                "data": {"source": "demo", "path": str(self.scenes())},
                "model": {"path": self.start_from()},
                "logging": {"report_to": "none"},
                "checkpoint": {"checkpoints_total_limit": 1, "checkpointing_steps": 400},
                "training": {"max_minutes": max(0.01, self.minutes_left())},
            },
        )
        own = piece.row.set if piece.row is not None and piece.kind != "router" else ()
        return train.from_dict(merged, [*own, *self.args.set, *last])

    def scenes(self) -> Path:
        if self.args.data is not None:
            return Path(self.args.data)
        made = self.folder / "textures.npz"
        if not made.is_file():
            sys.path.insert(0, str(HERE.parent))
            from train_demo_cuda import generated_scenes

            save_scenes(made, generated_scenes(self.settings["train"]["data"]["height"]))
        return made

    def start_from(self) -> str | None:
        """The dense model that all rows start from."""
        if "start" in self.settings:
            folder = self.folder / "start" / "final" / "transformer"
            if folder.is_dir():
                return str(folder)
        given: str | None = self.settings["train"].get("model", {}).get("path")
        return given

    def start(self, piece: Piece) -> dict[str, Any]:
        config = self.config(piece, {"name": "original"}, self.settings["start"])
        trainer, told = self.train(config)
        told["held_out_loss"] = mean_loss(trainer.held_out_losses())
        self.clean(piece, keep=True)
        return told

    def train_router(self, piece: Piece) -> dict[str, Any]:
        row = piece.row
        assert row is not None
        method = in_16_bits(row.method)
        config = self.config(piece, method, self.settings["router"], {"task": "router"})

        def show(done: int, total: int, words: str) -> None:
            if self.minutes_left() <= 0.0:
                raise OutOfTime

        begin = time.monotonic()
        train.RouterTrainer(config, device=self.args.device).run(show)
        told = (self.folder / piece.name / "router.jsonl").read_text().splitlines()
        errors = {
            f"{line['keep_ratio']:g}": [
                line[f"error_{name}"] for name in ("before", "trained", "fitted", "kept")
            ]
            for line in map(json.loads, told)
        }
        return {"router": row.router, "errors": errors, "training_minutes": minutes_since(begin)}

    def train(self, config: train.Config) -> tuple[train.Trainer, dict[str, Any]]:
        """Runs to the end or out of time; the trainer, and what is to be told of the training."""
        torch.compiler.reset()  # or the pieces before count towards the limit of recompilations
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer = train.Trainer(config, device=self.args.device)
        summary = trainer.run()
        if not summary.is_done:
            raise OutOfTime
        lines = [
            json.loads(line)
            for line in (Path(config.output_dir) / "log.jsonl").read_text().splitlines()
        ]
        steps = [line for line in lines if "grad_norm" in line and "ms" in line]
        curve = [(line["step"], line["held_out_loss"]) for line in lines if "held_out_loss" in line]
        told: dict[str, Any] = {
            "batch": config.data.train_batch_size,
            "steps": trainer.step,
            "train_loss": [(line["step"], round(line["loss"], 5)) for line in steps],
            "held_out_curve": [(step, round(loss, 6)) for step, loss in curve],
            "nonfinite_steps": summary.nonfinite_steps,
        }
        if not self.args.is_shared:
            told["ms"] = statistics.median(line["ms"] for line in steps)
        if self.device.type == "cuda":
            told["peak_bytes"] = torch.cuda.max_memory_allocated()
        return trainer, told

    def time_steps(self, piece: Piece) -> dict[str, Any]:
        row = piece.row
        assert row is not None
        timed = {"logging": {"logging_steps": TIMED_STEPS // 6, "validation_steps": 0}}
        steps = f"training.max_train_steps={TIMED_STEPS}"  # whatever --set says
        config = self.config(piece, self.at_density(row, piece.ratio), timed, last=(steps,))
        _, told = self.train(config)
        self.clean(piece, keep=False)
        return {name: told[name] for name in ("batch", "ms", "peak_bytes") if name in told}

    def fine_tune(self, piece: Piece) -> dict[str, Any]:
        row = piece.row
        assert row is not None
        method = self.at_density(row, piece.ratio)
        sections: list[dict[str, Any]] = []
        if row.router is not None:
            state = self.folder / f"router-{row.router}" / f"router-{piece.ratio:g}.safetensors"
            sections.append({"model": {"state": str(state)}})
        config = self.config(piece, method, *sections)
        trainer, told = self.train(config)
        losses = trainer.held_out_losses(self.settings["evaluation"]["held_out_clips"])
        told |= {"held_out_loss": mean_loss(losses), "held_out": rounded(losses)}
        # Other shapes than in training, and taps: not worth compiling.
        with trainer.averaged(), torch.compiler.set_stance("force_eager"):
            told |= measures.look_at(
                trainer.transformer, trainer.held_out, config, self.grid, self.device
            )
            self.generate(piece, trainer.transformer, config)
        told["method"] = method
        self.clean(piece, row.keep)
        return told

    def measure_free(self, piece: Piece) -> dict[str, Any]:
        """A method on the fine-tuned dense model, as it is."""
        row = piece.row
        assert row is not None
        dense = self.folder / "dense-seed0" / "final" / "transformer"
        method = self.at_density(row, piece.ratio, str(dense))
        config = self.config(piece, {"name": "original"}, {})
        model = setup.load_transformer(dataclasses.replace(config.model, path=str(dense)))
        model.to(self.device).eval().requires_grad_(False)
        sparline.apply(model, sparline.method(method["name"], **without_name(method)))
        source, held_out = setup.make_sources(config, model, self.device)
        assert held_out is not None
        layerwise.fit_alpha(model, source, config, World(self.device))
        losses = objective.held_out_losses(
            model,
            held_out,
            self.settings["evaluation"]["held_out_clips"],
            config.data.train_batch_size,
            World(self.device),
            config.training.mixed_precision,
        )
        told = {"held_out_loss": mean_loss(losses), "held_out": rounded(losses), "method": method}
        told |= measures.look_at(model, held_out, config, self.grid, self.device)
        self.generate(piece, model, config)
        return told

    def clean(self, piece: Piece, keep: bool) -> None:
        folder = self.folder / piece.name
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        if not keep:
            shutil.rmtree(folder / "final", ignore_errors=True)

    # Density ------------------------------------------------------------------------------------

    def at_density(self, row: Row, ratio: float | None, model: str | None = None) -> dict[str, Any]:
        """The method of a row with the option that keeps ``ratio`` of the scores."""
        if ratio is None:
            return row.method
        if row.density_by == "keep_ratio":
            return {**row.method, "keep_ratio": ratio}
        if row.density_by == "num_cubes":
            cube = sparline.method(row.method["name"], **without_name(row.method)).cube
            cubes = math.prod(n // side for n, side in zip(self.grid[:3], cube, strict=True))
            return {**row.method, "num_cubes": max(1, math.floor(ratio * cubes))}
        return {**row.method, row.density_by: self.search(row, ratio, model)}

    def search(self, row: Row, ratio: float, path: str | None) -> float:
        """The value of the option at which a few layers of the dense model keep ``ratio``."""
        config = self.config(Piece("free", row), {"name": "dense"}, {})
        if path is not None:
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=path))
        samples = measures.capture(config, self.grid, self.device)

        def make(value: float) -> Method:
            return sparline.method(
                row.method["name"], **without_name(row.method), **{row.density_by: value}
            )

        def kept(value: float) -> float:
            if row.density_by == "log_threshold":
                found = [
                    density.skipped_shares(make(value), s, density.SKIP_TILES) for s in samples
                ]
                return 1.0 - statistics.fmean(statistics.fmean(shares) for shares in found)
            return statistics.fmean(density.kept_share(make(value), s) for s in samples)

        # A higher mass keeps more, and so does VMoBA's share; a higher log-threshold keeps less.
        if row.density_by == "log_threshold":
            return -density.search(lambda x: kept(-x), 1e-3, 20.0, ratio)
        return density.search(kept, 0.0, 1.0, ratio)

    # Clips --------------------------------------------------------------------------------------

    def generate(self, piece: Piece, model: Any, config: train.Config) -> None:
        """Clips of a piece's model, at the seeds of every other piece."""
        clips = measures.generate(
            model, config, self.scenes(), self.settings["evaluation"], self.device
        )
        folder = self.folder / piece.name
        folder.mkdir(exist_ok=True)
        np.savez_compressed(folder / "clips.npz", **clips)  # type: ignore[arg-type]

    def compare_clips(self, piece: Piece) -> dict[str, float]:
        """How alike they are to those of the dense row, where that is done."""
        row, folder = piece.row, self.folder / piece.name
        if row is None or row.name == "dense" or piece.kind in ("time", "router"):
            return {}
        against, known = self.folder / f"dense-seed{piece.seed}", folder / "alike.json"
        if not (against / "clips.npz").is_file():
            return {}
        made = max(f.stat().st_mtime for f in (against / "clips.npz", folder / "clips.npz"))
        if known.is_file() and known.stat().st_mtime >= made:
            found: dict[str, float] = json.loads(known.read_text())
            return found
        told = measures.alike(folder / "clips.npz", against / "clips.npz")
        write_json(known, told)
        return told


def check_routers(rows: list[Row]) -> None:
    """A router fits one method, whatever its bits; rows without training take none."""
    methods: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.router is None:
            continue
        method = in_16_bits(row.method)
        if row.is_free or methods.setdefault(row.router, method) != method:
            raise SystemExit(
                f"rows: {row.name} cannot start from the router {row.router}: a row without "
                "training takes none, and all rows of one router have the same method but for "
                "low_bit. Give it a router of another name."
            )


# Small parts ------------------------------------------------------------------------------------


def mean_loss(losses: list[tuple[float, float]]) -> float:
    return statistics.fmean(loss for _, loss in losses)


def rounded(losses: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(round(sigma, 5), round(loss, 6)) for sigma, loss in losses]


def in_16_bits(method: dict[str, Any]) -> dict[str, Any]:
    """What a router is trained for, whatever the bits of the rows that start from it."""
    return {k: v for k, v in method.items() if k != "low_bit"}


def without_name(method: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in method.items() if k != "name"}


def merge(base: dict[str, Any], *others: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries, the later over the earlier; a method is replaced whole."""
    merged = dict(base)
    for other in others:
        for key, value in other.items():
            both = isinstance(value, dict) and isinstance(merged.get(key), dict) and key != "method"
            merged[key] = merge(merged[key], value) if both else value
    return merged


def minutes_since(begin: float) -> float:
    return round((time.monotonic() - begin) / 60.0, 2)


def read(file: Path) -> dict[str, Any]:
    import yaml

    path = file if file.is_file() else HERE / file
    settings: dict[str, Any] = yaml.safe_load(path.read_text())
    return settings


def write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content) + "\n")
    partial.replace(path)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add: Callable[..., Any] = parser.add_argument
    add("file", type=Path, help="short.yaml, long.yaml, or another of their kind")
    add("--out", type=Path, default=Path("experiment"), help="state and results")
    add("--data", metavar="FILE", help="scenes of train_demo_model.py --prepare")
    add("--minutes", type=float, default=math.inf, help="stop, resumable, after this long")
    add("--only", action="append", help="pieces such as sla2-0.05-seed0 or '*-seed0'; repeatable")
    add("--set", action="append", default=[], help="override of the training configuration")
    add("--list", action="store_true", help="say what is done and what is not, and stop")
    add("--time", action="store_true", help="time steps of trained rows, a process on each GPU")
    add("--processes", type=int, default=1, help="share the pieces among this many")
    add("--worker", dest="is_worker", action="store_true", help=argparse.SUPPRESS)
    # Several processes on one GPU: their times mean nothing.
    add("--shared", dest="is_shared", action="store_true", help=argparse.SUPPRESS)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = parse_args()
    torch.set_float32_matmul_precision("high")
    experiment = Experiment(args.file, args)
    if args.list:
        for piece in experiment.pieces():
            print("done" if experiment.is_done(piece) else "    ", piece.name)
        return 0
    if args.is_worker:
        return experiment.run()
    experiment.folder.mkdir(parents=True, exist_ok=True)
    experiment.scenes()  # once, before many want them
    for claim in experiment.folder.glob("*.claim"):
        claim.unlink()  # of processes that were killed
    failed = work_together(args.processes) if args.processes > 1 else experiment.run()
    experiment.collect()
    return 1 if failed else 0


def work_together(num_processes: int) -> int:
    """This command in many processes, which take the GPUs by turns."""
    num_gpus = max(1, torch.cuda.device_count())
    command = [sys.executable, *sys.argv, "--worker"]
    if num_processes > num_gpus:
        command.append("--shared")
    workers = []
    for n in range(num_processes):
        environment = dict(os.environ)
        if num_gpus > 1:
            environment["CUDA_VISIBLE_DEVICES"] = str(n % num_gpus)
        workers.append(subprocess.Popen(command, env=environment))
    return sum(worker.wait() for worker in workers)


if __name__ == "__main__":
    raise SystemExit(main())
