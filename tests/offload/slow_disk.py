"""A disk that is as slow as a test wants it."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lightning_efficient.offload.tiers.direct_file import SystemCalls
from lightning_efficient.offload.tiers.disk import DiskTier

__all__ = ["slow_disk"]


def slow_disk(bytes_per_second: float) -> Callable[..., DiskTier]:
    """Makes disk tiers whose device moves so many bytes a second, one request after another, in either direction."""
    device, free_at = threading.Lock(), [0.0]

    def taking_its_time(call: Callable[..., int]) -> Callable[..., int]:
        def move(file: int, buffers: Sequence[Any], offset: int) -> int:
            done = call(file, buffers, offset)
            with device:
                free_at[0] = max(time.perf_counter(), free_at[0]) + done / bytes_per_second
                end = free_at[0]
            time.sleep(max(0.0, end - time.perf_counter()))
            return done

        return move

    system = replace(SystemCalls(), preadv=taking_its_time(os.preadv), pwritev=taking_its_time(os.pwritev))
    return functools.partial(DiskTier, system=system)
