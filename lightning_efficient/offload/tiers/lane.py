"""One direction of transfers: threads that carry them out, and a limit to how much may be under way."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from lightning_efficient.offload.tiers.tier import Pending, TierError

__all__ = ["Lane", "LaneCounts", "Transfer", "again"]


@dataclass(frozen=True)
class LaneCounts:
    """What went through a lane.

    Attributes:
        moved_bytes: Of transfers that ended well.
        busy_seconds: In which at least one transfer was being carried out.
        waited_seconds: That callers waited, for room or for the end of a transfer.
    """

    moved_bytes: int
    busy_seconds: float
    waited_seconds: float


class Transfer:
    """A transfer that waits for its turn, is carried out, or has ended."""

    def __init__(self, lane: Lane, nbytes: int, work: Callable[[], None]) -> None:
        self.nbytes = nbytes
        self.error: TierError | None = None
        self.work: Callable[[], None] | None = work
        self._lane = lane
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._followers: list[Transfer] = []

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._ended.is_set()

    def wait(self) -> None:
        """Until it has ended.

        Raises:
            TierError: If it failed.
        """
        self.settle()
        if self.error is not None:
            raise again(self.error) from self.error

    def settle(self) -> None:
        """Until it has ended, well or not."""
        if not self.done:
            self._lane.wait_for(self._ended)

    def then(self, follower: Transfer) -> bool:
        """Let another begin after it; False if it has ended already."""
        with self._lock:
            if self.done:
                return False
            self._followers.append(follower)
            return True

    def end(self) -> list[Transfer]:
        """It has ended; those that waited for it."""
        with self._lock:
            self.work = None  # and with it the memory
            self._ended.set()
            followers, self._followers = self._followers, []
            return followers

    def enqueue(self) -> None:
        """It can be carried out now."""
        self._lane.enqueue(self)


class Lane:
    """Carries out transfers in the order in which they can begin.

    Attributes:
        failed: The error of the first transfer that failed.

    Args:
        name: For its threads.
        threads: How many transfers are carried out at a time.
        in_flight_bytes: Limit to what is asked for and not done; a single transfer may be larger.
    """

    def __init__(self, name: str, *, threads: int, in_flight_bytes: int) -> None:
        self.failed: TierError | None = None
        self._process = os.getpid()
        self._most = in_flight_bytes
        self._changed = threading.Condition()
        self._queue: deque[Transfer] = deque()
        self._in_flight_bytes = self._in_flight = self._active = self._moved_bytes = 0
        self._busy_since = self._busy_seconds = self._waited_seconds = 0.0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"offload-{name}-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def counts(self) -> LaneCounts:
        """Until now."""
        with self._changed:
            running = time.perf_counter() - self._busy_since if self._active else 0.0
            return LaneCounts(self._moved_bytes, self._busy_seconds + running, self._waited_seconds)

    def admit(self, nbytes: int) -> None:
        """Wait until a transfer of so many bytes may be asked for, which must then be.

        Raises:
            TierError: If the lane is closed, or of another process.
        """
        self._check()
        begin = time.perf_counter()
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or not self._in_flight or self._in_flight_bytes + nbytes <= self._most
            )
            if self._closed:
                raise TierError("The tier is closed.")
            self._waited_seconds += time.perf_counter() - begin  # first: an interrupt here has admitted nothing
            self._in_flight += 1
            self._in_flight_bytes += nbytes

    def withdraw(self, nbytes: int) -> None:
        """What was admitted is not asked for."""
        with self._changed:
            self._in_flight -= 1
            self._in_flight_bytes -= nbytes
            self._changed.notify_all()

    def begin(self, nbytes: int, work: Callable[[], None], after: Pending | None) -> Transfer:
        """Let ``work`` be done, once it is its turn and ``after`` has ended; it was admitted before."""
        transfer = Transfer(self, nbytes, work)
        if not (isinstance(after, Transfer) and after.then(transfer)):
            self.enqueue(transfer)
        return transfer

    def enqueue(self, transfer: Transfer) -> None:
        """Its turn is behind those that are there."""
        with self._changed:
            self._queue.append(transfer)
            self._changed.notify_all()

    def wait_for(self, event: threading.Event) -> None:
        """Until a transfer has ended.

        Raises:
            TierError: In a fork, where it never will.
        """
        self._check()
        begin = time.perf_counter()
        event.wait()
        with self._changed:
            self._waited_seconds += time.perf_counter() - begin

    def drain(self) -> None:
        """Until nothing is under way."""
        self._check()
        begin = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: not self._in_flight)
            self._waited_seconds += time.perf_counter() - begin

    def close(self) -> None:
        """Carry out what was asked for, and end the threads."""
        with self._changed:
            if threading.current_thread() not in self._threads:
                self._changed.wait_for(lambda: not self._in_flight)
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _check(self) -> None:
        if os.getpid() != self._process:
            raise TierError("The tier belongs to another process, which this one was forked from. Use it there only.")

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                transfer = self._queue.popleft()
                if not self._active:
                    self._busy_since = time.perf_counter()
                self._active += 1
            self._carry_out(transfer)
            with self._changed:
                self._active -= 1
                if not self._active:
                    self._busy_seconds += time.perf_counter() - self._busy_since
                self._moved_bytes += 0 if transfer.error else transfer.nbytes
                self.failed = self.failed or transfer.error
            followers = transfer.end()  # from here on the caller may look at all of that
            with self._changed:
                self._in_flight -= 1
                self._in_flight_bytes -= transfer.nbytes
                self._changed.notify_all()
            for follower in followers:
                follower.enqueue()
            del transfer, followers  # nothing is kept alive while there is nothing to do

    def _carry_out(self, transfer: Transfer) -> None:
        work = transfer.work
        try:
            if work is not None:
                work()
        except TierError as error:
            transfer.error = error
        except BaseException as error:
            transfer.error = TierError(f"A transfer failed: {type(error).__name__}: {error}")
            transfer.error.__cause__ = error


def again(error: TierError) -> TierError:
    """The same error, to be raised once more."""
    new = TierError(*error.args)
    if error.filename is not None:  # setting it, even to None, changes the text
        new.filename = error.filename
    return new
