# SPDX-License-Identifier: Apache-2.0
"""Sparse-linear attention for diffusers: processors on the self-attention of
``WanTransformer3DModel``.

``apply`` swaps the processors of ``blocks.*.attn1`` and leaves everything else of the model alone:
the projections, norms and rotary embedding stay the model's own, and so do cross-attention, hooks
and configuration. ``restore`` puts the original processors back. Learned tensors live in
``blocks.{i}.attn1.processor`` and travel in one safetensors file of their own (``save_state``,
``load_state``), because plain ``from_pretrained`` drops keys that it does not know.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from diffusers.hooks._helpers import (
    AttentionProcessorMetadata,
    AttentionProcessorRegistry,
    _skip_proc_output_fn_Attention_WanAttnProcessor2_0,
)
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from diffusers.models.attention_dispatch import SeqAllToAllDim, dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    _get_qkv_projections,
)
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_tensor_autograd

import sparline
from sparline.integrations.state import State, read_state, write_state
from sparline.methods import ChunkRouter, Method
from sparline.tokens import Grid

__all__ = [
    "WanSparseAttnProcessor",
    "apply",
    "learned_parameters",
    "load_state",
    "restore",
    "save_state",
    "set_trainable",
]

ModelT = TypeVar("ModelT")


FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
_not_compiled: Callable[[FunctionT], FunctionT] = cast(Any, torch.compiler.disable)(
    reason="sparline: dense_steps reads the timestep; compile_repeated_blocks() compiles the rest"
)


class StepClock:
    """Tells whether the current denoising step is one of the first ``dense_steps`` of its
    generation.

    Processors see neither the step nor the timestep, and counting calls would be wrong: guidance
    calls the model twice a step, and caches skip calls. So a hook on the transformer watches the
    timestep: a lower one is the next step, a higher one the start of another generation. Both
    transformers of a pipeline share one clock. Training draws timesteps at random, so a model in
    training mode is never in a dense step.
    """

    def __init__(self, dense_steps: int) -> None:
        self.dense_steps = dense_steps
        # Read by the processors; torch.compile guards on it and keeps one graph for each value.
        self.is_dense = False
        # By number of tokens, the last of each: activation checkpointing comes back to a call
        # after others of another size.
        self.grids: dict[int, Grid] = {}
        self._step = 0
        self._timestep: float | None = None

    def watch_grid(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the transformer: where its tokens stand."""
        latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        patch = cast(Any, module).config.patch_size
        frames, height, width = (
            size // step for size, step in zip(latents.shape[2:], patch, strict=True)
        )
        grid = Grid(frames, height, width)
        self.grids[grid.length] = grid

    @_not_compiled
    def watch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the transformer."""
        if module.training:
            self.is_dense = False
            return
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        value = float(
            timestep.max()
        )  # per-token timesteps (Wan 2.2 TI2V) are 0 on condition frames
        if self._timestep is None or value > self._timestep:
            self._step = 0
        elif value < self._timestep:
            self._step += 1
        self._timestep = value
        self.is_dense = self._step < self.dense_steps


class WanSparseAttnProcessor(nn.Module):
    """What ``WanAttnProcessor`` does for self-attention, with the attention itself replaced."""

    # diffusers skips processors without these two names when a backend or context parallelism is
    # set.
    _attention_backend = None  # of the dense steps
    _parallel_config = None

    def __init__(
        self,
        attn: WanAttention,
        method: Method,
        clock: StepClock,
        original: WanAttnProcessor,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.attention = sparline.nn.module_for(
            method,
            head_dim=attn.inner_dim // attn.heads,
            num_heads=attn.heads,
            hidden_dim=attn.to_q.in_features,
        )
        self.attention.to(attn.to_q.weight.device)
        self.backend = backend
        self.clock = clock
        self.original = original

    def forward(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            what = "an attention mask" if encoder_hidden_states is None else "encoder_hidden_states"
            raise ValueError(
                f"WanSparseAttnProcessor: it replaces unmasked self-attention, got {what}. Call "
                "sparline.restore(model) for such inputs."
            )
        q, k, v = _get_qkv_projections(attn, hidden_states, hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
        if rotary_emb is not None:
            # torch.compile fuses the first, and knows no complex numbers.
            is_exact = self.clock.is_dense or torch.compiler.is_compiling()
            rotate = _rotate if is_exact else _rotate_at_once
            q, k = rotate(q, *rotary_emb), rotate(k, *rotary_emb)
        if self.clock.is_dense:
            o = dispatch_attention_fn(
                q, k, v, backend=self._attention_backend, parallel_config=self._parallel_config
            )
        elif _scores_are_skipped():
            o = v
        else:
            # Under autocast the norms may return float32 beside a 16-bit v.
            o = self._attend(q.type_as(v), k.type_as(v), v, hidden_states)
        o = o.flatten(2, 3).type_as(hidden_states)
        return cast(Tensor, attn.to_out[1](attn.to_out[0](o)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, hidden_states: Tensor) -> Tensor:
        options: dict[str, Any] = {"layout": "bnhd", "backend": self.backend}
        recipe = self.attention.method.recipe
        group = None
        if self._parallel_config is not None:  # all rows, H / ranks heads
            group = _ulysses_group(self._parallel_config, self.attention, num_heads=q.shape[2])
            q, k, v = (SeqAllToAllDim.apply(group, x, 2, 1) for x in (q, k, v))
            first = dist.get_rank(group) * q.shape[2]
            options["heads"] = slice(first, first + q.shape[2])
            if recipe.has_coarse_branch:  # whose gates are maps of every row's input
                hidden_states = all_gather_tensor_autograd(hidden_states, 1, group)
        if recipe.has_coarse_branch:
            options["hidden_states"] = hidden_states
        if recipe.needs_grid:
            options["grid"] = self.clock.grids[q.shape[1]]
        o = self.attention(q, k, v, **options)
        return cast(Tensor, o if group is None else SeqAllToAllDim.apply(group, o, 1, 2))

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> WanSparseAttnProcessor:
        """Follows the model to its device but stays float32: a cast would round what is learned."""

        def keep_float32(t: Tensor) -> Tensor:
            moved = fn(t)
            is_cast = moved.is_floating_point() and moved.dtype != t.dtype
            return t.to(moved.device) if is_cast else moved

        cast(Any, super())._apply(keep_float32, recurse)
        return self


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Wan's rotary embedding, to the bit: pairs of neighbouring channels; cos and sin hold every
    value twice."""
    x1, x2 = x.view(*x.shape[:-1], -1, 2).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1).flatten(-2).type_as(x)


