"""What every growth test starts from: one thread, one seed, and a few small ready-made networks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.growth.networks import Residual, arrangement_of


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def net() -> Residual:
    """Six equal layers of width 4 in float64, with embed and head around them."""
    return Residual(6).double()


@pytest.fixture
def shared_net() -> tuple[Residual, object]:
    """Six layers, a unit of two shared three times."""
    network = Residual(6).double()
    arrangement = arrangement_of(network)
    arrangement.arrange((0, 1, 0, 1, 0, 1))
    return network, arrangement


@pytest.fixture
def batch() -> torch.Tensor:
    return torch.randn(5, 3, dtype=torch.float64)
