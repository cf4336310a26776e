"""A file that is either there as a whole, and survives a loss of power, or is not there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

from lightning_efficient.core.buffers import PAGE

__all__ = ["DurableFile", "Intention", "durable_link", "durable_remove", "sweep"]

PREFIX, SUFFIX, REMOVAL = ".lightning-efficient-", ".tmp", ".removal"
_LINK_SECONDS = 60
_numbers = itertools.count()


class DurableFile:
    """Takes the bytes of a file in large pieces, and lets it appear when all are on the disk.

    They go to a temporary file in the same directory, past the page cache where the file system allows it
    (``O_DIRECT``), which takes the file's place by a rename. The temporary file is locked while its writer lives, so
    that :func:`sweep` can tell what a killed one left behind.

    Args:
        path: Where the file shall be; its directory exists.

    Raises:
        OSError: If the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written = 0
        self._temporary = path.parent / f"{PREFIX}{os.getpid()}-{next(_numbers)}-{path.name[-100:]}{SUFFIX}"
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        self._descriptor = os.open(self._temporary, flags, 0o666)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        self._direct = self._set_direct(True)

    def append(self, piece: memoryview) -> None:
        """Write ``piece`` after the others.

        Args:
            piece: Page-aligned memory, a whole number of pages.

        Raises:
            OSError: As the system says.
        """
        while len(piece):
            try:
                count = os.pwrite(self._descriptor, piece, self.written)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._direct = self._set_direct(False)  # some file systems refuse only when it comes to writing
                continue
            if count % PAGE and self._direct:
                self._direct = self._set_direct(False)
            self.written += count
            piece = piece[count:]

    def commit(self, nbytes: int) -> None:
        """Cut the file to ``nbytes``, and give it its name once it is on the disk.

        Raises:
            OSError: As the system says.
        """
        os.ftruncate(self._descriptor, nbytes)
        os.fsync(self._descriptor)
        if not self._direct and hasattr(os, "posix_fadvise"):  # do not push what is useful out of the page cache
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.replace(self._temporary, self.path)
        self._close()
        _sync_directory(self.path.parent)

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._close()
        with contextlib.suppress(OSError):
            os.unlink(self._temporary)

    def _set_direct(self, on: bool) -> bool:
        """Whether writes go past the page cache now."""
        if not hasattr(os, "O_DIRECT"):
            return False
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
        except OSError:
            return False
        return on

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def durable_remove(path: Path) -> None:
    """Remove a file or a link, if it is there.

    Raises:
        OSError: As the system says.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
        _sync_directory(path.parent)


def durable_link(target: Path, link: Path) -> None:
    """Make ``link`` name ``target``, at once: there is no moment without it.

    Where the file system has no symbolic links it becomes a second name of the same file.

    Raises:
        OSError: As the system says.
    """
    temporary = link.parent / f"{PREFIX}{os.getpid()}-{next(_numbers)}-{link.name[-100:]}{SUFFIX}"
    try:
        os.symlink(os.path.relpath(target, link.parent), temporary)
    except OSError:
        os.link(target, temporary)
    os.replace(temporary, link)
    _sync_directory(link.parent)


class Intention:
    """A note in the directory that ``path`` is to be removed once ``successor`` is there, for who comes after a kill.

    It must outlive the process, not a loss of power, and so costs no wait for the disk.

    Args:
        path: To be removed, later, by who calls :meth:`fulfil`.
        successor: In the same directory or another.
    """

    def __init__(self, path: Path, successor: Path) -> None:
        self.path = path
        self._note = path.parent / f"{PREFIX}{path.name}{REMOVAL}"
        with contextlib.suppress(OSError):
            os.symlink(successor.absolute(), self._note)  # made and filled in one

    def fulfil(self) -> None:
        """Remove the file and the note.

        Raises:
            OSError: As the system says.
        """
        durable_remove(self.path)
        self.withdraw()

    def withdraw(self) -> None:
        """Remove the note: the successor will not come."""
        with contextlib.suppress(OSError):
            self._note.unlink()


def sweep(directory: Path) -> list[Path]:
    """Remove what killed runs left: unfinished files, and old ones whose successors have become durable.

    Returns:
        What was removed.
    """
    removed = []
    for note in directory.glob(f"{PREFIX}*{REMOVAL}") if directory.is_dir() else ():
        with contextlib.suppress(OSError):
            old, successor = directory / note.name[len(PREFIX) : -len(REMOVAL)], Path(os.readlink(note))
            if old.exists() and successor.exists():
                for link in directory.iterdir():  # which the killed run had not come to
                    if link.is_symlink() and link.suffix != REMOVAL and link.resolve() == old.resolve():
                        durable_link(successor, link)
                durable_remove(old)
                removed.append(old)
            note.unlink()
    for path in _temporaries(directory):
        with contextlib.suppress(OSError):
            if _abandoned(path):
                path.unlink()
                removed.append(path)
    return removed


def _abandoned(path: Path) -> bool:
    if path.is_symlink():  # it lives for a moment only, and has no lock
        return time.time() - path.lstat().st_mtime > _LINK_SECONDS
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _temporaries(directory: Path) -> Iterator[Path]:
    if directory.is_dir():
        yield from directory.glob(f"{PREFIX}*{SUFFIX}")


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
