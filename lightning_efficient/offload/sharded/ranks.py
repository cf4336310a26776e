"""The ranks of a run, and how they agree that all of them can go on.

What one rank does alone (its disk, its memory) can fail there alone. The others would wait for it in their next
collective for ever; so each such piece of work ends with the question whether all have done it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["FirstError", "OtherRankError", "Ranks"]


class OtherRankError(RuntimeError):
    """Another rank cannot go on; the message says which, and why."""


class FirstError:
    """Keeps the first error of several pieces of work, each in a ``with`` block, so that all of them are come through.

    Attributes:
        error: The first one; None while there is none.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        self.error = self.error or error
        return True


class Ranks:
    """The default process group, which must have been initialized.

    Attributes:
        rank: Of this process.
        size: How many there are.
        on_host: How many of them share the memory of this one's host.
        device: On which tensors can be sent from one rank to another.

    Args:
        device: On which this rank computes.
        on_host: How many ranks are on its host.
    """

    def __init__(self, device: torch.device, on_host: int = 1) -> None:
        self.on_host = on_host
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        only_host = device.type == "cpu" or dist.get_backend() == "gloo"
        self.device = torch.device("cpu") if only_host else device

    def agree(self, error: Exception | None) -> None:
        """Go on if no rank has an error; all of them must call it.

        Raises:
            OtherRankError: If another rank has one. A rank that has one itself raises that.
        """
        failed = torch.tensor(int(error is not None), device=self.device)
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        if not failed.item():
            return
        said = self.tell(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            error.add_note(f"(on rank {self.rank} of {self.size})")
            raise error
        told = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(said) if text is not None)
        raise OtherRankError(f"Another rank cannot go on, and this one ends with it. {told}")

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """Around what each rank does alone, without waiting for others in it; see :meth:`agree`."""
        first = FirstError()
        with first:
            yield
        self.agree(first.error)

    def tell(self, thing: Any) -> list[Any]:
        """What each rank gives, by rank; for small things that can be pickled."""
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, thing)
        return told
