"""In which order things that were put away will be asked for."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

__all__ = ["UseOrder", "Walk"]

_LOOK = 1024  # numbers that are looked at, from where one begins


class UseOrder:
    """As in the last step, as long as this one goes like it; else those first that were put away last.

    A graph is gone through backwards, but compiled parts of it ask for all of theirs at once, in the order of forward.
    Things have numbers that count up.
    """

    def __init__(self) -> None:
        self._first = self._next = 0
        self._uses: list[int] = []  # of this step, counted from its first
        self._used: set[int] = set()
        self._last: list[int] = []  # step's
        self._alike = True

    def open(self) -> None:
        """A step begins."""
        if self._uses:
            self._last = self._uses
        self._uses, self._used = [], set()
        self._first, self._alike = self._next, True

    def put(self) -> int:
        """The number of the next thing."""
        self._next += 1
        return self._next - 1

    def use(self, number: int) -> bool:
        """It is asked for; whether that is the first time in this step."""
        place, count = number - self._first, len(self._uses)
        if place < 0 or place in self._used:
            return False
        self._used.add(place)
        self._uses.append(place)
        self._alike = self._alike and count < len(self._last) and self._last[count] == place
        return True

    def coming(self) -> Iterator[int]:
        """The numbers that will be asked for first when nothing was, as far as anybody can know."""
        return self.after(self._next)

    def after(self, number: int) -> Iterator[int]:
        """The numbers that will be asked for after this one."""
        latest = self._first + self._uses[-1] if self._uses else self._next
        if self._alike and self._last and number == latest:
            rest = self._last[len(self._uses) :]
            return (self._first + place for place in rest if self._first + place < self._next)
        return iter(range(number - 1, -1, -1))


class Walk:
    """Goes along expected numbers ahead of their use, each once."""

    def __init__(self) -> None:
        self._numbers: Iterator[int] = iter(())
        self._passed: dict[int, None] = {}  # and not used yet, in their order
        self._again: int | None = None

    def start(self, numbers: Iterator[int]) -> None:
        """From now on along these."""
        self._numbers = islice(numbers, _LOOK)
        self._passed.clear()
        self._again = None

    def goes_by(self, number: int) -> bool:
        """Whether the use of a number was expected, here or a little later."""
        if number not in self._passed:
            return False
        while True:
            first = next(iter(self._passed))
            del self._passed[first]
            if first == number:
                return True

    def next(self) -> int | None:
        """The next number to look at; None if there is none."""
        number, self._again = self._again, None
        if number is None:
            number = next(self._numbers, None)
        if number is not None:
            self._passed[number] = None
        return number

    def again(self, number: int) -> None:
        """Nothing could be done about it yet."""
        self._again = number
        del self._passed[number]
