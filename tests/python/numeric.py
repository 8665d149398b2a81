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
    slack: float = 0.0,
) -> None:
    """Asserts the relative rule.

    ``dtype`` is the storage dtype whose rounding is the floor; ``magnitude`` the size of the terms
    whose difference the result is, where that may be larger than the result; ``slack`` an error,
    relative to the larger of both, that the definition leaves open.
    """
    assert actual.shape == exact.shape, f"{what}: shape {actual.shape}, expected {exact.shape}"
    finite = exact[exact.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    floor = (FLOOR_ULPS * torch.finfo(dtype).eps + slack) * max(largest, magnitude)
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


def assert_low_bit(
    what: str, actual: Tensor, exact: Tensor, dtype: torch.dtype, magnitude: float = 0.0
) -> None:
    """Asserts that two quantised results agree up to single rounding steps.

    Both sides round the same numbers, but one of them computes those in float32, so that here and
    there a number next to the middle of two steps falls on the other side. A step of e4m3 is up to
    1/8 of one probability or value, which bounds the largest error; the rarity bounds the rest.
    ``magnitude`` as in ``assert_relative``: d_o . o takes o as it was rounded for storage.
    """
    assert actual.shape == exact.shape, f"{what}: shape {actual.shape}, expected {exact.shape}"
    actual, exact = actual.double(), exact.double()
    largest, size = exact.abs().max().item(), exact.norm().item()
    epsilon = torch.finfo(dtype).eps
    rounding = 1e-5 + 0.5 * epsilon * magnitude
    error, bound = max_error(actual, exact), (0.125 + 16 * epsilon) * largest + 16 * rounding
    assert error <= bound, f"{what}: error {error:.3e} > {bound:.3e} (largest {largest:.3e})"
    bound = (5e-3 + 0.5 * epsilon) * size + rounding * exact.numel() ** 0.5
    error = (actual - exact).norm().item()
    assert error <= bound, f"{what}: L2 error {error:.3e} > {bound:.3e} (of {size:.3e})"


def assert_low_bit_lse(actual: Tensor, exact: Tensor) -> None:
    """The same for lse: a step of int8 in q or k moves a score by some hundredths at most."""
    assert torch.equal(actual.isinf(), exact.isinf()), "lse: other rows are empty"
    difference = (actual.double() - exact.double())[exact.isfinite()]
    error, mean = max_error(actual, exact), difference.square().mean().sqrt().nan_to_num().item()
    assert error <= 0.05, f"lse: error {error:.3e}"
    assert mean <= 5e-3, f"lse: root mean square error {mean:.3e}"
