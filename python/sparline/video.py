# SPDX-License-Identifier: Apache-2.0
"""Reading and writing short clips: mp4 and gif files, contact sheets, and how alike two clips are.

A clip is a uint8 array (T, H, W, 3). Only reading and writing files needs PyAV.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Clip = NDArray[np.uint8]

_LABEL_HEIGHT = 18
_BACKGROUND, _INK = (24, 24, 24), (235, 235, 235)


def read_clip(path: Path, num_frames: int, height: int, width: int) -> Clip:
    """The first frames of a video, scaled and centre-cropped to (num_frames, height, width, 3).

    Raises ValueError, in one sentence, if the file is no video or too short.
    """
    return read_window(path, num_frames, height, width)


def read_window(
    path: Path, num_frames: int, height: int, width: int, seed: int | None = None
) -> Clip:
    """As ``read_clip``, from a frame that ``seed`` draws, where the file says how many it has."""
    import av

    frames: list[Clip] = []
    try:
        with av.open(str(path)) as container:
            spare = container.streams.video[0].frames - num_frames
            first = 0
            if seed is not None and spare > 0:
                rng = torch.Generator().manual_seed(seed)
                first = int(torch.randint(spare + 1, (), generator=rng))
            for number, frame in enumerate(container.decode(video=0)):
                if number < first:
                    continue
                image: Image.Image = cast(Any, frame).to_image()
                frames.append(_fit(image, height, width))
                if len(frames) == num_frames:
                    return np.stack(frames)
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} must be a video file, and it cannot be read: {error}.") from error
    raise ValueError(
        f"{path} must have at least {num_frames} frames, got {len(frames)}. Take a longer clip or "
        "pass --frames."
    )


def _fit(image: Image.Image, height: int, width: int) -> Clip:
    scale = max(height / image.height, width / image.width)
    if scale != 1.0:
        size = (math.ceil(image.width * scale), math.ceil(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.uint8)


def write_clip(path: Path, clip: Clip, frame_rate: int = 8, min_side: int = 256) -> None:
    """Writes .mp4 (H.264) or .gif; small clips are enlarged by a whole factor."""
    clip = enlarge(clip, min_side)
    if path.suffix == ".gif":
        first, *rest = (Image.fromarray(frame) for frame in clip)
        first.save(path, save_all=True, append_images=rest, duration=1000 // frame_rate, loop=0)
        return
    import av

    height, width = clip.shape[1] // 2 * 2, clip.shape[2] // 2 * 2  # yuv420p halves both
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(frame_rate))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"crf": "12"}
        for frame in clip[:, :height, :width]:
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode())


def enlarge(clip: Clip, min_side: int) -> Clip:
    factor = max(1, math.ceil(min_side / max(clip.shape[1:3])))
    return clip.repeat(factor, axis=1).repeat(factor, axis=2)


def side_by_side(clips: Sequence[Clip], labels: Sequence[str], min_side: int = 256) -> Clip:
    """One clip that shows all, left to right, each under its label."""
    large = [enlarge(clip, min_side) for clip in clips]
    bars = [_label_bar(label, clip.shape[2]) for label, clip in zip(labels, large, strict=True)]
    columns = [
        np.concatenate([np.broadcast_to(bar, (len(clip), *bar.shape)), clip], axis=1)
        for bar, clip in zip(bars, large, strict=True)
    ]
    return np.concatenate(columns, axis=2)


def write_sheet(path: Path, clips: Sequence[Clip], labels: Sequence[str]) -> None:
    """A contact sheet: a labelled row of frames for each clip."""
    rows = []
    for clip, label in zip(clips, labels, strict=True):
        row = np.concatenate(list(enlarge(clip, 128)), axis=1)
        rows += [_label_bar(label, row.shape[1]), row]
    Image.fromarray(np.concatenate(rows, axis=0)).save(path)


def _label_bar(text: str, width: int) -> Clip:
    bar = Image.new("RGB", (width, _LABEL_HEIGHT), _BACKGROUND)
    ImageDraw.Draw(bar).text((4, 3), text, fill=_INK, font=ImageFont.load_default())
    return np.asarray(bar, dtype=np.uint8)


def psnr(clip: Clip, reference: Clip) -> float:
    """Peak signal-to-noise ratio in dB, averaged over frames; infinite frames count as 100."""
    error = ((clip.astype(np.float64) - reference) ** 2).mean(axis=(1, 2, 3))
    return float(np.minimum(100.0, 10 * np.log10(255.0**2 / np.maximum(error, 1e-12))).mean())


def ssim(clip: Clip, reference: Clip) -> float:
    """Structural similarity (Wang et al. 2004, Gaussian window, sigma 1.5), mean of frames."""
    x, y = (
        torch.from_numpy(np.ascontiguousarray(c)).double().permute(0, 3, 1, 2)
        for c in (clip, reference)
    )
    offsets = torch.arange(11, dtype=torch.float64) - 5
    taps = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = (taps / taps.sum()).expand(3, 1, 11)

    def blur(image: Tensor) -> Tensor:
        columns = F.conv2d(image, window[..., None], groups=3)
        return F.conv2d(columns, window[..., None, :], groups=3)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((numerator / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())
