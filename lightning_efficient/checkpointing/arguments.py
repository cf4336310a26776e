"""Arguments that users give, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["check_arguments"]

_CHOICES: Mapping[str, tuple[str | None, ...]] = {
    "when_busy": ("wait", "skip", "eager"),
    "staging": ("auto", "host", "device"),
    "verify": ("none", "checksum"),
    "resume": (None, "auto"),
    "on_error": ("raise", "warn", "retry"),
    "frequency": ("advise", "drive"),
}
_LEAST = {"in_memory": 0, "keep": 1}


def check_arguments(given: Mapping[str, Any]) -> None:
    """Complain of what :class:`AsyncCheckpointIO` cannot be given.

    Raises:
        ValueError: Naming the argument, and what it may be.
    """
    for name, allowed in _CHOICES.items():
        if given[name] not in allowed:
            raise ValueError(f"{name}={given[name]!r} is not allowed. Use one of {', '.join(map(repr, allowed))}.")
    for name, least in _LEAST.items():
        count = given[name]
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise ValueError(f"{name}={count!r} is no number of checkpoints. Use {least} or more.")
    part = given["max_overhead"]
    if isinstance(part, bool) or not isinstance(part, int | float) or not 0 < part < 1:
        raise ValueError(f"max_overhead={part!r} is no part of the run's time. Use e.g. 0.035 for 3.5 %.")
