"""What is known of a run so far: sums, largest values, series and events, over all its parts."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from lightning_efficient.core.balance import Balance
from lightning_efficient.monitoring.report import BalanceWords, EventRow, RunReport
from lightning_efficient.monitoring.series import Series, quantile
from lightning_efficient.monitoring.timing import StepTime, StepTimer

__all__ = ["PER_STEP", "RunRecord"]

_FORMAT = 1
PER_STEP = ("step_ms", "step_cpu_ms", "data_wait_ms")


class RunRecord:
    """Accumulates the measurements of one run, in bounded memory, and carries them over a resume.

    Args:
        limit: Points per series; see :class:`Series`.

    Attributes:
        timer: The stop-watch of the part of the run that is going on; None before it starts.
        latest: Values of which only the newest counts, such as the number of parameters.
        largest: Values of which only the largest counts, such as peak memory.
        events: What happened once, in order and without doubles.
        balances: By technique, how it knows what it cost and saved.
        resumed: How many times the run was continued from a checkpoint.
    """

    def __init__(self, limit: int = 2000) -> None:
        self._limit = limit
        self.timer: StepTimer | None = None
        self.latest: dict[str, float] = {}
        self.largest: dict[str, float] = {}
        self.events: dict[EventRow, None] = {}
        self.balances: dict[str, BalanceWords] = {}
        self.resumed = 0
        self.batch_unit = "samples"
        self.series: dict[str, Series] = {}
        self.metrics: dict[str, Series] = {}
        self._sums = {"batches": 0.0, "optimizer_steps": 0.0, "amount": 0.0, "data_wait_seconds": 0.0}
        self._earlier = {"train_seconds": 0.0, "train_cpu_seconds": 0.0, "validation_seconds": 0.0}
        self._sums_seen: dict[str, float] = {}  # where the sums of others stood at last, by tag
        self._window: deque[StepTime] = deque(maxlen=1000)
        self._window_start = (0.0, 0.0)  # seconds of training and amount at the last :meth:`window`

    @property
    def batches(self) -> int:
        """Training batches that ended, over all parts of the run."""
        return int(self._sums["batches"])

    def start(self, timer: StepTimer, totals: Mapping[str, float] | None = None) -> None:
        """A part of the run starts.

        Args:
            timer: Its stop-watch.
            totals: Where the sums of balances stand, by tag: that is of earlier fits.
        """
        self.timer = timer
        self._sums_seen = dict(totals or {})
        self._window.clear()
        self._window_start = (self.clocks()[0], self._sums["amount"])

    def clocks(self) -> tuple[float, float]:
        """Wall-clock and CPU seconds of training, over all parts of the run."""
        wall, cpu = self.timer.train_seconds() if self.timer is not None else (0.0, 0.0)
        return self._earlier["train_seconds"] + wall, self._earlier["train_cpu_seconds"] + cpu

    def batch(self, step: int, time: StepTime, amount: int, optimizer_steps: int) -> None:
        """A training batch of ``amount`` tokens or samples ended."""
        self._sums["batches"] += 1
        self._sums["optimizer_steps"] += optimizer_steps
        self._sums["amount"] += amount
        self._sums["data_wait_seconds"] += time.data_wait_ms / 1e3
        self._window.append(time)
        seconds, cpu_seconds = self.clocks()
        for name in PER_STEP:
            self._of(self.series, f"efficiency/{name}").append(step, seconds, cpu_seconds, getattr(time, name))

    def window(self) -> dict[str, float]:
        """Medians and throughput of the batches since the last call (medians of at most the last 1,000)."""
        if not self._window:
            return {}
        seconds, amount = self.clocks()[0], self._sums["amount"]
        values = {name: median(getattr(time, name) for time in self._window) for name in PER_STEP}
        before, amount_before = self._window_start
        values[f"{self.batch_unit}_per_s"] = (amount - amount_before) / max(seconds - before, 1e-9)
        self._window.clear()
        self._window_start = (seconds, amount)
        return values

    def add(self, tag: str, step: int, value: float, *, only_larger: bool = False) -> None:
        """A measurement under ``tag``; ``only_larger``: if it is larger than the last one."""
        last = self.last(tag)
        if not only_larger or last is None or value > last:
            self._of(self.series, tag).append(step, *self.clocks(), value)

    def add_balance(self, balance: Balance, step: int, *, only_larger: bool = False) -> None:
        """What a technique cost and saved; sums go on over all parts of the run."""
        for tag, value in balance.measurements().items():
            if tag.endswith("_total_ms"):
                before = self._sums_seen.get(tag, 0.0)
                self._sums_seen[tag] = value
                value = (self.last(tag) or 0.0) + (value - before if value >= before else value)  # it may begin anew
            self.add(tag, step, value, only_larger=only_larger)
        words = BalanceWords(balance.technique, balance.time, balance.memory, balance.verdict)
        self.balances[balance.technique] = words

    def add_metric(self, name: str, step: int, value: float) -> None:
        """The training loss or a validation metric."""
        self._of(self.metrics, name).append(step, *self.clocks(), value)

    def last(self, tag: str) -> float | None:
        """The newest value under ``tag``, or None."""
        return self.series[tag].last if tag in self.series else None

    def raise_to(self, values: Mapping[str, float]) -> None:
        """Keep each value that is the largest under its name."""
        for name, value in values.items():
            self.largest[name] = max(value, self.largest.get(name, value))

    def report(
        self, title: str, facts: Mapping[str, str], notes: Sequence[str] = (), interrupted: str = ""
    ) -> RunReport:
        """All of it, as plain data."""
        return RunReport(
            title=title,
            facts=facts,
            totals=self.totals(),
            metrics={name: series.points() for name, series in self.metrics.items()},
            series={tag: series.points() for tag, series in self.series.items()},
            events=tuple(sorted(self.events)),
            notes=notes,
            balances=tuple(self.balances.values()),
            batch_unit=self.batch_unit,
            resumed=self.resumed,
            interrupted=interrupted,
        )

    def totals(self) -> dict[str, float]:
        """The numbers over the whole run, for :attr:`RunReport.totals`."""
        seconds, cpu_seconds = self.clocks()
        amount = self._sums["amount"]
        totals = {
            "batches": self._sums["batches"],
            "optimizer_steps": self._sums["optimizer_steps"],
            "train_seconds": seconds,
            "validation_seconds": self._validation_seconds(),
            "train_cpu_seconds": cpu_seconds,
            "data_wait_seconds": self._sums["data_wait_seconds"],
            self.batch_unit: amount,
            f"{self.batch_unit}_per_s": amount / seconds if seconds > 0 else float("nan"),
        }
        for name in PER_STEP:
            series = self.series.get(f"efficiency/{name}")
            values = [point.value for point in series.points()] if series is not None else []
            totals[f"{name}_median"] = quantile(values, 0.5)
            if name == "step_ms":
                totals[f"{name}_p10"], totals[f"{name}_p90"] = quantile(values, 0.1), quantile(values, 0.9)
        return totals | self.latest | self.largest

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings, tensors, lists and dicts only: loads under ``weights_only=True``."""
        seconds, cpu_seconds = self.clocks()
        return {
            "version": _FORMAT,
            "sums": dict(self._sums),
            "seconds": {
                "train_seconds": seconds,
                "train_cpu_seconds": cpu_seconds,
                "validation_seconds": self._validation_seconds(),
            },
            "latest": dict(self.latest),
            "largest": dict(self.largest),
            "batch_unit": self.batch_unit,
            "series": {tag: series.state_dict() for tag, series in self.series.items()},
            "metrics": {name: series.state_dict() for name, series in self.metrics.items()},
            "events": [list(event) for event in self.events],
            "resumed": self.resumed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the run that :meth:`state_dict` describes, which counts as one resume more.

        Raises:
            ValueError: If the state has a version that this release does not know.
        """
        if state.get("version") != _FORMAT:
            raise ValueError(
                f"The checkpoint holds EfficiencyMonitor state of version {state.get('version')!r}; this release reads "
                f"version {_FORMAT}. Resume with the release that wrote it, or without EfficiencyMonitor."
            )
        self._sums = dict(state["sums"])
        self._earlier = dict(state["seconds"])
        self.latest, self.largest = dict(state["latest"]), dict(state["largest"])
        self.batch_unit = state["batch_unit"]
        self.events = {EventRow(*event): None for event in state["events"]}
        self.resumed = state["resumed"] + 1
        for own, saved in ((self.series, state["series"]), (self.metrics, state["metrics"])):
            own.clear()
            for name, series in saved.items():
                self._of(own, name).load_state_dict(series)

    def _validation_seconds(self) -> float:
        now = self.timer.validation_seconds() if self.timer is not None else 0.0
        return self._earlier["validation_seconds"] + now

    def _of(self, group: dict[str, Series], name: str) -> Series:
        if name not in group:
            group[name] = Series(self._limit)
        return group[name]
