# SPDX-License-Identifier: Apache-2.0
"""FlexAttention, compiled, over the best 128 x 128 blocks by pooled scores: the sparse branch
alone, with a block mask that was made before."""

from __future__ import annotations

from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from . import Attend, PeerError

BLOCK = 128


class Flex:
    name = "flex"
    about = f"FlexAttention, blocks {BLOCK} x {BLOCK}, sparse branch only, mask given"
    is_dense = False
    _compiled: Any = None

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, keep_ratio: float) -> Attend:
        mask = make_mask(q, k, keep_ratio)
        if Flex._compiled is None:
            functorch_config.donated_buffer = False  # the backward is timed again and again
            Flex._compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        compiled = Flex._compiled

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            o: Tensor = compiled(q, k, v, block_mask=mask)
            return o

        try:
            attend(q, k, v)
        except Exception as error:  # the compiler's own kinds
            raise PeerError(f"{self.about}: {type(error).__name__}: {error}") from error
        return attend


def make_mask(q: Tensor, k: Tensor, keep_ratio: float) -> BlockMask:
    """The top blocks of every row of pooled scores, all of them whole."""
    heads_of_pairs = (pooled(q) @ pooled(k).mT).float()  # (B, H, T, T)
    number = max(1, int(keep_ratio * heads_of_pairs.shape[-1]))
    best = heads_of_pairs.topk(number, dim=-1).indices.sort(dim=-1).values
    rest = torch.zeros_like(heads_of_pairs, dtype=torch.int32)
    indices = rest.clone()
    indices[..., :number] = best.to(torch.int32)
    counts = torch.full(rest.shape[:3], number, dtype=torch.int32, device=q.device)
    # No partial blocks: every chosen block is whole, and needs no mask inside.
    return BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        rest,
        counts,
        indices,
        BLOCK_SIZE=BLOCK,
        seq_lengths=(q.shape[2], k.shape[2]),
    )


def pooled(x: Tensor) -> Tensor:
    """Means of blocks of 128 rows."""
    length = x.shape[2]
    padded = torch.nn.functional.pad(x, (0, 0, 0, -length % BLOCK))
    means = padded.unflatten(2, (-1, BLOCK)).float().mean(dim=3)
    return means.to(x.dtype)
