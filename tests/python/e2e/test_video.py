# SPDX-License-Identifier: Apache-2.0
"""Clips on disk, and how alike two clips are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")

from PIL import Image

from sparline import video


@pytest.fixture
def clip() -> video.Clip:
    """Six smooth frames of 24 x 40."""
    t, y, x = np.meshgrid(np.arange(6), np.arange(24), np.arange(40), indexing="ij")
    waves = [np.sin(0.2 * x + 0.5 * t), np.cos(0.3 * y), np.sin(0.1 * (x + y) - t)]
    return (127.5 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


def noisy(clip: video.Clip, amplitude: int) -> video.Clip:
    noise = np.random.default_rng(0).integers(-amplitude, amplitude + 1, clip.shape)
    return (clip.astype(np.int64) + noise).clip(0, 255).astype(np.uint8)


def test_mp4_round_trip(clip: video.Clip, tmp_path: Path) -> None:
    video.write_clip(tmp_path / "clip.mp4", clip, min_side=40)
    back = video.read_clip(tmp_path / "clip.mp4", 6, 24, 40)
    assert back.shape == clip.shape
    assert video.psnr(back, clip) > 28  # yuv420p halves the resolution of colour


def test_reading_scales_and_crops(clip: video.Clip, tmp_path: Path) -> None:
    video.write_clip(tmp_path / "clip.mp4", clip)  # enlarged
    back = video.read_clip(tmp_path / "clip.mp4", 3, 24, 24)
    assert back.shape == (3, 24, 24, 3)
    assert video.psnr(back, np.ascontiguousarray(clip[:3, :, 8:32])) > 30


def test_gif_has_all_frames(clip: video.Clip, tmp_path: Path) -> None:
    video.write_clip(tmp_path / "clip.gif", clip)
    with Image.open(tmp_path / "clip.gif") as image:
        assert image.n_frames == 6
        assert image.size == (280, 168)  # 7 times 40 x 24: the first factor that reaches 256


def test_side_by_side_and_sheet(clip: video.Clip, tmp_path: Path) -> None:
    both = video.side_by_side([clip, clip], ["one", "two"], min_side=40)
    assert both.shape[0] == 6
    assert both.shape[2] == 80
    assert np.array_equal(both[:, -24:, :40], clip)
    video.write_sheet(tmp_path / "sheet.png", [clip, clip], ["one", "two"])
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width == 6 * 4 * 40  # six frames, enlarged to 160


def test_psnr(clip: video.Clip) -> None:
    assert video.psnr(clip, clip) == 100.0
    plus_one = clip + np.uint8(1)  # the clip never reaches 255
    assert video.psnr(plus_one, clip) == pytest.approx(20 * np.log10(255.0))


def test_ssim_orders_clips_and_equals_scikit_image(clip: video.Clip) -> None:
    assert video.ssim(clip, clip) == pytest.approx(1.0)
    little, much = video.ssim(noisy(clip, 8), clip), video.ssim(noisy(clip, 60), clip)
    assert 1.0 > little > much > 0.0
    # The mean of scikit-image 0.26: structural_similarity(gaussian_weights=True, sigma=1.5,
    # use_sample_covariance=False, data_range=255, channel_axis=-1).
    assert much == pytest.approx(0.4330616475, abs=1e-9)
