# SPDX-License-Identifier: Apache-2.0
"""Ulysses context parallelism: two processes, each with half of the tokens, give what one process "
"gives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

diffusers = pytest.importorskip("diffusers")

import sparline  # noqa: E402

METHOD = sparline.SLA(keep_ratio=0.25, block_q=16, block_k=16)
RANKS = 2


def _model() -> diffusers.WanTransformer3DModel:
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    sparline.apply(model.eval(), METHOD)
    for _, parameter in sparline.integrations.diffusers.learned_parameters(model):
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def _forward(model: diffusers.WanTransformer3DModel) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    out: torch.Tensor = model(
        hidden_states=torch.randn(1, 4, 2, 16, 16, generator=rng),
        timestep=torch.tensor([500.0]),
        encoder_hidden_states=torch.randn(1, 12, 16, generator=rng),
        return_dict=False,
    )[0]
    return out


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    torch.accelerator.device_count = lambda: 1  # diffusers 0.42 divides by it, and a CPU has none
    model = _model()
    model.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=RANKS))
    out = _forward(model)
    out.square().mean().backward()
    gradients = [p.grad for _, p in sparline.integrations.diffusers.learned_parameters(model)]
    torch.save((out.detach(), gradients), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.slow
def test_ulysses_equals_one_process(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=RANKS, join=True)
    expected = _forward(_model()).detach()
    for rank in range(RANKS):
        out, gradients = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        assert all(g is not None and g.abs().max() > 0 for g in gradients)
