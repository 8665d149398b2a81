# SPDX-License-Identifier: Apache-2.0
"""Exports in both styles of names, public checkpoints, and LoRA beside what a method learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

pytest.importorskip("diffusers")

import diffusers
import training
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

import sparline
from sparline.cli import app
from sparline.integrations.diffusers import learned_parameters
from sparline.train import setup
from sparline.train.export import to_wan
from sparline.train.loop import Trainer

pytestmark = pytest.mark.e2e

SLA = {"name": "sla_main", "keep_ratio": 0.25, "block_q": 16, "block_k": 16}
TURBO = "self_attn.attn_op.local_attn.proj_l"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def convert(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def converted(*arguments: str | Path) -> None:
    result = convert(*arguments)
    assert result.exit_code == 0, result.output


def predict(model: Any) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        out: Tensor = model.eval()(
            hidden_states=torch.randn(1, 3, 4, 16, 16, generator=rng),
            timestep=torch.tensor([500.0]),
            encoder_hidden_states=torch.randn(1, 4, 32, generator=rng),
            return_dict=False,
        )[0]
    return out


def load_export(folder: Path) -> Any:
    model = diffusers.WanTransformer3DModel.from_pretrained(folder / "transformer")
    return sparline.load_state(model, folder / "sparline.safetensors")


# Of a run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SLA, training.METHOD], ids=["sla", "sla2"])
def test_an_export_is_the_model_that_was_trained(method: dict[str, Any], tmp_path: Path) -> None:
    trainer = Trainer(training.make_config(tmp_path / "run", method=method))
    trainer.run()
    with trainer.averaged():
        expected = predict(trainer.transformer)
    assert not torch.equal(expected, predict(trainer.transformer))
    assert torch.equal(predict(load_export(tmp_path / "run" / "final")), expected)

    converted(tmp_path / "run" / "checkpoint-4", tmp_path / "again")
    for name in ("sparline.safetensors", "transformer/diffusion_pytorch_model.safetensors"):
        a, b = (
            load_file(folder / name) for folder in (tmp_path / "run" / "final", tmp_path / "again")
        )
        assert a.keys() == b.keys()
        assert all(torch.equal(value, b[key]) for key, value in a.items())


def test_without_an_average_the_weights_themselves_are_exported(tmp_path: Path) -> None:
    config = training.make_config(tmp_path / "run", method=SLA, training={"use_ema": False})
    trainer = Trainer(config)
    trainer.run()
    expected = predict(trainer.transformer)
    assert torch.equal(predict(load_export(tmp_path / "run" / "final")), expected)
    converted(tmp_path / "run" / "checkpoint-4", tmp_path / "again")
    assert torch.equal(predict(load_export(tmp_path / "again")), expected)


# LoRA -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "learned"), [(SLA, "projection"), (training.METHOD, "alpha")], ids=["sla", "sla2"]
)
def test_lora_trains_beside_what_the_method_learns(
    method: dict[str, Any], learned: str, tmp_path: Path
) -> None:
    lora = {"rank": 2, "lora_alpha": 4}
    trainer = Trainer(training.make_config(tmp_path / "run", method=method, lora=lora))
    assert {group.kind for group in trainer.groups} == {"lora", learned}
    everything = dict(trainer.transformer.named_parameters())
    before = {name: p.detach().clone() for name, p in everything.items()}
    trainer.run()
    changed = {setup.kind_of(n) for n, p in everything.items() if not torch.equal(p, before[n])}
    assert changed == {"lora", learned}

    with trainer.averaged():
        expected = predict(trainer.transformer)
    model = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "model")
    sparline.load_state(model, tmp_path / "run" / "final" / "sparline.safetensors")
    name = "pytorch_lora_weights.safetensors"
    model.load_lora_adapter(tmp_path / "run" / "final", weight_name=name)
    torch.testing.assert_close(predict(model), expected)
    converted(tmp_path / "run" / "checkpoint-4", tmp_path / "again")
    a, b = (
        load_file(folder / "pytorch_lora_weights.safetensors")
        for folder in (tmp_path / "run" / "final", tmp_path / "again")
    )
    assert all(torch.equal(value, b[key]) for key, value in a.items())


def test_lora_resumes_to_the_bit(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": SLA, "lora": {"rank": 2}}
    whole = Trainer(training.make_config(tmp_path / "whole", **settings))
    halves = Trainer(training.make_config(tmp_path / "halves", **settings))
    for _ in range(2):
        whole.train_step()
        halves.train_step()
    halves.save_checkpoint()
    resumed = Trainer(training.make_config(tmp_path / "halves", **settings))
    for _ in range(2):
        assert whole.train_step() == resumed.train_step()
    for name, p in whole.parameters.items():
        assert torch.equal(p, resumed.parameters[name]), name


# TurboDiffusion's names -------------------------------------------------------------------------


def test_the_names_are_those_of_the_original_wan() -> None:
    """diffusers' own converter takes them back, image branch included."""
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        image_dim=8,
        added_kv_proj_dim=24,
        pos_embed_seq_len=4,
    )
    own = {n: t for n, t in model.state_dict().items() if "pos_embed" not in n}
    wan = {to_wan(name): tensor for name, tensor in own.items()}
    assert len(wan) == len(own)
    assert "blocks.1.self_attn.q.weight" in wan
    assert "blocks.0.cross_attn.k_img.weight" in wan
    assert "head.modulation" in wan
    back = convert_wan_transformer_to_diffusers(dict(wan))
    assert back.keys() == own.keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in back.items())


