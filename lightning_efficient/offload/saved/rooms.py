"""Records of a tier that are used again and again, so that a step that is like the last one reserves nothing."""

from __future__ import annotations

from collections import OrderedDict

from lightning_efficient.offload.tiers.tier import Record, Tier

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
    """

    def __init__(self, tier: Tier) -> None:
        self.lent_bytes = 0
        self.reserved = 0
        self._tier = tier
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
            [record] = self._tier.reserve([nbytes], versioned=False)
            self.reserved += 1
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
                self._tier.release([records.pop()])
            if not records:
                del self._free[nbytes]
