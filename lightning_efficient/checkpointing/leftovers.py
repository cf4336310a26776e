"""What killed runs leave in a directory, and the notes by which the next one knows it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from lightning_efficient.checkpointing.durable_file import (
    NO_LOCKS,
    PREFIX,
    REMOVAL,
    SUFFIX,
    UNLOCKED,
    durable_link,
    durable_remove,
)

__all__ = ["Intention", "sweep"]

_LINK_SECONDS, _UNLOCKED_SECONDS = 60, 24 * 3600


class Intention:
    """A note in the directory that ``path`` is to be removed once ``successor`` is there, for who comes after a kill.

    It must outlive the process, not a loss of power, and so costs no wait for the disk. Without it (no symbolic links,
    a name too long to be part of another, a successor that replaces a file) nothing is lost: after a kill, ``path``
    stays.

    Args:
        path: To be removed, later, by who calls :meth:`fulfil`.
        successor: In the same directory or another.
    """

    def __init__(self, path: Path, successor: Path) -> None:
        self.path = path
        self._note = path.parent / f"{PREFIX}{path.name}{REMOVAL}"
        self.withdraw()  # one of before would name another successor
        if not os.path.lexists(successor):  # what has its name already is not it, and would be taken for it
            with contextlib.suppress(OSError):
                os.symlink(successor.absolute(), self._note)  # made and filled in one

    def fulfil(self) -> None:
        """Remove the file and the note; the note also if the file stays, for its name may be given to a new one.

        Raises:
            OSError: As the system says.
        """
        try:
            durable_remove(self.path)
        finally:
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
                    if link.is_symlink() and link.suffix != REMOVAL and link.exists() and link.samefile(old):
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
    """Whether nobody is at work on a temporary file or link, for certain."""
    if path.is_symlink():  # it lives for a moment only, and has no lock
        return _age(path) > _LINK_SECONDS
    if not path.name.startswith(PREFIX + UNLOCKED):
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)  # over NFS only what can be written can be locked
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        finally:
            os.close(descriptor)
    # Without locks nothing tells at once, and its writer may be on another host. But a writer that lives writes all the
    # time: what no process here has the number of, and nobody has touched for a day, is no one's.
    return _age(path) > _UNLOCKED_SECONDS and not _lives(path.name.removeprefix(PREFIX).removeprefix(UNLOCKED))


def _lives(name: str) -> bool:
    """Whether another process on this host may have the number that ``name`` begins with."""
    try:
        number = int(name.partition("-")[0])
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, OverflowError):
        return True
    return number != os.getpid()  # ours: of a run that had it before, as in containers


def _age(path: Path) -> float:
    """Seconds since it was last written to."""
    return time.time() - path.lstat().st_mtime


def _temporaries(directory: Path) -> Iterator[Path]:
    if directory.is_dir():
        yield from directory.glob(f"{PREFIX}*{SUFFIX}")
