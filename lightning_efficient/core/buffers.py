"""Host memory that is taken once, touched at once, and used again and again within a cap."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
import warnings
from typing import Any

import torch

__all__ = ["PAGE", "BufferPool", "HostBuffer", "round_up"]

PAGE = mmap.PAGESIZE
_PORTABLE = 1  # cudaHostRegisterPortable: for all devices
_TOUCH = 8 << 20  # bytes that are touched between two looks at whether others want the interpreter


def round_up(nbytes: int) -> int:
    """To whole pages."""
    return -(-nbytes // PAGE) * PAGE


class HostBuffer:
    """Page-aligned memory of the host, outside the allocators of Python and torch.

    Args:
        nbytes: Rounded up to whole pages.
        pinned: Lock it for copies from an NVIDIA GPU that do not block.

    Raises:
        OSError: If there is not that much memory.
        RuntimeError: If it cannot be locked.
    """

    def __init__(self, nbytes: int, *, pinned: bool = False) -> None:
        self.nbytes = round_up(max(nbytes, 1))
        self._map = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):  # fewer faults; no copies in forked workers
            if hasattr(mmap, advice):
                with contextlib.suppress(OSError):  # advice that this kernel does not know
                    self._map.madvise(getattr(mmap, advice))
        self.view = memoryview(self._map)
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        self.address = self.tensor.data_ptr()
        self._process = os.getpid()
        self._pinned = False
        if pinned:
            self.pin()

    @property
    def pinned(self) -> bool:
        """Whether copies from a GPU need not block."""
        return self._pinned

    def pin(self) -> None:
        """Lock it for copies from an NVIDIA GPU; what was in it is lost.

        Raises:
            RuntimeError: If it cannot be locked.
        """
        self.touch()  # else the driver does it, and holds everybody up meanwhile
        if code := _register(self.address, self.nbytes):
            raise RuntimeError(f"{self.nbytes} bytes could not be pinned: CUDA error {code}.")
        self._pinned = True

    def touch(self) -> None:
        """Make the system give all pages now, rather than in the first copy."""
        for start in range(0, self.nbytes, _TOUCH):
            ctypes.memset(self.address + start, 0, min(_TOUCH, self.nbytes - start))

    def grown(self, nbytes: int, *, keep: int) -> HostBuffer:
        """A larger one with the first ``keep`` bytes of this one."""
        larger = HostBuffer(nbytes)
        ctypes.memmove(larger.address, self.address, keep)
        return larger

    def __del__(self) -> None:
        if getattr(self, "_process", os.getpid()) != os.getpid():
            _of_the_parent.append(self._map)  # a fork has not got this memory, and may have another at its address
        elif getattr(self, "_pinned", False):
            with contextlib.suppress(Exception):  # at the end of the interpreter there may be no CUDA any more
                _cudart().cudaHostUnregister(self.address)


_of_the_parent: list[mmap.mmap] = []


def _register(address: int, nbytes: int) -> int:
    """Pin memory; returns CUDA's error code, or 0.

    In a thread of its own: CUDA keeps an error for the next call of the thread to find, which would be the user's.
    """
    device, codes = torch.cuda.current_device(), []

    def register() -> None:
        torch.cuda.set_device(device)
        codes.append(int(_cudart().cudaHostRegister(address, nbytes, _PORTABLE)))

    thread = threading.Thread(target=register, name="checkpoint-pin")
    thread.start()
    thread.join()
    return codes[0] if codes else -1


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class BufferPool:
    """Lends buffers and keeps them for the next time.

    Args:
        cap_bytes: Memory of all buffers together; None: no cap.
        pinned: See :class:`HostBuffer`.
        most: Buffers that may exist at a time.
        spare_bytes: A new buffer is larger by this, where the cap allows it: what is asked for may grow.

    Attributes:
        may_pin: False once memory could not be pinned.
    """

    def __init__(self, cap_bytes: int | None, *, pinned: bool = False, most: int = 2, spare_bytes: int = 0) -> None:
        self.cap_bytes = cap_bytes
        self.pinned = pinned
        self.may_pin = True
        self.most = most
        self.spare_bytes = spare_bytes
        self._free: list[HostBuffer] = []
        self._lent: set[int] = set()
        self._coming = 0
        self._held = 0
        self._changed = threading.Condition()

    @property
    def held_bytes(self) -> int:
        """Memory of all buffers, lent or not."""
        return self._held

    def fits(self, nbytes: int) -> bool:
        """Whether one buffer of this size can ever be lent."""
        return self.cap_bytes is None or round_up(nbytes) <= self.cap_bytes

    def try_take(self, nbytes: int) -> HostBuffer | None:
        """A buffer of at least ``nbytes``, or None while too many, or too much memory, are lent."""
        with self._changed:
            return self._try_take(nbytes)

    def take(self, nbytes: int, timeout: float | None = None) -> HostBuffer:
        """Wait for a buffer of at least ``nbytes``.

        Raises:
            MemoryError: If it does not fit under the cap even alone.
            TimeoutError: If none came back in time.
        """
        if not self.fits(nbytes):
            raise MemoryError(f"A buffer of {nbytes} bytes does not fit under the cap of {self.cap_bytes} bytes.")
        with self._changed:
            taken: list[HostBuffer] = []

            def try_it() -> bool:
                found = self._try_take(nbytes)
                if found is not None:
                    taken.append(found)
                return bool(taken)

            if not self._changed.wait_for(try_it, timeout):
                raise TimeoutError(f"No buffer of {nbytes} bytes came back within {timeout} s.")
            return taken[0]

    def prepare(self, nbytes: int) -> None:
        """Have one more buffer ready, touched, if the cap allows one; in a thread that may take its time."""
        with self._changed:
            needed = self._new_size(nbytes)
            if any(buffer.nbytes >= nbytes for buffer in self._free) or not self._may_add(needed):
                return
            self._held += needed
            self._coming += 1
        buffer = None
        try:
            buffer = self.new(needed)
            if not buffer.pinned:  # which has touched it
                buffer.touch()
        finally:
            with self._changed:
                self._coming -= 1
                if buffer is None:
                    self._held -= needed
                else:
                    self._free.append(buffer)
                self._changed.notify_all()

    def give_back(self, buffer: HostBuffer) -> None:
        """Return a buffer that was lent; one that is not of this pool is let go."""
        with self._changed:
            if id(buffer) in self._lent:
                self._lent.remove(id(buffer))
                self._free.append(buffer)
                self._changed.notify_all()

    def clear(self) -> None:
        """Let go of the buffers that are not lent."""
        with self._changed:
            self._held -= sum(buffer.nbytes for buffer in self._free)
            self._free.clear()

    def _try_take(self, nbytes: int) -> HostBuffer | None:
        fitting = [buffer for buffer in self._free if buffer.nbytes >= nbytes]
        if fitting:
            buffer = min(fitting, key=lambda b: b.nbytes)
            self._free.remove(buffer)
        else:
            while self._free and not self._may_add(round_up(nbytes)):  # too small ones make room
                self._held -= self._free.pop(0).nbytes
            needed = self._new_size(nbytes)
            if self._coming or not self._may_add(needed):  # one that is being touched is soon quicker than a new one
                return None
            buffer = self.new(needed)
            self._held += buffer.nbytes
        self._lent.add(id(buffer))
        return buffer

    def new(self, nbytes: int) -> HostBuffer:
        """One that does not count, and is let go when it is given back."""
        try:
            return HostBuffer(nbytes, pinned=self.pinned and self.may_pin)
        except RuntimeError as error:
            warnings.warn(f"{error} Copies from the GPU will be slower.", stacklevel=2)
            self.may_pin = False
            return HostBuffer(nbytes)

    def _new_size(self, nbytes: int) -> int:
        least = round_up(max(nbytes, 1))
        more = least + round_up(self.spare_bytes)
        return more if self.cap_bytes is None or self._held + more <= self.cap_bytes else least

    def _may_add(self, nbytes: int) -> bool:
        count = len(self._free) + len(self._lent) + self._coming
        return count < self.most and (self.cap_bytes is None or self._held + nbytes <= self.cap_bytes)
