"""What the operations of a step save for backward, and how long forward takes, module by module."""

from __future__ import annotations

import contextlib
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_efficient.planning.facts import Layer

__all__ = ["LayerAccount"]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")


class LayerAccount:
    """Counts what is saved for backward, each storage once, by the module in whose forward it was saved.

    Args:
        module: The whole model.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._stack: list[tuple[str, float, float]] = []  # name, begin, seconds of the modules in it
        self._saved: Counter[str] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._kinds: dict[str, tuple[str, int]] = {}
        for name, part in module.named_modules():
            line = _NUMBER.sub("*", name)
            kind, count = self._kinds.get(line, (type(part).__name__, 0))
            self._kinds[line] = kind, count + 1

    @property
    def saved_bytes(self) -> int:
        """Of the last step."""
        return self._saved.total()

    def layers(self) -> tuple[Layer, ...]:
        """Of the last step, those that saved most first."""
        lines: set[str] = {name for name in self._kinds if self._saved[name] or self._seconds[name] > 0}
        found = [
            Layer(name or "(the step itself)", *self._kinds[name], self._saved[name], self._seconds[name])
            for name in lines
        ]
        return tuple(sorted(found, key=lambda layer: (-layer.saved_bytes, -layer.forward_seconds)))

    @contextlib.contextmanager
    def counting(self, batch: Iterable[Tensor]) -> Iterator[None]:
        """Around the forward of one step.

        Args:
            batch: Its tensors, which somebody keeps anyway, as parameters and buffers.
        """
        self._saved.clear()
        self._seconds.clear()
        self._stack = [("", time.perf_counter(), 0.0)]
        held = [*self._module.parameters(), *self._module.buffers(), *batch]
        seen = {address for tensor in held if (address := _address(tensor))}

        def pack(tensor: Tensor) -> Tensor:
            address = _address(tensor)
            if address and address not in seen:
                seen.add(address)
                self._saved[self._stack[-1][0]] += tensor.untyped_storage().nbytes()
            return tensor

        handles = []
        for name, part in self._module.named_modules():
            if part is self._module:
                continue
            line = _NUMBER.sub("*", name)
            handles.append(part.register_forward_pre_hook(lambda *_, line=line: self._enter(line)))
            handles.append(part.register_forward_hook(lambda *_: self._leave(), always_call=True))
        try:
            with saved_tensors_hooks(pack, lambda tensor: tensor):
                yield
        finally:
            for handle in handles:
                handle.remove()
            while self._stack:
                self._leave()

    def _enter(self, line: str) -> None:
        self._stack.append((line, time.perf_counter(), 0.0))

    def _leave(self) -> None:
        name, began, inside = self._stack.pop()
        seconds = time.perf_counter() - began
        self._seconds[name] += seconds - inside
        if self._stack:
            outer, start, others = self._stack[-1]
            self._stack[-1] = outer, start, others + seconds


def _address(tensor: Tensor) -> int:
    """Of its memory; 0 for what has none of its own."""
    if tensor.layout is not torch.strided:
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # wrapper subclasses, functional tensors
        return 0
