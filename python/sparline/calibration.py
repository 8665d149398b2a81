# SPDX-License-Identifier: Apache-2.0
"""BLASST's threshold for a wanted sparsity: fit it on samples once, then use it at any length.

The best threshold falls with the number of keys, lambda = scale_factor / L, and the scale factor
grows with sparsity S as a exp(b S). ``calibrate`` measures the sparsity of a range of thresholds on
samples of q, k and v and fits a and b; ``Calibration.method`` turns a wanted sparsity and a length
into a ``BLASST`` method.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .functional import tile_statistics
from .methods import BLASST

#: Thresholds that ``calibrate`` tries: 20 values from 1e-6 to 0.99, even in the logarithm.
TRIALS = tuple(float(x) for x in np.geomspace(1e-6, 0.99, 20))
#: Points outside this range of sparsity say nothing about the curve between.
FIT_RANGE = (0.10, 0.90)
FORMAT = "sparline-calibration-1"


@dataclasses.dataclass(frozen=True)
class Calibration:
    """scale_factor = a exp(b S), as fitted, with the range of sparsity that the points covered."""

    a: float
    b: float
    sparsity_min: float
    sparsity_max: float
    block_q: int = 128
    block_k: int = 64

    @classmethod
    def fit(
        cls,
        points: Iterable[tuple[float, int, float]],
        *,
        log_space: bool = True,
        block_q: int = 128,
        block_k: int = 64,
    ) -> Calibration:
        """Least squares over points (threshold lambda, number of keys L, sparsity S).

        ``log_space`` fits ln(lambda L) = ln a + b S, which weighs all magnitudes alike and is
        advised for diffusion models; otherwise lambda L itself is fitted, by Gauss-Newton steps
        from there.
        """
        table = np.array(
            [(x * n, s) for x, n, s in points if FIT_RANGE[0] <= s <= FIT_RANGE[1]], dtype=float
        ).reshape(-1, 2)
        factor, sparsity = table[:, 0], table[:, 1]
        if len(np.unique(sparsity)) < 2:
            raise ValueError(
                "Calibration.fit: at least two points of different sparsity within "
                f"{FIT_RANGE} are needed, got {len(np.unique(sparsity))}. Try more thresholds, or "
                "samples that attend more sharply."
            )
        b, log_a = np.polyfit(sparsity, np.log(factor), 1)
        if not log_space:
            a = math.exp(log_a)
            for _ in range(100):
                curve = a * np.exp(b * sparsity)
                slopes = np.stack([curve / a, curve * sparsity], axis=1)
                step = np.linalg.lstsq(slopes, factor - curve, rcond=None)[0]
                a, b = max(a + step[0], 0.1 * a), b + float(np.clip(step[1], -1.0, 1.0))
            log_a = math.log(a)
        return cls(
            math.exp(log_a),
            float(b),
            float(sparsity.min()),
            float(sparsity.max()),
            block_q,
            block_k,
        )

    def threshold(self, sparsity: float, num_keys: int) -> float:
        """lambda for a sparsity at a length, in (0, 1)."""
        if not 0.0 <= sparsity <= 1.0:
            raise ValueError(
                f"Calibration.threshold: sparsity must lie in [0, 1], got {sparsity!r}. 70 % is "
                "0.7."
            )
        return min(self.a * math.exp(self.b * sparsity) / num_keys, 1.0 - 1e-6)

    def method(self, sparsity: float, num_keys: int, **options: Any) -> BLASST:
        """The method that skips about ``sparsity`` of the tiles at a length of ``num_keys``."""
        blocks = {"block_q": self.block_q, "block_k": self.block_k}
        return BLASST(math.log(self.threshold(sparsity, num_keys)), **{**blocks, **options})

    def save(self, path: str | Path) -> None:
        """Writes the fit as JSON."""
        text = json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2)
        partial = Path(f"{path}.partial")  # a broken write leaves an older file as it was
        partial.write_text(text + "\n")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads what ``save`` wrote."""
        try:
            data = json.loads(Path(path).read_text())
            if data.pop("format") != FORMAT:
                raise ValueError("another format")
            return cls(**data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"Calibration.load: {path} must be a file that Calibration.save wrote, got one "
                f"that does not read ({error}). Write it anew."
            ) from error


def calibrate(
    samples: Sequence[tuple[Tensor, Tensor, Tensor]],
    *,
    thresholds: Sequence[float] = TRIALS,
    log_space: bool = True,
    block_q: int = 128,
    block_k: int = 64,
    **options: Any,
) -> Calibration:
    """Fits a ``Calibration`` on samples (q, k, v); ``options`` as in ``sparline.attention``.

    Takes samples from the layers and timesteps that the method will run on, of more than one
    length if it will see more than one.
    """
    if "cu_seqlens_q" in options:
        raise ValueError(
            "calibrate: samples must be single sequences, got cu_seqlens_q. Pass each sequence as "
            "a sample of its own: the threshold depends on its length."
        )
    points = []
    for q, k, v in samples:
        num_keys = k.shape[1 if options.get("layout") == "bnhd" else 2]
        for threshold in thresholds:
            method = BLASST(math.log(threshold), block_q=block_q, block_k=block_k)
            told = tile_statistics(q, k, v, method=method, **options)
            points.append((threshold, num_keys, told.sparsity))
    return Calibration.fit(points, log_space=log_space, block_q=block_q, block_k=block_k)
