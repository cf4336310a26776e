"""Which batches the short runs train on: the smallest, the largest, and some between them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from lightning_efficient.monitoring.memory import nested_tensors

__all__ = ["ChosenBatches", "Scan", "as_in_fit", "batch_bytes", "batch_size", "load_batches", "save_batches", "scan"]

_BATCHES, _SECONDS = 256, 3.0  # that are looked at: what comes first
_KEPT, _KEPT_BYTES = 48, 64 << 20


def batch_size(batch: object) -> int:
    """Elements of all tensors in a batch: what its cost grows with."""
    return sum(tensor.numel() for tensor in _tensors(batch))


def batch_bytes(batch: object) -> int:
    """Of all its tensors."""
    return sum(tensor.nbytes for tensor in _tensors(batch))


def _tensors(batch: object) -> Iterator[torch.Tensor]:
    found = False
    for tensor in nested_tensors(batch):
        found = True
        yield tensor
    if not found and hasattr(batch, "__dict__"):
        yield from nested_tensors(vars(batch))


def as_in_fit(loader: Any) -> tuple[Iterable[Any], int | None, bool]:
    """What a ``train_dataloader`` returned, as a fit would read it: several loaders give one batch together.

    Returns:
        The batches; how many an epoch has, None if nobody knows; whether workers make them beside the training.
    """
    if isinstance(loader, list | tuple | Mapping):
        loader = CombinedLoader(loader, "max_size_cycle")  # what Trainer.fit makes of them
    loaders, batches = [loader], loader
    if isinstance(loader, CombinedLoader):
        loaders, iterator = loader.flattened, iter(loader)  # it has a length from then on
        batches = (batch for batch, _, _ in iterator)
    try:
        length: float = len(loader)  # of loaders together one without an end may make it infinite
    except TypeError:
        length = math.inf
    return (
        batches,
        None if length == math.inf else int(length),
        all(getattr(one, "num_workers", 0) > 0 for one in loaders),
    )


@dataclass
class Scan:
    """What a look at the first batches of a loader found, without computing them.

    Attributes:
        sizes: Of all that were looked at.
        complete: Whether these are all of an epoch.
        seconds: To get one, the first (which starts workers) left out.
        kept: Some of them, by size.
    """

    sizes: list[int] = field(default_factory=list)
    complete: bool = False
    seconds: float = 0.0
    kept: dict[int, Any] = field(default_factory=dict)

    def keep(self, batch: Any) -> None:
        """Keep it if it makes the range of sizes wider, or fills its largest gap."""
        size = batch_size(batch)
        self.sizes.append(size)
        if size in self.kept:
            return
        self.kept[size] = batch
        held = sum(batch_bytes(kept) for kept in self.kept.values())
        while len(self.kept) > 2 and (len(self.kept) > _KEPT or held > _KEPT_BYTES):
            order = sorted(self.kept)
            inner = min(range(1, len(order) - 1), key=lambda place: order[place + 1] - order[place - 1])
            held -= batch_bytes(self.kept.pop(order[inner]))

    def by_turns(self, first: int) -> list[Any]:
        """What was kept, in the order in which it came, but so many that are spread over the sizes before the rest."""
        order = sorted(self.kept)
        steps = max(1, min(first, len(order)) - 1)
        spread = {order[round(step * (len(order) - 1) / steps)] for step in range(steps + 1)}
        return [self.kept[size] for size in sorted(self.kept, key=lambda size: size not in spread)]  # a stable order


def scan(loader: Iterable[Any], *, batches: int = _BATCHES, seconds: float = _SECONDS) -> Scan:
    """Look at the first batches of ``loader``.

    Args:
        loader: Of the training.
        batches: The most that are looked at.
        seconds: The longest that this may take; two batches are looked at in any case.
    """
    found = Scan()
    began = first = time.perf_counter()
    for number, batch in enumerate(loader, start=1):
        now = time.perf_counter()
        if number == 1:
            first = now
        else:
            found.seconds = (now - first) / (number - 1)
        found.keep(batch)
        if number >= batches or (number >= 2 and now - began > seconds):
            break
    else:
        found.complete = True
    return found


def save_batches(path: Path, batches: list[Any]) -> bool:
    """Write what was kept, so that all short runs train on the same; whether that was possible."""
    try:
        torch.save(batches, path)
    except Exception:  # whatever pickling raises for objects of the user's
        path.unlink(missing_ok=True)
        return False
    return True


def load_batches(path: Path) -> list[Any]:
    """The inverse of :func:`save_batches`."""
    return torch.load(path, weights_only=False)  # written by this command a moment ago


class ChosenBatches:
    """A loader that gives the same batches again and again, as many as the user's would.

    Args:
        batches: To give.
        length: Batches of an epoch; None: no end.
    """

    def __init__(self, batches: list[Any], length: int | None) -> None:
        self.batches = batches
        self.length = length

    def __iter__(self) -> Iterator[Any]:
        number = 0
        while self.length is None or number < self.length:
            yield self.batches[number % len(self.batches)]
            number += 1

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("This loader has no end.")
        return self.length
