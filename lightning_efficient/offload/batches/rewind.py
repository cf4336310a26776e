"""What a step has changed by the time it fails, put back, so that it can begin again as if nothing had happened."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_efficient.core.torch_internals import tensor_version
from lightning_efficient.offload.batches.free_memory import free_bytes

__all__ = ["KeptGradients", "Slot", "WatchedTensors", "buffer_slots"]

_SMALL = 1 << 16  # bytes
_HOST_SHARE = 0.5  # of the host's free memory that copies of gradients may take


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


class KeptGradients:
    """The gradients of earlier batches, to which a step adds its own.

    Those that are not there are taken away again, which costs nothing; of the others there are copies in the host's
    memory, if it has room.

    Args:
        module: The gradients' parameters are its.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._copies: dict[nn.Parameter, Tensor] = {}
        self._kept: list[tuple[nn.Parameter, Tensor | None]] | None = None

    def keep(self) -> bool:
        """A backward pass begins; returns whether :meth:`back` will be possible."""
        self._kept = None
        there = {p: p.grad for p in self._parameters() if p.grad is not None}
        new = {p: g for p, g in there.items() if not self._fits(self._copies.get(p), g)}
        needed = sum(g.numel() * g.element_size() for g in new.values())
        if needed and needed > _HOST_SHARE * free_bytes(torch.device("cpu")):
            return False
        for parameter, gradient in new.items():
            if gradient.layout is not torch.strided:
                continue
            pinned = gradient.device.type == "cuda"
            self._copies[parameter] = torch.empty(gradient.shape, dtype=gradient.dtype, pin_memory=pinned)
        for parameter, gradient in there.items():
            if gradient.layout is torch.strided:
                self._copies[parameter].copy_(gradient, non_blocking=True)  # in the stream's order, as is the way back
            else:
                self._copies[parameter] = gradient.detach().clone()
        self._kept = [(p, self._copies[p] if p in there else None) for p in self._parameters()]
        return True

    def forget(self) -> None:
        """The step is done; the memory of the copies stays for the next ones."""
        self._kept = None

    def back(self) -> None:
        """As the backward pass began; nothing if none did."""
        for parameter, copy in self._kept or ():
            if copy is None:
                parameter.grad = None
            elif parameter.grad is None or copy.layout is not torch.strided:
                parameter.grad = copy.to(parameter.device, copy=True)
            else:
                parameter.grad.copy_(copy, non_blocking=True)

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self._module.parameters() if parameter.requires_grad)

    @staticmethod
    def _fits(copy: Tensor | None, gradient: Tensor) -> bool:
        return copy is not None and (copy.shape, copy.dtype, copy.layout) == (
            gradient.shape,
            gradient.dtype,
            gradient.layout,
        )
