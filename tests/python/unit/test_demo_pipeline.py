# SPDX-License-Identifier: Apache-2.0
"""The demo pipeline on a tiny transformer, and the bundled weights themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from safetensors.torch import load_file

import sparline
from sparline import demo
from sparline.demo.data import CLASSES
from sparline.demo.pipeline import TRANSFORMER_CONFIG, DemoPipeline, class_embeddings
from sparline.train.layerwise import attentions

TINY = {
    "attention_head_dim": 12,
    "num_attention_heads": 1,
    "num_layers": 1,
    "ffn_dim": 32,
    "text_dim": 64,
}
SIZE = {"num_frames": 2, "height": 8, "width": 8}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tensors this small run slower on several threads; conftest puts the number back."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pipeline() -> DemoPipeline:
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(**{**TRANSFORMER_CONFIG, **TINY})
    made = DemoPipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=2.0))
    made.set_progress_bar_config(disable=True)
    return made


def generate(pipeline: DemoPipeline, prompt: Any = "coffee", seed: int = 0, **options: Any) -> Any:
    options = {**SIZE, "num_inference_steps": 2, **options}
    return pipeline(prompt, generator=torch.Generator().manual_seed(seed), **options).frames


def test_class_codes_are_orthogonal_and_bounded() -> None:
    codes = class_embeddings(torch.arange(-1, 31), 128).flatten(0, 1)
    torch.testing.assert_close(codes @ codes.T, 128 * torch.eye(128))
    with pytest.raises(ValueError, match="carries class ids -1 to 30, got"):
        class_embeddings(torch.tensor([31]), 128)
    with pytest.raises(ValueError, match="power of two"):
        class_embeddings(torch.tensor([0]), 100)


def test_frames_in_every_output_type(pipeline: DemoPipeline) -> None:
    array = generate(pipeline, ["coffee", 3])
    assert array.shape == (2, 2, 8, 8, 3)
    assert np.isfinite(array).all()
    assert 0.0 <= array.min() <= array.max() <= 1.0
    tensor = generate(pipeline, ["coffee", 3], output_type="pt")
    np.testing.assert_allclose(tensor.permute(0, 1, 3, 4, 2).numpy(), array)
    images = generate(pipeline, output_type="pil")
    assert (len(images), len(images[0]), images[0][0].size) == (1, 2, (8, 8))
    latents = generate(pipeline, output_type="latent")
    assert latents.shape == (1, 3, 2, 8, 8)
    assert isinstance(pipeline("coffee", **SIZE, num_inference_steps=1, return_dict=False), tuple)


def test_equal_seeds_give_equal_clips(pipeline: DemoPipeline) -> None:
    np.testing.assert_array_equal(generate(pipeline, seed=1), generate(pipeline, seed=1))
    assert not np.array_equal(generate(pipeline, seed=1), generate(pipeline, seed=2))


def test_given_latents_are_the_noise(pipeline: DemoPipeline) -> None:
    noise = torch.randn(1, 3, 2, 8, 8, generator=torch.Generator().manual_seed(4))
    np.testing.assert_array_equal(
        generate(pipeline, seed=9, latents=noise), generate(pipeline, seed=4)
    )


def test_guidance_is_one_forward_of_twice_the_batch(pipeline: DemoPipeline) -> None:
    batches = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    try:
        generate(pipeline, ["coffee", "rocket"], guidance_scale=3.0)
        generate(pipeline, ["coffee", "rocket"], guidance_scale=1.0)
    finally:
        hook.remove()
    assert batches == [4, 4, 2, 2]


def test_guidance_extrapolates_from_no_class(pipeline: DemoPipeline) -> None:
    """One Euler step is linear in the velocity, so w = 3 lies on the line through w = 1 and 2."""
    one, two, three = (
        generate(pipeline, num_inference_steps=1, guidance_scale=w, output_type="latent")
        for w in (1.0, 2.0, 3.0)
    )
    torch.testing.assert_close(three, 2 * two - one, rtol=1e-4, atol=1e-5)


def test_strength_is_how_much_of_the_clip_is_replaced(pipeline: DemoPipeline) -> None:
    clip = torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    steps: list[int] = []

    def count(host: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return tensors

    def distance(strength: float) -> float:
        options = {"video": clip, "strength": strength, "num_inference_steps": 10}
        out = generate(pipeline, output_type="latent", callback_on_step_end=count, **options)
        return float((out[0] - clip).pow(2).mean())

    distances = [distance(s) for s in (0.1, 0.5, 1.0)]
    assert len(steps) == 1 + 5 + 10
    assert distances == sorted(distances)
    # Strength 1 starts from noise alone: the clip leaves no trace.
    whole = generate(pipeline, video=clip, strength=1.0, output_type="latent")
    torch.testing.assert_close(whole, generate(pipeline, output_type="latent"))


def test_video_in_every_accepted_form(pipeline: DemoPipeline) -> None:
    array = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(3, 0, 1, 2).float() / 127.5 - 1.0
    expected = generate(pipeline, video=tensor, strength=0.5)
    np.testing.assert_allclose(generate(pipeline, video=tensor[None], strength=0.5), expected)
    np.testing.assert_allclose(generate(pipeline, video=array, strength=0.5), expected)
    from PIL import Image

    images = [Image.fromarray(frame) for frame in array]
    np.testing.assert_allclose(generate(pipeline, video=images, strength=0.5), expected)


def test_callback_may_replace_latents(pipeline: DemoPipeline) -> None:
    out = generate(
        pipeline,
        output_type="latent",
        callback_on_step_end=lambda host, step, t, tensors: {"latents": tensors["latents"] * 0},
    )
    assert out.abs().max() == 0.0


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("dog", {}, "prompt must be a class name or an id below 13, got 'dog'. This model knows"),
        (13, {}, "an id below 13, got 13"),
        ([], {}, "prompt must name at least one class"),
        ("coffee", {"height": 7}, "height must be a multiple of 2 from 2 to 2048, got 7"),
        ("coffee", {"num_frames": 0}, "num_frames must be a multiple of 1 from 1"),
        ("coffee", {"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ("coffee", {"strength": 0.5}, "got 0.5 and no video. Pass video="),
        ("coffee", {"output_type": "gif"}, "output_type must be .* got 'gif'"),
        ("coffee", {"latents": torch.zeros(1, 3, 2, 8, 9)}, r"latents must have shape \(1, 3, 2"),
        ("coffee", {"video": torch.zeros(3, 2, 8, 9)}, r"got \(3, 2, 8, 9\). Resize or cut it"),
        ("coffee", {"video": np.zeros((2, 8, 8, 3))}, "must hold 8-bit frames, got float64"),
        ("coffee", {"video": torch.zeros(3, 2, 8, 8), "strength": 0.0}, r"in \(0, 1\], got 0.0"),
        ("coffee", {"video": torch.zeros(3, 2, 8, 8), "strength": 1.5}, r"in \(0, 1\], got 1.5"),
        ("coffee", {"callback_on_step_end_tensor_inputs": ["noise"]}, "may only name latents"),
    ],
)
def test_bad_input_is_said_in_the_callers_words(
    pipeline: DemoPipeline, prompt: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(pipeline, prompt, **options)


def test_save_and_load_keep_everything(pipeline: DemoPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    loaded = DemoPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.class_names == pipeline.class_names
    np.testing.assert_array_equal(generate(loaded), generate(pipeline))


# The bundled weights ------------------------------------------------------------------------------


def test_bundled_files_are_small_enough_for_git() -> None:
    files = [*demo.WEIGHTS.rglob("*"), demo.HELD_OUT_VIDEO]
    assert (demo.WEIGHTS / "MODEL_CARD.md").is_file()
    assert max(file.stat().st_size for file in files) <= 16 * 2**20


def test_bundled_model_is_what_the_card_says() -> None:
    bundled = demo.load_pipeline()
    assert bundled.class_names == CLASSES
    assert bundled.transformer.dtype == torch.float32
    assert sum(p.numel() for p in bundled.transformer.parameters()) == 9_071_884
    for name, value in TRANSFORMER_CONFIG.items():
        found = bundled.transformer.config[name]
        assert (tuple(found) if isinstance(found, list) else found) == value


def test_tuned_models_have_routers_of_their_own() -> None:
    a, b = (load_file(folder / "sparline.safetensors") for folder in demo.TUNED.values())
    assert sorted(a) == sorted(b)
    assert any(".router." in name for name in a)
    assert not any(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(demo.TUNED))
def test_tuned_models_are_the_bundled_one_with_sla2(name: str) -> None:
    dense = demo.load_pipeline().transformer
    tuned = type(dense).from_pretrained(demo.TUNED[name] / "transformer", torch_dtype=torch.float32)
    sparline.load_state(tuned, demo.TUNED[name] / "sparline.safetensors")
    method = next(iter(attentions(tuned).values())).method
    assert isinstance(method, sparline.SLA2)
    assert method.keep_ratio == {"sla2-95": 0.05, "sla2-97": 0.03}[name]
    assert (method.token_order, method.block_q, method.block_k) == ("cubes", 64, 32)
    before = dict(dense.named_parameters())
    moved = [
        float((p - before[n]).norm() / before[n].norm())
        for n, p in tuned.named_parameters()
        if n in before and before[n].norm() > 0
    ]
    assert 0.001 < sum(moved) / len(moved) < 0.5  # fine-tuned, not trained anew
    alphas = [m.alpha_logit.sigmoid() for m in attentions(tuned).values()]  # type: ignore[operator]
    assert all(0.0 < float(a.min()) < float(a.max()) < 1.0 for a in alphas)


def test_bundled_model_denoises_the_held_out_clip() -> None:
    """A small crop, to be quick: far from the trained size, but far from untrained too."""
    data = pytest.importorskip("sparline.demo.data")
    pytest.importorskip("av")
    clip = data.read_clip(demo.HELD_OUT_VIDEO).pixels
    assert clip.shape == (20, 3, 96, 96)
    clip = torch.nn.functional.interpolate(clip[:4].float(), 64, mode="area") / 127.5 - 1.0
    clip = clip.transpose(0, 1)[None, :, :, 16:48, 16:48]
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
    bundled = demo.load_pipeline()
    class_id = torch.tensor([bundled.class_names.index(demo.HELD_OUT_CLASS)])
    with torch.no_grad():
        velocity = bundled.transformer(
            0.5 * clip + 0.5 * noise, torch.tensor([500.0]), class_embeddings(class_id, 128)
        ).sample
    loss = float((velocity - (noise - clip)).pow(2).mean())
    assert loss < 0.25  # predicting nothing would cost about 1.3