def test_to_turbodiffusion_and_back(tmp_path: Path) -> None:
    trainer = Trainer(training.make_config(tmp_path / "run", method=SLA))
    trainer.run()
    final = tmp_path / "run" / "final"
    turbo = tmp_path / "turbo.safetensors"
    converted(final, turbo, "--to", "turbodiffusion")
    tensors = load_file(turbo)
    learned = load_file(final / "sparline.safetensors")
    name = "blocks.1.attn1.processor.proj_l.weight"
    assert torch.equal(tensors[f"blocks.1.{TURBO}.weight"], learned[f"transformer.{name}"])
    assert "patch_embedding.weight" in tensors
    transformer = diffusers.WanTransformer3DModel.from_pretrained(final / "transformer")
    assert len(tensors) == len(transformer.state_dict()) + len(learned)

    back = tmp_path / "back.safetensors"
    method = "sla_main:keep_ratio=0.25:block_q=16:block_k=16"
    converted(turbo, back, "--method", method)
    assert all(torch.equal(t, learned[n]) for n, t in load_file(back).items())
    sparline.load_state(transformer, back)
    assert torch.equal(predict(transformer), predict(load_export(final)))

    alone = tmp_path / "alone.safetensors"
    converted(final / "sparline.safetensors", alone, "--to", "turbodiffusion")
    assert set(load_file(alone)) == {n for n in tensors if "proj_l" in n}


@pytest.mark.parametrize("form", ["plain", "net", "nested"])
def test_a_public_checkpoint_is_what_the_public_module_computes(form: str, tmp_path: Path) -> None:
    """Projections of the drop-in module, under TurboDiffusion's names, in a file of torch."""
    modules = [sparline.nn.SparseLinearAttention(16, 0.25, BLKQ=16, BLKK=16) for _ in range(2)]
    tensors = {}
    for n, module in enumerate(modules):
        torch.nn.init.normal_(module.proj_l.weight, std=0.3)
        for key, value in module.state_dict().items():
            prefix = "net." if form == "net" else ""
            tensors[f"{prefix}blocks.{n}.self_attn.attn_op.local_attn.{key}"] = value.bfloat16()
    tensors["blocks.2.self_attn.q.weight"] = torch.zeros(2, 2)  # a block that stayed dense
    file = tmp_path / "public.pth"
    torch.save({"model": tensors} if form == "nested" else tensors, file)
    state = tmp_path / "state.safetensors"
    result = convert(file, state, "--method", "sla_main:keep_ratio=0.25:block_q=16:block_k=16")
    assert result.exit_code == 0, result.output
    assert "dense layers 2" in result.output

    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=3, out_channels=3, text_dim=32,
        ffn_dim=32, num_layers=3, rope_max_seq_len=64,
    )  # fmt: skip
    sparline.load_state(model, state)
    q, k, v = (torch.randn(1, 2, 96, 16) for _ in range(3))
    for n, module in enumerate(modules):
        module.proj_l.weight.data = module.proj_l.weight.bfloat16().float()
        ours = model.blocks[n].attn1.processor.attention
        torch.testing.assert_close(ours(q, k, v), module(q, k, v), rtol=0.02, atol=0.02)
    assert len(list(learned_parameters(model))) == 4


def test_wan_2_2_has_two_transformers(tmp_path: Path) -> None:
    tensors = {f"blocks.0.{TURBO}.{k}": torch.zeros(2) for k in ("weight", "bias")}
    save_file(tensors, tmp_path / "a.safetensors")
    out = tmp_path / "b.safetensors"
    converted(tmp_path / "a.safetensors", out, "--method", "sla1", "--component", "transformer_2")
    assert all(name.startswith("transformer_2.blocks.0.") for name in load_file(out))


def test_what_cannot_be_converted(tmp_path: Path) -> None:
    trainer = Trainer(training.make_config(tmp_path / "run"))
    trainer.run()
    run, out = tmp_path / "run", tmp_path / "out"
    (tmp_path / "junk.pth").write_bytes(b"junk")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    junk, x = tmp_path / "junk.pth", tmp_path / "x.safetensors"
    for arguments, text in (
        ([tmp_path / "no", out], "there is no"),
        ([run / "final", out, "--to", "turbodiffusion"], "TurboDiffusion computes SLA with"),
        ([run / "checkpoint-4", out, "--to", "turbodiffusion"], "Convert it to diffusers first"),
        ([run, out], "must be a checkpoint folder"),
        ([x, out], "does not say its method"),
        ([x, out, "--method", "sla1"], "got none"),
        ([x, out, "--method", "sla2"], "holds SLA's projections"),
        ([x, out, "--method", "slb"], "it must be one of"),
        ([x, out, "--to", "turbodiffusion"], "must be a file of format"),
        ([x, out, "--to", "comfy"], "--to must be diffusers or turbodiffusion"),
        ([junk, out, "--method", "sla1"], "does not read"),
    ):
        result = convert(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert text in result.stderr, (arguments, result.stderr)
        assert result.stderr.strip().count("\n") == 0
    assert not out.exists()
