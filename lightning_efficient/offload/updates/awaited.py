"""Parameters whose update is still to come: whoever computes with one makes it take place first.

However he came by it: in a list of his own, in an optimizer's groups, or by going over a module. The class of the
object sees to it, and changes back when the update begins.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lightning_efficient.offload.streaming.guarded import METADATA, instances

__all__ = ["Awaited", "await_no_more", "await_update"]

Used = Callable[[nn.Parameter], None]

_waiting: dict[int, Used] = {}  # by id of the parameter, which is kept alive by who is to be told


def await_update(parameter: nn.Parameter, used: Used) -> None:
    """Call ``used`` before anybody can compute with ``parameter``, which must then :func:`await_no_more` of it.

    One of a class of its own is left alone.
    """
    if type(parameter) is nn.Parameter:
        _waiting[id(parameter)] = used
        parameter.__class__ = Awaited


def await_no_more(parameters: Iterable[nn.Parameter]) -> None:
    """These are ordinary ones again."""
    for parameter in parameters:
        if _waiting.pop(id(parameter), None) is not None:
            parameter.__class__ = nn.Parameter


class Awaited(nn.Parameter):
    """A parameter that is updated when an operation is called with it; what only asks for its shape leaves it."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in METADATA:
            return super().__torch_function__(func, types, args, kwargs or {})
        return _call(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        _use(self)
        return copy.deepcopy(self, memo)

    def __reduce_ex__(self, proto: Any) -> Any:
        _use(self)
        return self.__reduce_ex__(proto)  # of another class now


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _call(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    for parameter in instances(Awaited, args, kwargs):
        _use(parameter)
    return func(*args, **kwargs)


def _use(parameter: nn.Parameter) -> None:
    if (used := _waiting.get(id(parameter))) is not None:
        used(parameter)
