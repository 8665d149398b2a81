# SPDX-License-Identifier: Apache-2.0
"""Sparse-linear attention for video diffusion: the public names."""

from typing import TYPE_CHECKING, Any

from . import accounting, methods, nn
from .functional import TileStatistics, attention, explain, route, tile_statistics
from .methods import (
    BLASST,
    METHODS,
    SLA,
    SLA2,
    VSA,
    Dense,
    DynSparse,
    LowBit,
    Method,
    VMoBA,
    method,
)
from .reference import Weights
from .tokens import Grid

if TYPE_CHECKING:
    from .integrations.diffusers import apply, load_state, restore, save_state

__version__ = "0.1.0"

__all__ = [
    "BLASST",
    "METHODS",
    "SLA",
    "SLA2",
    "VSA",
    "Dense",
    "DynSparse",
    "Grid",
    "LowBit",
    "Method",
    "TileStatistics",
    "VMoBA",
    "Weights",
    "accounting",
    "apply",
    "attention",
    "explain",
    "load_state",
    "method",
    "methods",
    "nn",
    "restore",
    "route",
    "save_state",
    "tile_statistics",
]

_FROM_DIFFUSERS = ("apply", "load_state", "restore", "save_state")


def __getattr__(name: str) -> Any:
    if name in _FROM_DIFFUSERS:  # on first use: diffusers is optional
        from .integrations import diffusers

        return getattr(diffusers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
