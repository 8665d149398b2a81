# SPDX-License-Identifier: Apache-2.0
"""What a user would pick instead, each behind one call: ``prepare(q, k, v, keep_ratio)`` gives the
function from q, k and v to o that bench/gpu.py times, and raises ``PeerError`` with a reason where
it cannot run here. None of these is a dependency, and nothing of them is part of this repository.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class PeerError(RuntimeError):
    """The peer is not here, or does not take these tensors."""


class Peer(Protocol):
    name: str
    about: str  # what of the whole operator it does
    is_dense: bool  # takes no density

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, keep_ratio: float) -> Attend: ...


def find_peers() -> dict[str, Peer]:
    """Every peer by name; whether it runs is known when it is prepared."""
    from . import flex, sdpa, triton_sla

    all_peers: list[Peer] = [
        sdpa.Sdpa("cudnn"),
        sdpa.Sdpa("fa2"),
        flex.Flex(),
        triton_sla.TritonSLA("main"),
        triton_sla.TritonSLA("sla1"),
    ]
    return {peer.name: peer for peer in all_peers}
