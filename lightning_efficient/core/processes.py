"""Whether the process that made a file lives, as far as this machine can know."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

__all__ = ["NO_MARK", "is_dead", "machine_mark"]

NO_MARK = "0"


def machine_mark() -> str:
    """Of this machine since its last boot, and of the namespace in which process numbers mean something.

    Twelve hexadecimal digits, or :data:`NO_MARK` where the system does not say.
    """
    known = ""
    with contextlib.suppress(OSError):
        known = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(known.encode()).hexdigest()[:12] if known else NO_MARK


def is_dead(machine: str, process: int) -> bool:
    """Whether it is certain that a process is dead.

    Args:
        machine: The :func:`machine_mark` where it ran.
        process: Its number.
    """
    if machine in (NO_MARK, "") or machine != machine_mark():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False
