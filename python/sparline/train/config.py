# SPDX-License-Identifier: Apache-2.0
"""What a training run is: frozen dataclasses, read from a YAML or JSON file and changed by dotted
overrides (``method.keep_ratio=0.05``).

Keys carry the names that trainers of diffusion models share (``max_train_steps``,
``resume_from_checkpoint``, ...). An unknown key is an error that names the nearest one.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import sparline
from sparline.methods import METHODS, Method, options_of

#: The model's own attention, in place of a method of ours.
ORIGINAL = "original"

#: What kinds of parameters a run tells apart, each with settings of its own.
KINDS = ("model", "lora", "router", "alpha", "projection", "feature_map", "gate")


class TrainError(ValueError):
    """Something that the caller gave is wrong; the message says what and the way out."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Args:
    path: folder or hub id of a diffusers pipeline with a Wan transformer, or of such a transformer
        alone; None takes the bundled demo model.
    component: which transformer of the pipeline: ``transformer``, or ``transformer_2`` (Wan 2.2).
    dense_layers: blocks that keep the model's own attention.
    state: learned tensors of the method to start from (``sparline.save_state``), such as those of a
        router run.
    alpha_start: where SLA2's alpha starts, if ``state`` does not bring one: ``output`` fits it to
        the dense model's attention, ``mass`` takes the softmax mass that its blocks hold there,
        ``constant`` is 0.9 (see ``sparline.nn.SLA2.alpha_evidence``).
    gradient_checkpointing: keep no activations inside blocks; compute them again in the backward.
    compile: ``torch.compile`` the blocks.
    """

    path: str | None = None
    component: str = "transformer"
    dense_layers: tuple[int, ...] = ()
    state: str | None = None
    alpha_start: str = "output"
    gradient_checkpointing: bool = False
    compile: bool = False


@dataclasses.dataclass(frozen=True)
class MethodConfig:
    """``name`` of a method in ``sparline.METHODS``, or ``original`` for the model's own attention,
    and beside it any option of that method."""

    name: str = "sla2"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def make(self) -> Method | None:
        """The method; None is the model's own attention."""
        if self.name == ORIGINAL:
            return None
        try:
            return sparline.method(self.name, **self.options)
        except (TypeError, ValueError) as error:
            raise TrainError(f"method: {error}") from error


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Args:
    source: ``demo`` (real clips and filmed photographs, see sparline.demo.data), ``clips`` (a
        folder of videos) or ``latents`` (a folder of safetensors or webdataset shards with latents
        and text embeddings).
    path: the folder; for ``demo`` a file of examples/train_demo_model.py --prepare, or None for the
        installed wheels.
    validation_path: the same for held-out clips; ``demo`` has its own.
    num_frames, height, width: of the clips, in pixels. Latents have the size that they have.
    train_batch_size: clips of one forward of one data-parallel rank.
    max_sequence_length: text tokens; shorter embeddings are filled up with zeros, as Wan does.
    null_text: safetensors file with ``text_embeds`` of the empty prompt, for ``caption_dropout``.
    caption_dropout: share of the clips that train without their text.
    cache_dir: where ``clips`` keeps what the VAE and the text encoder made of a file.
    dataloader_num_workers: threads that read ahead; 0 reads when a batch is wanted.
    """

    source: str = "demo"
    path: str | None = None
    validation_path: str | None = None
    num_frames: int = 8
    height: int = 64
    width: int = 64
    train_batch_size: int = 1
    max_sequence_length: int = 512
    null_text: str | None = None
    caption_dropout: float = 0.1
    cache_dir: str | None = None
    dataloader_num_workers: int = 2


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Args:
    kind: ``flow_matching``, the mean square of v(x_sigma) - (noise - clip); or ``teacher_mse``, of
        v(x_sigma) - v_dense(x_sigma) against a frozen dense copy (white-box distillation).
    weighting_scheme: how noise levels are drawn: ``logit_normal``, sigma = sigmoid(normal(mean,
        std)), or ``uniform``.
    logit_mean, logit_std: of ``logit_normal``.
    flow_shift: s of sigma' = s sigma / (1 + (s - 1) sigma), applied to what was drawn.
    """

    kind: str = "flow_matching"
    weighting_scheme: str = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    flow_shift: float = 1.0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. The rate warms up linearly over ``lr_warmup_steps``, then follows ``lr_scheduler``
    (``cosine`` down to ``lr_min_ratio`` of the peak, or ``constant``)."""

    learning_rate: float = 1e-5
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 0
    lr_min_ratio: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    adam_weight_decay: float = 0.01
    max_grad_norm: float = 1.0  # 0 does not clip


@dataclasses.dataclass(frozen=True)
class ParameterConfig:
    """One kind of parameters.

    Args:
        learning_rate: its peak; None takes ``optimizer.learning_rate``.
        weight_decay: None takes ``optimizer.adam_weight_decay`` for the model and LoRA, and 0 for
            what a method adds: alpha and the router do not start from zero.
        frozen: None trains it, except for the model under LoRA and a router that is hard.
    """

    learning_rate: float | None = None
    weight_decay: float | None = None
    frozen: bool | None = None


@dataclasses.dataclass(frozen=True)
class ParametersConfig:
    """Settings of each kind of parameters: the model's weights, LoRA's, and what a method adds."""

    model: ParameterConfig = ParameterConfig()
    lora: ParameterConfig = ParameterConfig()
    router: ParameterConfig = ParameterConfig()
    alpha: ParameterConfig = ParameterConfig()
    projection: ParameterConfig = ParameterConfig()
    feature_map: ParameterConfig = ParameterConfig()
    gate: ParameterConfig = ParameterConfig()


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters through peft; a ``rank`` of 0 trains the weights themselves."""

    rank: int = 0
    lora_alpha: int = 0  # 0 takes the rank
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Args:
    max_train_steps: optimizer steps.
    max_minutes: stop earlier, with a checkpoint; 0 has no limit.
    gradient_accumulation_steps: forwards of each rank for one step.
    mixed_precision: ``no`` or ``bf16``; weights, gradients and averages stay float32.
    use_ema: keep a moving average of what is trained, float32; it is what is validated, sampled and
        exported.
    ema_decay: of the average; in the first steps it is less, min(decay, (1 + n) / (10 + n)).
    max_nonfinite_steps: steps in a row that may give NaN or Inf, which are skipped, before the run
        gives up.
    """

    max_train_steps: int = 500
    max_minutes: float = 0.0
    gradient_accumulation_steps: int = 1
    mixed_precision: str = "no"
    use_ema: bool = True
    ema_decay: float = 0.999
    max_nonfinite_steps: int = 5


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Args:
    checkpointing_steps: steps between checkpoints; one is always written at the end. 0: only there.
    checkpoints_total_limit: older ones are removed; 0 keeps all.
    resume_from_checkpoint: ``latest`` (start anew where there is none), ``none``, or the folder of
        one.
    """

    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str = "latest"


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """Args:
    report_to: ``tensorboard`` or ``none``; ``log.jsonl`` is always written.
    logging_steps, validation_steps, sample_steps: steps between lines, held-out losses and sheets
        of samples; 0 never. Validation and samples also follow the last step.
    validation_batches: of ``data.train_batch_size`` clips, the same ones every time.
    sample_prompts: what is generated; of the bundled model, class names.
    num_inference_steps, guidance_scale: of a sample.
    """

    report_to: str = "tensorboard"
    logging_steps: int = 10
    validation_steps: int = 0
    validation_batches: int = 8
    sample_steps: int = 0
    sample_prompts: tuple[str, ...] = ()
    num_inference_steps: int = 20
    guidance_scale: float = 2.0


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Under torchrun. Args:
    sharding: ``fsdp`` shards weights, gradients and optimizer state over all ranks
        (``fully_shard``); ``replicate`` keeps a copy on each.
    ulysses_degree: ranks that share one clip, each with a part of its tokens.
    """

    sharding: str = "fsdp"
    ulysses_degree: int = 1


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """SLA2's first stage (``task: router``). Args:
    keep_ratios: in the order of training, each started from what the one before it learned, or
        from that with alpha fitted anew where it is nearer to dense.
    steps: optimizer steps for each ratio.
    learning_rate, alpha_learning_rate: of the router and of alpha's logits; cosine.
    buffer_samples: q, k, v kept of each layer; the oldest is replaced at every step.
    batch_samples: of them, in one step.
    max_buffer_bytes: of all layers together; layers that do not fit are trained in a later pass.
    evaluation_samples: held-out q, k, v of each layer on which the hard router is measured before
        and after.
    """

    keep_ratios: tuple[float, ...] = (0.05, 0.04, 0.03)
    steps: int = 1000
    learning_rate: float = 1e-3
    alpha_learning_rate: float = 1e-2
    buffer_samples: int = 8
    batch_samples: int = 2
    max_buffer_bytes: int = 8 << 30
    evaluation_samples: int = 2


@dataclasses.dataclass(frozen=True)
class Config:
    """A run. ``task`` is ``finetune`` (any method; SLA2's stage 2) or ``router`` (SLA2's stage
    1)."""

    output_dir: str = "outputs/train"
    seed: int = 0
    task: str = "finetune"
    model: ModelConfig = ModelConfig()
    method: MethodConfig = MethodConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    parameters: ParametersConfig = ParametersConfig()
    lora: LoraConfig = LoraConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    distributed: DistributedConfig = DistributedConfig()
    router: RouterConfig = RouterConfig()

    def to_dict(self) -> dict[str, Any]:
        """Plain values; ``from_dict`` restores an equal configuration."""
        told = dataclasses.asdict(self)
        told["method"] = {"name": self.method.name, **self.method.options}
        return told


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML or JSON file, then applies ``key=value`` overrides, keys dotted."""
    path = Path(path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainError(
            f"train: {path} must be a readable configuration file, and it is not: {error}."
        ) from error
    data = _parse_file(path, text)
    if not isinstance(data, dict):
        raise TrainError(
            f"train: {path} must hold a mapping of sections, got {type(data).__name__}. Start from "
            "examples/train/sla2.yaml."
        )
    return from_dict(data, overrides)


def _parse_file(path: Path, text: str) -> Any:
    if path.suffix == ".json":
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise TrainError(f"train: {path} must be JSON: {error}.") from error
    try:
        import yaml
    except ImportError as missing:
        raise TrainError(
            f"train: reading {path} needs PyYAML ({missing}). Run: pip install 'sparline[train]', "
            "or write the configuration as .json."
        ) from missing
    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise TrainError(f"train: {path} must be YAML: {error}.") from error


def from_dict(data: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """A configuration from nested plain values and dotted overrides."""
    merged = _copy(data)
    # The method's name first: it drops the options of the method that it replaces.
    for override in sorted(overrides, key=lambda o: not o.startswith("method.name=")):
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise TrainError(
                f"train: overrides read key=value, got {override!r}. Try method.keep_ratio=0.05."
            )
        _set(merged, key, _parse_value(text))
    return _check(_build(Config, merged, ""))


def _copy(data: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in data.items()}


def _parse_value(text: str) -> Any:
    """JSON where it is JSON (numbers, lists, true, null), else the word itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _set(data: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    for section in sections:
        inner = data.setdefault(section, {})
        if not isinstance(inner, dict):
            raise _unknown_key(dotted)
        data = inner
    if last == "name" and sections == ["method"] and data.get("name", value) != value:
        data.clear()  # the options of another method mean nothing to this one
    data[last] = value


# From plain values to dataclasses ---------------------------------------------------------------

ConfigT = TypeVar("ConfigT")


def _build(cls: type[ConfigT], data: Any, prefix: str) -> ConfigT:
    """A config dataclass from a mapping; ``prefix`` is its dotted name, for messages."""
    if not isinstance(data, Mapping):
        raise TrainError(
            f"train: {prefix.rstrip('.')} must be a section of keys, got {data!r}. Write its keys "
            "below it."
        )
    if cls is MethodConfig:
        return typing.cast(ConfigT, _build_method(data))
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in data.items():
        if key not in hints:
            inner = next(iter(value), None) if isinstance(value, Mapping) else None
            raise _unknown_key(f"{prefix}{key}" if inner is None else f"{prefix}{key}.{inner}")
        values[key] = _convert(hints[key], value, f"{prefix}{key}")
    return cls(**values)


def _build_method(data: Mapping[str, Any]) -> MethodConfig:
    name = data.get("name", MethodConfig.name)
    if name != ORIGINAL and name not in METHODS:
        raise TrainError(
            f"train: method.name must be one of {ORIGINAL}, {', '.join(METHODS)}, got {name!r}."
        )
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "name"}
    known = () if name == ORIGINAL else options_of(METHODS[name])
    for key, value in options.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.0)
            hint = f"The nearest is method.{near[0]}." if near else "It has no options."
            raise TrainError(f"train: {name} has no option method.{key}. {hint}")
        if isinstance(value, str):  # YAML 1.1 takes 1e-3 for a word
            options[key] = _number_or_word(value)
    config = MethodConfig(name, options)
    config.make()
    return config


def _number_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _convert(hint: Any, value: Any, key: str) -> Any:
    """``value`` as the type that ``hint`` says, or an error that names the key."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type[Any], hint), value, f"{key}.")
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        if not isinstance(value, (list, tuple)):
            value = [value]
        return tuple(_convert(inner, item, key) for item in value)
    if hint is float and isinstance(value, str):
        value = _number_or_word(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise TrainError(f"train: {key} must be of type {hint.__name__}, got {value!r}.")


def _keys(cls: Any, prefix: str = "") -> Iterator[str]:
    for name, hint in typing.get_type_hints(cls).items():
        if hint is MethodConfig:
            yield f"{prefix}{name}.name"
            yield from (f"{prefix}{name}.{o}" for c in METHODS.values() for o in options_of(c))
        elif dataclasses.is_dataclass(hint):
            yield from _keys(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _unknown_key(key: str) -> TrainError:
    keys = list(_keys(Config))
    same_name = [k for k in keys if k.split(".")[-1] == key.split(".")[-1]]  # in another section
    nearest = (same_name or difflib.get_close_matches(key, keys, 1, 0.0))[0]
    return TrainError(f"train: there is no key {key}. The nearest is {nearest}.")


# What values may be -----------------------------------------------------------------------------

_CHOICES: dict[str, tuple[str, ...]] = {
    "task": ("finetune", "router"),
    "model.component": ("transformer", "transformer_2"),
    "model.alpha_start": ("output", "mass", "constant"),
    "data.source": ("demo", "clips", "latents"),
    "loss.kind": ("flow_matching", "teacher_mse"),
    "loss.weighting_scheme": ("logit_normal", "uniform"),
    "optimizer.lr_scheduler": ("cosine", "constant"),
    "training.mixed_precision": ("no", "bf16"),
    "logging.report_to": ("tensorboard", "none"),
    "distributed.sharding": ("fsdp", "replicate"),
}
#: Smallest values.
_AT_LEAST: dict[str, float] = {
    "data.num_frames": 1,
    "data.height": 1,
    "data.width": 1,
    "data.train_batch_size": 1,
    "data.max_sequence_length": 1,
    "data.dataloader_num_workers": 0,
    "data.caption_dropout": 0,
    "loss.logit_std": 0,
    "optimizer.learning_rate": 0,
    "optimizer.lr_warmup_steps": 0,
    "optimizer.max_grad_norm": 0,
    "lora.rank": 0,
    "training.max_train_steps": 1,
    "training.max_minutes": 0,
    "training.gradient_accumulation_steps": 1,
    "training.ema_decay": 0,
    "training.max_nonfinite_steps": 1,
    "checkpoint.checkpointing_steps": 0,
    "checkpoint.checkpoints_total_limit": 0,
    "logging.logging_steps": 1,
    "logging.validation_steps": 0,
    "logging.validation_batches": 1,
    "logging.sample_steps": 0,
    "logging.num_inference_steps": 1,
    "distributed.ulysses_degree": 1,
    "router.steps": 1,
    "router.buffer_samples": 1,
    "router.batch_samples": 1,
    "router.max_buffer_bytes": 1,
    "router.evaluation_samples": 1,
}


def _check(config: Config) -> Config:
    def get(key: str) -> Any:
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        return value

    for key, choices in _CHOICES.items():
        if get(key) not in choices:
            raise TrainError(f"train: {key} must be one of {', '.join(choices)}, got {get(key)!r}.")
    for key, least in _AT_LEAST.items():
        if not get(key) >= least:  # also refuses NaN
            raise TrainError(f"train: {key} must be at least {least:g}, got {get(key)!r}.")
    for key in ("data.caption_dropout", "training.ema_decay"):
        if get(key) > 1.0:
            raise TrainError(f"train: {key} must be at most 1, got {get(key)!r}.")
    if not config.loss.flow_shift > 0.0:
        raise TrainError(f"train: loss.flow_shift must be positive, got {config.loss.flow_shift}.")
    if config.data.source != "demo" and config.data.path is None:
        raise TrainError(
            f"train: data.source={config.data.source} needs data.path, the folder to read, got "
            "none. Set data.path=FOLDER."
        )
    if config.lora.rank and config.task == "router":
        raise TrainError(
            f"train: task=router trains no weights of the model, got lora.rank={config.lora.rank}. "
            "Set lora.rank=0, and use LoRA in the fine-tuning that follows."
        )
    method = config.method.make()
    if config.task == "router" and not isinstance(method, sparline.SLA2):
        raise TrainError(
            f"train: task=router trains SLA2's router, got method.name={config.method.name}. Set "
            "method.name=sla2, or task=finetune."
        )
    if config.task == "router" and method is not None and method.low_bit is not None:
        raise TrainError(
            "train: task=router trains in 16 bits, got method.low_bit. Set method.low_bit=null, "
            "and low_bit in the fine-tuning that follows."
        )
    if isinstance(method, (sparline.DynSparse, sparline.BLASST)):
        raise TrainError(
            f"train: {config.method.name} skips tiles by what it sees in the loop and is meant for "
            "trained models; nothing of it is learned. Fine-tune with another method, or generate "
            "with it as it is."
        )
    return config
