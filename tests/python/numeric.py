# SPDX-License-Identifier: Apache-2.0
"""The one metric of the Python tests.

The relative rule: both the result under test and plain PyTorch of the same precision are compared
with the exact (float64) result, and ours may be at most twice as far off, plus a rounding floor of
a few units in the last place of the largest exact element.
"""

import math

import torch
from torch import Tensor

FLOOR_ULPS = 16.0
OVERFLOW_TOLERANCE = 0.01


def max_error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; equal infinities agree, NaN never does."""
    actual, exact = actual.double(), exact.double()
    if actual.numel() == 0:
        return 0.0
    difference = torch.where(actual == exact, torch.zeros_like(exact), (actual - exact).abs())
    error = difference.max().item()
    return float("inf") if difference.isnan().any() else error


def assert_relative(
    what: str,
    actual: Tensor,
    exact: Tensor,
    same_precision: Tensor,
    dtype: torch.dtype,
    magnitude: float = 0.0,
) -> None:
    """Asserts the relative rule.

    ``dtype`` is the storage dtype whose rounding is the floor; ``magnitude`` the size of the terms
    whose difference the result is, where that may be larger than the result.
    """
    assert actual.shape == exact.shape, f"{what}: shape {actual.shape}, expected {exact.shape}"
    finite = exact[exact.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    floor = FLOOR_ULPS * torch.finfo(dtype).eps * max(largest, magnitude)
    plain = max_error(same_precision, exact)
    if not math.isfinite(plain):  # plain PyTorch overflows where we must not
        plain = OVERFLOW_TOLERANCE * largest
    error, allowed = max_error(actual, exact), 2.0 * plain + floor
    assert error <= allowed, f"{what}: error {error:.3e} > {allowed:.3e} (largest {largest:.3e})"


def assert_close(what: str, actual: Tensor, exact: Tensor, tolerance: float) -> None:
    """Asserts max-abs error <= tolerance x max(1, largest exact element)."""
    assert actual.shape == exact.shape, f"{what}: shape {actual.shape}, expected {exact.shape}"
    finite = exact[exact.isfinite()]
    largest = max(1.0, finite.abs().max().item() if finite.numel() else 0.0)
    error = max_error(actual, exact)
    assert error <= tolerance * largest, f"{what}: error {error:.3e} > {tolerance * largest:.3e}"


def relative_l2(actual: Tensor, exact: Tensor) -> float:
    actual, exact = actual.double(), exact.double()
    return ((actual - exact).norm() / exact.norm()).item()
