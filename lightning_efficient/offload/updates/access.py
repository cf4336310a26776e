"""Being told when code is about to use a parameter, whichever way it gets at it.

Modules hand out parameters through ``nn.Module.__getattr__``, which looks into ``_parameters``; here that dict becomes
one that says so first. That also sees a parameter that is used by another module than its own (tied weights,
``nn.MultiheadAttention`` with its ``out_proj``) and all that walks over modules (``state_dict``, averaging). Modules
that keep references of their own (recurrent ones) are seen by a hook before their forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_efficient.core.torch_internals import compiled_entry, forward_is_compiled

__all__ = ["ParameterWatch"]

Used = Callable[[nn.Parameter], None]


class _Watched(dict[str, Any]):
    """A module's parameters; whoever takes one out is announced before."""

    def __init__(self, parameters: Mapping[str, Any], used: Used) -> None:
        super().__init__(parameters)
        self._used = used

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _announced(self, parameter: Any) -> Any:
        if parameter is not None:
            self._used(parameter)
        return parameter

    def __getitem__(self, name: str) -> Any:
        return self._announced(super().__getitem__(name))

    def get(self, name: str, default: Any = None) -> Any:
        return self._announced(super().get(name, default))

    def values(self) -> Any:
        return [self._announced(parameter) for parameter in super().values()]

    def items(self) -> Any:
        return [(name, self._announced(parameter)) for name, parameter in super().items()]

    def pop(self, name: str, *default: Any) -> Any:
        return self._announced(super().pop(name, *default))

    def copy(self) -> dict[str, Any]:
        return dict(self.items())

    def __reduce__(self) -> Any:  # copies and pickles are of an ordinary module
        return dict, (self.items(),)

    def unwatched(self) -> Iterator[tuple[str, Any]]:
        return iter(super().items())


class ParameterWatch:
    """Calls ``used`` with a parameter before code that goes through the modules can read it.

    Attributes:
        unseen: Parameters whose use cannot be seen.

    Args:
        module: With all below it.
        used: Must be quick: it is called for every access.
    """

    def __init__(self, module: nn.Module, used: Used) -> None:
        self._used = used
        self.unseen: list[nn.Parameter] = []
        self._watched: list[nn.Module] = []
        self._handles: list[RemovableHandle] = []
        self._attach(module)

    def detach(self) -> None:
        """The modules are ordinary ones again."""
        for module in self._watched:
            parameters = module._parameters
            if isinstance(parameters, _Watched):
                module._parameters = dict(parameters.unwatched())
        self._watched.clear()
        while self._handles:
            self._handles.pop().remove()

    def _attach(self, module: nn.Module) -> None:
        if compiled_entry(module) is not None or forward_is_compiled(
            module
        ):  # compiled code reads parameters in ways of its own
            self.unseen += module.parameters()
        else:
            own = [parameter for parameter in module._parameters.values() if parameter is not None]
            if own and isinstance(module, nn.RNNBase):
                self._handles.append(module.register_forward_pre_hook(lambda *_: self._all_used(own)))
            if own:
                module._parameters = _Watched(module._parameters, self._used)
                self._watched.append(module)
            for child in module.children():
                self._attach(child)

    def _all_used(self, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            self._used(parameter)
