# SPDX-License-Identifier: Apache-2.0
"""Trained weights for other programs, in two styles of names, and public checkpoints for us.

diffusers: a folder with ``transformer/`` as ``save_pretrained`` writes it, ``sparline.safetensors``
with what the method learned (``sparline.load_state``), and under LoRA, in place of the transformer,
``pytorch_lora_weights.safetensors``.

TurboDiffusion: one safetensors file in the names of the original Wan, in which SLA's projection is
``blocks.{i}.self_attn.attn_op.local_attn.proj_l.{weight,bias}``.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparline
from sparline.integrations.diffusers import learned_parameters
from sparline.integrations.state import STATE_FORMAT, State, read_state, write_state
from sparline.methods import SLA, Method

from . import checkpoint, setup
from .config import Config, ModelConfig, TrainError, from_dict
from .distributed import World, whole

STATE_FILE = "sparline.safetensors"
#: What stands between a block and SLA's projection, there and here.
TURBO, OURS = "self_attn.attn_op.local_attn", "attn1.processor"


# Of a run ---------------------------------------------------------------------------------------


def write(transformer: Any, folder: Path, config: Config, world: World) -> None:
    """Writes a trained model to ``folder``; every rank has to call it, one writes.

    The folder is written beside and renamed, so that it is whole or the one of before.
    """
    tensors = {name: whole(p.detach()).cpu() for name, p in transformer.named_parameters()}
    if world.is_main:
        # A plain model: sharding and sequence parallelism stay with the one that trains.
        plain = type(transformer).from_config(transformer.config)
        method = config.method.make()
        if method is not None:
            sparline.apply(plain, method, dense_layers=config.model.dense_layers)
        setup.add_lora(plain, config)
        plain.load_state_dict(tensors)
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if method is not None:
            if any(True for _ in learned_parameters(plain)):
                sparline.save_state(plain, partial / STATE_FILE)
            sparline.restore(plain)
        if config.lora.rank:
            _write_lora(plain, partial)
        else:
            plain.save_pretrained(partial / "transformer")
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
    world.wait()


def _write_lora(transformer: Any, folder: Path) -> None:
    """As pipelines and their trainers do, for ``pipeline.load_lora_weights(folder)``."""
    import peft
    from diffusers.loaders import WanLoraLoaderMixin

    (adapter,) = transformer.peft_config.values()
    WanLoraLoaderMixin.save_lora_weights(
        folder,
        transformer_lora_layers=peft.get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=adapter.to_dict(),
    )


def from_checkpoint(path: Path, folder: Path) -> None:
    """Writes the averaged weights of ``output_dir/checkpoint-N`` as the end of that run would."""
    config = from_dict(checkpoint.read_about(path)["config"])
    transformer = setup.load_transformer(config.model)
    world = World(torch.device("cpu"))
    setup.add_method(transformer, config, world.device)
    setup.add_lora(transformer, config)
    groups = setup.parameter_groups(transformer, config)
    trained = dict(setup.trained(groups))
    kept = {
        name: p.detach()
        for name, p in transformer.named_parameters()
        if name in trained or setup.PROCESSOR in name
    }
    checkpoint.load(path, {"weights": kept}, world)
    if config.training.use_ema:
        average = {name: p.detach() for name, p in trained.items()}
        checkpoint.load(path, {"average": average}, world)
    write(transformer, folder, config, world)


# Other names ------------------------------------------------------------------------------------

#: Names of the original Wan, as patterns over diffusers' names; in blocks, and outside of them.
_IN_BLOCK = (
    (r"^scale_shift_table$", "modulation"),
    (r"^attn1\.", "self_attn."),
    (r"^attn2\.", "cross_attn."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.add_([kv])_proj\.", r".\1_img."),
    (r"\.norm_added_k\.", ".norm_k_img."),
    (r"^norm2\.", "norm3."),  # of cross-attention; the other norms have no weights
    (r"^ffn\.net\.0\.proj\.", "ffn.0."),
    (r"^ffn\.net\.2\.", "ffn.2."),
)
_OUTSIDE = (
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\.", "head.head."),
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"^condition_embedder\.image_embedder\.pos_embed$", "img_emb.emb_pos"),
    (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
    (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
)
_BLOCK = re.compile(r"^(blocks\.\d+\.)(.*)$")


def to_wan(name: str) -> str:
    """The original Wan's name of a tensor that diffusers calls ``name``."""
    block = _BLOCK.match(name)
    prefix, name = block.groups() if block else ("", name)
    for pattern, replacement in _IN_BLOCK if block else _OUTSIDE:
        name = re.sub(pattern, replacement, name)
    return prefix + name


