# SPDX-License-Identifier: Apache-2.0
"""Self-attention inputs of chosen layers and steps, seen one call at a time as a pipeline runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparline.tokens import Grid

QKV_FORMAT = "sparline-qkv-1"


@dataclass(frozen=True)
class Sample:
    """What one layer's self-attention saw in one step, after the rotary embedding."""

    model: str  # component of the pipeline: transformer or transformer_2
    step: int
    layer: int
    timestep: float
    grid: Grid
    q: Tensor = field(repr=False)  # (1, N, H, D)
    k: Tensor = field(repr=False)
    v: Tensor = field(repr=False)

    @property
    def name(self) -> str:
        return f"{self.model}-step{self.step}-layer{self.layer}"


def save_sample(sample: Sample, folder: Path) -> Path:
    """Writes q, k and v with their origin to ``<name>.safetensors``."""
    path = folder / f"{sample.name}.safetensors"
    origin = {
        "model": sample.model,
        "step": sample.step,
        "layer": sample.layer,
        "timestep": sample.timestep,
        "grid": sample.grid,
    }
    tensors = {name: getattr(sample, name).contiguous().cpu() for name in "qkv"}
    save_file(tensors, str(path), {"format": QKV_FORMAT, "sample": json.dumps(origin)})
    return path


def load_sample(path: Path) -> Sample:
    """What ``save_sample`` wrote. Raises ValueError, in one sentence, for another file."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            if metadata.get("format") != QKV_FORMAT:
                raise ValueError(
                    f"load_sample: {path} must be a file of format {QKV_FORMAT!r}, got "
                    f"{metadata.get('format')!r}. Write one with sparline inspect --save-qkv."
                )
            tensors = {name: file.get_tensor(name) for name in "qkv"}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"load_sample: {path} must be a whole safetensors file, and it does not read ({error})."
        ) from error
    origin = json.loads(metadata["sample"])
    return Sample(**{**origin, "grid": Grid(*origin["grid"])}, **tensors)


class Capture(TorchFunctionMode):
    """Within ``with Capture(...)`` each chosen self-attention call of the transformers is shown to
    ``on_sample``, once for a layer and step, before the model goes on.

    Nothing is kept: what ``on_sample`` does not store is gone when it returns. A layer is known by
    hooks on ``blocks.*.attn1``, and its q, k, v by what it hands to
    ``scaled_dot_product_attention``. The caller says when a step is over (``end_step``): guidance
    may call the model twice a step, and caches may skip it. Of a batch the last item is taken,
    which is the conditional one where guidance makes it two. Meant for eager models.
    """

    def __init__(
        self,
        transformers: dict[str, nn.Module],
        steps: Collection[int],
        layers: Collection[int],
        on_sample: Callable[[Sample], None],
    ) -> None:
        super().__init__()
        self._transformers = transformers
        self._steps, self._layers, self._on_sample = steps, layers, on_sample
        self._step = 0
        self._seen: set[int] = set()  # layers, in this step
        self._model, self._timestep, self._grid = "", 0.0, Grid(0, 0, 0)
        self._layer: int | None = None  # whose attention is to be captured next
        self._handles: list[Any] = []

    def end_step(self, done: int) -> None:
        """``done`` steps are over."""
        self._step = done
        self._seen.clear()

    def __enter__(self) -> Capture:
        for name, transformer in self._transformers.items():
            hook = self._enter_model(name)
            self._handles.append(transformer.register_forward_pre_hook(hook, with_kwargs=True))
            for layer, block in enumerate(cast(Any, transformer).blocks):
                if layer in self._layers:
                    attention: nn.Module = block.attn1
                    enter = attention.register_forward_pre_hook(self._enter_layer(layer))
                    self._handles += [enter, attention.register_forward_hook(self._leave_layer)]
        cast(Any, super()).__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        cast(Any, super()).__exit__(kind, error, trace)
        while self._handles:
            self._handles.pop().remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self._layer is not None:
            names = ("query", "key", "value")
            tensors = dict(zip(names, args, strict=False)) | kwargs
            q, k, v = (tensors[name].detach()[-1:].transpose(1, 2) for name in names)
            layer, self._layer = self._layer, None
            self._on_sample(
                Sample(self._model, self._step, layer, self._timestep, self._grid, q, k, v)
            )
        return func(*args, **kwargs)

    def _enter_model(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
            self._model, self._timestep = name, float(timestep.max())
            sides = zip(latents.shape[2:], module.config.patch_size, strict=True)
            self._grid = Grid(*(side // patch for side, patch in sides))

        return hook

    def _enter_layer(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._step in self._steps and layer not in self._seen:
                self._seen.add(layer)
                self._layer = layer

        return hook

    def _leave_layer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._layer is not None:
            raise RuntimeError(
                f"Capture: blocks.{self._layer}.attn1 must attend through torch's "
                "scaled_dot_product_attention, and it did not. Choose that attention backend: "
                "pipeline.transformer.reset_attention_backend()."
            )
