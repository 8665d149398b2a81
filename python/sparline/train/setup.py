# SPDX-License-Identifier: Apache-2.0
"""From a configuration to the parts of a run: model, clips, groups of parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import sparline
from sparline.integrations.diffusers import set_trainable

from . import data
from .config import KINDS, Config, DataConfig, ModelConfig, TrainError

PROCESSOR = ".attn1.processor.attention."


# Model ------------------------------------------------------------------------------------------


def load_transformer(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Any:
    """The transformer alone, on the CPU. With a 16-bit ``dtype`` what the host keeps in float32
    stays so."""
    import diffusers

    if config.path is None:
        from sparline import demo

        return demo.load_pipeline(dtype).transformer
    folder = Path(config.path)
    looks_local = config.path.startswith((".", "/", "~")) or config.path.count("/") != 1
    if looks_local and not folder.exists():
        raise TrainError(
            f"train: there is no folder model.path={config.path}. Pass a path or a hub id."
        )
    is_bare = (folder / "config.json").is_file()
    try:
        return cast(Any, diffusers).WanTransformer3DModel.from_pretrained(
            config.path, subfolder=None if is_bare else config.component, torch_dtype=dtype
        )
    except Exception as error:  # whatever the host and the hub's client raise
        reason = str(error).strip().splitlines()[0]
        raise TrainError(
            f"train: model.path={config.path} must be a diffusers pipeline with a Wan "
            f"{config.component}, or such a transformer alone, and it does not load: {reason}"
        ) from error


def load_pipeline(config: ModelConfig, transformer: Any) -> Any:
    """The pipeline around ``transformer``, for samples and for encoding clips; None for a latent
    transformer that came without one."""
    if config.path is None:
        from sparline import demo

        pipeline = demo.load_pipeline()
        pipeline.register_modules(transformer=transformer)
        return pipeline
    import diffusers

    host = cast(Any, diffusers)
    if (Path(config.path) / "model_index.json").is_file() or not Path(config.path).exists():
        return host.DiffusionPipeline.from_pretrained(
            config.path, **{config.component: transformer}, torch_dtype=torch.float32
        )
    if transformer.config.in_channels != 3:
        return None
    from sparline.demo.pipeline import DemoPipeline

    return DemoPipeline(transformer, host.FlowMatchEulerDiscreteScheduler())


def add_method(transformer: Any, config: Config, device: torch.device) -> None:
    """Puts the method of ``config`` into the model, with learned tensors if it names a file.

    ``device`` is where it will run.
    """
    method = config.method.make()
    if method is not None and device.type == "cuda" and config.training.mixed_precision == "no":
        raise TrainError(
            "train: on a GPU attention takes 16 bits, got training.mixed_precision=no. Set it to "
            "bf16; weights, gradients and averages stay float32."
        )
    if method is None:
        if config.model.state is not None:
            raise TrainError(
                f"train: model.state={config.model.state} holds learned tensors, and "
                "method.name=original learns none. Name their method, or leave model.state out."
            )
        return
    try:
        sparline.apply(transformer, method, dense_layers=config.model.dense_layers)
        if config.model.state is not None:
            sparline.load_state(transformer, config.model.state)
    except (TypeError, ValueError, OSError) as error:
        raise TrainError(f"train: {error}") from error


def add_lora(transformer: Any, config: Config) -> None:
    """Adds LoRA through peft, which freezes all else, then frees what the method learns."""
    lora = config.lora
    if not lora.rank:
        return
    try:
        import peft
    except ImportError as missing:
        raise TrainError(
            f"train: lora.rank={lora.rank} needs peft ({missing}). Run: pip install "
            "'sparline[train]'."
        ) from missing
    torch.manual_seed(data.mix(config.seed, 17))  # of LoRA's first factors
    adapter = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.lora_alpha or lora.rank,
        lora_dropout=lora.lora_dropout,
        target_modules=list(lora.target_modules),
    )
    try:
        transformer.add_adapter(adapter)
    except ValueError as error:
        raise TrainError(f"train: lora.target_modules: {error}") from error
    set_trainable(transformer)


# Clips ------------------------------------------------------------------------------------------


def make_sources(
    config: Config, transformer: Any, device: torch.device
) -> tuple[data.Source, data.Source | None]:
    """Clips to train on and held-out ones; None where the configuration names none."""
    train, held_out = _make_sources(config, transformer, device)
    if config.data.caption_dropout > 0.0 and train.null_text is None:
        raise TrainError(
            f"train: data.caption_dropout={config.data.caption_dropout} needs the text of the "
            "empty prompt. Set data.null_text=FILE, or data.caption_dropout=0."
        )
    return train, held_out


def _make_sources(
    config: Config, transformer: Any, device: torch.device
) -> tuple[data.Source, data.Source | None]:
    settings = config.data
    if settings.source == "demo":
        return _demo_sources(settings, transformer, device)
    make: Callable[[str, int | None], data.Source]
    if settings.source == "latents":
        null_text = data.load_null_text(settings)

        def make(path: str, order_seed: int | None) -> data.Source:
            return data.latent_source(Path(path), settings, null_text, order_seed=order_seed)
    else:
        encode, null_text = make_encoder(config, transformer, device)

        def make(path: str, order_seed: int | None) -> data.Source:
            return data.clip_source(Path(path), settings, encode, null_text, order_seed=order_seed)

    assert settings.path is not None
    held_out = settings.validation_path
    return make(settings.path, config.seed), None if held_out is None else make(held_out, None)


def _demo_sources(
    settings: DataConfig, transformer: Any, device: torch.device
) -> tuple[data.Source, data.Source]:
    from sparline.demo.data import ClipSource, DemoDataError, load_scenes

    if transformer.config.in_channels != 3 or settings.height != settings.width:
        raise TrainError(
            "train: data.source=demo gives square clips of pixels, for the bundled model; got "
            f"{transformer.config.in_channels} channels, {settings.height} x {settings.width}. Set "
            "data.source=latents or clips for other models."
        )
    try:
        scenes = load_scenes(settings.path)
        train, held_out = (
            ClipSource(split, settings.num_frames, settings.height, scenes=scenes, device=device)
            for split in ("train", "val")
        )
        text_dim = transformer.config.text_dim
        return data.DemoSource(train, text_dim), data.DemoSource(held_out, text_dim)
    except (DemoDataError, ValueError) as error:
        raise TrainError(f"train: data.source=demo: {error}") from error


Encode = Callable[[Tensor, str], tuple[Tensor, Tensor]]


def make_encoder(
    config: Config, transformer: Any, device: torch.device
) -> tuple[Encode, Tensor | None]:
    """What makes latents (C, T, H, W) and text (L, D) of a clip (3, T, H, W) in [-1, 1] and its
    caption, and the text of the empty prompt."""
    pipeline = load_pipeline(config.model, transformer)
    if pipeline is None:
        raise TrainError(
            f"train: data.source=clips needs the VAE and the text encoder of a pipeline, and "
            f"model.path={config.model.path} is a transformer alone. Pass the folder of the whole "
            "pipeline, or set data.source=latents."
        )
    if hasattr(pipeline, "class_names"):
        return _class_encoder(pipeline, transformer.config.text_dim)
    length = config.data.max_sequence_length
    vae, text_encoder = pipeline.vae.to(device), pipeline.text_encoder.to(device)
    mean, deviation = (
        torch.tensor(getattr(vae.config, name)).view(-1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )

    @torch.no_grad()
    def encode_text(caption: str) -> Tensor:
        embeds = pipeline.encode_prompt(
            caption,
            do_classifier_free_guidance=False,
            max_sequence_length=length,
            device=text_encoder.device,
        )[0][0]
        return data.pad_text(embeds.float().cpu(), length)

    @torch.no_grad()
    def encode(clip: Tensor, caption: str) -> tuple[Tensor, Tensor]:
        pixels = clip[None].to(device, vae.dtype)
        latents = vae.encode(pixels).latent_dist.mode()[0].float().cpu()
        return (latents - mean) / deviation, encode_text(caption)

    if config.data.cache_dir is not None:
        return data.cached(encode, Path(config.data.cache_dir)), encode_text("")
    return encode, encode_text("")


def _class_encoder(pipeline: Any, text_dim: int) -> tuple[Encode, Tensor]:
    from sparline.demo.pipeline import class_embeddings

    names = pipeline.class_names
    table = class_embeddings(torch.arange(-1, len(names)), text_dim)

    def encode(clip: Tensor, caption: str) -> tuple[Tensor, Tensor]:
        if caption not in names:
            raise data.BrokenSample(
                f"its text must be one of the model's classes {', '.join(names)}, got {caption!r}"
            )
        return clip, table[names.index(caption) + 1]

    return encode, table[0]


# Parameters -------------------------------------------------------------------------------------

_LEARNED = {
    "router": "router",
    "alpha_logit": "alpha",
    "proj_l": "projection",
    "feature_map_q": "feature_map",
    "feature_map_k": "feature_map",
    "gate_coarse": "gate",
    "gate_fine": "gate",
}


def kind_of(name: str) -> str:
    """Which of ``KINDS`` a parameter of a transformer is, by its name."""
    _, is_ours, own = name.partition(PROCESSOR)
    if is_ours:
        return _LEARNED[own.split(".")[0]]
    return "lora" if ".lora_" in name else "model"


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters that share a rate and a decay."""

    kind: str
    learning_rate: float  # the peak
    weight_decay: float
    parameters: dict[str, nn.Parameter]


