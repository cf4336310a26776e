"""Account of bytes that are held in memory, or on their way there, because they will be used soon."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

__all__ = ["Fetched"]


class Fetched:
    """Sizes of things by number; those that have been used once make room before those that have not.

    Attributes:
        nbytes: Of all.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._ahead: OrderedDict[int, int] = OrderedDict()
        self._in_hand: OrderedDict[int, int] = OrderedDict()  # used, and held for another use
        self._in_hand_bytes = 0

    def __contains__(self, number: int) -> bool:
        return number in self._ahead or number in self._in_hand

    def add(self, number: int, nbytes: int) -> None:
        """It is held ahead of its use."""
        self._ahead[number] = nbytes
        self.nbytes += nbytes

    def use(self, number: int) -> None:
        """It has been used, and will be again."""
        nbytes = self._ahead.pop(number, None)
        if nbytes is not None:
            self._in_hand[number] = nbytes
            self._in_hand_bytes += nbytes

    def forget(self, number: int) -> None:
        """It is not held any more."""
        in_hand = self._in_hand.pop(number, 0)
        self._in_hand_bytes -= in_hand
        self.nbytes -= in_hand + self._ahead.pop(number, 0)

    def oldest(self, room_bytes: int, *, at_any_cost: bool) -> Iterator[int]:
        """What makes room, one after another; each must be forgotten before the next.

        Args:
            room_bytes: That there are for all. Things in hand make room for others that come ahead of their use only
                where they take half of it.
            at_any_cost: Whatever there is makes room, for something is needed now.
        """
        while True:
            if self._in_hand and (at_any_cost or 2 * self._in_hand_bytes > room_bytes):
                yield next(iter(self._in_hand))
            elif self._ahead and at_any_cost:
                yield next(iter(self._ahead))
            else:
                return
