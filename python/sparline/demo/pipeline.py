# SPDX-License-Identifier: Apache-2.0
"""A diffusers pipeline around a small, class-conditional, pixel-space Wan transformer.

The transformer is the class that Wan 2.1 runs, so whatever is done to its attention here carries
over to the real one. Text is replaced by a fixed code per class, and there is no VAE: the latents
are the pixels, (B, 3, T, H, W) in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from .data import CLASSES

#: Configuration of the bundled transformer: 8 x 64 x 64 pixels give 8 192 tokens of 4 x 64.
TRANSFORMER_CONFIG: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": 128,
    "freq_dim": 256,
    "ffn_dim": 1024,
    "num_layers": 8,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
}

#: Text tokens that stand for one class.
CLASS_TOKENS = 4

Prompt = str | int | Sequence[str | int]
Video = Tensor | np.ndarray | Sequence[Any]


def class_embeddings(class_ids: Tensor, text_dim: int) -> Tensor:
    """The text input (B, 4, text_dim) for class ids (B,); an id of -1 means "no class".

    Token j of class c is row 4 (c + 1) + j of the Hadamard matrix of order `text_dim`, so codes
    are exact (+1 or -1), mutually orthogonal, and need no weights. `text_dim` is a power of two.
    """
    if text_dim < CLASS_TOKENS or text_dim & (text_dim - 1):
        raise ValueError(
            f"class_embeddings: text_dim must be a power of two of at least {CLASS_TOKENS}, "
            f"got {text_dim}."
        )
    limit = text_dim // CLASS_TOKENS - 1  # one code is spent on "no class"
    if class_ids.numel() and (int(class_ids.min()) < -1 or int(class_ids.max()) >= limit):
        raise ValueError(
            f"class_embeddings: text_dim {text_dim} carries class ids -1 to {limit - 1}, "
            f"got {class_ids.tolist()}. Use a transformer with a larger text_dim."
        )
    hadamard = torch.ones(1, 1, device=class_ids.device)
    while len(hadamard) < text_dim:
        top = torch.cat([hadamard, hadamard], dim=1)
        bottom = torch.cat([hadamard, -hadamard], dim=1)
        hadamard = torch.cat([top, bottom])
    token_idx = torch.arange(CLASS_TOKENS, device=class_ids.device)
    return hadamard[(class_ids[:, None] + 1) * CLASS_TOKENS + token_idx]


class DemoPipeline(DiffusionPipeline):
    """Generates short clips of the classes it was trained on, from noise or from a given clip.

    transformer  predicts the velocity noise - clip from a noised clip
    scheduler    a flow-matching Euler scheduler
    class_names  names of the classes, in the order of their ids; the bundled model's if not given
    """

    model_cpu_offload_seq: Any = "transformer"
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        class_names: list[str] | None = None,
    ) -> None:
        base: Any = super()  # untyped in diffusers
        base.__init__()
        base.register_modules(transformer=transformer, scheduler=scheduler)
        base.register_to_config(class_names=list(CLASSES if class_names is None else class_names))
        self.video_processor = VideoProcessor(vae_scale_factor=1)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names that `prompt` accepts, in the order of their ids."""
        config: Any = self.config
        return tuple(config.class_names)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt,
        *,
        num_frames: int = 8,
        height: int = 64,
        width: int = 64,
        num_inference_steps: int = 20,
        guidance_scale: float = 2.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        video: Video | None = None,
        strength: float | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]]
        | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> WanPipelineOutput | tuple[Any]:
        """Generate one clip per entry of `prompt`.

        prompt         a class name or id, or a sequence of them
        num_frames, height, width
                       size of the clips in pixels; trained at 8 x 64 x 64, others run but were
                       never seen in training
        num_inference_steps
                       Euler steps of the full schedule; with `video`, a share `strength` is run
        guidance_scale w of classifier-free guidance, v_null + w (v_class - v_null); both are
                       computed in one forward of twice the batch. 1 or less runs the class alone
        generator      seeds the noise; one for all, or a list with one per clip
        latents        noise to start from, (B, 3, T, H, W), instead of drawing it
        video          a clip to regenerate: a tensor (3, T, H, W) or (B, 3, T, H, W) in [-1, 1], a
                       uint8 array (T, H, W, 3), or a list of PIL images; exactly num_frames x
                       height x width. One clip serves all prompts
        strength       how much of `video` is replaced, in (0, 1]; 0.7 if not given
        output_type    "np" (B, T, H, W, 3) in [0, 1]; "pt" (B, T, 3, H, W) in [0, 1]; "pil" lists
                       of images; "latent" (B, 3, T, H, W), nominally in [-1, 1]
        callback_on_step_end
                       called as f(pipeline, step, timestep, {"latents": ...}) after each step; may
                       return replaced latents

        Returns an object whose `.frames` holds the clips (a 1-tuple if `return_dict` is false).
        """
        class_ids = self._class_ids(prompt)
        self._check_inputs(
            num_frames, height, width, num_inference_steps, strength, video, output_type
        )
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                "DemoPipeline: callback_on_step_end_tensor_inputs may only name latents, "
                f"got {', '.join(sorted(unknown))}."
            )
        device = self._execution_device
        batch = len(class_ids)
        shape = (batch, self.transformer.config.in_channels, num_frames, height, width)
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(
                "DemoPipeline: a list of generators must hold one per clip, got "
                f"{len(generator)} for {batch} clips."
            )

        if latents is None:
            noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(
                f"DemoPipeline: latents must have shape {shape}, got {tuple(latents.shape)}."
            )
        else:
            noise = latents.to(device, torch.float32)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        if video is None:
            latents = noise
        else:
            clip = _as_clip(video, shape).to(device)
            kept_steps = max(
                1, round(num_inference_steps * (0.7 if strength is None else strength))
            )
            first = num_inference_steps - kept_steps
            timesteps = timesteps[first:]
            self.scheduler.set_begin_index(first)
            latents = self.scheduler.scale_noise(clip, timesteps[:1].expand(batch), noise)

        guided = guidance_scale > 1.0
        ids = torch.tensor(class_ids, device=device)
        if guided:
            ids = torch.cat([torch.full_like(ids, -1), ids])
        dtype = self.transformer.dtype
        text = class_embeddings(ids, self.transformer.config.text_dim).to(dtype)

        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for step, timestep in enumerate(timesteps):
                model_input = torch.cat([latents, latents]) if guided else latents
                velocity = self.transformer(
                    hidden_states=model_input.to(dtype),
                    timestep=timestep.expand(len(model_input)),
                    encoder_hidden_states=text,
                    return_dict=False,
                )[0].float()
                if guided:
                    null, conditional = velocity.chunk(2)
                    velocity = null + guidance_scale * (conditional - null)
                latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {"latents": latents} if callback_on_step_end_tensor_inputs else {}
                    replaced = callback_on_step_end(self, step, timestep, tensors)
                    latents = (replaced or {}).get("latents", latents)
                progress_bar.update()

        if output_type == "latent":
            frames: Any = latents
        else:
            frames = self.video_processor.postprocess_video(latents, output_type=output_type)
        base: Any = super()
        base.maybe_free_model_hooks()
        return WanPipelineOutput(frames=frames) if return_dict else (frames,)

    def _class_ids(self, prompt: Prompt) -> list[int]:
        names = self.class_names
        entries = [prompt] if isinstance(prompt, str | int) else list(prompt)
        if not entries:
            raise ValueError("DemoPipeline: prompt must name at least one class, got none.")
        class_ids = []
        for entry in entries:
            if isinstance(entry, str) and entry in names:
                class_ids.append(names.index(entry))
            elif isinstance(entry, int) and 0 <= entry < len(names):
                class_ids.append(entry)
            else:
                raise ValueError(
                    f"DemoPipeline: prompt must be a class name or an id below {len(names)}, "
                    f"got {entry!r}. This model knows {', '.join(names)}."
                )
        return class_ids

    def _check_inputs(
        self,
        num_frames: int,
        height: int,
        width: int,
        num_inference_steps: int,
        strength: float | None,
        video: Video | None,
        output_type: str,
    ) -> None:
        patch = self.transformer.config.patch_size
        limit = self.transformer.config.rope_max_seq_len
        for what, value, step in zip(
            ("num_frames", "height", "width"), (num_frames, height, width), patch, strict=True
        ):
            if value < step or value % step or value // step > limit:
                raise ValueError(
                    f"DemoPipeline: {what} must be a multiple of {step} from {step} to "
                    f"{limit * step}, got {value}."
                )
        if num_inference_steps < 1:
            raise ValueError(
                f"DemoPipeline: num_inference_steps must be at least 1, got {num_inference_steps}."
            )
        if strength is not None and video is None:
            raise ValueError(
                f"DemoPipeline: strength says how much of a given video to replace, got {strength} "
                "and no video. Pass video=, or leave strength out."
            )
        if strength is not None and not 0.0 < strength <= 1.0:
            raise ValueError(f"DemoPipeline: strength must be in (0, 1], got {strength}.")
        if output_type not in ("np", "pt", "pil", "latent"):
            raise ValueError(
                f'DemoPipeline: output_type must be "np", "pt", "pil" or "latent", '
                f"got {output_type!r}."
            )


