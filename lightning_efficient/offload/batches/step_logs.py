"""What ``training_step`` logs in the parts of one batch, put together and logged once.

A part of ``micro_batches.py``. The parts of a batch are reduced as ``self.log`` reduces the batches of an epoch: means
are averaged with the samples (or the given ``batch_size``) as weights, sums are added, and so on.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_efficient.compat_steps import LoggedValue, log_value, logs_kept

__all__ = ["StepLogs"]


class StepLogs:
    """Of one attempt at one batch.

    Args:
        trainer: That trains.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._parts: list[list[LoggedValue]] = []

    @contextlib.contextmanager
    def part(self) -> Iterator[None]:
        """Within it the next part of the batch is run."""
        with logs_kept(self._trainer) as kept:
            yield
        self._parts.append(kept)

    def log(self, sizes: Sequence[int], losses: Sequence[Tensor], *, sums: bool) -> None:
        """Log the values of the whole batch.

        Args:
            sizes: Samples of each part.
            losses: What the parts returned.
            sums: Whether they are sums over samples, so that a logged loss is one too.
        """
        for logged in self._by_call():
            first = next(iter(logged.values()))
            if isinstance(first.value, Tensor):
                given = {part: one.arguments.get("batch_size") for part, one in logged.items()}
                weights, batch_size = _weights(given, sizes)
                values = [_precise(one.value) for one in logged.values() if isinstance(one.value, Tensor)]
                is_loss = sums and _are_the_same(values, [losses[part] for part in logged])
                how = "sum" if is_loss else _reduction(first)
                value = _reduced(values, weights, how)
                first = LoggedValue(first.name, value, {**first.arguments, "batch_size": batch_size})
            log_value(self._trainer, first)

    def _by_call(self) -> list[dict[int, LoggedValue]]:
        """For each call of ``self.log`` in a step, in order: what was logged, by part."""
        calls: dict[tuple[str, int], dict[int, LoggedValue]] = {}
        for part, entries in enumerate(self._parts):
            seen: defaultdict[str, int] = defaultdict(int)
            for logged in entries:
                calls.setdefault((logged.name, seen[logged.name]), {})[part] = logged
                seen[logged.name] += 1
        return list(calls.values())


def _weights(given: dict[int, int | None], sizes: Sequence[int]) -> tuple[list[float], int | None]:
    """Of the values of the parts; and the ``batch_size`` of the whole, None if none was given."""
    counts = [count for count in given.values() if count is not None]
    own = [float(sizes[part]) for part in given]
    if len(counts) < len(given):
        return own, None
    if all(count == sum(sizes) for count in counts):  # it was said of the batch, not of what the step was given
        return own, counts[0]
    return [float(count) for count in counts], sum(counts)


def _reduction(logged: LoggedValue) -> str:
    given = logged.arguments.get("reduce_fx", "mean")
    name = given if isinstance(given, str) else getattr(given, "__name__", "mean")
    return "mean" if name.lower() == "avg" else name.lower()


def _reduced(values: Sequence[Tensor], weights: Sequence[float], how: str) -> Tensor:
    stacked = torch.stack(list(values))
    if how == "sum":
        return stacked.sum(0)
    if how in ("max", "min"):
        return stacked.amax(0) if how == "max" else stacked.amin(0)
    total = sum(weights)
    return torch.stack([v * (w / total) for v, w in zip(values, weights, strict=True)]).sum(0)


def _are_the_same(values: Sequence[Tensor], losses: Sequence[Tensor]) -> bool:
    return torch.equal(torch.stack(list(values)), torch.stack([_precise(loss.squeeze()) for loss in losses]))


def _precise(value: Tensor) -> Tensor:
    """As Lightning stores it: not below float32."""
    if value.dtype in (torch.float32, torch.float64):
        return value
    return value.to(torch.promote_types(torch.get_default_dtype(), torch.float32))
