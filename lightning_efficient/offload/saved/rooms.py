"""Records of a tier that are used again and again, so that a step that is like the last one reserves nothing."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

from lightning_efficient.core.buffers import round_up
from lightning_efficient.offload.tiers.tier import Record, Tier, TierError

__all__ = ["Rooms"]


class Rooms:
    """Lends records by size.

    Where sizes vary from step to step, those that nobody asked for the longest make room: all records together take no
    more than those that were lent at a time ever did.

    Attributes:
        lent_bytes: Of the records that are lent.
        reserved: How often the tier was asked for a record.

    Args:
        tier: Whose records they are.
        room_bytes: Asked how many, in whole pages, all records together may take.
    """

    def __init__(self, tier: Tier, room_bytes: Callable[[], float] = lambda: math.inf) -> None:
        self.lent_bytes = 0
        self.reserved = 0
        self._tier, self._room_bytes = tier, room_bytes
        self._pages = 0  # in bytes, of all records
        self._free: OrderedDict[int, list[Record]] = OrderedDict()  # by size, the one that was used last at the end
        self._free_bytes = self._most_bytes = 0

    def take(self, nbytes: int) -> Record:
        """A record of this size.

        Raises:
            TierError: If there is no room for it.
        """
        free = self._free.get(nbytes)
        if free:
            record = free.pop()
            self._free_bytes -= nbytes
        else:
            self._release(max(self._most_bytes, self.lent_bytes + nbytes) - self.lent_bytes - nbytes)
            room = self._room_bytes() - round_up(nbytes)
            while self._pages > room and self._free_bytes:
                self._release(self._free_bytes - 1)
            if self._pages > room:
                raise TierError(f"Beside what is planned there, it has {room + round_up(nbytes):,} bytes for them.")
            [record] = self._tier.reserve([nbytes], versioned=False)
            self.reserved += 1
            self._pages += round_up(nbytes)
        self.lent_bytes += nbytes
        self._most_bytes = max(self._most_bytes, self.lent_bytes)
        return record

    def give_back(self, record: Record) -> None:
        """It is not needed any more; transfers may be under way."""
        self.lent_bytes -= record.nbytes
        self._free_bytes += record.nbytes
        self._free.setdefault(record.nbytes, []).append(record)
        self._free.move_to_end(record.nbytes)

    def close(self) -> None:
        """Give what is not lent back to the tier."""
        self._release(0)
        self._most_bytes = self.lent_bytes

    def _release(self, most_bytes: int) -> None:
        """Until those that are free take no more than this."""
        while self._free_bytes > most_bytes:
            nbytes, records = next(iter(self._free.items()))
            if records:
                self._free_bytes -= nbytes
                self._pages -= round_up(nbytes)
                self._tier.release([records.pop()])
            if not records:
                del self._free[nbytes]
