"""The largest batch that a GPU takes within a fixed part of its memory.

``python -m benchmarks activation --device cuda``. It has not been run on a GPU yet.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from benchmarks.activation_steps import ARMS, HEADLINE, Job, Size
from benchmarks.harness import Table

__all__ = ["largest", "largest_batches", "within"]

TRIED = ("none", "activation checkpointing", HEADLINE)
MOST = 4096  # sequences


def largest(fits: Callable[[int], bool], most: int = MOST) -> int:
    """The largest number up to ``most`` that fits, where all smaller ones do; 0 if not even 1."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@contextlib.contextmanager
def within(limit_bytes: int) -> Iterator[None]:
    """Within it the GPU has no more memory than that."""
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def largest_batches(size: Size, device: str, limit_bytes: int, most: int = MOST) -> tuple[Table, dict[str, int]]:
    """Sequences that each arm can train on at once, in bf16-mixed; on a CPU nothing sets a limit but ``most``."""
    found: dict[str, int] = {}
    with within(limit_bytes) if device == "cuda" else contextlib.nullcontext():
        for name in TRIED:
            found[name] = largest(lambda count, name=name: _fits(name, size, count, device), most)  # type: ignore[misc]
            print(f"largest batch, {name}: {found[name]}", flush=True)
    rows = [(name, str(count), f"{count / max(1, found['none']):.2f}") for name, count in found.items()]
    title = f"Largest batch of {size.context} tokens in {limit_bytes / 2**30:.0f} GiB, width {size.width}, bf16-mixed"
    return Table(title, ("", "sequences", "/ none"), rows), found


def _fits(name: str, size: Size, count: int, device: str) -> bool:
    """Whether two steps do not run out of memory."""
    try:
        job = Job(replace(size, tokens=count * size.context), device, mixed=True)
        with ARMS[name](job) as step:
            for _ in range(2):
                step().backward()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        job = step = None  # type: ignore[assignment]
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
