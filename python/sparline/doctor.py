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
    device = "cuda" if torch.cuda.is_available() and _has_cuda() else "cpu"
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for name, shape in _TYPICAL.items():
        title = f"{name}, SLA, {str(dtype).removeprefix('torch.')} {shape} on {device}"
        console.print(f"\n[bold]{title}[/bold]", highlight=False)
        console.print(
            explain_call(shape, shape, dtype, sparline.SLA(), device=device), markup=False
        )
    return True


def _has_cuda() -> bool:
    return bool(json.loads(torch.ops.sparline.build_info())["cuda_archs"])


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
    return [*rows, ("torch CUDA", _torch_cuda()), ("CUDA devices", _devices())]


def _torch_cuda() -> str:
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    return f"{torch.version.cuda}, " + (
        "usable" if torch.cuda.is_available() else "no device or driver that it can use"
    )


def _devices() -> str:
    """What torch sees, and what of the compiled code each device runs."""
    if not torch.cuda.is_available():
        return "none"
    archs = json.loads(torch.ops.sparline.build_info())["cuda_archs"] if _ops.available() else []
    lines = []
    for idx in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(idx)
        name = torch.cuda.get_device_name(idx)
        lines.append(f"{idx}: {name}, sm_{major}{minor}: {code_for(10 * major + minor, archs)}")
    return "\n".join(lines)


def code_for(arch: int, compiled: list[str]) -> str:
    """What of the compiled code a device of compute capability ``arch`` (80, 90, ...) runs, and
    what that device lacks. Machine code runs on devices of its major number that are not older, PTX
    on all that are not older."""
    if not compiled:
        return "not used, as this sparline was built without CUDA"
    if arch < 80:
        return "too old, 8.0 is needed"
    codes = [int(name[3:]) for name in compiled if name.startswith("sm_")]
    ptx = [int(name[4:]) for name in compiled if name.startswith("PTX ")]
    fitting = [code for code in codes if code // 10 == arch // 10 and code <= arch]
    if fitting:
        text = f"runs code for sm_{max(fitting)}"
    elif any(version <= arch for version in ptx):
        version = max(version for version in ptx if version <= arch)
        text = f"runs PTX {version}, which the driver compiles at first use"
    else:
        return f"runs none of {', '.join(compiled)}; build with SPARLINE_CUDA_ARCHITECTURES={arch}"
    if arch < 89:
        text += "; no fp8, so low_bit multiplies its e4m3 values as float16"
    return text


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
