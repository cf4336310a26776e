"""What the operations of a network are called: by their weight's module, or numbered in the order of their calls."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Hashable, Iterable

from torch import Tensor, nn

__all__ = ["Names"]

_COMPILED = "_orig_mod"  # the module within one that torch.compile made


class Names:
    """Of the parameters of a module, and of what has none."""

    def __init__(self) -> None:
        self._module: nn.Module | None = None
        self._known: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._in_memory: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._strangers: set[int] = set()
        self._others: set[int] = set()
        self._places: Counter[str] = Counter()
        self._of_site: dict[Hashable, list[str]] = {}
        self._alike: dict[Hashable, list[str]] = {}

    def begin(self, module: nn.Module | None) -> None:
        """A step begins."""
        self._module = module
        self._others.clear()
        self._strangers.clear()
        self._places.clear()
        self._of_site.clear()
        self._alike.clear()

    def forget(self) -> None:
        """Parameters came or went."""
        self._known.clear()
        self._in_memory.clear()

    def of(self, tensor: Tensor) -> str:
        """Of the module that has it as a parameter; or empty."""
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        if isinstance(tensor, nn.Parameter) and id(tensor) not in self._others:
            self._others.add(id(tensor))  # walked for once a step, if it is nobody's
            self._walk()  # with FSDP2 parameters are there only while their module computes
            return self.of(tensor)
        return ""

    def parameter(self, tensor: Tensor) -> tuple[Tensor, str]:
        """The parameter whose memory a tensor is, and its name; the tensor and an empty name if there is none.

        Those that a graph is called with may be other objects than the parameters.
        """
        place = tensor.data_ptr()
        found = self._at(place, tensor)
        if found is None and place not in self._strangers:
            self._walk()
            found = self._at(place, tensor)
            if found is None:
                self._strangers.add(place)
        return found or (tensor, "")

    def _at(self, place: int, tensor: Tensor) -> tuple[Tensor, str] | None:
        reference, name = self._in_memory.get(place, (None, ""))
        known = reference() if reference is not None else None
        # What was a parameter's memory may be another tensor's now.
        if known is None or known.data_ptr() != place or known.shape != tensor.shape:
            return None
        return (known, name) if known.stride() == tensor.stride() and known.dtype == tensor.dtype else None

    def _walk(self) -> None:
        for name, parameter in _parameters(self._module) if self._module is not None else ():
            entry: tuple[weakref.ref[Tensor], str] = weakref.ref(parameter), name
            self._known[id(parameter)] = entry
            if type(parameter) is nn.Parameter:
                self._in_memory[parameter.data_ptr()] = entry

    def numbered(self, base: str, site: Hashable, *, again: bool) -> str:
        """Of an operation without a parameter.

        Args:
            base: What comes before the number.
            site: Where it is in a graph; without a graph, what it looks like.
            again: Whether it is not the next one, but the last of that site, computed again.
        """
        names = self._of_site.setdefault((base, site), [])
        if again and names:  # graphs are gone through backwards, each call of one after those that came later
            return names.pop() if len(names) > 1 else names[0]
        self._places[base] += 1
        names.append(f"{base}#{self._places[base]}")
        self._alike.setdefault((base, site), []).append(names[-1])
        return names[-1]

    def alike(self, base: str, site: Hashable) -> list[str]:
        """All numbered operations of a site in this step."""
        return self._alike.get((base, site), [])


def _parameters(module: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """By the name of the first module that has it; of weights that are not called so, with their own."""
    for name, parameter in module.named_parameters():
        yield ".".join(part for part in name.split(".") if part != _COMPILED).removesuffix(".weight"), parameter
