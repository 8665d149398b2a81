# SPDX-License-Identifier: Apache-2.0
"""BLASST's calibration: the fit recovers a known curve, and the threshold does what it promises."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import sparline
from sparline.calibration import Calibration, calibrate


@pytest.mark.parametrize("log_space", [True, False])
def test_fit_recovers_the_curve(log_space: bool) -> None:
    """Points on a exp(b S) at two lengths; those outside 10 to 90 % are noise and left out."""
    a, b = 2822.62, 4.3883
    points = [
        (a * math.exp(b * s) / length, length, s)
        for s in np.linspace(0.1, 0.9, 9)
        for length in (8192, 75600)
    ]
    points += [(0.5, 8192, 0.01), (1e-6, 8192, 0.99)]
    fit = Calibration.fit(points, log_space=log_space)
    assert fit.a == pytest.approx(a, rel=1e-6)
    assert fit.b == pytest.approx(b, rel=1e-6)
    assert (fit.sparsity_min, fit.sparsity_max) == pytest.approx((0.1, 0.9))
    assert fit.threshold(0.7, 75600) == pytest.approx(a * math.exp(b * 0.7) / 75600)


def test_fits_differ_where_noise_grows() -> None:
    """With noise that grows with the value, least squares of the value follow the large points."""
    rng = np.random.default_rng(0)
    points = [
        (100 * math.exp(3 * s) * math.exp(rng.normal() * 0.3) / 1000, 1000, s)
        for s in np.linspace(0.15, 0.85, 40)
    ]
    in_log, in_value = (Calibration.fit(points, log_space=x) for x in (True, False))

    def squares(fit: Calibration, is_log: bool) -> float:
        values = [(x * n, fit.a * math.exp(fit.b * s)) for x, n, s in points]
        return sum((math.log(y / f) if is_log else y - f) ** 2 for y, f in values)

    assert squares(in_log, True) < squares(in_value, True)
    assert squares(in_value, False) < squares(in_log, False)


def test_too_few_points() -> None:
    with pytest.raises(ValueError, match="at least two points"):
        Calibration.fit([(0.1, 100, 0.5), (0.2, 100, 0.95)])


def test_a_sparsity_is_reached() -> None:
    """Calibrated on some samples, the method comes near the wanted sparsity on another."""
    torch.manual_seed(1)

    def sample() -> tuple[torch.Tensor, ...]:
        place = torch.linspace(0.0, 1.0, 512)[:, None]
        field = torch.cos(40.0 * place * torch.randn(1, 16) + 6.3 * torch.rand(1, 16))
        noise = 0.3 * torch.randn(3, 1, 2, 512, 16)
        return tuple(2.0 * field + noise)

    samples = [sample() for _ in range(3)]
    fit = calibrate(samples[:2], block_q=32, block_k=32)
    q, k, v = samples[2]
    for wanted in (0.3, 0.5):
        method = fit.method(wanted, 512)
        told = sparline.tile_statistics(q, k, v, method=method)
        assert (method.block_q, method.block_k) == (32, 32)
        assert told.sparsity == pytest.approx(wanted, abs=0.15)


def test_save_and_load(tmp_path: Path) -> None:
    fit = Calibration(12.0, 3.4, 0.1, 0.8, 64, 64)
    fit.save(tmp_path / "fit.json")
    assert Calibration.load(tmp_path / "fit.json") == fit
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text(json.dumps({"a": 1}))
    for name in ("broken.json", "other.json"):
        with pytest.raises(ValueError, match=r"must be a file that Calibration\.save wrote"):
            Calibration.load(tmp_path / name)
    with pytest.raises(ValueError, match="sparsity must lie in"):
        fit.threshold(70, 100)
