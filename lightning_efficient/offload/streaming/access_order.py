"""The order in which the parts of a model are needed, step after step, and what it says about the next ones."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence

__all__ = ["AccessOrder"]

_LONGEST = 1 << 16  # accesses of one step that are remembered


class AccessOrder:
    """Foretells accesses: those of a step are expected to be those of the last step of its kind.

    Kinds are passes with and without gradients.

    Args:
        guess: The order that is expected before there was a step.
    """

    def __init__(self, guess: Sequence[int]) -> None:
        self._expected: dict[bool, list[int]] = {True: [*guess, *reversed(guess)], False: list(guess)}
        self._places: dict[int, list[int]] = {}  # of each part, in the order that is followed
        self._order: list[int] = []
        self._seen: list[int] = []
        self._kind: bool | None = None
        self._at = 0

    def note(self, part: int, gradients: bool) -> bool:
        """Part number ``part`` is needed; returns whether that is another one than before."""
        if self._kind is None:
            self.expect(gradients)
        if self._seen and self._seen[-1] == part:
            return False
        if len(self._seen) < _LONGEST:
            self._seen.append(part)
        if places := self._places.get(part):
            following = bisect.bisect_left(places, self._at)
            self._at = places[following % len(places)] + 1
        return True

    def expect(self, gradients: bool) -> None:
        """A step of this kind begins."""
        self._kind = gradients
        self._order = self._expected[gradients]
        self._places = {}
        for place, part in enumerate(self._order):
            self._places.setdefault(part, []).append(place)
        self._at = 0

    def finish(self) -> None:
        """The step has ended."""
        if self._seen and self._kind is not None:
            self._expected[self._kind] = self._seen
        self._seen, self._kind = [], None

    def upcoming(self, most: int) -> Iterator[int]:
        """The parts that are expected next in this step, each once, ``most`` at most."""
        found: set[int] = set()
        for place in range(self._at, len(self._order)):
            part = self._order[place]
            if part not in found:
                if len(found) == most:
                    return
                found.add(part)
                yield part

    def distance(self, part: int) -> float:
        """Accesses until it is needed again, in this step or the next."""
        places = self._places.get(part)
        if not places:
            return math.inf
        following = bisect.bisect_left(places, self._at)
        if following == len(places):
            return len(self._order) - self._at + places[0]
        return places[following] - self._at
