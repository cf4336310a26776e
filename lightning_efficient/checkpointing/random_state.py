"""The state of every random generator of the process, as plain data, and back."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["RandomStates", "random_state", "restore_random_state"]


def random_state() -> dict[str, Any]:
    """Of torch on the CPU and on all CUDA devices in use, of Python's ``random`` and, if it is imported, of NumPy.

    The result loads under ``torch.load(weights_only=True)``.
    """
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [version, list(words), gauss]}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if numpy := sys.modules.get("numpy"):
        name, keys, position, has_gauss, cached = numpy.random.get_state()
        state["numpy"] = [name, torch.from_numpy(keys.astype("int64")), int(position), int(has_gauss), float(cached)]
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Go back to what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    if "cuda" in state and torch.cuda.is_available():
        for device, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(device_state, device)
    if "numpy" in state:
        import numpy

        name, keys, position, has_gauss, cached = state["numpy"]
        numpy.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, cached))


class RandomStates:
    """Those of all ranks, in a checkpoint that one of them writes."""

    def __init__(self) -> None:
        self._restored: Mapping[str, Any] | None = None

    def gather(self, world_size: int) -> dict[str, Any]:
        """The states by rank; to be called on all ``world_size`` ranks of the run."""
        states = [random_state()]
        if world_size > 1:
            states *= world_size
            torch.distributed.all_gather_object(states, states[0])
        return {"ranks": states}

    def restore(self, gathered: Mapping[str, Any]) -> None:
        """Go back to this rank's state; with another number of ranks, only rank zero can."""
        world_size, rank = _world()
        states = gathered["ranks"]
        if rank == 0 or len(states) == world_size:
            self._restored = states[rank]
            restore_random_state(states[rank])

    def restore_again(self) -> None:
        """Once more, as training goes on: what was drawn since then the run had drawn before, or draws later."""
        if self._restored is not None:
            restore_random_state(self._restored)
        self._restored = None


def _world() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0
