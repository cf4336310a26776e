"""The private symbols of Lightning that running one step in several parts needs: its logged results, and its closure.

As in ``compat.py``, of which this is a part; ``tests/test_compat_steps.py`` asserts that each still exists.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning.pytorch.overrides.distributed import prepare_for_backward
from torchmetrics import Metric

__all__ = [
    "ClosureResult",
    "LoggedValue",
    "as_training_step",
    "log_value",
    "logged_in_training_step",
    "logs_kept",
    "metrics_logged_per_step",
    "prepare_for_backward",
    "watch_steps",
]

_HOOK = "training_step"


@dataclass
class LoggedValue:
    """One call of ``self.log`` in ``training_step``.

    Attributes:
        name: As given.
        value: A detached tensor with one element, or a metric.
        arguments: The others, by name, with Lightning's defaults filled in.
    """

    name: str
    value: torch.Tensor | Metric
    arguments: dict[str, Any]


@contextlib.contextmanager
def as_training_step(module: pl.LightningModule) -> Iterator[None]:
    """Within it ``self.log`` takes what is logged as logged in ``training_step``."""
    before = module._current_fx_name
    module._current_fx_name = _HOOK
    try:
        yield
    finally:
        module._current_fx_name = before


class _Tap:
    """In place of the ``log`` of the results, for a whole fit: a compiled step must not meet another one each time."""

    def __init__(self, own: Callable[..., None]) -> None:
        self.own = own
        self.kept: list[LoggedValue] | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def log(self, fx: str, name: str, value: Any, **arguments: Any) -> None:
        if self.kept is None or fx != _HOOK:
            self.own(fx, name, value, **arguments)
            return
        if arguments.get("enable_graph"):
            raise ValueError(
                f"self.log({name!r}, enable_graph=True) cannot work in a batch that is split into micro-batches: their "
                "graphs are gone when the value of the batch is known. Log without enable_graph, or do not let batches "
                "be split."
            )
        self.kept.append(LoggedValue(name, value.detach() if isinstance(value, torch.Tensor) else value, arguments))


@contextlib.contextmanager
def logs_kept(trainer: pl.Trainer) -> Iterator[list[LoggedValue]]:
    """Within it what ``training_step`` logs is put into a list, and nowhere else; in a fit that is watched."""
    tap: _Tap = trainer.fit_loop.epoch_loop._results.__dict__["log"].__self__
    tap.kept = []
    try:
        yield tap.kept
    finally:
        tap.kept = None


def log_value(trainer: pl.Trainer, logged: LoggedValue) -> None:
    """Log it, as in ``training_step``."""
    trainer.fit_loop.epoch_loop._results.log(_HOOK, logged.name, logged.value, **logged.arguments)


def logged_in_training_step(trainer: pl.Trainer) -> Callable[[], None]:
    """Note what ``training_step`` has logged so far; returns what undoes all that it logs from now on."""
    results = trainer.fit_loop.epoch_loop._results
    # A value is never changed in place, so that the attributes are all there is.
    before = {key: (one, dict(one.__dict__)) for key, one in results.items() if _of_the_hook(one)}

    def undo() -> None:
        for key in [key for key, one in results.items() if _of_the_hook(one) and key not in before]:
            del results[key]
        for one, attributes in before.values():
            one.__dict__.clear()
            one.__dict__.update(attributes)

    return undo


def metrics_logged_per_step(trainer: pl.Trainer) -> list[Metric]:
    """The metric objects that ``training_step`` logs with ``on_step``."""
    results = trainer.fit_loop.epoch_loop._results.values()
    return [one.value for one in results if _of_the_hook(one) and not one.is_tensor and one.meta.on_step]


def _of_the_hook(result: Any) -> bool:
    return result.meta.fx.split(".")[0] == _HOOK


def watch_steps(trainer: pl.Trainer, made: Callable[[ClosureResult, int], None]) -> Callable[[], None]:
    """Be shown what becomes of the output of each ``training_step``, before its backward; and let logs be kept.

    Args:
        trainer: Of automatic optimization.
        made: Called with the result, whose ``loss`` and ``extra`` go to ``on_train_batch_end`` as they are by then,
            and the number that the loss has been divided by.

    Returns:
        What ends it.
    """
    results = trainer.fit_loop.epoch_loop._results
    loop = trainer.fit_loop.epoch_loop.automatic_optimization

    class Watched(ClosureResult):
        @classmethod
        def from_training_step_output(cls, training_step_output: Any, normalize: int = 1) -> ClosureResult:
            result = ClosureResult.from_training_step_output(training_step_output, normalize)
            made(result, normalize)
            return result

    loop.__dict__["output_result_cls"] = Watched
    results.__dict__["log"] = _Tap(results.log).log

    def end() -> None:
        loop.__dict__.pop("output_result_cls", None)
        results.__dict__.pop("log", None)

    return end
