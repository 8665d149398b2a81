# SPDX-License-Identifier: Apache-2.0
"""What this machine is called, for reports and results."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def describe_device() -> str:
    """The device that results were measured on."""
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
