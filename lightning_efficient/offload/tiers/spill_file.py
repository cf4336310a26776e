"""The files that offloaded records are in: their names, whose they are, and what becomes of those of killed runs.

A file is locked (``flock``) for the life of its process, so that whoever starts next in the same folder can tell what a
killed one left behind. Where the file system has no locks, the name says so; such a file is only removed if it is
known that its process is dead: it has the mark of this machine since its last boot (and of this namespace of process
numbers), and no process here has its number. Those of other machines are left alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
from pathlib import Path

from lightning_efficient.core.processes import is_dead, machine_mark
from lightning_efficient.offload.tiers.tier import TierError

__all__ = ["SpillFile", "sweep"]

_PREFIX, _SUFFIX = ".lightning-efficient-offload-", ".spill"
_NAME = re.compile(rf"{re.escape(_PREFIX)}(unlocked-)?([0-9a-f]+)-([0-9]+)-[0-9a-f]+{re.escape(_SUFFIX)}")
_IN_MEMORY = frozenset(("tmpfs", "ramfs", "devtmpfs"))
_ATTEMPTS = 100  # to make a file in a folder that vanishes
_NO_LOCKS = frozenset((errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK))


class SpillFile:
    """An empty file of this process, locked.

    Attributes:
        path: Its name.
        descriptor: Open for reading and writing.

    Args:
        directory: Made if it is missing.

    Raises:
        TierError: If it cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        self._process = os.getpid()
        try:
            self.path, self.descriptor = _make(directory)
        except OSError as error:
            raise TierError(
                error.errno,
                f"no file to offload to can be made in this folder ({error.strerror}). Name one that exists or can be "
                "made, and can be written to",
                str(directory),
            ) from error

    @property
    def in_memory(self) -> bool:
        """Whether it is in a file system that takes the host's memory (tmpfs), as far as the system says."""
        device = os.fstat(self.descriptor).st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        mounts = ""
        with contextlib.suppress(OSError):
            mounts = Path("/proc/self/mountinfo").read_text()
        for mount in mounts.splitlines():
            fields, _, kind = mount.partition(" - ")
            if fields.split()[2] == number:
                return kind.split()[0] in _IN_MEMORY
        return False

    def remove(self) -> None:
        """The name is gone, and with it the room, once the descriptor is closed; in a fork, nothing."""
        if os.getpid() == self._process:
            with contextlib.suppress(OSError):
                os.unlink(self.path)


def sweep(directory: Path) -> list[Path]:
    """Remove the files that killed processes of this user left in a folder.

    Returns:
        What was removed.
    """
    removed, found = [], list[Path]()
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # another rank may remove it meanwhile
        found = sorted(directory.glob(f"{_PREFIX}*{_SUFFIX}"))
    for path in found:
        match = _NAME.fullmatch(path.name)
        if match is None:
            continue
        with contextlib.suppress(OSError):
            unlocked, machine, process = match[1], match[2], int(match[3])
            if (is_dead(machine, process) if unlocked else True) and _unlink_if_abandoned(path):
                removed.append(path)
    return removed


def _make(directory: Path) -> tuple[Path, int]:
    vanished = 0
    while True:
        path = directory / _name("")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except (FileNotFoundError, FileExistsError):  # another rank, which is ending, has removed it, for it was empty
            vanished += 1
            if vanished > _ATTEMPTS:
                raise
            continue
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                # Locks may come back before a sweep does (ENOLCK), which must not take this file for a dead one's then.
                unlocked = directory / _name("unlocked-")
                os.rename(path, unlocked)
                return unlocked, descriptor
            if os.fstat(descriptor).st_nlink:
                return path, descriptor
            os.close(descriptor)  # a sweep was quicker with the lock, and has removed it
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(path)
            os.close(descriptor)
            raise


def _name(mark: str) -> str:
    return f"{_PREFIX}{mark}{machine_mark()}-{os.getpid()}-{secrets.token_hex(6)}{_SUFFIX}"


def _unlink_if_abandoned(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            unlocked = "unlocked-" in path.name
            if not unlocked or error.errno not in _NO_LOCKS:
                return False
        os.unlink(path)
        return True
    finally:
        os.close(descriptor)
