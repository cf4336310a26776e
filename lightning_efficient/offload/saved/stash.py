"""A stack of byte strings of which the newest stay in memory and the others go to a tier and come back before use.

What was put last is needed first in a backward pass, so the oldest leave. They leave beside the computation, and come
back ahead of their use, with a bounded number of bytes on the way. (Source: Bae et al. 2021, "FlashNeuron: SSD-Enabled
Large-Batch Training of Very Deep Neural Networks", sections 3 and 4; Rajbhandari et al. 2021, "ZeRO-Infinity", 5.2.)
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_efficient.core.freed_memory import return_freed_memory
from lightning_efficient.offload.saved.fetched import Fetched
from lightning_efficient.offload.saved.rooms import Rooms
from lightning_efficient.offload.saved.stashed import Stashed, StashStatistics
from lightning_efficient.offload.saved.use_order import UseOrder, Walk
from lightning_efficient.offload.tiers.carriers import Arriving, Carrier, Leaving, carrier_for
from lightning_efficient.offload.tiers.tier import Record, Tier, TierError

__all__ = ["Stash"]


class Stash:
    """Takes byte strings and gives them back.

    Args:
        tier: Where they go. It stays the caller's.
        staging_bytes: That may be on their way there and back at a time; one thing that is larger is alone.
        keep_bytes: Of the newest that stay in memory.
        room_bytes: Asked how much of the tier may be taken; what does not fit stays in memory.
    """

    def __init__(
        self,
        tier: Tier,
        *,
        staging_bytes: int,
        keep_bytes: int = 0,
        room_bytes: Callable[[], float] = lambda: math.inf,
    ) -> None:
        self.staging_bytes = staging_bytes
        self.keep_bytes = keep_bytes
        self._tier = tier
        self._rooms = Rooms(tier, room_bytes)
        self._order = UseOrder()
        self._walk = Walk()
        self._carriers: dict[str, Carrier] = {}
        self._lock = threading.RLock()
        self._dead: deque[tuple[int, Record | None]] = deque()
        self._alive: dict[int, weakref.ref[Stashed]] = {}
        self._kept: OrderedDict[int, int] = OrderedDict()  # sizes by number, oldest first
        self._stuck: dict[int, int] = {}
        self._fetched = Fetched()
        self._leaving: deque[tuple[int, int, Leaving]] = deque()  # number and size
        self._kept_bytes = self._stuck_bytes = self._leaving_bytes = self._peak_bytes = 0
        self._written_bytes = self._read_bytes = self._hits = self._misses = 0
        self._freed_bytes = 0
        self._wait_seconds = self._back_pressure_seconds = 0.0
        self._closed = False

    def open(self) -> None:
        """A step begins."""
        with self._lock:
            self._settle()
            self._order.open()
            self._peak_bytes = self._resident_bytes

    def put(self, data: Tensor) -> Stashed:
        """Keep bytes, uint8 ``[n]``, whose memory must stay as it is; it is given up once they are in the tier.

        Raises:
            TierError: If what was put earlier could not be written.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("Nothing can be put here any more: it has been closed.")
            self._settle()
            stashed = Stashed(self._order.put(), data, self._dead)
            self._alive[stashed.number] = weakref.ref(stashed)
            self._kept[stashed.number] = stashed.nbytes
            self._kept_bytes += stashed.nbytes
            while self._kept_bytes > self.keep_bytes:
                number, nbytes = self._kept.popitem(last=False)
                self._kept_bytes -= nbytes
                oldest = self._get(number)
                if oldest is not None:
                    self._send(oldest)
            self._peak_bytes = max(self._peak_bytes, self._resident_bytes)
        return stashed

    def expect(self) -> None:
        """Nothing more is put for now, and things are asked for soon: begin to fetch."""
        with self._lock, contextlib.suppress(TierError):  # which whoever uses something will hear of
            self._settle()
            self._walk.start(self._order.coming())
            self._fetch_ahead()
            self._peak_bytes = max(self._peak_bytes, self._resident_bytes)

    def take(self, stashed: Stashed) -> Tensor:
        """The bytes, uint8 ``[n]``, not to be changed: a part of what was put, or memory of their own.

        Raises:
            TierError: If they could not be read.
        """
        with self._lock:
            self._settle()
            stashed.uses -= 1
            first = self._order.use(stashed.number)
            arriving = stashed.arriving if stashed.data is None else None
            data = stashed.data if arriving is None else arriving.data
            missed = data is None
            self._hits, self._misses = self._hits + (not missed), self._misses + missed
            if missed:
                self._make_room(stashed.nbytes, at_any_cost=True)
                arriving = self._fetch(stashed)
                data = arriving.data
            if not self._walk.goes_by(stashed.number) and (first or missed):
                self._walk.start(self._order.after(stashed.number))
            self._fetch_ahead()
            self._peak_bytes = max(self._peak_bytes, self._resident_bytes)
        if arriving is not None:
            begin = time.perf_counter()
            try:
                arriving.wait()
            except BaseException:
                with self._lock:
                    self._let_loose(stashed)
                    stashed.arriving = None
                raise
            self._wait_seconds += time.perf_counter() - begin
        with self._lock:
            stashed.wanted = stashed.uses > 0
            if not stashed.wanted:
                self._let_loose(stashed)
            else:
                self._fetched.use(stashed.number)
        if data is None:
            raise RuntimeError("What was fetched from the tier was let go of before it was used; this is a defect.")
        return data

    def statistics(self) -> StashStatistics:
        """So far."""
        with self._lock, contextlib.suppress(TierError):  # which whoever saves or uses something will hear of
            self._settle()
        with self._lock:
            return StashStatistics(
                self._written_bytes, self._read_bytes, self._hits, self._misses, self._wait_seconds,
                self._back_pressure_seconds, self._resident_bytes, self._peak_bytes, self._rooms.lent_bytes,
                self._stuck_bytes, self._rooms.reserved,
            )  # fmt: skip

    def close(self) -> None:
        """Give the records back to the tier; what is still out there is lost for who asks for it later.

        Raises:
            TierError: If something could not be written.
        """
        with self._lock:
            self._closed = True
            try:
                for _, _, leaving in self._leaving:
                    leaving.settle()
                for carrier in self._carriers.values():
                    carrier.flush()
            finally:
                self._leaving.clear()
                self._leaving_bytes = 0
                self._bury()
                for reference in list(self._alive.values()):
                    stashed = reference()
                    if stashed is not None and stashed.record is not None:
                        self._let_loose(stashed)
                        self._rooms.give_back(stashed.record)
                        stashed.record = stashed.arriving = None
                self._rooms.close()

    # -- all below with the lock ---------------------------------------------------------------------------------------

    @property
    def _resident_bytes(self) -> int:
        return self._kept_bytes + self._stuck_bytes + self._leaving_bytes + self._fetched.nbytes

    def _get(self, number: int) -> Stashed | None:
        reference = self._alive.get(number)
        return reference() if reference is not None else None

    def _carrier(self, device: torch.device) -> Carrier:
        carrier = self._carriers.get(device.type)
        if carrier is None:
            carrier = self._carriers[device.type] = carrier_for(device, self.staging_bytes)
        return carrier

    def _send(self, stashed: Stashed) -> None:
        data, nbytes = stashed.data, stashed.nbytes
        if data is None:
            return
        try:
            stashed.record = self._rooms.take(nbytes)
        except TierError as error:
            if not self._stuck:
                message = f"Saved tensors stay in memory, because the tier '{self._tier.name}' has no room: {error}"
                warnings.warn(message, stacklevel=2)
            self._stuck[stashed.number] = nbytes
            self._stuck_bytes += nbytes
            return
        if self._leaving_bytes + nbytes > self.staging_bytes:
            begin = time.perf_counter()
            while self._leaving and self._leaving_bytes + nbytes > self.staging_bytes:
                self._leaving[0][2].let_go()
                self._left()
            self._back_pressure_seconds += time.perf_counter() - begin
        stashed.leaving = self._carrier(stashed.device).send(self._tier, stashed.record, data)
        self._leaving.append((stashed.number, nbytes, stashed.leaving))
        self._leaving_bytes += nbytes
        self._written_bytes += nbytes

    def _left(self) -> None:
        """The first of those that leave is gone."""
        number, nbytes, _ = self._leaving.popleft()
        self._leaving_bytes -= nbytes
        stashed = self._get(number)
        if stashed is None:
            return
        if stashed.wanted:  # it need not go, for it would be fetched at once
            self._fetched.add(number, nbytes)
        else:
            stashed.data = None
            self._free_later(stashed)

    def _fetch(self, stashed: Stashed) -> Arriving:
        if stashed.record is None:
            raise RuntimeError(
                "A saved tensor is asked for whose bytes were given up when its offload was closed. Go backwards "
                "through a graph before closing what its tensors were saved to."
            )
        if stashed.leaving is not None:
            stashed.leaving.hand_over()
            stashed.leaving = None
        arriving = self._carrier(stashed.device).fetch(self._tier, stashed.record, stashed.device)
        stashed.arriving = arriving
        self._fetched.add(stashed.number, stashed.nbytes)
        self._read_bytes += stashed.nbytes
        return arriving

    def _fetch_ahead(self) -> None:
        while self._leaving_bytes + self._fetched.nbytes < self.staging_bytes:
            number = self._walk.next()
            if number is None:
                return
            stashed = self._get(number)
            if stashed is None or stashed.record is None:
                continue
            if stashed.data is not None:
                stashed.wanted = True
            elif stashed.arriving is None or stashed.arriving.data is None:
                if not self._make_room(stashed.nbytes):
                    self._walk.again(number)
                    return
                self._fetch(stashed)

    def _make_room(self, nbytes: int, *, at_any_cost: bool = False) -> bool:
        """For bytes that come; whether there is."""
        room = self.staging_bytes - self._leaving_bytes - nbytes
        if self._fetched.nbytes <= room:
            return True
        for number in self._fetched.oldest(self.staging_bytes, at_any_cost=at_any_cost):
            stashed = self._get(number)
            if stashed is not None:
                self._let_loose(stashed)
            self._fetched.forget(number)
            if self._fetched.nbytes <= room:
                return True
        return False

    def _let_loose(self, stashed: Stashed) -> None:
        if stashed.arriving is not None:
            stashed.arriving.loosen()
            self._free_later(stashed)
        elif stashed.number in self._fetched:
            stashed.data = None
            self._free_later(stashed)
        self._fetched.forget(stashed.number)

    def _free_later(self, stashed: Stashed) -> None:
        """Its memory is given up as soon as the operation is done that uses it now."""
        if stashed.device.type == "cpu":
            self._freed_bytes += stashed.nbytes

    def _settle(self) -> None:
        """See what has happened since.

        Raises:
            TierError: If something could not be written.
        """
        self._bury()
        for carrier in self._carriers.values():
            carrier.advance()
        while self._leaving and self._leaving[0][2].gone:
            self._left()
        if self._freed_bytes >= self.staging_bytes:
            self._freed_bytes = 0
            return_freed_memory()

    def _bury(self) -> None:
        while self._dead:
            number, record = self._dead.popleft()
            del self._alive[number]
            self._kept_bytes -= self._kept.pop(number, 0)
            self._stuck_bytes -= self._stuck.pop(number, 0)
            self._fetched.forget(number)
            if record is not None:
                for carrier in self._carriers.values():
                    carrier.forget(record)
                self._rooms.give_back(record)
