# SPDX-License-Identifier: Apache-2.0
"""Runs on folders: latents of a latent model, clips of a pixel model, clips through a VAE."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers")

import diffusers
import training

from sparline import train, video
from sparline.train import setup
from sparline.train.config import TrainError
from sparline.train.data import Draw
from sparline.train.loop import Trainer

pytestmark = pytest.mark.e2e


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def save_latents(folder: Path, count: int, channels: int = 4) -> Path:
    folder.mkdir()
    rng = torch.Generator().manual_seed(count)
    for n in range(count):
        sample = {
            "latents": torch.randn(channels, 4, 8, 8, generator=rng),
            "text_embeds": torch.randn(3 + n, 32, generator=rng),
        }
        save_file(sample, folder / f"{n}.safetensors")
    return folder


def latent_config(tmp_path: Path, **sections: Any) -> train.Config:
    model = tmp_path / "latent-model"
    if not model.exists():
        training.save_model(model, channels=4)
    return training.make_config(tmp_path / "run", model={"path": str(model)}, **sections)


def test_latents_with_dropped_captions_and_held_out_shards(tmp_path: Path) -> None:
    folder = save_latents(tmp_path / "train", 5)
    (folder / "broken.safetensors").write_bytes(b"no")
    save_file({"text_embeds": torch.zeros(2, 32)}, tmp_path / "null.safetensors")
    config = latent_config(
        tmp_path,
        data={
            "source": "latents",
            "path": str(folder),
            "validation_path": str(save_latents(tmp_path / "held-out", 2)),
            "null_text": str(tmp_path / "null.safetensors"),
            "caption_dropout": 0.5,
            "max_sequence_length": 12,
            "train_batch_size": 2,
        },
        logging={"validation_steps": 4, "validation_batches": 1},
    )
    summary = train.run(config)
    assert isinstance(summary, train.Summary)
    assert summary.is_done
    assert summary.skipped_samples == 1
    assert "1 files skipped" in summary.words()[0]
    assert summary.held_out_loss is not None
    logged = training.lines(tmp_path / "run", "skipped_samples")
    assert {line["skipped_samples"] for line in logged} == {1}


def test_dropped_captions_need_the_empty_prompt(tmp_path: Path) -> None:
    data = {"source": "latents", "path": str(save_latents(tmp_path / "train", 2))}
    config = latent_config(tmp_path, data=data)
    with pytest.raises(TrainError, match="needs the text of the empty prompt"):
        Trainer(config)
    wrong = latent_config(tmp_path, data={**data, "null_text": "nowhere.safetensors"})
    with pytest.raises(TrainError, match="must be a safetensors file with text_embeds"):
        Trainer(wrong)


def test_samples_of_a_bare_latent_model_are_left_out(tmp_path: Path) -> None:
    data = {"source": "latents", "path": str(save_latents(tmp_path / "train", 2))}
    trainer = Trainer(latent_config(tmp_path, data={**data, "caption_dropout": 0.0}))
    assert trainer.draw_samples() is None
    with pytest.raises(TrainError, match=r"Set data.validation_path"):
        trainer.held_out_losses()
    assert trainer.validate() is None


# Clips ------------------------------------------------------------------------------------------


def write_clip(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    video.write_clip(path, rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8))


def test_clips_of_a_pixel_model_are_named_by_their_folders(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("chelsea/a.mp4", "coffee/b.mp4", "unicorn/c.mp4"):
        write_clip(tmp_path / "clips" / name)
    training.save_model(tmp_path / "model", text_dim=128)
    config = training.make_config(
        tmp_path / "run",
        data={"source": "clips", "path": str(tmp_path / "clips"), "dataloader_num_workers": 2},
    )
    summary = train.run(config)
    assert isinstance(summary, train.Summary)
    assert summary.skipped_samples == 1
    assert "one of the model's classes astronaut" in caplog.text
    assert "got 'unicorn'" in caplog.text


def test_clips_of_a_latent_model_need_its_pipeline(tmp_path: Path) -> None:
    write_clip(tmp_path / "clips" / "a.mp4")
    data = {"source": "clips", "path": str(tmp_path / "clips")}
    with pytest.raises(TrainError, match="needs the VAE and the text encoder of a pipeline"):
        Trainer(latent_config(tmp_path, data=data))


def test_clips_are_encoded_as_the_pipeline_decodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real VAE, tiny and untrained; the text encoder is played."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, 0.2, 0.3, 0.4],
        latents_std=[1.0, 2.0, 3.0, 4.0],
    ).eval()
    asked: list[str] = []

    def encode_prompt(prompt: str, **options: Any) -> tuple[torch.Tensor, None]:
        assert options["do_classifier_free_guidance"] is False
        asked.append(prompt)
        return torch.full((1, 3, 32), float(len(prompt))), None

    text_encoder = torch.nn.Linear(1, 1)
    text_encoder.device = torch.device("cpu")  # type: ignore[assignment]
    pipeline = SimpleNamespace(vae=vae, text_encoder=text_encoder, encode_prompt=encode_prompt)
    monkeypatch.setattr(setup, "load_pipeline", lambda *_: pipeline)
    write_clip(tmp_path / "clips" / "a.mp4")
    (tmp_path / "clips" / "a.txt").write_text("noise")
    config = latent_config(
        tmp_path,
        data={
            "source": "clips",
            "path": str(tmp_path / "clips"),
            "num_frames": 5,
            "height": 32,
            "width": 32,
            "max_sequence_length": 8,
            "cache_dir": str(tmp_path / "cache"),
        },
    )
    transformer = setup.load_transformer(config.model)
    source, held_out = setup.make_sources(config, transformer, torch.device("cpu"))
    assert held_out is None
    latents, text = source.load(Draw(0, 0))
    assert latents.shape == (4, 2, 4, 4)
    assert text.shape == (8, 32)
    assert text[:3].unique().tolist() == [5.0]
    assert source.null_text is not None
    assert source.null_text.shape == (8, 32)
    # What the pipeline undoes before it decodes.
    mean, deviation = (
        torch.tensor(values).view(4, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    clip = video.read_window(tmp_path / "clips" / "a.mp4", 5, 32, 32, 0)
    pixels = torch.from_numpy(clip).permute(3, 0, 1, 2).float() / 127.5 - 1.0
    with torch.no_grad():
        raw = vae.encode(pixels[None]).latent_dist.mode()[0]
    torch.testing.assert_close(latents * deviation + mean, raw)
    source.load(Draw(0, 0))
    assert asked == ["", "noise"]  # from the cache, the second time
