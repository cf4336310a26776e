"""The ``torchmetrics`` objects of a module through a step in several parts: what they would hold had it been one.

A part of ``micro_batches.py``. A metric object meets each micro-batch as if it were a batch; what differs then is its
value for the step, which would be that of the last part, and means over batches, which would count parts.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import CatMetric, MeanMetric, Metric
from torchmetrics.utilities import dim_zero_cat, dim_zero_max, dim_zero_mean, dim_zero_min, dim_zero_sum
from torchmetrics.wrappers import Running
from torchmetrics.wrappers.abstract import WrapperMetric

from lightning_efficient.core.watched_tensors import Slot, WatchedTensors

__all__ = ["StepMetrics"]

_Merge = Callable[[Any, Any, int], Any]  # of the states before, and of the step, and how many steps were before
_MERGES: dict[Any, _Merge] = {
    dim_zero_sum: lambda before, step, _: before + step,
    dim_zero_mean: lambda before, step, n: (before * n + step) / (n + 1),
    dim_zero_max: lambda before, step, _: torch.maximum(before, step),
    dim_zero_min: lambda before, step, _: torch.minimum(before, step),
    dim_zero_cat: lambda before, step, _: [*_listed(before), *_listed(step)],
}


class StepMetrics:
    """Those of one module.

    Args:
        module: All metrics that it holds are watched.
    """

    def __init__(self, module: nn.Module) -> None:
        self._metrics = {path: part for path, part in module.named_modules() if isinstance(part, Metric)}
        within = tuple(f"{path}." for path, metric in self._metrics.items() if isinstance(metric, WrapperMetric))
        self._mergeable = {p: m for p, m in self._metrics.items() if _is_mergeable(m) and not p.startswith(within)}
        self._states = WatchedTensors(
            Slot(f"{path}.{name}", metric, name) for path, metric in self._metrics.items() for name in metric._defaults
        )
        self._attributes: dict[str, dict[str, Any]] = {}
        self._before: dict[str, dict[str, Any]] = {}

    def keep(self) -> None:
        """A step begins, which may fail."""
        self._states.keep()
        self._attributes = {
            path: {name: value for name, value in metric.__dict__.items() if name not in metric._defaults}
            for path, metric in self._metrics.items()
        }
        self._before = {}

    def back(self) -> None:
        """As the step began."""
        for path, metric in self._metrics.items():
            metric.__dict__.update(self._attributes[path])
        self._states.back()
        self._before = {}

    def lost(self) -> list[str]:
        """Names of states that cannot be put back."""
        return self._states.lost()

    def succeeded(self, logged_per_step: Iterable[Metric]) -> None:
        """The step is done.

        Args:
            logged_per_step: Metrics that are logged with ``on_step``.

        Raises:
            ValueError: For a metric that a step has updated and that cannot be right in a split one.
        """
        updated = [path for path, metric in self._metrics.items() if self._was_updated(path, metric)]
        per_step = {id(metric) for metric in logged_per_step}
        for path in updated:
            metric = self._metrics[path]
            if isinstance(metric, Running):
                raise _refused(path, metric, "its window would be of micro-batches, not of batches")
            if id(metric) in per_step and path not in self._mergeable:
                raise _refused(path, metric, "its value for a whole batch cannot be had from those of the parts")
        self._states.succeeded()

    def split(self) -> None:
        """The step will be in parts: what they add is collected apart."""
        fresh: dict[int, Any] = {}
        for path, metric in self._mergeable.items():
            self._before[path] = {name: getattr(metric, name) for name in metric._defaults}
            for name, default in metric._defaults.items():
                before = self._before[path][name]  # metrics of a collection may share one
                if id(before) not in fresh:
                    fresh[id(before)] = _fresh(default, before)
                setattr(metric, name, fresh[id(before)])
            metric._update_count, metric._computed = 0, None

    @contextlib.contextmanager
    def part(self, share: float) -> Iterator[None]:
        """Within it a part of the batch is run, which is this share of it."""
        wrapped = [(p, m) for p, m in self._metrics.items() if isinstance(m, MeanMetric | CatMetric)]
        own = {path: metric.__dict__["update"] for path, metric in wrapped}
        for path, metric in wrapped:
            metric.__dict__["update"] = functools.partial(_update, path, metric, own[path], share)
        try:
            yield
        finally:
            for path, metric in wrapped:
                metric.__dict__["update"] = own[path]

    def merge(self) -> None:
        """All parts are done: metrics have the value of the step, and hold what they held before and the step."""
        merged: dict[int, Any] = {}
        for path in sorted(self._before, key=lambda p: self._mergeable[p]._update_count, reverse=True):
            metric, before = self._mergeable[path], self._before[path]
            count, before_count = metric._update_count, self._attributes[path]["_update_count"]
            if metric._forward_cache is not None and count:
                metric._forward_cache = _value(metric)
            for name, state in before.items():
                step = getattr(metric, name)
                if count and id(step) not in merged:
                    merge = _MERGES[metric._reductions[name]]
                    value = merge(state, step, before_count) if before_count or _holds(state) else step
                    merged[id(step)] = _in_place_of(state, value)
                setattr(metric, name, merged.get(id(step), state))
            metric._update_count = before_count + (1 if count else 0)
            metric._computed = None
        self._before = {}

    def _was_updated(self, path: str, metric: Metric) -> bool:
        count = "_num_vals_seen" if isinstance(metric, Running) else "_update_count"
        return getattr(metric, count) != self._attributes[path][count]


def _update(
    path: str, metric: Metric, own: Callable[..., None], share: float, value: Any, *args: Any, **kw: Any
) -> None:
    """A number given for a part counts as the part of a number."""
    if getattr(value, "ndim", 0):
        own(value, *args, **kw)
        return
    if isinstance(metric, CatMetric):
        raise _refused(path, metric, "it would collect a number of each micro-batch")
    weight = args[0] if args else kw.get("weight")
    own(value, share if weight is None else weight * share)


def _value(metric: Metric) -> Any:
    """Of what it holds now, on this rank."""
    synced, metric._to_sync = metric._to_sync, False
    metric._computed = None
    try:
        with torch.no_grad():
            return metric.compute()
    finally:
        metric._to_sync, metric._computed = synced, None


def _is_mergeable(metric: Metric) -> bool:
    simple = metric.full_state_update is False and not metric.dist_sync_on_step
    return simple and not isinstance(metric, WrapperMetric) and all(r in _MERGES for r in metric._reductions.values())


def _fresh(default: Any, before: Any) -> Any:
    return default.detach().clone().to(before.device) if isinstance(default, Tensor) else []


def _in_place_of(state: Any, value: Any) -> Any:
    if isinstance(state, list):
        state[:] = _listed(value)
        return state
    return value


def _holds(state: Any) -> bool:
    return isinstance(state, list) and bool(state)


def _listed(state: Any) -> list[Any]:
    return [state] if isinstance(state, Tensor) else list(state)


def _refused(path: str, metric: Metric, why: str) -> ValueError:
    return ValueError(
        f"{path} is a {type(metric).__name__} that training_step updates, and {why}. Log the number itself with "
        "self.log, which weights it right, or log the metric with on_step=False where that is what is missing, or do "
        "not let batches be split."
    )
