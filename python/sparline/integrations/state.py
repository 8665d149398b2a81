# SPDX-License-Identifier: Apache-2.0
"""The state file: learned tensors with the method and options that they belong to, in safetensors.

It knows no host library: ``sparline.save_state`` and ``sparline.load_state`` bring it to a model.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import sparline
from sparline.methods import Method, from_dict

STATE_FORMAT = "sparline-state-1"


@dataclass(frozen=True)
class State:
    """What a state file holds; tensors are named ``<component>.blocks.{i}.attn1.processor.<own>``,
    the component being ``transformer`` or ``transformer_2``."""

    tensors: dict[str, Tensor]
    method: Method
    dense_steps: int = 0
    dense_layers: tuple[int, ...] = ()


def write_state(state: State, path: str | Path) -> None:
    """Writes a state file without a model."""
    metadata = {
        "format": STATE_FORMAT,
        "sparline": sparline.__version__,
        "method": json.dumps(state.method.to_dict()),
        "dense_steps": json.dumps(state.dense_steps),
        "dense_layers": json.dumps(state.dense_layers),
    }
    partial = Path(f"{path}.partial")  # a broken write leaves an older file as it was
    save_file(state.tensors, str(partial), metadata=metadata)
    os.replace(partial, path)


def read_state(path: str | Path) -> State:
    """What ``save_state`` or ``write_state`` wrote. Raises FileNotFoundError or ValueError, in one
    sentence, for another file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"load_state: there is no file {path}. Write one with sparline.save_state(model, path)."
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"load_state: {path} must be a whole safetensors file, got one that does not read "
            f"({error}). Copy it again, or write it anew with sparline.save_state(model, path)."
        ) from error
    if metadata.get("format") != STATE_FORMAT:
        raise ValueError(
            f"load_state: {path} must be a file of format {STATE_FORMAT!r}, got "
            f"{metadata.get('format')!r}. Write one with sparline.save_state(model, path)."
        )
    return State(
        tensors,
        from_dict(json.loads(metadata["method"])),
        json.loads(metadata["dense_steps"]),
        tuple(json.loads(metadata["dense_layers"])),
    )
