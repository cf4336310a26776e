"""Which bytes of a tier are those of a record now, which were accepted last, and which may be overwritten.

A versioned record has two slots: it is written to the one that is not accepted, so that going back costs nothing. A
slot that is still mapped is never written to: the record gets another in its place.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from lightning_efficient.offload.tiers.tier import Pending, Record, TierError

__all__ = ["Place", "RecordSlots", "Slot"]

E = TypeVar("E")
_MAPPED_COMMITS = 2  # that a mapping outlasts, as the protocol of tiers has it


@dataclass(eq=False)
class Slot(Generic[E]):
    """Room for the bytes of one record.

    Attributes:
        extent: Where it is.
        whole: Whether all of its bytes are there: not before the first write has ended, nor after one has failed.
        crc: The CRC-32 of them, where the tier checks it.
        mappings: Who uses it as memory, and the number of the commit until which they may.
    """

    extent: E
    whole: bool = False
    crc: int = 0
    mappings: list[tuple[weakref.ref[Any], int]] = field(default_factory=list)


@dataclass(eq=False)
class Place(Generic[E]):
    """The slots of a record.

    Attributes:
        record: Whose they are.
        slots: Two for a versioned record, else one.
        newest: The one that was last written.
        committed: The one that was last accepted.
        last: The last transfer.
    """

    record: Record
    slots: list[Slot[E]]
    newest: Slot[E] | None = None
    committed: Slot[E] | None = None
    last: Pending | None = None


@dataclass(frozen=True)
class _Retired(Generic[E]):
    slot: Slot[E]
    due: int  # the number of commits after which nothing refers to it
    last: Pending | None


class RecordSlots(Generic[E]):
    """The records of a tier. Not safe for threads: the tier has a lock.

    Attributes:
        changed: Whether there is something to commit.

    Args:
        tier: Its name, for messages.
        take: Room of so many bytes; may raise ``TierError``.
        give_back: That room is free again.
        outlasts: Whether what is accepted must stay until the next commit even if its record is removed.
    """

    def __init__(self, tier: str, take: Callable[[int], E], give_back: Callable[[E], None], *, outlasts: bool) -> None:
        self.changed = False
        self._outlasts = outlasts
        self._tier = tier
        self._take = take
        self._give_back = give_back
        self._places: dict[Record, Place[E]] = {}
        self._retired: list[_Retired[E]] = []
        self._commits = 0

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Place[E]]:
        return iter(self._places.values())

    def add(self, record: Record, extents: list[E]) -> None:
        """A record with so many slots."""
        self._places[record] = Place(record, [Slot(extent) for extent in extents])

    def find(self, record: Record) -> Place[E]:
        """The place of a record.

        Raises:
            TierError: If it is not of this tier, or not any more.
        """
        place = self._places.get(record)
        if place is None:
            raise TierError(
                f"A record of {record.nbytes:,} bytes is not, or not any more, one of the {self._tier} tier."
            )
        return place

    def to_read(self, record: Record) -> tuple[Place[E], Slot[E]]:
        """The place and what is newest in it.

        Raises:
            TierError: If there is nothing.
        """
        place = self.find(record)
        if place.newest is None:
            raise TierError(
                f"Nothing was written to a record of {record.nbytes:,} bytes of the {self._tier} tier. Write it before "
                "it is read."
            )
        return place, place.newest

    def to_write(self, record: Record, take: Callable[[int], E] | None = None) -> tuple[Place[E], Slot[E]]:
        """The place and the slot whose bytes nobody needs; it is the newest from now on.

        Args:
            record: See above.
            take: Room for a slot, in place of one that is mapped; None: as for all others.

        Raises:
            TierError: If it takes more room, because the slot is mapped, and there is none.
        """
        place = self.find(record)
        slot = next(slot for slot in place.slots if slot is not place.committed)
        if self._is_mapped(slot):
            self._collect()
            slot = self._replace(place, slot, (take or self._take)(record.nbytes))
        place.newest = slot
        self.changed |= record.versioned
        return place, slot

    def to_change(self, record: Record, take: Callable[[int], E]) -> tuple[Place[E], Slot[E], Slot[E] | None]:
        """The place, the slot in which its bytes may be changed, and the one to copy them from first, if there is one.

        Args:
            record: That is not versioned.
            take: Room for a slot, in place of one that is mapped.

        Raises:
            TierError: If there is nothing in it, or no room.
            ValueError: If it is versioned.
        """
        place, slot = self.to_read(record)
        if record.versioned:
            raise ValueError("A versioned record cannot be changed where it is: nothing would be left to go back to.")
        if not self._is_mapped(slot):
            return place, slot, None
        self._collect()
        place.newest = self._replace(place, slot, take(record.nbytes))
        return place, place.newest, slot

    def _replace(self, place: Place[E], slot: Slot[E], extent: E) -> Slot[E]:
        replacement = Slot(extent)
        place.slots[place.slots.index(slot)] = replacement
        self._retired.append(_Retired(slot, 0, place.last))
        return replacement

    def map(self, slot: Slot[E], memory: Any) -> None:
        """``memory`` uses the slot: for as long as it lives, until the second commit after this."""
        slot.mappings.append((weakref.ref(memory), self._commits + _MAPPED_COMMITS))

    def remove(self, records: Sequence[Record]) -> None:
        """These are not needed any more; their room is free once nothing refers to it.

        Raises:
            TierError: If one is not of this tier; then all stay.
        """
        for place in [self.find(record) for record in records]:
            del self._places[place.record]
            for slot in place.slots:
                accepted = self._outlasts and slot is place.committed
                self.changed |= accepted
                self._retired.append(_Retired(slot, self._commits + accepted, place.last))
        self._collect()

    def clear(self) -> None:
        """There are no records any more."""
        self._places.clear()
        self._retired.clear()

    def accepted(self) -> list[tuple[Record, Slot[E]]]:
        """What a commit makes the state to go back to."""
        return [(place.record, place.newest) for place in self if place.record.versioned and place.newest is not None]

    def commit(self) -> None:
        """The newest slots are the accepted ones."""
        for place in self._places.values():
            if place.record.versioned:
                place.committed = place.newest
        self._commits += 1
        self.changed = False
        self._collect()

    def _collect(self) -> None:
        """Give back the room of the slots that nothing refers to any more."""
        kept = []
        for retired in self._retired:
            in_use = retired.last is not None and not retired.last.done
            if in_use or self._commits < retired.due or self._is_mapped(retired.slot):
                kept.append(retired)
            else:
                self._give_back(retired.slot.extent)
        self._retired = kept

    def _is_mapped(self, slot: Slot[E]) -> bool:
        slot.mappings = [
            (memory, until) for memory, until in slot.mappings if memory() is not None and self._commits < until
        ]
        return bool(slot.mappings)
