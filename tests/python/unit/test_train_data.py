# SPDX-License-Identifier: Apache-2.0
"""Clips for training: by draw, from folders and shards, with what is broken said and left out."""

from __future__ import annotations

import io
import logging
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("av")

from safetensors.torch import save, save_file

from sparline import train, video
from sparline.train import data
from sparline.train.config import DataConfig
from sparline.train.data import Draw, FolderSource, Loader, draws

CPU = torch.device("cpu")


def numbered(count: int, **options: Any) -> FolderSource:
    """Samples that say their number and their seed."""

    def read(name: str, draw: Draw) -> tuple[Tensor, Tensor]:
        return torch.full((1, 1, 1, 1), float(name)), torch.full((1, 1), float(draw.seed % 1000))

    return FolderSource([str(n) for n in range(count)], read, **{"order_seed": 0, **options})


def taken(loader: Loader, numbers: range) -> list[float]:
    return [x for n in numbers for x in loader.batch(n).latents.flatten().tolist()]


# Draws ------------------------------------------------------------------------------------------


def test_an_epoch_sees_every_sample_once_in_an_order_of_its_own() -> None:
    loader = Loader(numbered(12), 4, 0, CPU)
    epochs = [taken(loader, range(3 * n, 3 * n + 3)) for n in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert epochs[0] != epochs[1] != epochs[2]
    other = taken(Loader(numbered(12, order_seed=1), 4, 0, CPU), range(3))
    assert other != epochs[0]


def test_two_ranks_see_what_one_sees() -> None:
    one = Loader(numbered(10), 4, 5, CPU)
    two = [Loader(numbered(10), 2, 5, CPU, rank, 2) for rank in range(2)]
    for n in range(5):
        assert one.draws(n) == two[0].draws(n) + two[1].draws(n)
        whole = one.batch(n)
        parts = [loader.batch(n) for loader in two]
        assert torch.equal(whole.latents, torch.cat([part.latents for part in parts]))
        assert torch.equal(whole.text, torch.cat([part.text for part in parts]))


def test_reading_ahead_changes_nothing() -> None:
    ahead, behind = Loader(numbered(10), 2, 0, CPU, num_workers=3), Loader(numbered(10), 2, 0, CPU)
    assert taken(ahead, range(8)) == taken(behind, range(8))
    ahead.close()


def test_seeds_of_neighbours_share_nothing() -> None:
    seeds = [data.mix(seed, n) for seed in range(4) for n in range(256)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    bits = torch.tensor([[seed >> b & 1 for b in range(62)] for seed in seeds]).double()
    assert (bits.mean(dim=0) - 0.5).abs().max() < 0.08  # 5 standard deviations


# Broken files -----------------------------------------------------------------------------------


def make_clip(path: Path, frames: int, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    clip = np.full((frames, 32, 48, 3), shade, np.uint8)
    video.write_clip(path, clip + np.arange(frames, dtype=np.uint8)[:, None, None, None] * 8)


def test_a_broken_or_short_clip_is_said_counted_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_clip(tmp_path / "cat" / "long.mp4", 9, 40)
    make_clip(tmp_path / "short.mp4", 2, 90)
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 100)
    (tmp_path / "notes.md").write_text("not a clip")
    heard: list[tuple[tuple[int, ...], str]] = []

    def encode(clip: Tensor, caption: str) -> tuple[Tensor, Tensor]:
        heard.append((tuple(clip.shape), caption))
        return clip, torch.zeros(1, 1)

    config = DataConfig(source="clips", num_frames=4, height=16, width=24)
    source = data.clip_source(tmp_path, config, encode, None, order_seed=0)
    assert len(source) == 3
    with caplog.at_level(logging.WARNING, "sparline.train"):
        for draw in draws(0, 0, 6):
            source.load(draw)
    assert {Path(name).name for name in source.skipped} == {"short.mp4", "broken.mp4"}
    assert Counter(heard) == {((3, 4, 16, 24), "cat"): 6}
    words = caplog.text
    assert words.count("skipped") == 2  # once each
    assert "at least 4 frames, got 2" in words
    assert "must be a video file" in words


def test_the_window_and_the_caption_of_a_clip(tmp_path: Path) -> None:
    make_clip(tmp_path / "clip.mp4", 12, 20)
    (tmp_path / "clip.txt").write_text(" a grey wall\n")
    config = DataConfig(source="clips", num_frames=4, height=16, width=16)
    captions = set()

    def encode(clip: Tensor, caption: str) -> tuple[Tensor, Tensor]:
        captions.add(caption)
        return clip, torch.zeros(1, 1)

    source = data.clip_source(tmp_path, config, encode, None, order_seed=0)
    clips = [source.load(draw)[0] for draw in draws(0, 0, 8)]
    firsts = {round(float(clip[:, 0].mean()), 1) for clip in clips}
    assert len(firsts) > 3  # windows begin at different frames
    assert captions == {"a grey wall"}
    assert torch.equal(clips[0], source.load(draws(0, 0, 1)[0])[0])
    rising = clips[0].mean(dim=(0, 2, 3))
    assert (rising.diff() > 0).all()


def test_folders_without_a_usable_file(tmp_path: Path) -> None:
    config = DataConfig(source="clips", num_frames=4)

    def encode(clip: Tensor, caption: str) -> tuple[Tensor, Tensor]:
        return clip, torch.zeros(1, 1)

    with pytest.raises(train.TrainError, match="there is none at"):
        data.clip_source(tmp_path / "no", config, encode, None, order_seed=0)
    with pytest.raises(train.TrainError, match=r"must hold \.mp4.* files, and it holds none"):
        data.clip_source(tmp_path, config, encode, None, order_seed=0)
    (tmp_path / "a.mp4").write_bytes(b"x")
    source = data.clip_source(tmp_path, config, encode, None, order_seed=0)
    with pytest.raises(train.TrainError, match=r"none of the 1 samples can be used.*video file"):
        source.load(Draw(0, 0))


# Latents ----------------------------------------------------------------------------------------

SHAPE = (4, 2, 3, 3)


def sample(number: int, tokens: int = 3) -> dict[str, Tensor]:
    return {
        "latents": torch.full(SHAPE, float(number)).bfloat16(),
        "text_embeds": torch.full((tokens, 5), float(number)),
    }


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def npy(array: Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, array.float().numpy())
    return file.getvalue()


def test_latents_from_shards_of_every_form(tmp_path: Path) -> None:
    shard = {f"{n}.{key}": value for n in (0, 1) for key, value in sample(n).items()}
    save_file(shard, tmp_path / "many.safetensors")
    save_file(sample(2), tmp_path / "single.safetensors")
    with tarfile.open(tmp_path / "web.tar", "w") as tar:
        add(tar, "x/3.safetensors", save(sample(3)))
        for key, value in sample(4).items():
            add(tar, f"x/4.{key}.npy", npy(value))
        add(tar, "x/4.txt", b"a caption that nobody reads")
    source = data.latent_source(tmp_path, DataConfig(max_sequence_length=6), None, order_seed=0)
    found = {}
    for draw in draws(0, 0, 5):
        latents, text = source.load(draw)
        number = int(latents[0, 0, 0, 0])
        found[number] = text
        assert latents.shape == SHAPE
        assert latents.dtype == torch.float32
        assert text.shape == (6, 5)
        assert (text[:3] == number).all()
        assert (text[3:] == 0).all()  # filled up, as Wan does
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert source.skipped == {}


def test_broken_latents_are_said_and_passed_over(tmp_path: Path) -> None:
    save_file(sample(0), tmp_path / "good.safetensors")
    save_file({"latents": torch.zeros(SHAPE)}, tmp_path / "silent.safetensors")
    save_file(sample(0, tokens=9), tmp_path / "wordy.safetensors")
    (tmp_path / "half.safetensors").write_bytes(save(sample(0))[:60])
    (tmp_path / "no.tar").write_bytes(b"no tar" * 200)
    with tarfile.open(tmp_path / "cut.tar", "w") as tar:
        add(tar, "first.safetensors", save(sample(1)))
        add(tar, "second.latents.npy", npy(torch.zeros(SHAPE)))
        add(tar, "third.safetensors", save(sample(3)) + bytes(4096))
    with tarfile.open(tmp_path / "cut.tar") as tar:
        end = tar.getmember("third.safetensors").offset_data + 100
    whole = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:end])
    source = data.latent_source(tmp_path, DataConfig(max_sequence_length=6), None, order_seed=0)
    values = {int(source.load(draw)[0].max()) for draw in draws(0, 0, 2 * len(source))}
    assert values == {0, 1}
    reasons = {Path(n).name.removesuffix(":latents"): r for n, r in source.skipped.items()}
    assert "no text_embeds" in reasons["silent.safetensors"]
    assert "9 tokens, more than" in reasons["wordy.safetensors"]
    assert "does not read" in reasons["half.safetensors"]
    assert "no tar file" in reasons["no.tar"]
    assert "'text_embeds.npy' is missing" in reasons["cut.tar:second"]
    assert "has 100 of its" in reasons["cut.tar:third"]


def test_latents_of_different_shapes_do_not_mix() -> None:
    wide = (torch.zeros(1, 1, 2, 4), torch.zeros(1, 1))
    tall = (torch.zeros(1, 1, 4, 2), torch.zeros(1, 1))
    with pytest.raises(train.TrainError, match="latents of a batch must have one shape"):
        data.collate([wide, tall], CPU)


def test_what_was_encoded_is_kept(tmp_path: Path) -> None:
    calls = []

    def encode(clip: Tensor, caption: str) -> tuple[Tensor, Tensor]:
        calls.append(caption)
        return 2 * clip, torch.ones(1, 1)

    look_up = data.cached(encode, tmp_path / "cache")
    clip = torch.rand(3, 2, 4, 4)
    for _ in range(2):
        assert torch.equal(look_up(clip, "a")[0], 2 * clip)
    look_up(clip, "b")
    look_up(clip + 1, "a")
    assert calls == ["a", "b", "a"]
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(b"half")  # a cache that a full disk broke
    assert torch.equal(look_up(clip, "a")[0], 2 * clip)
