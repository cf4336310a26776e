"""Which parameters are on the device: fetched when needed and before, given back when the room is needed for others."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor

from lightning_efficient.offload.streaming.access_order import AccessOrder
from lightning_efficient.offload.streaming.slots import Slot, record_of
from lightning_efficient.offload.streaming.stream_statistics import StreamStatistics
from lightning_efficient.offload.streaming.sub_modules import Part
from lightning_efficient.offload.tiers.carriers import carrier_for
from lightning_efficient.offload.tiers.tier import TierError

__all__ = ["BudgetError", "Residency"]


class BudgetError(RuntimeError):
    """More parameters are in use at once than may be on the device."""


class Residency:
    """Fetches and frees slots within a budget.

    The order in which parts were needed in the last step tells what to fetch, and what to free: that which is needed
    again the latest (Belady, "A study of replacement algorithms for a virtual-storage computer", 1966).

    Attributes:
        by_address: The slots that are on the device, by the address of their memory.
        resident_bytes: On the device now.

    Args:
        parts: Whose slots these are.
        budget_bytes: At most this much is on the device.
        device: Where it is.
        order: Foretells which parts are needed when.
    """

    def __init__(self, parts: Sequence[Part], budget_bytes: int, device: torch.device, order: AccessOrder) -> None:
        self._parts = parts
        self._budget_bytes = budget_bytes
        self._device = device
        self._carrier = carrier_for(device, staging_bytes=budget_bytes)
        self._order = order
        self._written: dict[int, Slot] = {}  # whose writes may be under way
        self.by_address: dict[int, Slot] = {}
        self.resident_bytes = 0
        self._peak_bytes = 0
        self._fetches = self._fetched_bytes = self._writes = self._written_bytes = self._prefetched = 0
        self._wait_seconds = 0.0

    def statistics(self) -> StreamStatistics:
        """Up to now."""
        return StreamStatistics(
            self._fetches, self._fetched_bytes, self._writes, self._written_bytes, self._wait_seconds,
            self._prefetched, self.resident_bytes, self._peak_bytes,
        )  # fmt: skip

    def adopt(self, slot: Slot) -> None:
        """Its memory, which was there from the beginning, goes to the tier and is given back if nobody has a view."""
        self.by_address[slot.storage.data_ptr()] = slot
        self.resident_bytes += slot.nbytes
        if slot.changed:
            self.write(slot)
        self.settle(slot)
        if not slot.lent:
            self.free(slot)

    def begin(self, slots: Sequence[Slot]) -> None:
        """Begin to fetch them where they are not on the device.

        Raises:
            BudgetError: If there is no room.
            TierError: If a transfer failed.
        """
        missing = [slot for slot in slots if not slot.resident]
        if missing:
            nbytes = sum(slot.nbytes for slot in missing)
            if not self._make_room(nbytes, slots):
                raise BudgetError(self._full(missing, nbytes, slots))
            for slot in missing:
                self._fetch(slot)

    def ahead(self, parts: Iterable[int], stay: Sequence[Slot]) -> None:
        """Begin to fetch these parts in turn, as far as there is room, or can be without waiting; ``stay`` stays."""
        self._carrier.advance()
        for number in parts:
            missing = [slot for slot in self._parts[number].slots if not slot.resident]
            if not missing:
                continue
            nbytes, when = sum(slot.nbytes for slot in missing), self._order.distance(number)
            if not self._make_room(nbytes, {*self._parts[number].slots, *stay}, after=when):
                return
            for slot in missing:
                self._fetch(slot)
                slot.ahead = True

    def arrive(self, slot: Slot) -> None:
        """Until what is asked of the device from now on finds it filled.

        Raises:
            TierError: If it could not be fetched.
        """
        if slot.ahead:
            slot.ahead = False
            self._prefetched += 1
        if slot.incoming is not None:
            try:
                self._timed(slot.incoming.wait)
            except TierError:
                slot.incoming = None
                self._forget(slot)  # what is in the memory is not its value
                raise
            slot.incoming = None

    def restore(self, slot: Slot) -> None:
        """Have it on the device, for good and beside the budget.

        Raises:
            TierError: If it could not be fetched.
        """
        if not slot.resident:
            self._fetch(slot)
        self.arrive(slot)
        with contextlib.suppress(TierError):  # the value is here
            self.settle(slot)
        if self.by_address.pop(slot.storage.data_ptr(), None) is not None:
            self.resident_bytes -= slot.nbytes

    def close(self) -> None:
        """Let go of what is done; all slots were restored."""
        with contextlib.suppress(TierError):  # the values are here
            self._carrier.flush()

    def replace(self, slot: Slot, data: Tensor) -> None:
        """Give a slot that is away another value, uint8 ``[nbytes]`` in host memory.

        Raises:
            TierError: If it could not be written.
        """
        self.settle(slot)
        slot.tier.write(record_of(slot), data).wait()
        self._writes += 1
        self._written_bytes += slot.nbytes

    def write(self, slot: Slot) -> None:
        """Begin to bring the value of now to the tier."""
        self.settle(slot)
        slot.outgoing = self._carrier.send(slot.tier, record_of(slot), slot.bytes)
        slot.mark_kept()
        self._written[id(slot)] = slot
        self._writes += 1
        self._written_bytes += slot.nbytes

    def settle(self, slot: Slot) -> None:
        """Until its value may be changed again: until the last one is in the tier."""
        if slot.outgoing is not None:
            try:
                self._timed(slot.outgoing.settle)
            except TierError:
                slot.mark_changed()  # what is on the device is the only copy
                raise
            finally:
                slot.outgoing = None
                self._written.pop(id(slot), None)

    def settle_all(self) -> None:
        """Until all writes are in the tiers."""
        for slot in list(self._written.values()):
            self.settle(slot)

    def free(self, slot: Slot) -> None:
        """Give its memory back; what changed is written before.

        Raises:
            TierError: If that failed; the memory stays, then.
        """
        if slot.incoming is not None:
            self.arrive(slot)
        if slot.changed:
            self.write(slot)
        if slot.outgoing is not None:
            try:
                self._timed(slot.outgoing.let_go)
            except TierError:
                slot.mark_changed()  # and is tried again
                slot.outgoing = None
                self._written.pop(id(slot), None)
                raise
        self._forget(slot)

    def free_all(self) -> None:
        """Give all memory back, but that which is pinned, or which somebody holds a view of.

        Raises:
            TierError: If a value could not be written; all others are free then.
        """
        resident = list(self.by_address.values())
        errors: list[TierError] = []
        for slot in resident:
            if slot.changed and slot.incoming is None:
                self._try(errors, self.write, slot)
        for slot in resident:
            if not (slot.pins or slot.lent):
                self._try(errors, self.free, slot)
        for slot in list(self._written.values()):
            self._try(errors, self.settle, slot)
        if errors:
            raise errors[0]

    @staticmethod
    def _try(errors: list[TierError], do: Callable[[Slot], None], slot: Slot) -> None:
        try:
            do(slot)
        except TierError as error:
            errors.append(error)

    def _fetch(self, slot: Slot) -> None:
        if slot.outgoing is not None:
            slot.outgoing.hand_over()
        slot.storage.resize_(slot.nbytes)
        try:
            self._fill(slot)
        except BaseException:
            slot.storage.resize_(0)
            raise
        slot.resident = True
        self.by_address[slot.storage.data_ptr()] = slot
        self.resident_bytes += slot.nbytes
        self._peak_bytes = max(self._peak_bytes, self.resident_bytes)

    def _fill(self, slot: Slot) -> None:
        slot.incoming = self._carrier.fetch(slot.tier, record_of(slot), self._device, into=slot.bytes)
        slot.mark_kept()
        self._fetches += 1
        self._fetched_bytes += slot.nbytes

    def _timed(self, wait: Callable[[], None]) -> None:
        started = time.perf_counter()
        try:
            wait()
        finally:
            self._wait_seconds += time.perf_counter() - started

    def _forget(self, slot: Slot) -> None:
        del self.by_address[slot.storage.data_ptr()]
        slot.storage.resize_(0)
        slot.resident = slot.ahead = False
        self.resident_bytes -= slot.nbytes

    def _make_room(self, nbytes: int, stay: Collection[Slot], after: float | None = None) -> bool:
        """Free slots until ``nbytes`` more fit; with ``after``, only such as are needed later, and without waiting."""
        excess = self.resident_bytes + nbytes - self._budget_bytes
        if excess <= 0:
            return True
        victims = []
        idle = [slot for slot in self.by_address.values() if not (slot.pins or slot.lent or slot in stay)]
        for when, slot in sorted(((self._next_use(one), one) for one in idle), key=lambda pair: -pair[0]):
            if after is not None and (when <= after or self._busy(slot)):
                continue
            victims.append(slot)
            excess -= slot.nbytes
            if excess <= 0:
                break
        if excess > 0:
            return False
        for slot in victims:
            self.free(slot)
        return True

    @staticmethod
    def _busy(slot: Slot) -> bool:
        """Whether to free it would mean to wait."""
        return slot.changed or slot.incoming is not None or (slot.outgoing is not None and not slot.outgoing.gone)

    def _next_use(self, slot: Slot) -> float:
        return min(self._order.distance(number) for number in slot.units)

    def _full(self, missing: Sequence[Slot], nbytes: int, stay: Collection[Slot]) -> str:
        held = [slot for slot in self.by_address.values() if slot.pins or slot.lent or slot in stay]
        names = ", ".join(f"'{slot.names[0]}' ({slot.nbytes})" for slot in held[:8])
        message = f"Parameter '{missing[0].names[0]}' is needed, and {nbytes} bytes with those needed at the same time"
        if held:
            message += f", while {sum(one.nbytes for one in held)} are in use: {names}{', ...' if held[8:] else ''}"
        return (
            f"{message}; but memory_budget leaves {self._budget_bytes} for parameters that are elsewhere. Give it "
            "more, place fewer parameters, or let go of views of parameters that are not needed any more."
        )
