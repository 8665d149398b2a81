# SPDX-License-Identifier: Apache-2.0
"""Ulysses context parallelism: two processes, each with half of the tokens, give what one process
gives, and gradients that add up to its."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

import sparline  # noqa: E402

BLOCKS = {"block_q": 16, "block_k": 16}
METHODS: dict[str, sparline.Method] = {
    "projection": sparline.SLA(keep_ratio=0.25, **BLOCKS),
    "hedgehog": sparline.SLA(keep_ratio=0.25, feature_map="hedgehog", **BLOCKS),
    "alpha": sparline.SLA2(keep_ratio=0.25, num_alphas=8, token_order="cubes", **BLOCKS),
    "router": sparline.SLA2(
        keep_ratio=0.25, num_alphas=8, router_mode="soft", router_per_head=True, **BLOCKS
    ),
    "gates": sparline.VSA(keep_ratio=0.25, cube=(2, 4, 4)),
    "chunks": sparline.VMoBA(partition="3d", box_3d=(2, 4, 4), **BLOCKS),
}
RANKS = 2


def _model(method: sparline.Method) -> diffusers.WanTransformer3DModel:
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
    sparline.apply(model.eval(), method)
    for _, parameter in sparline.integrations.diffusers.learned_parameters(model):
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def _run(model: diffusers.WanTransformer3DModel) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradient of every parameter."""
    rng = torch.Generator().manual_seed(1)
    out: Tensor = model(
        hidden_states=torch.randn(1, 4, 2, 16, 16, generator=rng),
        timestep=torch.tensor([500.0]),
        encoder_hidden_states=torch.randn(1, 12, 16, generator=rng),
        return_dict=False,
    )[0]
    out.square().mean().backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    torch.accelerator.device_count = lambda: 1  # diffusers 0.42 divides by it, and a CPU has none
    found = {}
    for name, method in METHODS.items():
        model = _model(method)
        model.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=RANKS))
        found[name] = _run(model)
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    dist.barrier()
    os._exit(0)  # gloo's threads may outlive the interpreter, which then aborts


@pytest.mark.slow
def test_ulysses_equals_one_process(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=RANKS, join=True)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    for name, method in METHODS.items():
        expected, gradients = _run(_model(method))
        for found in ranks:
            torch.testing.assert_close(found[name][0], expected, rtol=1e-4, atol=1e-5)
        for parameter, gradient in gradients.items():
            total = sum(found[name][1][parameter] for found in ranks)
            torch.testing.assert_close(
                total,
                gradient,
                rtol=1e-3,
                atol=1e-6,
                msg=partial("{} {}: {}".format, name, parameter),
            )


def test_heads_that_are_ranked_together_are_not_spread() -> None:
    method = sparline.VMoBA(mode="overall", partition="3d", box_3d=(2, 4, 4), **BLOCKS)
    model = _model(method)
    config = diffusers.ContextParallelConfig(ulysses_degree=RANKS)
    for block in model.blocks:
        block.attn1.processor._parallel_config = SimpleNamespace(context_parallel_config=config)
    with pytest.raises(NotImplementedError, match=r"mode 'overall' ranks all of them together"):
        _run(model)
