# SPDX-License-Identifier: Apache-2.0
"""The public Triton implementation of SLA (github.com/thu-ml/SLA, Apache-2.0), if there is a copy:
``SPARLINE_PEER_TRITON_SLA`` names a folder with the checked-out branches ``main`` and ``SLA-1`` in
it, or one such checkout.

Both branches have one module of one interface. ``main`` sums the linear branch over every key in
plain PyTorch, ``SLA-1`` over the blocks that are not critical, inside its kernels.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import Attend, PeerError

VARIABLE = "SPARLINE_PEER_TRITON_SLA"
PACKAGE = "sparse_linear_attention"
BRANCHES = {"main": "main", "sla1": "SLA-1"}


class TritonSLA:
    is_dense = False

    def __init__(self, branch: str) -> None:
        self.branch = branch
        self.name = f"triton_sla_{branch}"
        self.about = f"public Triton SLA, branch {BRANCHES[branch]}, blocks 128 x 64, whole module"

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, keep_ratio: float) -> Attend:
        module_type = load(self.branch)
        try:
            module: Any = module_type(q.shape[3], topk=keep_ratio, BLKQ=128, BLKK=64).to(q.device)
            with torch.no_grad():  # zeros would cost the same, and show nothing
                module.proj_l.weight.normal_(std=q.shape[3] ** -0.5)
            module(q, k, v)
        except Exception as error:  # Triton's own kinds
            raise PeerError(f"{self.about}: {type(error).__name__}: {error}") from error
        attend: Attend = module
        return attend


@functools.cache
def load(branch: str) -> Any:
    """The class of a branch. The packages of both have one name: only one is in place at a time."""
    root = os.environ.get(VARIABLE)
    if not root:
        raise PeerError(f"{VARIABLE} names no folder with the public Triton SLA")
    folder = Path(root)
    if not (folder / PACKAGE).is_dir():
        folder = folder / BRANCHES[branch]
    elif ("SLA-1" in folder.name) != (branch == "sla1"):
        raise PeerError(f"{folder} is a checkout of the other branch")
    if not (folder / PACKAGE / "core.py").is_file():
        raise PeerError(f"{folder} holds no {PACKAGE}")
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(PACKAGE).SparseLinearAttention
    except ImportError as error:
        raise PeerError(f"{PACKAGE} does not import: {error}") from error
    finally:
        sys.path.remove(str(folder))
