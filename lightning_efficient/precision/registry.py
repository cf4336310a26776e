"""The operations of a network that are known, by name, with those of a checkpoint that have not come yet."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lightning_efficient.precision.nodes import Node, unmeasured

__all__ = ["Registry"]


class Registry:
    """Makes nodes as operations come, with the state that a checkpoint has of them.

    Attributes:
        nodes: By name.

    Args:
        new: A node that has learnt nothing, of this name and kind.
        exclude: Patterns of names of operations that stay in high bits.
    """

    def __init__(self, new: Callable[[str, str], Node], exclude: Sequence[str] = ()) -> None:
        self.nodes: dict[str, Node] = {}
        self._new, self._exclude = new, tuple(exclude)
        self._loaded: dict[str, Any] = {}
        self._met: set[str] = set()

    def make(self, name: str, kind: str) -> Node:
        """The node of this name."""
        if name not in self.nodes:
            node = self.nodes[name] = self._new(name, kind)
            _go_on(node, self._loaded.pop(name, None))
        return self.nodes[name]

    def takes_part(self, name: str) -> bool:
        """Whether no pattern leaves it out."""
        found = [pattern for pattern in self._exclude if fnmatch.fnmatchcase(name, pattern)]
        self._met.update(found)
        return not found

    @property
    def unmet(self) -> list[str]:
        """Patterns that no name has matched so far."""
        return [pattern for pattern in self._exclude if pattern not in self._met]

    def forget(self) -> None:
        """All."""
        self.nodes.clear()
        self._loaded, self._met = {}, set()

    def drop(self, parameters: Iterable[str]) -> None:
        """What belongs to parameters of these names, and what has only a number, which may be another one's now."""
        gone = {name.removesuffix(".weight") for name in parameters}
        for known in (self.nodes, self._loaded):
            for name in [name for name in known if name in gone or "#" in name]:
                del known[name]

    def states(self) -> dict[str, Any]:
        """Of all nodes; of those that have not come yet, as they were in the checkpoint."""
        return self._loaded | {name: node.state_dict() for name, node in self.nodes.items()}

    def load(self, states: Mapping[str, Any], *, timed: bool = True) -> None:
        """What :meth:`states` returned; nodes go on from it as they come.

        Args:
            states: By name.
            timed: Whether what was timed there holds here.
        """
        self.nodes.clear()
        self._loaded = dict(states) if timed else {name: unmeasured(state) for name, state in states.items()}

    def go_back(self, states: Mapping[str, Any]) -> None:
        """The nodes that there are, to what :meth:`states` returned; those that were not there, to nothing learnt."""
        for name, node in self.nodes.items():
            if not _go_on(node, states.get(name)):
                node.load_state_dict(self._new(name, node.kind).state_dict())


def _go_on(node: Node, state: Mapping[str, Any] | None) -> bool:
    """From a state, if it is that of such a node."""
    if state is None or state["kind"] != node.kind:
        return False
    node.load_state_dict(state)
    return True
