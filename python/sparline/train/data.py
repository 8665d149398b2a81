# SPDX-License-Identifier: Apache-2.0
"""Where clips come from: the demo's generator, a folder of videos, precomputed latents.

A clip is a function of a ``Draw``, and a draw of (seed, step, place in the batch). So a run that is
killed and resumed sees the clips of one that was not, any number of ranks sees those of one, and
there is no sampler state to save. A file that is broken or too short is reported once, counted, and
its place is taken by the next one in the folder, always the same.
"""

from __future__ import annotations

import io
import logging
import os
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .config import DataConfig, TrainError

log = logging.getLogger("sparline.train")

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif", ".m4v")
_MASK = (1 << 64) - 1


class Draw(NamedTuple):
    """One clip of a run: its place in the endless sequence of clips, and what seeds it."""

    position: int
    seed: int


class Batch(NamedTuple):
    """latents (B, C, T, H, W) and text (B, L, D), float32."""

    latents: Tensor
    text: Tensor


class Source(Protocol):
    """Clips by draw."""

    #: The text of "no text", (L, D); None where there is none.
    null_text: Tensor | None
    #: Files that gave nothing, with the reason.
    skipped: dict[str, str]

    def load(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """latents (C, T, H, W) and text (L, D), float32."""


def mix(*numbers: int) -> int:
    """A seed from numbers: rounds of splitmix64, so that neighbours share nothing. Below 2^63."""
    state = 0
    for number in numbers:
        state = (state + 0x9E3779B97F4A7C15 + number) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def draws(seed: int, first: int, count: int) -> list[Draw]:
    """The ``count`` draws of a run from position ``first`` on."""
    return [Draw(n, mix(seed, n)) for n in range(first, first + count)]


def collate(samples: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> Batch:
    """Raises TrainError where latents differ in shape."""
    shapes = {tuple(latents.shape) for latents, _ in samples}
    if len(shapes) > 1:
        raise TrainError(
            "train: the latents of a batch must have one shape, got "
            f"{', '.join(map(str, sorted(shapes)))}. Sort them into folders by shape, or set "
            "data.train_batch_size=1."
        )
    latents, text = (torch.stack(parts) for parts in zip(*samples, strict=True))
    return Batch(latents.to(device, non_blocking=True), text.to(device, non_blocking=True))


class Loader:
    """Reads the batches of one rank, a few ahead of the run.

    Batch ``m`` of the run holds ``batch_size x num_ranks`` draws, of which each rank takes its
    part.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        num_ranks: int = 1,
        num_workers: int = 0,
    ) -> None:
        self._source, self._seed, self._device = source, seed, device
        self._batch_size, self._rank, self._num_ranks = batch_size, rank, num_ranks
        self._ahead = num_workers
        self._pool = ThreadPoolExecutor(num_workers) if num_workers else None
        self._reading: dict[int, list[Future[tuple[Tensor, Tensor]]]] = {}

    def draws(self, number: int) -> list[Draw]:
        """What this rank draws for batch ``number``."""
        first = (number * self._num_ranks + self._rank) * self._batch_size
        return draws(self._seed, first, self._batch_size)

    def batch(self, number: int) -> Batch:
        if self._pool is None:
            return collate([self._source.load(draw) for draw in self.draws(number)], self._device)
        for wanted in range(number, number + self._ahead + 1):
            if wanted not in self._reading:
                self._reading[wanted] = [
                    self._pool.submit(self._source.load, draw) for draw in self.draws(wanted)
                ]
        return collate([f.result() for f in self._reading.pop(number)], self._device)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


# The demo's generator ---------------------------------------------------------------------------


class DemoSource:
    """Clips of ``sparline.demo.data.ClipSource``, with the class code as text. Pixels are
    latents."""

    def __init__(self, clips: Any, text_dim: int) -> None:
        from sparline.demo.pipeline import class_embeddings

        self._clips = clips
        table = class_embeddings(torch.arange(-1, len(clips.names)), text_dim)
        self._table = table.to(clips.device)
        self.null_text: Tensor | None = self._table[0]
        self.skipped: dict[str, str] = {}
        self.names: tuple[str, ...] = clips.names

    def load(self, draw: Draw) -> tuple[Tensor, Tensor]:
        clip, class_id = self._clips.sample(torch.Generator().manual_seed(draw.seed))
        return clip, self._table[class_id + 1]


# Folders ----------------------------------------------------------------------------------------


class BrokenSample(Exception):
    """A file or member that cannot be used; the message says why."""


class FolderSource:
    """Samples by name, in an order that ``order_seed`` draws anew for every pass through them; None
    keeps the order of the names."""

    def __init__(
        self,
        names: Sequence[str],
        read: Callable[[str, Draw], tuple[Tensor, Tensor]],
        null_text: Tensor | None = None,
        *,
        order_seed: int | None,
    ) -> None:
        self._names, self._read, self._order_seed = list(names), read, order_seed
        self.null_text = null_text
        self.skipped: dict[str, str] = {}
        self._lock = threading.Lock()
        self._order: tuple[int, list[int]] = (-1, [])  # of one epoch

    def __len__(self) -> int:
        return len(self._names)

    def load(self, draw: Draw) -> tuple[Tensor, Tensor]:
        epoch, place = divmod(draw.position, len(self._names))
        first = place if self._order_seed is None else self._order_of(epoch)[place]
        for step in range(len(self._names)):
            name = self._names[(first + step) % len(self._names)]
            if name in self.skipped:
                continue
            try:
                return self._read(name, draw)
            except BrokenSample as error:
                self.skip(name, str(error))
        raise TrainError(
            f"train: none of the {len(self._names)} samples can be used; the first, "
            f"{self._names[0]}: {self.skipped[self._names[0]]}"
        )

    def skip(self, name: str, reason: str) -> None:
        with self._lock:
            if name not in self.skipped:
                self.skipped[name] = reason
                log.warning("skipped %s: %s", name, reason)

    def _order_of(self, epoch: int) -> list[int]:
        known, order = self._order
        if known != epoch:
            rng = torch.Generator().manual_seed(mix(self._order_seed or 0, epoch))
            order = torch.randperm(len(self._names), generator=rng).tolist()
            self._order = (epoch, order)
        return order


def clip_source(
    folder: Path,
    config: DataConfig,
    encode: Callable[[Tensor, str], tuple[Tensor, Tensor]],
    null_text: Tensor | None,
    *,
    order_seed: int | None,
) -> FolderSource:
    """A folder of videos, read with PyAV.

    A window of ``num_frames`` frames is drawn from each file, scaled and cropped in the middle to
    height x width. Its text is in a ``.txt`` file beside it, else the name of its folder.
    ``encode`` makes latents (C, T, H, W) and text (L, D) of a clip (3, T, H, W) in [-1, 1] and a
    caption.
    """
    names = [str(p) for p in _files(folder, VIDEO_SUFFIXES, "clips", ", ".join(VIDEO_SUFFIXES))]

    def read(name: str, draw: Draw) -> tuple[Tensor, Tensor]:
        path = Path(name)
        caption_file = path.with_suffix(".txt")
        has_file = caption_file.is_file()
        caption = caption_file.read_text().strip() if has_file else path.parent.name
        clip = read_window(path, config.num_frames, config.height, config.width, draw.seed)
        return encode(clip, caption)

    return FolderSource(names, read, null_text, order_seed=order_seed)


def read_window(path: Path, num_frames: int, height: int, width: int, seed: int) -> Tensor:
    """A window of a video that ``seed`` chooses, (3, T, H, W) float32 in [-1, 1].

    Raises BrokenSample if the file does not decode or is too short.
    """
    from sparline import video

    try:
        frames = video.read_window(path, num_frames, height, width, seed)
    except ValueError as error:
        raise BrokenSample(str(error)) from error
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float().div(127.5).sub(1.0)


def latent_source(
    folder: Path, config: DataConfig, null_text: Tensor | None, *, order_seed: int | None
) -> FolderSource:
    """Latents (C, T, H, W) and text embeddings (L, D), of any floating dtype, in

    - ``.safetensors`` shards with tensors ``<name>.latents`` and ``<name>.text_embeds``, or with
      one sample as ``latents`` and ``text_embeds``;
    - ``.tar`` shards (webdataset): for each sample ``<name>.safetensors`` as above, or
      ``<name>.latents.npy`` and ``<name>.text_embeds.npy``.
    """
    shards = _files(folder, (".safetensors", ".tar"), "latents", ".safetensors or .tar")
    readers: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {}
    broken: dict[str, str] = {}
    for shard in shards:
        index = _index_tar if shard.suffix == ".tar" else _index_safetensors
        try:
            for name, reader in index(shard):
                readers[f"{shard}:{name}"] = reader
        except BrokenSample as error:
            broken[str(shard)] = str(error)

    def read(name: str, draw: Draw) -> tuple[Tensor, Tensor]:
        latents, text = readers[name]()
        if latents.ndim != 4 or text.ndim != 2:
            raise BrokenSample(
                "it must hold latents (C, T, H, W) and text_embeds (L, D), got "
                f"{tuple(latents.shape)} and {tuple(text.shape)}"
            )
        return latents.float(), pad_text(text.float(), config.max_sequence_length)

    if not readers:
        first = next(iter(broken.items()), ("", "they are empty"))
        raise TrainError(
            f"train: none of the {len(shards)} shards in {folder} can be used; {first[0]}: "
            f"{first[1]}"
        )
    source = FolderSource(list(readers), read, null_text, order_seed=order_seed)
    for name, reason in broken.items():
        source.skip(name, reason)
    return source


def pad_text(text: Tensor, length: int) -> Tensor:
    """(L, D) to (length, D), filled up with zeros. Raises BrokenSample if it is longer."""
    if len(text) > length:
        raise BrokenSample(
            f"its text has {len(text)} tokens, more than data.max_sequence_length={length}"
        )
    return torch.nn.functional.pad(text, (0, 0, 0, length - len(text)))


def _files(folder: Path, suffixes: tuple[str, ...], source: str, words: str) -> list[Path]:
    if not folder.is_dir():
        raise TrainError(
            f"train: data.source={source} reads a folder, and there is none at {folder}. Set "
            "data.path=FOLDER."
        )
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
    if not found:
        raise TrainError(
            f"train: {folder} must hold {words} files, and it holds none. Choose another folder, "
            "or another data.source."
        )
    return found


Indexed = Iterator[tuple[str, Callable[[], tuple[Tensor, Tensor]]]]


def _index_safetensors(path: Path) -> Indexed:
    from safetensors import SafetensorError, safe_open

    def read(latents: str, text: str) -> tuple[Tensor, Tensor]:
        try:
            with safe_open(str(path), framework="pt") as file:
                return file.get_tensor(latents), file.get_tensor(text)
        except (SafetensorError, OSError) as error:
            raise BrokenSample(f"it does not read ({error})") from error

    try:
        with safe_open(str(path), framework="pt") as file:
            keys = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise BrokenSample(f"it does not read ({error})") from error
    found = False
    for key in sorted(keys):
        if key == "latents" or key.endswith(".latents"):
            text = key.removesuffix("latents") + "text_embeds"
            if text not in keys:
                raise BrokenSample(f"it has {key} and no {text}")
            found = True
            yield key, partial(read, key, text)
    if not found:
        raise BrokenSample("it has no tensor that is called latents")


def _index_tar(path: Path) -> Indexed:
    """Samples of a webdataset shard. What stands before a cut is kept."""
    members: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    folder, _, base = member.name.rpartition("/")
                    stem, _, kind = base.partition(".")
                    members.setdefault(f"{folder}/{stem}", {})[kind] = member
    except (tarfile.TarError, OSError) as error:
        if not members:
            raise BrokenSample(f"it is no tar file that reads ({error})") from error
        log.warning("%s is cut after %d samples: %s", path, len(members), error)

    def content(member: tarfile.TarInfo) -> bytes:
        # Read by offset: each thread has a file of its own, and nothing is unpacked to disk.
        with path.open("rb") as file:
            file.seek(member.offset_data)
            data = file.read(member.size)
        if len(data) != member.size:
            raise BrokenSample(f"{member.name} has {len(data)} of its {member.size} bytes")
        return data

    def read(parts: dict[str, tarfile.TarInfo]) -> tuple[Tensor, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            if "safetensors" in parts:
                tensors = load(content(parts["safetensors"]))
                return tensors["latents"], tensors["text_embeds"]
            latents, text = (
                np.load(io.BytesIO(content(parts[f"{name}.npy"])), allow_pickle=False)
                for name in ("latents", "text_embeds")
            )
        except KeyError as error:
            raise BrokenSample(
                f"it needs latents and text_embeds, as .safetensors or .npy; {error} is missing"
            ) from error
        except (SafetensorError, ValueError, EOFError) as error:
            raise BrokenSample(f"it does not read ({error})") from error
        return torch.from_numpy(latents), torch.from_numpy(text)

    for name, parts in sorted(members.items()):
        yield name.strip("/"), partial(read, parts)


def load_null_text(config: DataConfig) -> Tensor | None:
    """The embedding of the empty prompt, (L, D); None where ``data.null_text`` is not set."""
    if config.null_text is None:
        return None
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        text = load_file(config.null_text)["text_embeds"].float()
        return pad_text(text, config.max_sequence_length)
    except (OSError, SafetensorError, KeyError, BrokenSample) as error:
        raise TrainError(
            f"train: data.null_text must be a safetensors file with text_embeds (L, D), got "
            f"{config.null_text}: {error}. Encode the empty prompt with the model's text encoder."
        ) from error


def cached(
    encode: Callable[[Tensor, str], tuple[Tensor, Tensor]], folder: Path
) -> Callable[[Tensor, str], tuple[Tensor, Tensor]]:
    """``encode`` that keeps its results in ``folder``, by the content of what it is given."""
    import hashlib

    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)

    def look_up(clip: Tensor, caption: str) -> tuple[Tensor, Tensor]:
        content = hashlib.sha256(clip.numpy().tobytes() + caption.encode()).hexdigest()
        path = folder / f"{content}.safetensors"
        if path.is_file():
            try:
                tensors = load_file(path)
                return tensors["latents"], tensors["text_embeds"]
            except (SafetensorError, KeyError):
                path.unlink()  # half written by a run that was killed
        latents, text = encode(clip, caption)
        written = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.partial")
        save_file({"latents": latents.contiguous(), "text_embeds": text.contiguous()}, written)
        os.replace(written, path)
        return latents, text

    return look_up