def _as_clip(video: Video, shape: tuple[int, ...]) -> Tensor:
    """`video` as float32 (B, 3, T, H, W) in [-1, 1]; one clip is repeated for the whole batch."""
    batch, channels, num_frames, height, width = shape
    if isinstance(video, Tensor):
        clip = video.float()
        expected = f"a tensor of shape {shape[1:]} or {shape}"
    else:
        # Also takes what other diffusers pipelines take: a list of PIL images or an array.
        array = np.stack([np.asarray(frame) for frame in video])
        if array.dtype != np.uint8:
            raise ValueError(
                "DemoPipeline: a video that is not a tensor must hold 8-bit frames, "
                f"got {array.dtype}. Pass uint8, or a tensor in [-1, 1]."
            )
        expected = f"frames of shape {(num_frames, height, width, channels)}"
        if array.ndim != 4:
            raise ValueError(f"DemoPipeline: video must be {expected}, got {array.shape}.")
        clip = torch.from_numpy(array).permute(3, 0, 1, 2).float().div(127.5).sub(1.0)
    if clip.ndim == 4:
        clip = clip[None]
    if clip.ndim != 5 or clip.shape[1:] != shape[1:] or clip.shape[0] not in (1, batch):
        got = tuple(video.shape) if isinstance(video, Tensor) else array.shape
        raise ValueError(
            f"DemoPipeline: video must be {expected}, got {got}. Resize or cut it, or set "
            "num_frames, height and width to its size."
        )
    return clip.expand(batch, *clip.shape[1:])