def _rotate_at_once(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same but for the rounding of a product, in one pass where ``_rotate`` makes seven, unless
    it is compiled."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)
    turn = torch.complex(cos[..., 0::2].to(dtype), sin[..., 1::2].to(dtype))
    pairs = torch.view_as_complex(x.to(dtype).view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(-2).type_as(x)


def _scores_are_skipped() -> bool:
    """Whether perturbed-attention guidance asks for o = v. It does so by intercepting the SDPA call
    that we replace."""
    if torch.compiler.is_compiling() or torch._C._len_torch_function_stack() == 0:
        return False
    stack = cast(Any, torch.overrides)._get_current_function_mode_stack()
    return any(isinstance(mode, AttentionScoreSkipFunctionMode) for mode in stack)


def _ulysses_group(config: Any, attention: sparline.nn.Attention, num_heads: int) -> Any:
    """The process group of Ulysses context parallelism, or an error that says why the layout cannot
    work."""
    parallel = config.context_parallel_config
    if parallel.ring_degree > 1:
        raise NotImplementedError(
            "context parallelism: choosing key blocks needs all keys at once, but a ring shows "
            f"each rank one shard at a time (ring_degree={parallel.ring_degree}). Use "
            "ContextParallelConfig(ulysses_degree=...)."
        )
    if parallel.ulysses_anything or num_heads % parallel.ulysses_degree != 0:
        raise NotImplementedError(
            "context parallelism: ulysses_degree must divide the number of heads and rows, got "
            f"{num_heads} heads, ulysses_degree={parallel.ulysses_degree}, "
            f"ulysses_anything={parallel.ulysses_anything}. Choose a degree that divides both."
        )
    chunks = attention.method.recipe.router
    if isinstance(chunks, ChunkRouter) and chunks.mode == "overall":
        raise NotImplementedError(
            "context parallelism: each rank sees some of the heads, and VMoBA's mode 'overall' "
            f"ranks all of them together, got {attention.method}. Use mode='query_head' or "
            "'head_global'."
        )
    return parallel._ulysses_mesh.get_group()


@dataclass
class _Installed:
    """What ``apply`` did to one transformer."""

    method: Method
    dense_steps: int
    dense_layers: tuple[int, ...]
    hooks: list[Any]  # of the clock


def apply(
    model: ModelT,
    method: Method,
    *,
    dense_steps: int = 0,
    dense_layers: Iterable[int] = (),
    backend: str | None = None,
) -> ModelT:
    """Replaces the self-attention of a Wan transformer, or of each transformer of a pipeline, by
    ``method``.

    Args:
      model: a ``WanTransformer3DModel``, or a pipeline that holds one (``.transformer``) or two
        (``.transformer_2``).
      method: ``sparline.SLA(...)`` or another method. Learned tensors start at their initial
        values.
      dense_steps: the first steps of every generation keep the model's own attention (inference
        only).
      dense_layers: indices of blocks that keep it always; negative ones count from the end.
      backend: of ``sparline.attention``; None is the best one.

    Returns: ``model`` itself. A second ``apply`` replaces the first.
    """
    if not isinstance(method, Method):
        raise TypeError(
            f"apply: method must be a sparline method, got {method!r}. Pass, for example, "
            "sparline.SLA(keep_ratio=0.1)."
        )
    if isinstance(dense_steps, bool) or not isinstance(dense_steps, int) or dense_steps < 0:
        raise ValueError(
            f"apply: dense_steps must be an int >= 0, got {dense_steps!r}. 0 has no dense steps."
        )
    transformers = _transformers(model, "apply")
    layers = {
        name: _dense_layers(dense_layers, len(transformer.blocks))
        for name, transformer in transformers.items()
    }
    for name, transformer in transformers.items():
        _check_processors(transformer, layers[name])
    # Everything that can be wrong is known by now: a failed call changes nothing.
    restore(model)
    clock = StepClock(dense_steps)
    for name, transformer in transformers.items():
        for idx, block in enumerate(transformer.blocks):
            if idx not in layers[name]:
                attn = block.attn1
                processor = WanSparseAttnProcessor(
                    attn, method.for_layer(idx), clock, attn.processor, backend
                )
                processor._attention_backend = attn.processor._attention_backend
                processor._parallel_config = attn.processor._parallel_config
                processor.train(attn.training)
                attn.set_processor(processor)
        watches = [clock.watch] * (dense_steps > 0)
        watches += [clock.watch_grid] * method.recipe.needs_grid
        hooks = [transformer.register_forward_pre_hook(w, with_kwargs=True) for w in watches]
        # Layerwise casting would store our weights in float8.
        patterns = type(transformer)._skip_layerwise_casting_patterns or []
        transformer._skip_layerwise_casting_patterns = [*patterns, "attn1.processor"]
        transformer._sparline = _Installed(method, dense_steps, layers[name], hooks)
    return model


def restore(model: ModelT) -> ModelT:
    """Puts the original processors back; a model without ours is left as it is. Learned tensors are
    dropped."""
    for transformer in _transformers(model, "restore").values():
        for block in transformer.blocks:
            processor = block.attn1.processor
            if isinstance(processor, WanSparseAttnProcessor):
                processor.original._attention_backend = processor._attention_backend
                processor.original._parallel_config = processor._parallel_config
                block.attn1.set_processor(processor.original)
        installed = transformer.__dict__.pop("_sparline", None)
        transformer.__dict__.pop("_skip_layerwise_casting_patterns", None)
        for hook in installed.hooks if installed is not None else ():
            hook.remove()
    return model


def learned_parameters(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of everything that ``apply`` added, named as in the state file."""
    for component, transformer in _transformers(model, "learned_parameters").items():
        for prefix, processor in _processors(transformer):
            for name, parameter in processor.attention.named_parameters():
                yield f"{component}.{prefix}.{name}", parameter


def set_trainable(model: Any, trainable: bool = True) -> None:
    """Sets ``requires_grad`` of our parameters. ``add_adapter`` (LoRA) freezes all others, ours
    too: call this after it. SLA2's router stays frozen while it is hard: nothing trains it."""
    for transformer in _transformers(model, "set_trainable").values():
        for _, processor in _processors(transformer):
            module = processor.attention
            for name, parameter in module.named_parameters():
                is_frozen = isinstance(module, sparline.nn.SLA2) and module.is_frozen(name)
                parameter.requires_grad_(trainable and not is_frozen)


def save_state(model: Any, path: str | Path) -> None:
    """Writes the learned tensors, with the method and options that they belong to, to one
    safetensors file."""
    installed = _installed(model, "save_state")
    tensors = {name: p.detach().contiguous().cpu() for name, p in learned_parameters(model)}
    state = State(tensors, installed.method, installed.dense_steps, installed.dense_layers)
    write_state(state, path)


def load_state(model: ModelT, path: str | Path) -> ModelT:
    """Loads what ``save_state`` wrote. A model without our processors gets the stored method and
    options first.

    Raises ValueError, and changes no tensor, if the file and the model differ in names or shapes;
    warns if the tensors were learned with another method or other blocks than the model now uses.
    Low bit is neither: SLA2's router is learned in 16 bits for either.
    """
    path = Path(path)
    state = read_state(path)
    if not any(hasattr(t, "_sparline") for t in _transformers(model, "load_state").values()):
        apply(model, state.method, dense_steps=state.dense_steps, dense_layers=state.dense_layers)
    method = _installed(model, "load_state").method
    targets = dict(learned_parameters(model))
    _check_same("load_state", path, state.tensors, targets)
    if replace(state.method, low_bit=None) != replace(method, low_bit=None):
        warnings.warn(
            f"load_state: {path} was learned with {state.method}, the model now uses {method}. The "
            "tensors fit, but mean another function; apply the stored method if that was not "
            "intended.",
            stacklevel=2,
        )
    with torch.no_grad():
        for name, parameter in targets.items():
            parameter.copy_(state.tensors[name])
    return model


def _check_same(
    caller: str, path: Path, tensors: dict[str, Tensor], targets: dict[str, nn.Parameter]
) -> None:
    problems = []
    if missing := sorted(targets.keys() - tensors.keys()):
        problems.append(f"{len(missing)} missing (first: {missing[0]})")
    if unexpected := sorted(tensors.keys() - targets.keys()):
        problems.append(f"{len(unexpected)} unexpected (first: {unexpected[0]})")
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, the model's is {tuple(targets[name].shape)}"
        for name in sorted(targets.keys() & tensors.keys())
        if tensors[name].shape != targets[name].shape
    ]
    if problems:
        raise ValueError(
            f"{caller}: the tensors of {path} must be those of the model, got "
            f"{'; '.join(problems[:4])}. Apply the method and dense_layers that the file was saved "
            "with, to the same architecture."
        )


def _transformers(model: Any, caller: str) -> dict[str, Any]:
    """The transformers of a pipeline by attribute name, or a bare one as 'transformer'; wrappers
    removed."""
    found: dict[str, Any]
    if isinstance(model, nn.Module):
        found = {"transformer": model}
    else:
        names = ("transformer", "transformer_2")
        found = {n: getattr(model, n) for n in names if getattr(model, n, None) is not None}
    found = {name: getattr(module, "_orig_mod", module) for name, module in found.items()}
    for module in found.values():
        if not isinstance(module, WanTransformer3DModel):
            raise TypeError(
                f"{caller}: the model must be a WanTransformer3DModel (Wan 2.1, Wan 2.2), got "
                f"{type(module).__name__}. Other architectures can call sparline.attention in a "
                "processor of their own."
            )
    if not found:
        raise TypeError(
            f"{caller}: expected a WanTransformer3DModel or a pipeline with a .transformer, got "
            f"{type(model).__name__}."
        )
    return found


def _processors(
    transformer: Any,
) -> Iterator[tuple[str, WanSparseAttnProcessor]]:
    for idx, block in enumerate(transformer.blocks):
        if isinstance(block.attn1.processor, WanSparseAttnProcessor):
            yield f"blocks.{idx}.attn1.processor", block.attn1.processor


def _installed(model: Any, caller: str) -> _Installed:
    for transformer in _transformers(model, caller).values():
        if hasattr(transformer, "_sparline"):
            return cast(_Installed, transformer._sparline)
    raise ValueError(
        f"{caller}: the model has no sparline processors. Call sparline.apply(model, method) first."
    )


def _check_processors(transformer: Any, dense_layers: tuple[int, ...]) -> None:
    for idx, block in enumerate(transformer.blocks):
        kind = type(block.attn1.processor)
        if idx not in dense_layers and kind not in (WanAttnProcessor, WanSparseAttnProcessor):
            raise ValueError(
                f"apply: blocks.{idx}.attn1 must carry diffusers' WanAttnProcessor, got "
                f"{kind.__name__}. Remove what set it, or name the block in dense_layers."
            )


def _dense_layers(layers: Iterable[int], num_layers: int) -> tuple[int, ...]:
    chosen: Sequence[int] = list(layers)
    for idx in chosen:
        if not -num_layers <= idx < num_layers:
            raise ValueError(
                f"apply: dense_layers must name blocks of the model, which has {num_layers}, got "
                f"{idx}. Use 0..{num_layers - 1}, or -{num_layers}..-1 from the end."
            )
    return tuple(sorted({idx % num_layers for idx in chosen}))


# Layer skip (SLG) looks processors up by exact class.
AttentionProcessorRegistry.register(
    WanSparseAttnProcessor,
    AttentionProcessorMetadata(_skip_proc_output_fn_Attention_WanAttnProcessor2_0),
)
