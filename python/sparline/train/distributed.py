# SPDX-License-Identifier: Apache-2.0
"""One process or many, under torchrun: sharded weights (FSDP2), sequence parallelism (Ulysses).

Ranks stand on a mesh (data, ulysses). Ranks of one Ulysses group see the same clips, each a part of
their tokens; all others see clips of their own. Weights are sharded, or gradients averaged, over
all ranks.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from .config import DistributedConfig, TrainError


@dataclass(frozen=True)
class World:
    """This process among all."""

    device: torch.device
    rank: int = 0
    size: int = 1
    ulysses_degree: int = 1
    mesh: DeviceMesh | None = None  # data x ring x ulysses; None in a single process
    is_sharded: bool = False
    owns_group: bool = False

    @staticmethod
    def start(config: DistributedConfig, device: str | None = None) -> World:
        """Joins the other processes that torchrun started, if it did.

        ``device`` "cpu" or "cuda"; None takes a GPU where there is one.
        """
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        size, degree = int(os.environ.get("WORLD_SIZE", "1")), config.ulysses_degree
        if size % degree:
            raise TrainError(
                "train: distributed.ulysses_degree must divide the number of processes, got "
                f"{degree} and {size}. Start torchrun with --nproc_per_node={degree} or a multiple."
            )
        if size == 1:
            return World(torch.device(kind))
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if kind == "cuda" else None
        if own is not None:
            torch.cuda.set_device(own)
        owns_group = not dist.is_initialized()
        if owns_group:
            dist.init_process_group("gloo" if own is None else "nccl", device_id=own)
        mesh = init_device_mesh(
            kind, (size // degree, 1, degree), mesh_dim_names=("data", "ring", "ulysses")
        )
        return World(
            own or torch.device("cpu"),
            dist.get_rank(),
            size,
            degree,
            mesh,
            config.sharding == "fsdp",
            owns_group,
        )

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and files."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        return self.rank // self.ulysses_degree

    @property
    def num_data_ranks(self) -> int:
        return self.size // self.ulysses_degree

    def split_sequence(self, transformer: Any) -> None:
        """Each rank of a Ulysses group computes its part of the tokens of ``transformer``."""
        if self.ulysses_degree == 1:
            return
        import diffusers

        num_heads = transformer.config.num_attention_heads
        if num_heads % self.ulysses_degree:
            raise TrainError(
                "train: distributed.ulysses_degree must divide the model's heads, got "
                f"{self.ulysses_degree} and {num_heads}. Choose a divisor."
            )
        assert self.mesh is not None
        config = cast(Any, diffusers).ContextParallelConfig(
            ulysses_degree=self.ulysses_degree, mesh=self.mesh["ring", "ulysses"]
        )
        with _countable_devices(self.device):
            transformer.enable_parallelism(config=config)

    def check_tokens(self, transformer: Any, latents: Tensor) -> None:
        """Raises TrainError if the tokens of latents (B, C, T, H, W) cannot be split evenly."""
        sides = zip(latents.shape[2:], transformer.config.patch_size, strict=True)
        num_tokens = math.prod(side // patch for side, patch in sides)
        if num_tokens % self.ulysses_degree:
            raise TrainError(
                "train: distributed.ulysses_degree must divide the tokens of a clip, got "
                f"{self.ulysses_degree} and {num_tokens}. Choose a divisor, or clips of another "
                "size."
            )

    def shard(self, transformer: Any) -> None:
        """Shards every block, and what is left, over all ranks."""
        if self.size == 1 or not self.is_sharded:
            return
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.size,))
        for block in transformer.blocks:
            fully_shard(block, mesh=mesh)
        # Also the root: weights that stayed whole after a forward without a backward would be
        # stale when averaged weights have taken their places, and when these go back.
        fully_shard(transformer, mesh=mesh, reshard_after_forward=True)

    def sync_gradients(self, transformer: Any, is_last: bool) -> None:
        """Before a forward and backward: sharded gradients meet after the last of a step only."""
        if self.size > 1 and self.is_sharded:
            transformer.set_requires_gradient_sync(is_last)

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Averages, over all ranks, gradients that are not sharded."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        parts = torch.split(flat / self.size, [g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all ranks."""
        if self.size == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.size

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank."""
        if self.size == 1:
            return flag
        return bool(self.mean(torch.tensor(float(flag), device=self.device)).item() > 0.0)

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        if self.owns_group:
            dist.barrier()
            dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together; every rank has to ask. Others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def _countable_devices(device: torch.device) -> Iterator[None]:
    """diffusers 0.42 divides by the number of accelerators, and a CPU has none."""
    if device.type != "cpu":
        yield
        return
    counted = torch.accelerator.device_count
    torch.accelerator.device_count = lambda: 1
    try:
        yield
    finally:
        torch.accelerator.device_count = counted