def parameter_groups(transformer: Any, config: Config) -> list[Group]:
    """What will be trained, by kind; sets ``requires_grad`` of every parameter."""
    groups = []
    by_kind: dict[str, dict[str, nn.Parameter]] = {kind: {} for kind in KINDS}
    for name, parameter in transformer.named_parameters():
        by_kind[kind_of(name)][name] = parameter
    has_hard_router = _has_hard_router(transformer)
    for kind, parameters in by_kind.items():
        own = getattr(config.parameters, kind)
        cannot_train = kind == "router" and has_hard_router
        frozen = own.frozen
        if frozen is None:
            frozen = cannot_train or (kind == "model" and bool(config.lora.rank))
        if not frozen and cannot_train:
            raise TrainError(
                "train: parameters.router.frozen=false needs a router that gets a gradient, and "
                "method.router_mode=hard gives none. Train it with task=router, or set "
                "method.router_mode=straight_through."
            )
        for parameter in parameters.values():
            parameter.requires_grad_(not frozen)
        if frozen or not parameters:
            continue
        decay, rate = own.weight_decay, own.learning_rate
        if decay is None:
            decay = config.optimizer.adam_weight_decay if kind in ("model", "lora") else 0.0
        groups.append(
            Group(kind, config.optimizer.learning_rate if rate is None else rate, decay, parameters)
        )
    if not groups:
        raise TrainError(
            "train: something must be trained, and every kind of parameters is frozen. Set "
            "parameters.model.frozen=false."
        )
    return groups


def _has_hard_router(transformer: Any) -> bool:
    modules = (m for m in transformer.modules() if isinstance(m, sparline.nn.SLA2))
    return any(m.method.router_mode == "hard" for m in modules)


def trained(groups: list[Group]) -> Iterator[tuple[str, nn.Parameter]]:
    for group in groups:
        yield from group.parameters.items()
