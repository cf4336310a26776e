"""The parts of a model whose parameters are fetched together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lightning_efficient.core.torch_internals import compiled_entry
from lightning_efficient.offload.streaming.slots import Slot

__all__ = ["Part", "choose_parts", "is_compiled", "used_at_once"]

_SHARE = 4  # a part that can be split has at most this fraction of the budget: others are fetched and written beside it

# These use the parameters of their children without calling them, or hand them to one operation.
_WHOLE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.RNNBase)
_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, eq=False)
class Part:
    """Parameters that are fetched together.

    Attributes:
        name: Of the module, or of the module whose own parameters they are.
        module: Before whose forward they are fetched; None: each when it is used.
        slots: The memory of the parameters.
    """

    name: str
    module: nn.Module | None
    slots: tuple[Slot, ...]

    @property
    def nbytes(self) -> int:
        """Of all of its parameters."""
        return sum(slot.nbytes for slot in self.slots)


def is_compiled(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs code that ``torch.compile`` made of all that is in it."""
    return compiled_entry(module) is not None


def used_at_once(module: nn.Module) -> dict[str, list[str]]:
    """The names of the parameters that cannot be fetched one after another, by the name of the module that uses them.

    They are a module's own, or all of one that is a part as a whole.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found: dict[str, list[str]] = {}

    def walk(path: str, one: nn.Module) -> None:
        whole = isinstance(one, _WHOLE) or is_compiled(one)
        if used := [names[id(parameter)] for parameter in one.parameters(recurse=whole)]:
            found[path] = used
        for child, below in () if whole else one.named_children():
            walk(f"{path}.{child}" if path else child, below)

    walk("", module)
    return found


def choose_parts(
    module: nn.Module, slots: Sequence[Slot], budget_bytes: int, named: Sequence[str] | None = None
) -> list[Part]:
    """Parts that together have all slots, in the order in which ``module`` names them.

    A slot whose parameters are used in several parts is in each of them.

    Args:
        module: The model.
        slots: The memory that is streamed.
        budget_bytes: What may be on the device at once; each part fits well under it where it can be split.
        named: Modules that are parts, by name; what is not in them is split as ever.

    Raises:
        ValueError: If a part does not fit, or a name is not that of a module with streamed parameters, or a module is
            of a kind that cannot be a part.
    """
    found = _Choice(slots, budget_bytes, frozenset(named or ()))
    for name in named or ():
        if name not in dict(module.named_modules()):
            raise ValueError(f"units: '{name}' is not a module. Names are those of named_modules().")
        if not found.slots_in(module.get_submodule(name)):
            raise ValueError(f"units: module '{name}' has no parameter that is placed. Leave it out.")
    found.walk("", module)
    for part in found.parts:
        if part.nbytes > budget_bytes:
            raise ValueError(
                f"Module '{part.name}' needs {part.nbytes} bytes of parameters at once, more than "
                f"budget_bytes={budget_bytes}. Raise the budget, or place fewer of its parameters."
            )
    return found.parts


class _Choice:
    def __init__(self, slots: Sequence[Slot], budget_bytes: int, named: frozenset[str]) -> None:
        self._slots = {id(parameter): slot for slot in slots for parameter in slot.parameters}
        self._most = budget_bytes // _SHARE
        self._named = named
        self._seen: set[int] = set()
        self.parts: list[Part] = []

    def slots_in(self, module: nn.Module, recurse: bool = True) -> tuple[Slot, ...]:
        parameters = module.parameters(recurse)
        return tuple(dict.fromkeys(self._slots[id(one)] for one in parameters if id(one) in self._slots))

    def walk(self, name: str, module: nn.Module) -> None:
        slots = self.slots_in(module)
        if not slots or id(module) in self._seen:
            return
        self._seen.add(id(module))
        whole = isinstance(module, _WHOLE) or is_compiled(module)
        holds_named = any(other != name and (other.startswith(f"{name}.") or not name) for other in self._named)
        if name in self._named and isinstance(module, _NEVER_CALLED):
            raise ValueError(f"units: '{name}' is a {type(module).__name__}, which is never called. Name its elements.")
        fits = bool(name) and not holds_named and sum(slot.nbytes for slot in slots) <= self._most
        if name in self._named or whole or (fits and not isinstance(module, _NEVER_CALLED)):
            self.parts.append(Part(name, module, slots))
            return
        if own := self.slots_in(module, recurse=False):
            has_others = len(own) < len(slots)
            self.parts.append(Part(name, None if has_others else module, own))
        for child, sub in module._modules.items():
            if sub is not None:
                self.walk(f"{name}.{child}" if name else child, sub)
