"""The states of every random generator of all ranks, in a checkpoint that one of them writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lightning_efficient.core.random_state import random_state, restore_random_state

__all__ = ["RandomStates"]


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
