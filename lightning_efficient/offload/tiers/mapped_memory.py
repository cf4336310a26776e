"""Tensors on memory that somebody else owns: a part of a file, or of a slab; and when nobody uses them any more."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_efficient.core.buffers import PAGE, round_up
from lightning_efficient.offload.tiers.direct_file import DirectFile
from lightning_efficient.offload.tiers.tier import TierError

__all__ = ["FileMapping", "MappedMemory", "alone", "drop_pages", "drop_pages_at", "is_of_a_record"]

_FAILED = ctypes.c_void_p(-1).value


class MappedMemory:
    """Lives as long as any tensor on it does.

    Args:
        address: Of its first byte.
        nbytes: Its size.
        owner: Kept alive with it.
    """

    def __init__(self, address: int, nbytes: int, owner: Any) -> None:
        self.address, self.nbytes, self.owner = address, nbytes, owner

    def tensor(self) -> Tensor:
        """It as uint8 ``[nbytes]``."""
        array = (ctypes.c_ubyte * self.nbytes).from_address(self.address)
        array.memory = self  # type: ignore[attr-defined]  # the tensor keeps the array, and the array this
        return torch.frombuffer(array, dtype=torch.uint8)


class FileMapping(MappedMemory):
    """A part of a file as memory; what is written to it stays in it, on pages of its own, unless it is ``shared``.

    Where all memory that may be written to counts as taken (with ``RLIMIT_DATA``, or on a system that promises no more
    than it has) it can only be read: writing to it ends the process.

    Args:
        file: That it is a part of.
        offset: Of the part, a multiple of the page size.
        nbytes: Of the part.
        shared: What is written to it goes to the file, where nobody else uses it any more.

    Raises:
        TierError: If it cannot be mapped.
    """

    def __init__(self, file: DirectFile, offset: int, nbytes: int, *, shared: bool = False) -> None:
        kind = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE | _NO_RESERVE
        access = mmap.PROT_READ | (mmap.PROT_WRITE if shared or _costs_nothing_unwritten() else 0)
        address = _libc().mmap(None, nbytes, access, kind, file.descriptor, offset)
        if address in (None, _FAILED):
            code = ctypes.get_errno()
            raise TierError(code, f"{nbytes:,} bytes of the offload file cannot be mapped ({os.strerror(code)}). Raise "
                            "vm.max_map_count, or offload larger pieces", str(file.path))  # fmt: skip
        super().__init__(address, nbytes, file)
        self._offset, self._shared = offset, shared
        self._unmap = weakref.finalize(self, _libc().munmap, ctypes.c_void_p(address), ctypes.c_size_t(nbytes))
        self._unmap.atexit = False
        _mapped[address] = self

    def drop(self) -> None:
        """Give back the memory that reading has filled; it is read from the disk again when it is needed.

        What somebody has written to stays, and all with it.
        """
        if self._shared or not _has_own_pages(self.address, self.nbytes):
            _libc().madvise(ctypes.c_void_p(self.address), ctypes.c_size_t(round_up(self.nbytes)), _DONTNEED)
            self.owner.forget(self._offset, round_up(self.nbytes))


def _costs_nothing_unwritten() -> bool:
    """Whether memory that may be written to counts as taken only where it is."""
    return resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY and _promises_freely()


@cache
def _promises_freely() -> bool:
    try:
        return _OVERCOMMIT.read_text().strip() != "2"
    except OSError:
        return True


def _has_own_pages(address: int, nbytes: int) -> bool:
    """Whether memory that was mapped from a file has pages that are not the file's any more, or may have."""
    first, last = address // PAGE, -(-(address + nbytes) // PAGE)
    try:
        with _PAGEMAP.open("rb", buffering=0) as pagemap:
            pagemap.seek(first * _ENTRY)
            entries = bytearray(pagemap.read((last - first) * _ENTRY))
    except OSError:
        return True
    if len(entries) < (last - first) * _ENTRY:
        return True
    bits = torch.frombuffer(entries, dtype=torch.int64) >> 61  # of each page: of a file, swapped out, present
    return bool(((bits & 6 != 0) & (bits & 1 == 0)).any())


_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
_PAGEMAP, _ENTRY = Path("/proc/self/pagemap"), 8  # bytes of an entry
_DONTNEED = getattr(mmap, "MADV_DONTNEED", 4)
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_mapped: weakref.WeakValueDictionary[int, FileMapping] = weakref.WeakValueDictionary()


def is_of_a_record(tensor: Tensor) -> bool:
    """Whether a tensor lies in memory that a tier has mapped, which nobody else knows by another way."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() in _mapped


def alone(tensor: Tensor) -> Tensor:
    """The same memory as the only one of a storage: of a tensor on the host whose elements have no gaps."""
    memory = MappedMemory(tensor.data_ptr(), tensor.numel() * tensor.element_size(), tensor)
    if (mapping := _mapped.get(tensor.untyped_storage().data_ptr())) is not None:
        _mapped[memory.address] = mapping
    return memory.tensor().view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


def drop_pages(tensor: Tensor) -> int:
    """Give back the memory that reading a mapped record has filled, of the process and of the page cache.

    Args:
        tensor: What a tier's ``mapped`` returned, or a view of it; any other tensor is left alone.

    Returns:
        Bytes of the record; 0 if the tensor is not one.
    """
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        return 0
    return drop_pages_at(tensor.untyped_storage().data_ptr())


def drop_pages_at(address: int) -> int:
    """See :func:`drop_pages`; of the record that is mapped there."""
    memory = _mapped.get(address)
    if memory is None:
        return 0
    memory.drop()
    return memory.nbytes


_library: list[Any] = []


def _libc() -> Any:
    if not _library:
        library = ctypes.CDLL(None, use_errno=True)
        library.mmap.restype = ctypes.c_void_p
        library.mmap.argtypes = [
            ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64
        ]  # fmt: skip
        _library.append(library)
    return _library[0]
