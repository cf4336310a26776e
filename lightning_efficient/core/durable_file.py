"""A file that is either there as a whole, and survives a loss of power, or is not there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import re
import shutil
import sys
import time
from pathlib import Path

from lightning_efficient.core.buffers import PAGE
from lightning_efficient.core.direct_io import set_direct
from lightning_efficient.core.processes import NO_MARK, is_dead, machine_mark

__all__ = ["DurableFile", "durable_link", "durable_remove", "sweep_temporaries"]

PREFIX, UNLOCKED, SUFFIX = ".lightning-efficient-", "unlocked-", ".tmp"
_OWNER = re.compile(rf"{re.escape(PREFIX)}(?:{UNLOCKED})?(?:([0-9a-f]{{12}}|{NO_MARK})-)?([0-9]+)-")
_NAME_BYTES = 64  # of a temporary name, that say whose it is: with the rest far below the 255 of a file system
_NO_LOCKS = frozenset((errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK))
_NO_SYNC = frozenset((errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP))
_LINK_SECONDS, _UNLOCKED_SECONDS = 60, 24 * 3600
_numbers = itertools.count()


class DurableFile:
    """Takes the bytes of a file in large pieces, and lets it appear when all are on the disk.

    They go to a temporary file in the same directory, past the page cache where the file system allows it
    (``O_DIRECT``), which takes the file's place by a rename. The temporary file is locked while its writer lives, so
    that :func:`sweep_temporaries` can tell what a killed one left behind; where the file system has no locks, its name
    says so.

    Args:
        path: Where the file shall be; its directory exists.

    Raises:
        OSError: If the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written = 0
        self._temporary = _temporary_for(path)
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        self._descriptor = os.open(self._temporary, flags, 0o666)
        try:
            self._lock()
            self._direct = set_direct(self._descriptor, True)
        except BaseException:
            self.abandon()
            raise

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
                self._direct = set_direct(self._descriptor, False)
                continue
            if count % PAGE and self._direct:
                self._direct = set_direct(self._descriptor, False)
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
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.replace(self._temporary, self.path)
        self._close()
        _sync_directory(self.path.parent)

    def abandon(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(OSError):
            self._close()
        with contextlib.suppress(OSError):
            os.unlink(self._temporary)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            # Locks may come back before a sweep does (ENOLCK), which must not take this file for a dead one's then.
            unlocked = _temporary_for(self.path, UNLOCKED)
            os.rename(self._temporary, unlocked)
            self._temporary = unlocked

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def durable_remove(path: Path) -> None:
    """Remove a file, a link, or a directory (a checkpoint in another format), if it is there.

    Raises:
        OSError: As the system says.
    """
    with contextlib.suppress(FileNotFoundError):
        _remove(path)
        _sync_directory(path.parent)


def durable_link(target: Path, link: Path) -> None:
    """Make ``link`` name ``target``, at once: there is no moment without it, unless it was a directory.

    Where the file system has no symbolic links it becomes a second name of the same file, or else a copy. A directory
    in its place (a checkpoint in another format) is removed, as Lightning does.

    Raises:
        OSError: As the system says.
    """
    if target.absolute() == link.absolute():
        return
    temporary = _temporary_for(link, f"{UNLOCKED}{machine_mark()}-")
    try:
        _name_again(target, temporary)
        if link.is_dir() and not link.is_symlink():
            shutil.rmtree(link)
        os.replace(temporary, link)
    finally:  # a replacement by another name of the same file does nothing, and leaves it too
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    _sync_directory(link.parent)


def sweep_temporaries(directory: Path) -> list[Path]:
    """Remove the unfinished files and links that killed processes left.

    Returns:
        What was removed.
    """
    removed = []
    for path in directory.glob(f"{PREFIX}*{SUFFIX}") if directory.is_dir() else ():
        with contextlib.suppress(OSError):
            if _abandoned(path):
                path.unlink()
                removed.append(path)
    return removed


def _temporary_for(path: Path, mark: str = "") -> Path:
    """A name that nobody has, beside ``path``, with the end of its name."""
    end = os.fsencode(path.name)[-_NAME_BYTES:]  # may begin within a character
    name = end.decode(sys.getfilesystemencoding(), "ignore")
    return path.parent / f"{PREFIX}{mark}{os.getpid()}-{next(_numbers)}-{name}{SUFFIX}"


def _name_again(target: Path, name: Path) -> None:
    with contextlib.suppress(OSError):
        return os.symlink(os.path.relpath(target, name.parent), name)
    with contextlib.suppress(OSError):
        return os.link(target, name)
    with target.open("rb") as source, name.open("xb") as copy:
        shutil.copyfileobj(source, copy)
        copy.flush()
        os.fsync(copy.fileno())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:  # some mounts have no such thing as a directory's fsync
            raise
    finally:
        os.close(descriptor)


def _abandoned(path: Path) -> bool:
    """Whether nobody is at work on a temporary file or link, for certain."""
    if path.is_symlink():  # it lives for a moment only, and has no lock
        return _is_known_dead(path) or _age(path) > _LINK_SECONDS
    if not path.name.startswith(PREFIX + UNLOCKED):
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)  # over NFS only what can be written can be locked
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        finally:
            os.close(descriptor)
    # Without locks nothing tells at once, and its writer may be on another host. But a writer that lives writes all the
    # time: what no process here has the number of, and nobody has touched for a day, is no one's.
    return _is_known_dead(path) or (_age(path) > _UNLOCKED_SECONDS and not _lives(path))


def _is_known_dead(path: Path) -> bool:
    """Whether its name says which process on this machine it was, and that is gone."""
    match = _OWNER.match(path.name)
    return match is not None and match[1] is not None and is_dead(match[1], int(match[2]))


def _lives(path: Path) -> bool:
    """Whether another process on this host may have the number in the name."""
    if (match := _OWNER.match(path.name)) is None:
        return True
    number = int(match[2])
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return number != os.getpid()  # ours: of a run that had it before, as in containers


def _age(path: Path) -> float:
    """Seconds since it was last written to."""
    return time.time() - path.lstat().st_mtime
