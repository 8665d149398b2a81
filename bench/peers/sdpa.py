# SPDX-License-Identifier: Apache-2.0
"""torch's own attention, one backend at a time: cuDNN, or FlashAttention 2."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import Attend, PeerError

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}


class Sdpa:
    is_dense = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.about = f"scaled_dot_product_attention, {BACKENDS[name].name}"

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, keep_ratio: float = 1.0) -> Attend:
        backend = BACKENDS[self.name]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v)

        if not q.is_cuda:  # to try the benchmark itself
            return torch.nn.functional.scaled_dot_product_attention
        try:
            attend(q[:, :1, :256], k[:, :1, :256], v[:, :1, :256])
        except RuntimeError as error:
            raise PeerError(f"{self.about}: {error}") from error
        return attend
