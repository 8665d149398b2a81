# SPDX-License-Identifier: Apache-2.0
"""What was compiled, what the machine has, and what would run and why."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import sparline
from sparline import _ops
from sparline.describe import explain_call
from sparline.machine import cpu_name

_TYPICAL = {
    "bundled demo model": (1, 4, 8192, 64),
    "Wan 1.3B, 480p": (1, 12, 32760, 128),
}


def report(console: Console) -> bool:
    """Prints the report; True if the compiled operators can be used."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in (*_versions(), *_machine(), *_library()):
        table.add_row(name, value)
    console.print(table, highlight=False)
    if not _ops.available():
        try:
            _ops.require()
        except ImportError as error:
            console.print(f"\n{error}", highlight=False, markup=False)
        return False
    for name, shape in _TYPICAL.items():
        console.print(f"\n[bold]{name}, SLA, float32 {shape}[/bold]", highlight=False)
        console.print(explain_call(shape, shape, torch.float32, sparline.SLA()), markup=False)
    return True


def _versions() -> list[tuple[str, str]]:
    rows = [("sparline", sparline.__version__), ("python", platform.python_version())]
    rows.append(("torch", torch.__version__))
    return rows + [(name, _version(name)) for name in ("diffusers", "transformers", "peft")]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _machine() -> list[tuple[str, str]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [
        ("processor", f"{cpu_name()}, {cores} cores, torch uses {torch.get_num_threads()} threads"),
        ("torch sees", torch.backends.cpu.get_cpu_capability()),
    ]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(idx) for idx in range(torch.cuda.device_count())]
        rows.append(("CUDA devices", ", ".join(names)))
    else:
        rows.append(("CUDA devices", "none"))
    return rows


def _library() -> list[tuple[str, str]]:
    path = _ops.library_path()
    rows = [("library", str(path) if path else "not built")]
    if _ops.available():
        info: dict[str, Any] = json.loads(torch.ops.sparline.build_info())
        rows += [(key.replace("_", " "), _words(value)) for key, value in info.items()]
    forced = os.environ.get("SPARLINE_BACKEND")
    rows.append(("SPARLINE_BACKEND", forced or "not set"))
    return rows


def _words(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(str(item) for item in value) or "none"
    return str(value)
