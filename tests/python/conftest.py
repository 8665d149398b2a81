# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures. Every test runs with poisoned memory: torch fills what it does not initialise
with NaN (floats) or the largest value (integers), workspaces included, so that an element which is
never written, or read too early, shows.
"""

import os
from collections.abc import Iterator

# Waiting OpenMP threads sleep instead of spinning: on a busy machine the many tiny calls of these
# tests would otherwise take minutes. It has to be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import settings

settings.register_profile("sparline", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("sparline")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    num_threads = torch.get_num_threads()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
    torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs without a GPU."""
    name: str = request.param
    return name