def to_turbodiffusion(source: Path, target: Path, model: Path | None = None) -> None:
    """Writes ``target``, a safetensors file in TurboDiffusion's names.

    ``source`` is an export of a run, whose transformer goes along, or a file of
    ``sparline.save_state``, which gives the projections alone unless ``model``, the folder of a
    transformer, is given.
    """
    from safetensors.torch import save_file

    file = source / STATE_FILE if source.is_dir() else source
    model = model or (source / "transformer" if source.is_dir() else None)
    try:
        state = read_state(file)
    except (OSError, ValueError) as error:
        raise TrainError(f"convert: {error}") from error
    if not _is_public(state.method):
        raise TrainError(
            "convert: TurboDiffusion computes SLA with a projection, over all blocks or those that "
            f"are not critical, and none is negligible; got {state.method}. Train "
            "method.name=sla_main for it."
        )
    tensors = {}
    if model is not None:
        loaded = setup.load_transformer(ModelConfig(path=str(model)))
        tensors = {to_wan(name): t.contiguous() for name, t in loaded.state_dict().items()}
    for name, tensor in state.tensors.items():
        _, _, own = name.partition(".")  # of the component
        tensors[own.replace(OURS, TURBO)] = tensor
    partial = target.with_name(target.name + ".partial")
    save_file(tensors, partial)
    partial.replace(target)


def _is_public(method: Method) -> bool:
    return (
        isinstance(method, SLA)
        and method.combine == "projection"
        and method.selection == "top_k"
        and method.linear_scope in ("all", "complement")
        and not (method.negligible_ratio or method.recipe.has_feature_weights)
    )


_PROJECTION = re.compile(r"blocks\.(\d+)\..*proj_l\.(weight|bias)$")


def from_public(
    source: Path, target: Path, method: Method, component: str = "transformer"
) -> tuple[int, ...]:
    """Takes SLA's projections out of a public checkpoint (TurboDiffusion's names or any other with
    ``blocks.{i}`` before and ``proj_l`` after) and writes ``target`` for ``sparline.load_state``.

    The blocks without a projection become dense layers; returns those.
    """
    if not isinstance(method, SLA) or method.combine != "projection":
        raise TrainError(
            f"convert: a public checkpoint holds SLA's projections, and {method} has none. Pass "
            "--method sla_main:keep_ratio=0.1, with the ratio that it was trained with."
        )
    tensors, layers = {}, set()
    num_layers = 0
    for name, tensor in _read_tensors(source).items():
        if block := re.search(r"blocks\.(\d+)\.", name):
            num_layers = max(num_layers, int(block[1]) + 1)
        if found := _PROJECTION.search(name):
            layers.add(int(found[1]))
            own = f"{component}.blocks.{found[1]}.{OURS}.proj_l.{found[2]}"
            tensors[own] = tensor.float().contiguous()
    if not tensors:
        raise TrainError(
            f"convert: {source} must hold tensors called blocks.<i>...proj_l.weight, got none. "
            "Pass a checkpoint that was fine-tuned with SLA."
        )
    dense = tuple(sorted(set(range(num_layers)) - layers))
    write_state(State(tensors, method, 0, dense), target)
    return dense


def _read_tensors(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a safetensors or torch file; nothing in it is run."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever torch and pickle raise for another file
        kind = "safetensors" if isinstance(error, SafetensorError) else "safetensors or torch"
        raise TrainError(
            f"convert: {path} must be a {kind} file of tensors, and it does not read: "
            f"{str(error).splitlines()[0]}"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    return {name: t for name, t in loaded.items() if isinstance(t, Tensor)}


def convert(
    source: Path,
    target: Path,
    to: str,
    method: Method | None = None,
    model: Path | None = None,
    component: str = "transformer",
) -> str:
    """What ``sparline convert`` does; a sentence that says what was written."""
    if not source.exists():
        raise TrainError(f"convert: there is no {source}. Pass a checkpoint, an export or a file.")
    if to == "turbodiffusion":
        if (source / checkpoint.ABOUT).is_file():
            raise TrainError(
                f"convert: {source} is a checkpoint of a run. Convert it to diffusers first, and "
                "that to turbodiffusion."
            )
        to_turbodiffusion(source, target, model)
        return f"{target}: TurboDiffusion's names"
    if to != "diffusers":
        raise TrainError(f"convert: --to must be diffusers or turbodiffusion, got {to!r}.")
    if source.is_dir():
        from_checkpoint(source, target)
        return f"{target}: the averaged weights of {source.name}"
    if method is None:
        raise TrainError(
            "convert: a public checkpoint does not say its method. Pass --method "
            "sla_main:keep_ratio=0.1, with the ratio that it was trained with."
        )
    dense = from_public(source, target, method, component)
    words = f", dense layers {', '.join(map(str, dense))}" if dense else ""
    return f"{target}: learned tensors for sparline.load_state ({STATE_FORMAT}){words}"
