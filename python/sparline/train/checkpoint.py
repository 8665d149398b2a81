# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that a kill cannot break: written beside, then renamed; found again; kept in number.

``checkpoint-<step>/`` is torch's distributed format (torch.distributed.checkpoint), so that another
number of ranks can resume it, with ``trainer.json`` beside the tensors. A folder of that name is
whole; one that was not finished is called ``.partial`` and is removed by the next.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as _dcp

from .config import TrainError
from .distributed import World

dcp: Any = _dcp  # untyped
_NAME = re.compile(r"checkpoint-(\d+)")
ABOUT = "trainer.json"


def save(
    folder: Path, step: int, tensors: dict[str, Any], about: dict[str, Any], world: World, keep: int
) -> Path:
    """Writes ``folder/checkpoint-<step>``; then removes all but the ``keep`` newest (0 keeps
    all)."""
    final = folder / f"checkpoint-{step}"
    partial = folder / f"checkpoint-{step}.partial"
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("checkpoint-*.partial"):
            shutil.rmtree(leftover)
    world.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a single process is not distributed
        dcp.save(tensors, checkpoint_id=partial, no_dist=world.size == 1)
    if world.is_main:
        (partial / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        if keep:
            for old in list_checkpoints(folder)[:-keep]:
                shutil.rmtree(old)
    world.wait()
    return final


def load(path: Path, tensors: dict[str, Any], world: World) -> None:
    """Fills ``tensors``, in place, from a checkpoint with the same names and shapes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(tensors, checkpoint_id=path, no_dist=world.size == 1)
    except Exception as error:  # whatever torch raises for other names, shapes or a broken file
        reason = str(error).strip().splitlines()
        raise TrainError(
            f"train: {path} cannot be loaded into this model: {reason[0] if reason else error!r}. "
            "Resume with the method and parameters that it was made with, or set "
            "checkpoint.resume_from_checkpoint=none and another output_dir."
        ) from error


def read_about(path: Path) -> dict[str, Any]:
    """What ``save`` was told beside the tensors."""
    try:
        about: dict[str, Any] = json.loads((path / ABOUT).read_text())
    except (OSError, ValueError) as error:
        raise TrainError(
            f"train: {path} must be a checkpoint folder with {ABOUT}, and it is not: {error}. Pass "
            "output_dir/checkpoint-STEP, or checkpoint.resume_from_checkpoint=latest."
        ) from error
    return about


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, the oldest first."""
    found = [(int(m[1]), p) for p in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def find(folder: Path, which: str) -> Path | None:
    """The checkpoint to resume from: ``none``, ``latest`` or a path."""
    if which == "none":
        return None
    if which == "latest":
        found = list_checkpoints(folder)
        return found[-1] if found else None
    path = Path(which)
    read_about(path)
    return path
