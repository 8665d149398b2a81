# SPDX-License-Identifier: Apache-2.0
"""The diffusers integration on a tiny Wan: what it computes, and every trap of the host that "
"applies."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

import sparline  # noqa: E402
from sparline.integrations.diffusers import (  # noqa: E402
    WanSparseAttnProcessor,
    _rotate,
    _rotate_at_once,
    learned_parameters,
    set_trainable,
)

EVERYTHING = sparline.SLA(keep_ratio=1.0, block_q=16, block_k=16)  # equals dense attention
SPARSE = sparline.SLA(keep_ratio=0.25, block_q=16, block_k=16)


def tiny_wan(seed: int = 0, **config: Any) -> Any:
    """Two layers of 2 x 12; with the inputs below 128 tokens."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 256,
        "ffn_dim": 32,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }
    return diffusers.WanTransformer3DModel(**{**settings, **config}).eval()


def inputs(timestep: float = 500.0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 4, 2, 16, 16, generator=rng).to(dtype),
        "timestep": torch.tensor([timestep]),
        "encoder_hidden_states": torch.randn(1, 12, 16, generator=rng).to(dtype),
        "return_dict": False,
    }


@torch.no_grad()
def run(model: Any, timestep: float = 500.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return model(**inputs(timestep, dtype))[0]


def sparse_layers(model: Any) -> list[int]:
    return [
        idx
        for idx, block in enumerate(model.blocks)
        if isinstance(block.attn1.processor, WanSparseAttnProcessor)
    ]


def fill(model: Any, seed: int = 5) -> None:
    """Learned tensors away from their initial values."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in learned_parameters(model):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))


# What is computed ---------------------------------------------------------------------------------


def test_keeping_everything_equals_dense() -> None:
    model = tiny_wan()
    dense = run(model)
    sparline.apply(model, EVERYTHING)
    torch.testing.assert_close(run(model), dense, rtol=1e-4, atol=1e-5)


def test_dense_method_equals_dense() -> None:
    model = tiny_wan()
    dense = run(model)
    sparline.apply(model, sparline.Dense(block_q=16, block_k=16))
    assert sparse_layers(model) == [0, 1]
    torch.testing.assert_close(run(model), dense, rtol=1e-4, atol=1e-5)


def test_sparse_differs_and_restore_is_exact() -> None:
    model = tiny_wan()
    keys, dense = list(model.state_dict()), run(model)
    sparline.apply(model, SPARSE)
    assert not torch.allclose(run(model), dense, rtol=1e-3, atol=1e-4)
    sparline.restore(model)
    assert torch.equal(run(model), dense)
    assert list(model.state_dict()) == keys
    assert not hasattr(model, "_sparline")


def test_learned_tensors_take_part() -> None:
    model = sparline.apply(tiny_wan(), SPARSE)
    at_zero = run(model)
    fill(model)
    assert not torch.allclose(run(model), at_zero, rtol=1e-3, atol=1e-4)


def test_second_apply_replaces_the_first() -> None:
    model = tiny_wan()
    dense = run(model)
    sparline.apply(model, SPARSE, dense_steps=3, dense_layers=[1])
    sparline.apply(model, EVERYTHING)
    assert sparse_layers(model) == [0, 1]
    assert len(model._forward_pre_hooks) == 0
    torch.testing.assert_close(run(model), dense, rtol=1e-4, atol=1e-5)
    assert torch.equal(run(sparline.restore(model)), dense)


def test_cross_attention_is_untouched() -> None:
    model = sparline.apply(tiny_wan(), SPARSE)
    kinds = {type(block.attn2.processor).__name__ for block in model.blocks}
    assert kinds == {"WanAttnProcessor"}


def test_both_transformers_of_a_pipeline() -> None:
    pipe = SimpleNamespace(transformer=tiny_wan(0), transformer_2=tiny_wan(1))
    dense = run(pipe.transformer_2)
    assert sparline.apply(pipe, SPARSE, dense_steps=1) is pipe
    assert sparse_layers(pipe.transformer) == sparse_layers(pipe.transformer_2) == [0, 1]
    # One clock: the second transformer takes over in the middle of a generation, after its first
    # step.
    first, later = run(pipe.transformer, 900.0), run(pipe.transformer_2, 500.0)
    sparline.restore(pipe)
    assert torch.equal(first, run(pipe.transformer, 900.0))
    assert not torch.allclose(later, dense, rtol=1e-3, atol=1e-4)
    assert torch.equal(run(pipe.transformer_2), dense)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rotation_at_once(dtype: torch.dtype) -> None:
    """Both forms of the rotary embedding, their gradients, and rows with others between them."""
    rng = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 9, 3, 20, generator=rng).to(dtype)
    angle = torch.randn(1, 9, 1, 6, generator=rng).repeat_interleave(2, dim=-1)
    results = []
    for rotate in (_rotate, _rotate_at_once):
        x = wide.clone().requires_grad_()
        turned = rotate(x[..., :12], angle.cos(), angle.sin())
        assert turned.dtype == dtype
        results.append((turned, *torch.autograd.grad(turned.square().sum(), x)))
    for actual, expected in zip(results[1], results[0], strict=True):
        # In 16 bits the gradient of one form is rounded before its terms are added up.
        atol = 0.05 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=atol)


# First steps and layers ---------------------------------------------------------------------------


def test_dense_layers() -> None:
    model = sparline.apply(tiny_wan(), SPARSE, dense_layers=[-1])
    assert sparse_layers(model) == [0]
    model = sparline.apply(tiny_wan(), SPARSE, dense_layers=[0, 1])
    assert torch.equal(run(model), run(sparline.restore(model)))


def test_dense_steps_follow_the_timestep_not_the_calls() -> None:
    reference = tiny_wan()
    dense = {t: run(reference, t) for t in (900.0, 600.0, 300.0)}
    model = sparline.apply(tiny_wan(), SPARSE, dense_steps=2)
    calls = [900.0, 900.0, 600.0, 300.0, 300.0]  # guidance calls twice; a cache may skip one
    for _ in range(2):  # a second generation starts again
        is_dense = [torch.equal(run(model, t), dense[t]) for t in calls]
        assert is_dense == [True, True, True, False, False]


def test_dense_steps_do_not_apply_in_training() -> None:
    model = sparline.apply(tiny_wan(), SPARSE, dense_steps=2)
    dense = run(sparline.restore(copy.deepcopy(model)))
    assert torch.equal(run(model), dense)
    assert not torch.equal(run(model.train()), dense)


# Traps of the host --------------------------------------------------------------------------------


def test_cast_to_bfloat16_keeps_learned_tensors() -> None:
    model = sparline.apply(tiny_wan(), SPARSE)
    fill(model)
    before = {name: p.detach().clone() for name, p in learned_parameters(model)}
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    for name, parameter in learned_parameters(model):
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name])
    assert run(model, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_autocast() -> None:
    model = sparline.apply(tiny_wan(), SPARSE)
    fill(model)
    with torch.autocast("cpu", torch.bfloat16):
        low = run(model)
    torch.testing.assert_close(low.float(), run(model), rtol=0.1, atol=0.1)


def test_fused_projections() -> None:
    model = sparline.apply(tiny_wan(), SPARSE)
    apart = run(model)
    model.fuse_qkv_projections()
    torch.testing.assert_close(run(model), apart, rtol=1e-4, atol=1e-5)
    for block in model.blocks:  # to_q must not be used any more
        del block.attn1.to_q, block.attn1.to_k, block.attn1.to_v
    torch.testing.assert_close(run(model), apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_reaches_learned_tensors(checkpointing: bool) -> None:
    model = sparline.apply(tiny_wan(), SPARSE).train()
    fill(model)
    if checkpointing:
        model.enable_gradient_checkpointing()
    model(**inputs())[0].square().mean().backward()
    gradients = {name: p.grad for name, p in learned_parameters(model)}
    assert len(gradients) == 4  # proj_l.weight and .bias of two layers
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name
    if checkpointing:
        plain = sparline.apply(tiny_wan(), SPARSE).train()
        fill(plain)
        plain(**inputs())[0].square().mean().backward()
        for name, parameter in learned_parameters(plain):
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_hedgehog_weights_are_per_head_and_trained() -> None:
    method = sparline.SLA(keep_ratio=0.25, feature_map="hedgehog", block_q=16, block_k=16)
    model = sparline.apply(tiny_wan(), method).train()
    fill(model)
    model(**inputs())[0].square().mean().backward()
    shapes = {name.split("processor.")[1]: tuple(p.shape) for name, p in learned_parameters(model)}
    assert shapes["feature_map_q.weight"] == (2, 12, 12)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for _, p in learned_parameters(model))


def test_lora_freezes_and_set_trainable_thaws() -> None:
    peft = pytest.importorskip("peft")
    model = sparline.apply(tiny_wan(), SPARSE)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    assert not any(p.requires_grad for _, p in learned_parameters(model))
    set_trainable(model)
    model.train()(**inputs())[0].square().mean().backward()
    assert all(p.grad is not None for _, p in learned_parameters(model))


@pytest.mark.parametrize("name", ["_attention_backend", "_parallel_config"])
def test_host_settings_survive(name: str) -> None:
    model = tiny_wan()
    marker = object()
    setattr(model.blocks[0].attn1.processor, name, marker)
    sparline.apply(model, SPARSE)
    assert getattr(model.blocks[0].attn1.processor, name) is marker
    sparline.restore(model)
    assert getattr(model.blocks[0].attn1.processor, name) is marker


def test_set_attention_backend_reaches_dense_steps() -> None:
    model = sparline.apply(tiny_wan(), SPARSE, dense_steps=1)
    try:
        model.set_attention_backend("_native_math")
        assert model.blocks[0].attn1.processor._attention_backend == "_native_math"
        run(model)
    finally:
        model.set_attention_backend("native")  # it is global to the process


def test_ring_parallelism_is_refused() -> None:
    model = sparline.apply(tiny_wan(), SPARSE)
    ring = diffusers.ContextParallelConfig(ring_degree=2)
    for block in model.blocks:
        block.attn1.processor._parallel_config = SimpleNamespace(context_parallel_config=ring)
    with pytest.raises(NotImplementedError, match=r"ring_degree=2.*ulysses_degree"):
        run(model)


def test_layerwise_casting_leaves_learned_tensors() -> None:
    model = sparline.apply(tiny_wan().to(torch.bfloat16), SPARSE)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert model.blocks[0].ffn.net[0].proj.weight.dtype == torch.float8_e4m3fn
    assert {p.dtype for _, p in learned_parameters(model)} == {torch.float32}
    assert run(model, dtype=torch.bfloat16).isfinite().all()


@pytest.mark.parametrize("scores_only", [False, True])
def test_layer_skip_equals_the_host(scores_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.hooks._helpers import AttentionProcessorRegistry as Registry

    # The host looks its own WanAttnProcessor up as well, but registers only a deprecated name for
    # it.
    metadata = Registry.get(WanSparseAttnProcessor)
    monkeypatch.setitem(Registry._registry, type(tiny_wan().blocks[0].attn1.processor), metadata)

    def skipped(model: Any) -> Tensor:
        config = diffusers.LayerSkipConfig(
            indices=[0, 1],
            skip_attention=not scores_only,
            skip_attention_scores=scores_only,
            skip_ff=False,
        )
        diffusers.hooks.apply_layer_skip(model, config)
        return run(model)

    torch.testing.assert_close(skipped(sparline.apply(tiny_wan(), SPARSE)), skipped(tiny_wan()))


def test_attention_cache_skips_calls() -> None:
    model = sparline.apply(tiny_wan(), SPARSE, dense_steps=1)
    calls: list[int] = []
    model.blocks[0].attn1.processor.register_forward_hook(lambda *_: calls.append(1))
    model.enable_cache(
        diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(100, 950),
            current_timestep_callback=lambda: 500,
            spatial_attention_block_identifiers=("blocks",),
        )
    )
    for timestep in (900.0, 800.0, 700.0, 600.0):
        assert run(model, timestep).isfinite().all()
    assert 0 < len(calls) < 4
    assert model.blocks[0].attn1.processor.clock._step == 3


def test_deepcopy_and_state_dict_are_independent() -> None:
    model = sparline.apply(tiny_wan(), SPARSE, dense_steps=1)
    twin = copy.deepcopy(model)
    fill(model)
    assert all(p.abs().max() == 0 for _, p in learned_parameters(twin))
    run(model, 900.0), run(model, 500.0)
    assert twin.blocks[0].attn1.processor.clock._timestep is None


@pytest.mark.slow
@pytest.mark.parametrize("dense_steps", [0, 1])
def test_compile_repeated_blocks(dense_steps: int) -> None:
    torch._dynamo.reset()
    model = sparline.apply(tiny_wan(), SPARSE, dense_steps=dense_steps)
    fill(model)
    eager = [run(model, t) for t in (900.0, 500.0)]
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    for timestep, expected in zip((900.0, 500.0), eager, strict=True):
        torch.testing.assert_close(run(model, timestep), expected)


# State files --------------------------------------------------------------------------------------


def test_state_round_trip(tmp_path: Path) -> None:
    model = sparline.apply(tiny_wan(), SPARSE, dense_steps=1, dense_layers=[1])
    fill(model)
    sparline.save_state(model, tmp_path / "state.safetensors")
    fresh = tiny_wan()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparline.load_state(fresh, tmp_path / "state.safetensors")
    assert sparse_layers(fresh) == [0]
    for t in (900.0, 500.0):
        assert torch.equal(run(fresh, t), run(model, t))


def test_state_of_a_pipeline_names_both(tmp_path: Path) -> None:
    pipe = SimpleNamespace(transformer=tiny_wan(0), transformer_2=tiny_wan(1))
    sparline.apply(pipe, SPARSE)
    fill(pipe)
    path = tmp_path / "state.safetensors"
    sparline.save_state(pipe, path)
    import safetensors

    with safetensors.safe_open(path, "pt") as file:
        assert "transformer_2.blocks.1.attn1.processor.proj_l.weight" in file.keys()  # noqa: SIM118
        metadata = file.metadata()
    assert metadata["sparline"] == sparline.__version__
    assert json.loads(metadata["method"])["block_q"] == 16
    with pytest.raises(ValueError, match=r"4 unexpected \(first: transformer_2\.blocks\.0"):
        sparline.load_state(tiny_wan(), path)


def test_state_of_other_layers_or_shapes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    model = sparline.apply(tiny_wan(), SPARSE)
    sparline.save_state(model, path)
    other = sparline.apply(tiny_wan(), SPARSE, dense_layers=[0])
    with pytest.raises(ValueError, match=r"2 unexpected \(first: transformer\.blocks\.0"):
        sparline.load_state(other, path)
    wider = sparline.apply(tiny_wan(attention_head_dim=24), SPARSE)
    with pytest.raises(ValueError, match=r"\(12,\), the model's is \(24,\)"):
        sparline.load_state(wider, path)
    more = sparline.apply(tiny_wan(num_layers=3), SPARSE)
    with pytest.raises(ValueError, match=r"2 missing \(first: transformer\.blocks\.2"):
        sparline.load_state(more, path)
    assert all(p.abs().max() == 0 for m in (wider, more) for _, p in learned_parameters(m))


def test_state_of_other_blocks_warns(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    sparline.save_state(sparline.apply(tiny_wan(), SPARSE), path)
    other = sparline.apply(tiny_wan(), sparline.SLA(keep_ratio=0.25, block_q=32, block_k=16))
    with pytest.warns(UserWarning, match="block_q=16.*block_q=32"):
        sparline.load_state(other, path)


def test_state_learned_in_16_bits_serves_low_bit(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    sparline.save_state(sparline.apply(tiny_wan(), SPARSE), path)
    other = sparline.apply(tiny_wan(), replace(SPARSE, low_bit=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparline.load_state(other, path)
    assert other.blocks[0].attn1.processor.attention.method.low_bit is not None


def test_what_is_no_state_file(tmp_path: Path) -> None:
    import safetensors.torch

    with pytest.raises(FileNotFoundError, match="no file"):
        sparline.load_state(tiny_wan(), tmp_path / "nowhere.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"no header")
    with pytest.raises(ValueError, match="whole safetensors file"):
        sparline.load_state(tiny_wan(), tmp_path / "cut.safetensors")
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="sparline-state-1"):
        sparline.load_state(tiny_wan(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"Call sparline\.apply"):
        sparline.save_state(tiny_wan(), tmp_path / "state.safetensors")


# Errors -------------------------------------------------------------------------------------------


def test_bad_arguments_change_nothing() -> None:
    model = tiny_wan()
    cases: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
        (TypeError, r"sparline\.SLA\(", "sla", {}),
        (ValueError, "dense_steps", SPARSE, {"dense_steps": -1}),
        (ValueError, "dense_layers.*2, got 5", SPARSE, {"dense_layers": [0, 5]}),
    ]
    for kind, text, method, options in cases:
        with pytest.raises(kind, match=text):
            sparline.apply(model, method, **options)
    assert sparse_layers(model) == []
    with pytest.raises(TypeError, match=r"WanTransformer3DModel.*Linear"):
        sparline.apply(torch.nn.Linear(2, 2), SPARSE)
    with pytest.raises(TypeError, match="pipeline"):
        sparline.apply(object(), SPARSE)


def test_foreign_processor_is_refused() -> None:
    class Foreign(diffusers.models.transformers.transformer_wan.WanAttnProcessor):
        pass

    model = tiny_wan()
    model.blocks[1].attn1.set_processor(Foreign())
    with pytest.raises(ValueError, match=r"blocks\.1\.attn1.*Foreign"):
        sparline.apply(model, SPARSE)
    assert sparse_layers(sparline.apply(model, SPARSE, dense_layers=[1])) == [0]


def test_masks_are_refused() -> None:
    model = sparline.apply(tiny_wan(), SPARSE)
    attn = model.blocks[0].attn1
    with pytest.raises(ValueError, match="attention mask"):
        attn(torch.zeros(1, 8, 24), None, torch.zeros(1, 8, 8), None)
