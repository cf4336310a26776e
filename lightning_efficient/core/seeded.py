"""Code that draws from the global random generators, made reproducible without a trace in them."""

from __future__ import annotations

import contextlib
import hashlib
import random
import sys
from collections.abc import Iterator

import torch

__all__ = ["derive_seed", "seeded"]


def derive_seed(*parts: int) -> int:
    """A seed of 63 bits that any change of any of ``parts`` changes altogether."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global CPU generators of torch, ``random`` and NumPy within, and put them back afterwards.

    A GPU's generator is not touched: to seed it would wait for the GPU.
    """
    numpy = sys.modules.get("numpy")  # who has not imported it draws nothing from it
    torch_state, python_state = torch.default_generator.get_state(), random.getstate()
    numpy_state = numpy.random.get_state() if numpy else None
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if numpy:
        numpy.random.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.default_generator.set_state(torch_state)
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)
