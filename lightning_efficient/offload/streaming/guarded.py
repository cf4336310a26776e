"""Parameters whose bytes may be away: whoever computes with one makes them come.

However he came by it: as a module's attribute, in a list of his own, or by going over all parameters. The class of the
object sees to it, and it changes back while a module is known to be at work with it: then operations run as ever.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import nn

from lightning_efficient.core.torch_internals import has_compatible_type

if TYPE_CHECKING:
    from lightning_efficient.offload.streaming.slots import Slot

__all__ = ["METADATA", "Guarded", "User", "guard", "instances"]

P = TypeVar("P", bound=nn.Parameter)


class User(Protocol):
    """Has parameters on the device while operations use them."""

    def using(self, slots: Sequence[Slot]) -> AbstractContextManager[None]:
        """Around an operation with these: their parameters are ordinary ones, and filled."""


_slots: weakref.WeakValueDictionary[int, Slot] = weakref.WeakValueDictionary()  # by id of the guarded parameter


def guard(parameter: nn.Parameter, slot: Slot) -> None:
    """From now on whoever uses it makes the slot's user provide it."""
    _slots[id(parameter)] = slot
    parameter.__class__ = Guarded


def _slot_of(parameter: Any) -> Slot:
    slot = _slots.get(id(parameter))
    if slot is None:
        raise RuntimeError(
            f"A parameter of shape {list(parameter.shape)} was streamed, and its ParameterStream is gone, which was "
            "the only one to know its value. Keep the stream, or the module, or detach() it first."
        )
    return slot


class Guarded(nn.Parameter):
    """A parameter whose bytes may be away, and are fetched when an operation is called with it.

    What only asks for its shape, its gradient and the like does not fetch it.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA or (func in _TO_ITSELF and args[0] is args[1]):
            return super().__torch_function__(func, types, args, kwargs)
        if func == _SET_DATA:
            raise RuntimeError(
                f"Parameter '{_slot_of(args[0]).names[0]}' is streamed: its memory cannot be exchanged by "
                "'.data = ...'. Copy the value into it, with parameter.copy_(value) under torch.no_grad()."
            )
        return _call(func, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with _users([_slot_of(self)]):
            return copy.deepcopy(self, memo)

    def __reduce_ex__(self, proto: Any) -> Any:
        raise TypeError(
            f"Parameter '{_slot_of(self).names[0]}' is streamed and cannot be pickled. Save its value: "
            "parameter.detach().clone(), or the module's state_dict()."
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _call(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    slots = list(dict.fromkeys(_slot_of(parameter) for parameter in instances(Guarded, args, kwargs)))
    with _users(slots):
        if func == _GET_DATA or getattr(func, "__name__", "").startswith("_fused_"):  # these leave no trace of changes
            for slot in slots:
                slot.mark_changed()
        return func(*args, **kwargs)


@contextlib.contextmanager
def _users(slots: list[Slot]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for user in dict.fromkeys(slot.user for slot in slots):
            if user is not None:
                stack.enter_context(user.using([slot for slot in slots if slot.user is user]))
        yield


_GET_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_TO_ITSELF = (torch.Tensor.copy_, _SET_DATA)  # as modules do when there is nothing to convert or to load
_PROPERTIES = [
    "_backward_hooks", "_grad", "_post_accumulate_grad_hooks", "_version", "device", "dtype", "grad", "grad_dtype",
    "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_nested", "is_quantized", "is_sparse", "itemsize",
    "layout", "names", "nbytes", "ndim", "output_nr", "requires_grad", "retains_grad", "shape",
]  # fmt: skip
_METHODS = [
    "__len__", "dim", "element_size", "get_device", "is_complex", "is_contiguous", "is_floating_point", "is_inference",
    "is_signed", "ndimension", "nelement", "new_empty", "new_full", "new_ones", "new_zeros", "numel", "register_hook",
    "register_post_accumulate_grad_hook", "requires_grad_", "retain_grad", "size", "storage_offset", "stride",
    "untyped_storage",
]  # fmt: skip
_FUNCTIONS = [
    "empty_like", "full_like", "is_complex", "is_floating_point", "numel", "ones_like", "rand_like", "randn_like",
    "zeros_like",
]  # fmt: skip
METADATA: set[Any] = {getattr(torch, name) for name in _FUNCTIONS} | {has_compatible_type}
METADATA |= {getattr(torch.Tensor, name) for name in _METHODS}
for _name in _PROPERTIES:
    if (_property := getattr(torch.Tensor, _name, None)) is not None:
        METADATA |= {_property.__get__, _property.__set__} if hasattr(_property, "__set__") else {_property.__get__}


def instances(kind: type[P], *values: Any) -> Iterator[P]:
    """The parameters of exactly this class among the arguments of an operation, and in their containers."""
    for value in values:
        if type(value) is kind:
            yield value
        elif isinstance(value, list | tuple):
            yield from instances(kind, *value)
        elif isinstance(value, dict):
            yield from instances(kind, *value.values())
