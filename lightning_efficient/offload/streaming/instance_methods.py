"""Methods of single modules that run inside other code, until that is taken away again.

Hooks would do for most of it. But modules look at each other's hooks (``nn.TransformerEncoderLayer`` leaves its fast
path where there are any), and hooks do not run for ``module.forward(x)``, nor when Ctrl-C ends a forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["InstanceMethod"]


class InstanceMethod:
    """Is called instead of a method of one module.

    Args:
        module: Where ``name`` is looked up.
        name: Of the method.
        around: Is called with the method, and with its arguments.
    """

    def __init__(self, module: nn.Module, name: str, around: Callable[..., Any]) -> None:
        original = getattr(module, name)
        functools.update_wrapper(self, original, updated=())
        self._original = original
        self._around: Callable[..., Any] | None = around
        self._place = vars(module), name
        self._before = vars(module).get(name)
        vars(module)[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._around is None:  # somebody has kept it
            return self._original(*args, **kwargs)
        return self._around(self._original, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> InstanceMethod:
        raise TypeError(_NO_COPY)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(_NO_COPY)

    def remove(self) -> None:
        """The module has its own method again."""
        self._around = None
        attributes, name = self._place
        if attributes.get(name) is self:
            if self._before is None:
                del attributes[name]
            else:
                attributes[name] = self._before


_NO_COPY = (
    "A module whose parameters are streamed cannot be copied or pickled, for most of its parameters are not in memory. "
    "Copy it before the ParameterStream is made or after its detach(), or save its state_dict()."
)
