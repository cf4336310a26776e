"""What killed runs leave in a directory, and the notes by which the next one knows it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from lightning_efficient.core.durable_file import PREFIX, durable_link, durable_remove, sweep_temporaries

__all__ = ["Intention", "hand_links_over", "sweep"]

_REMOVAL = ".removal"


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
        self.path, self._successor = path, successor
        self._note = path.parent / f"{PREFIX}{path.name}{_REMOVAL}"
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
            with contextlib.suppress(OSError):
                hand_links_over(self.path, self._successor)
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
    for note in directory.glob(f"{PREFIX}*{_REMOVAL}") if directory.is_dir() else ():
        with contextlib.suppress(OSError):
            old, successor = directory / note.name[len(PREFIX) : -len(_REMOVAL)], Path(os.readlink(note))
            if old.exists() and successor.exists():
                hand_links_over(old, successor)  # which the killed run had not come to
                durable_remove(old)
                removed.append(old)
            note.unlink()
    return [*removed, *sweep_temporaries(directory)]


def hand_links_over(old: Path, successor: Path) -> None:
    """Links beside ``old`` that name it name ``successor`` from now on, if that is there.

    To be called before ``old`` is removed: a link is often asked for only then, and a kill in between must not leave a
    ``last.ckpt`` that names nothing.

    Raises:
        OSError: As the system says.
    """
    for link in old.parent.iterdir() if successor.exists() else ():
        if link.is_symlink() and link.suffix != _REMOVAL and link.exists() and link.samefile(old):
            durable_link(successor, link)
