"""Parameters that autograd saves for backward are there when backward uses them, and may be away until then."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_efficient.core.torch_internals import (
    innermost_saved_tensors_hooks,
    is_of_checkpointing,
    saved_tensors_hooks_are_allowed,
)
from lightning_efficient.offload.streaming.guarded import Guarded
from lightning_efficient.offload.streaming.slots import Slot

__all__ = ["SavedParameters", "Streamed"]

_PLAIN = (Tensor, nn.Parameter, Guarded)


class Streamed(Protocol):
    """Knows what is streamed."""

    def slot_at(self, address: int) -> Slot | None:
        """The slot whose memory is there."""

    def fetched(self, slot: Slot, view: Callable[[], Tensor]) -> Tensor:
        """``view()``, which holds the slot's memory, and so keeps it on the device."""


class _Parameter:
    """A view of a parameter's memory, without holding it."""

    __slots__ = ("geometry", "index", "slot", "version")

    def __init__(self, slot: Slot, tensor: Tensor) -> None:
        self.slot = slot
        self.geometry = tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()
        self.index = slot.index_at(int(tensor.storage_offset()) * tensor.element_size())
        self.version = slot.version(self.index)

    def view(self) -> Tensor:
        dtype, shape, stride, offset = self.geometry
        return self.slot.bytes.view(dtype).as_strided(shape, stride, offset)


class _Other:
    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.version = tensor._version


class SavedParameters:
    """Hooks for saved tensors that see parameters, and leave all else to the hooks that were there before.

    Args:
        streamed: Is asked, and told.
    """

    def __init__(self, streamed: Streamed) -> None:
        self._streamed = streamed

    @contextlib.contextmanager
    def seen(self, *, one_operation: bool = False) -> Iterator[None]:
        """Within it the parameters that this thread's operations save are seen, where hooks are allowed.

        Args:
            one_operation: It is for a single operation. Where activation checkpointing is going on, that is left alone:
                it counts what is saved, keeps nothing in forward, and in backward has views, which hold the memory.
        """
        outer = innermost_saved_tensors_hooks()
        ours = outer is not None and self._is_ours(outer[0])
        if ours or not saved_tensors_hooks_are_allowed() or (one_operation and outer and is_of_checkpointing(outer[0])):
            yield
            return
        hooks = _Hooks(self._streamed, *(outer or (None, None)))
        with saved_tensors_hooks(hooks.pack, hooks.unpack):
            yield

    def _is_ours(self, pack: Any) -> bool:
        hooks = getattr(pack, "__self__", None)
        return isinstance(hooks, _Hooks) and hooks.streamed is self._streamed


class _Hooks:
    def __init__(
        self, streamed: Streamed, pack: Callable[[Tensor], Any] | None, unpack: Callable[[Any], Tensor] | None
    ) -> None:
        self.streamed = streamed
        self._outer_pack = pack
        self._outer_unpack = unpack

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def pack(self, tensor: Tensor) -> Any:
        if type(tensor) in _PLAIN and tensor.layout is torch.strided:  # not those that compilers trace with
            slot = self.streamed.slot_at(tensor.untyped_storage().data_ptr())
            if slot is not None:
                return _Parameter(slot, tensor)
        return _Other(tensor) if self._outer_pack is None else self._outer_pack(tensor)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def unpack(self, packed: Any) -> Tensor:
        if type(packed) is _Parameter:
            slot = packed.slot
            _check(packed.version, slot.version(packed.index), f"the parameter '{slot.names[packed.index]}'")
            return self.streamed.fetched(slot, packed.view)
        if type(packed) is _Other:
            tensor: Tensor = packed.tensor
            _check(packed.version, tensor._version, f"a {tensor.dtype} tensor of shape {list(tensor.shape)}")
            return tensor
        if self._outer_unpack is None:
            raise TypeError(f"A {type(packed).__name__} was not packed here.")
        return self._outer_unpack(packed)


def _check(saved: int, now: int, what: str) -> None:
    """As autograd does where it has no hooks."""
    if saved != now:
        raise RuntimeError(
            f"one of the variables needed for gradient computation has been modified by an inplace operation: {what} "
            f"is at version {now}; expected version {saved} instead."
        )
