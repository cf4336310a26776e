"""The moment before a weight update: what the update will overwrite must have been copied by then, and no sooner.

(Mohan et al. 2021, "CheckFreq", 4.3.1: the snapshot of iteration i ends before the update of iteration i + 1 starts.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from lightning_efficient.checkpointing.snapshot import Snapshot
from lightning_efficient.core.before_update import right_before_update
from lightning_efficient.core.torch_internals import local_part, storage_key

__all__ = ["UpdateBarrier", "owned_tensors"]


def owned_tensors(optimizer: Optimizer) -> Iterator[Tensor]:
    """The tensors that only a step of ``optimizer`` changes: its parameters and its state, as far as they are here."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            values = (parameter, *optimizer.state.get(parameter, {}).values())
            yield from (local_part(value) for value in values if isinstance(value, Tensor))


class UpdateBarrier:
    """Makes any optimizer's update wait for the copies of what it changes, and for no longer.

    It stands behind the closure, in which Lightning runs forward, backward and clipping.

    Args:
        on_stall: Called with the seconds that an update waited.

    Attributes:
        before_updates: Called with each optimizer before its update, until it returns True.
    """

    def __init__(self, on_stall: Callable[[float], None] = lambda _: None) -> None:
        self._on_stall = on_stall
        self.before_updates: Callable[[Optimizer], bool] | None = None
        self._handle: RemovableHandle | None = None
        self._snapshots: list[tuple[Snapshot, Mapping[tuple[int, int], int]]] = []

    @property
    def attached(self) -> bool:
        return self._handle is not None

    def attach(self) -> None:
        """Stand before the updates of all optimizers of this process."""
        if self._handle is None:
            itself = weakref.ref(self)  # the hook is global, and must not keep alive who forgets to detach

            def before(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
                barrier = itself()
                return barrier._before(optimizer, args, kwargs) if barrier else None

            self._handle = register_optimizer_step_pre_hook(before)  # type: ignore[arg-type]

    def detach(self) -> None:
        """Stand there no more."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def protect(self, snapshot: Snapshot, numbers: Mapping[tuple[int, int], int]) -> None:
        """Let updates wait for what ``snapshot`` has not copied yet.

        Args:
            snapshot: Just begun.
            numbers: Of its storages, by :func:`storage_key`.
        """
        self._snapshots.append((snapshot, numbers))

    def wait(self) -> float:
        """Wait for all copies, where weights may change without an optimizer.

        Returns:
            Seconds.
        """
        waited = sum(snapshot.wait(numbers.values()) for snapshot, numbers in self._snapshots)
        self._snapshots.clear()
        return waited

    def _before(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
        if not self._snapshots and self.before_updates is None:
            return None
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "A CUDA graph is captured around an optimizer's step while a checkpoint is copied, for which the graph "
                "would then wait at each replay. Capture before the first checkpoint."
            )
        return right_before_update(lambda: self._wait_for(optimizer), args, kwargs)

    def _wait_for(self, optimizer: Optimizer) -> None:
        if self.before_updates is not None and self.before_updates(optimizer):
            self.before_updates = None
        stalled = 0.0
        for snapshot, numbers in self._snapshots:
            keys = (storage_key(tensor.untyped_storage()) for tensor in owned_tensors(optimizer))
            stalled += snapshot.wait([numbers[key] for key in keys if key in numbers])
        self._snapshots = [(snapshot, numbers) for snapshot, numbers in self._snapshots if not snapshot.settled]
        self._on_stall(stalled)
