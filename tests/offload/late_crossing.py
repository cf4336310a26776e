"""Ways to the host and back whose copies happen as late as they may, so that whoever does not wait is found out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lightning_efficient.offload.updates.crossing import Mark

__all__ = ["LateCrossing"]


class _Late:
    def __init__(self, act: Callable[[], None]) -> None:
        self._act: Callable[[], None] | None = act
        self._lock = threading.RLock()

    def synchronize(self) -> None:
        with self._lock:
            if self._act is not None:
                act, self._act = self._act, None
                act()


class LateCrossing:
    """Copies when somebody waits for them.

    Attributes:
        brought: Bytes that came to the host.
        returned: Bytes that went back.
    """

    def __init__(self) -> None:
        self.brought = self.returned = 0
        self._begun: list[_Late] = []

    def mark(self) -> Mark:
        return _Late(lambda: None)

    def to_host(self, tensors: Sequence[Tensor], after: Mark) -> tuple[list[Tensor], Mark]:
        sources = [tensor.detach() for tensor in tensors]
        found = [source.clone() for source in sources]
        for there in found:
            if there.layout == torch.strided and there.is_contiguous() and there.dim():
                there.view(-1).view(torch.uint8).fill_(255)  # NaN

        def copy() -> None:
            after.synchronize()
            for source, there in zip(sources, found, strict=True):
                there.copy_(source)
                self.brought += there.nbytes if there.layout == torch.strided else 0

        return found, self._later(copy)

    def to_device(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Mark) -> Mark:
        pairs = list(pairs)

        def copy() -> None:
            for target, source in pairs:
                target.copy_(source)
                self.returned += target.nbytes

        return self._later(copy)

    def like(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, requires_grad=False)

    def follow(self, mark: Mark) -> None:
        mark.synchronize()

    def settle(self) -> None:
        for late in self._begun:
            late.synchronize()

    def _later(self, act: Callable[[], None]) -> _Late:
        self._begun.append(_Late(act))
        return self._begun[-1]
