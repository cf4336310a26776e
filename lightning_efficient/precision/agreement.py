"""What the nodes of all ranks agree on: of each number the most careful one, in one reduction a step.

Ranks see other data, so a product may fail on one of them only. It is computed again there, at once, which no other
rank has to know of, for products need nothing of other ranks. But what follows from it is for all: counters, limits and
waits are reduced, so that the checkpoint, which is that of one rank, is that of all.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_efficient.precision.nodes import Node
from lightning_efficient.precision.status import Run

__all__ = ["Agreement"]

_FAR = 1e9  # beyond any count of products


class Agreement:
    """Between ranks that reduce by the largest number.

    Which nodes there are may differ for a while, as when branches are taken by data; names are gathered then.

    Args:
        like: Any node.
        reduce: float64 numbers ``[n]`` to the largest of each, on all ranks at once.
        gather: Names to those of all ranks.
    """

    def __init__(
        self, like: Node, reduce: Callable[[Tensor], Tensor], gather: Callable[[list[str]], list[list[str]]]
    ) -> None:
        self._reduce, self._gather = reduce, gather
        self._names: list[str] = []
        self._length = len(like.agreed())

    def __call__(self, nodes: Mapping[str, Node], run: Run) -> None:
        """Of each number of ``nodes`` and ``run`` take the most careful of all ranks; to be called by all."""
        if not self._take(nodes, run):
            self._names = sorted(set().union(*self._gather(sorted(nodes))))
            self._take(nodes, run)

    def _take(self, nodes: Mapping[str, Node], run: Run) -> bool:
        """Whether all ranks had the nodes that are known to all."""
        digest = _digest(nodes)
        numbers = [digest, -digest, _FAR - run.high_in_a_row if run.high_in_a_row else 0.0]
        for name in self._names:
            node = nodes.get(name)
            numbers += node.agreed() if node is not None else [-math.inf] * self._length
        reduced = self._reduce(torch.tensor(numbers, dtype=torch.float64)).tolist()
        run.high_in_a_row = int(_FAR - reduced[2]) if reduced[2] else 0
        for place, name in enumerate(self._names):
            if name in nodes:
                start = 3 + place * self._length
                nodes[name].agree(reduced[start : start + self._length])
        return bool(reduced[0] == -reduced[1] == _digest(self._names))


def _digest(names: Mapping[str, Node] | list[str]) -> float:
    """A number that two lists of names share only if they are the same."""
    text = "\n".join(sorted(names)).encode()
    return float(int.from_bytes(hashlib.sha256(text).digest()[:6], "big"))
