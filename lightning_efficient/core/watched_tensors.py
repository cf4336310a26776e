"""Tensors that a step changes, put back as they were before it, without a copy of those that it leaves alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_efficient.core.torch_internals import tensor_version

__all__ = ["Slot", "WatchedTensors", "buffer_slots"]

_SMALL = 1 << 16  # bytes


@dataclass(frozen=True)
class Slot:
    """An attribute that holds a tensor, or a list of tensors that only grows.

    Attributes:
        path: Its name, for messages.
        owner: The object.
        name: The attribute.
    """

    path: str
    owner: Any
    name: str


def buffer_slots(module: nn.Module) -> list[Slot]:
    """The buffers of a module and its parts."""
    return [
        Slot(f"{path}.{name}" if path else name, part, name)
        for path, part in module.named_modules()
        for name, _ in part.named_buffers(recurse=False)
    ]


class WatchedTensors:
    """Puts tensors back that a step changes in place, or puts others in the place of.

    Small tensors are copied before each step. Of the larger ones, in the first step all are, and later those that steps
    are seen to change: which a change that hides from autograd (through ``.data``) is not.

    Args:
        slots: Where the tensors are.
    """

    def __init__(self, slots: Iterable[Slot]) -> None:
        self._slots = list(slots)
        self._changing: set[int] | None = None
        self._kept: list[tuple[Any, int, Any]] = []  # the object, its version, and a copy or None

    def keep(self) -> None:
        """A step begins."""
        self._kept = []
        for i, slot in enumerate(self._slots):
            value = getattr(slot.owner, slot.name)
            if isinstance(value, list):
                self._kept.append((value, 0, list(value)))
            else:
                copied = value.nbytes <= _SMALL or self._changing is None or i in self._changing
                self._kept.append((value, tensor_version(value), value.detach().clone() if copied else None))

    def succeeded(self) -> None:
        """The step is done: what it changed is copied the next time, and the copies are let go."""
        changed = {i for i, slot in enumerate(self._slots) if self._is_changed(i, slot)}
        self._changing = changed if self._changing is None else self._changing | changed
        self._kept = []

    def lost(self) -> list[str]:
        """Names of what the step changed for the first time, so that there is no copy."""
        return [
            slot.path
            for i, (slot, (value, version, copy)) in enumerate(zip(self._slots, self._kept, strict=True))
            if copy is None and self._is_changed(i, slot) and tensor_version(value) != version
        ]

    def back(self) -> None:
        """As the step began; what there is no copy of stays."""
        for slot, (value, _, copy) in zip(self._slots, self._kept, strict=True):
            if isinstance(value, list):
                value[:] = copy
            elif copy is not None and not value.is_inference():
                with torch.no_grad():
                    value.copy_(copy)
            if getattr(slot.owner, slot.name) is not value:
                setattr(slot.owner, slot.name, value)

    def _is_changed(self, i: int, slot: Slot) -> bool:
        value, version, _ = self._kept[i]
        return getattr(slot.owner, slot.name) is not value or (
            not isinstance(value, list) and tensor_version(value) != version
        )
