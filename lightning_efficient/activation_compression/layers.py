"""Which module's forward is going on."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

from torch import nn

__all__ = ["follow_modules", "is_in", "outermost"]


@contextlib.contextmanager
def follow_modules(module: nn.Module, layers: list[str], compiled: Collection[str] = ()) -> Iterator[None]:
    """Within it, ``layers`` has the names of the modules in ``module`` whose forward is going on, outermost first.

    Not of the ``compiled`` ones and those in them: their hooks would be compiled too.
    """
    with contextlib.ExitStack() as hooks:
        for name, part in module.named_modules():
            if name and not any(is_in(name, other) for other in compiled):
                hooks.enter_context(part.register_forward_pre_hook(partial(_enter, layers, name), prepend=True))
                hooks.enter_context(part.register_forward_hook(partial(_leave, layers, name), always_call=True))
        yield


def outermost(names: Collection[str]) -> list[str]:
    """Names of the modules that are in no other of them."""
    return [name for name in names if not any(name != other and is_in(name, other) for other in names)]


def is_in(name: str, other: str) -> bool:
    """Whether the module ``name`` is ``other`` or in it."""
    return not other or name == other or name.startswith(f"{other}.")


def _enter(layers: list[str], name: str, *_: Any) -> None:
    layers.append(name)


def _leave(layers: list[str], name: str, *_: Any) -> None:
    if layers and layers[-1] == name:
        layers.pop()
