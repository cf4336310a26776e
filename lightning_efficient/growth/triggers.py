"""Watches the conditions that end a phase. Every value that decides is averaged over the ranks before it is judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

from torch import Tensor

from lightning_efficient.growth.arrangement import LayerArrangement
from lightning_efficient.growth.schedule import LossTracker, Until
from lightning_efficient.growth.settings import Phase, WidthSettings
from lightning_efficient.growth.sharing import GradientAgreement, correlations, neighbours

__all__ = ["Triggers"]

PATIENCE = 3
"""Readings in a row with low correlation before layers are unshared ([Yang 2021] §3.3)."""

Reduce = Callable[[Tensor], Tensor]


class Triggers:
    """The conditions of all phases, and the readings that they need.

    Args:
        monitor: Name of the metric that stands for the loss; None for the training loss.
        check_every: Steps between two readings of the loss.
        correlation_every: Steps between two readings of the gradients' correlation.
        by_groups: Whether low correlation splits groups one by one, so that it does not end a phase.
    """

    def __init__(
        self, monitor: str | None, check_every: int, correlation_every: int, *, by_groups: bool = False
    ) -> None:
        self._by_groups = by_groups
        self.monitor = monitor
        self.check_every = check_every
        self.correlation_every = correlation_every
        self._watching = ExitStack()
        self._agreement: GradientAgreement | None = None
        self._untils: list[Until | None] = []
        self._caps: list[float] = []
        self._width: Until | None = None
        self._width_cap = math.inf
        self.reset()

    def reset(self) -> None:
        """As before the first step."""
        self.loss = LossTracker()
        self._sum: Tensor | None = None
        self._count = 0
        self._read_at = 0
        self._last_seen = math.nan
        self._streak = 0
        self.correlations: dict[tuple[int, int], float] = {}

    def start(
        self,
        phases: Sequence[Phase],
        width: WidthSettings | None,
        total_steps: float | None,
        step: int = 0,
        *,
        trial: bool = False,
    ) -> None:
        """Fix the caps for a run of ``total_steps`` optimizer steps, of which ``step`` are done.

        Args:
            phases: Of the layers.
            width: Of the width, if it grows.
            total_steps: Infinite where the run has no known end; None: the model is complete, and nothing is to come.
            step: Optimizer steps before this fit.
            trial: Whether the run only tries whether everything works, and may end before a cap.

        Raises:
            ValueError: If the caps of successive phases do not increase, or a cap lies behind the end of the run.
        """
        self._untils = [phase.until for phase in phases]
        self._caps = [math.inf] * len(phases)
        self._width, self._width_cap = None, math.inf
        if self._read_at > step:  # the readings are of an earlier fit, and steps count from its beginning
            self.restart(step)
        if total_steps is None:
            return
        self._caps = [until.cap(total_steps) if until else math.inf for until in self._untils]
        self._width = width.until if width else None
        self._width_cap = self._width.cap(total_steps) if self._width else math.inf
        for i, (before, after) in enumerate(pairwise(self._caps)):
            if after < before:
                raise ValueError(
                    f"Stage {i + 1} would end at step {after:g}, not after stage {i}, which ends at step {before:g} at "
                    "the latest. `until` counts from the start of the run; give increasing values."
                )
        last = max(cap for cap in (0.0, *self._caps, self._width_cap) if cap < math.inf)
        if last > total_steps and not trial:
            raise ValueError(
                f"A phase would last until step {last:g}, but the run ends at step {total_steps:g}: it would never "
                "train the full model. Give an earlier `until`, or a fraction of the run."
            )

    def plan_text(self, step: int) -> str:
        """The caps that are to come after ``step``, for a log."""
        caps = [f"{cap:g}" for cap in self._caps if step < cap < math.inf]
        text = f"the layers grow at step {', '.join(caps)} at the latest" if caps else ""
        width = f"the width grows at step {self._width_cap:g} at the latest" if self._width else ""
        return "; ".join(part for part in (text, width) if part)

    # -- which condition holds -----------------------------------------------------------------------------------

    def due(self, phase: int, step: int) -> str | None:
        """Why ``phase`` is over at ``step``, or None."""
        until = self._untils[phase]
        return self._reason(until, self._caps[phase], step) if until else None

    def width_due(self, step: int) -> str | None:
        """Why the narrow phase is over at ``step``, or None."""
        return self._reason(self._width, self._width_cap, step) if self._width else None

    def _reason(self, until: Until, cap: float, step: int) -> str | None:
        if step >= cap:
            unseen = self.monitor is not None and math.isnan(self.loss.value)
            return f"as planned, at step {cap:g}" + (f" ('{self.monitor}' was never logged)" if unseen else "")
        if until.loss_below is not None and self.loss.value < until.loss_below:
            return f"{self._name} {self.loss.value:.4f} is below {until.loss_below:g}"
        if until.plateau is not None and self._read_at - self.loss.best_step >= until.plateau:
            return f"{self._name} has not improved on {self.loss.best:.4f} for {until.plateau} steps"
        if until.correlation_below is not None and not self._by_groups and self._streak >= PATIENCE:
            return f"gradients of most neighbouring layers correlated less than {until.correlation_below:g}"
        return None

    @property
    def _name(self) -> str:
        return self.monitor or "smoothed training loss"

    def restart(self, step: int) -> None:
        """A phase begins at ``step``."""
        self.loss.restart(step)
        self._read_at = step
        self._streak = 0
        self.correlations = {}

    # -- the loss ------------------------------------------------------------------------------------------------

    def needs_loss(self, phase: int) -> bool:
        """Whether a condition that is still open reads the loss."""
        open_conditions = [self._untils[phase], self._width]
        return any(u is not None and (u.loss_below is not None or u.plateau is not None) for u in open_conditions)

    def read_loss(self, value: Tensor | None, step: int, reduce: Reduce) -> None:
        """Add the loss of a batch; every ``check_every`` steps the mean of the batches since then is judged.

        Args:
            value: A scalar on any device, or None where this batch or this metric has none yet.
            step: Optimizer steps so far.
            reduce: Mean over the ranks.
        """
        if value is not None and self.monitor is not None:
            if value.item() == self._last_seen:  # the same reading as before: nothing new was logged
                return
            self._last_seen = value.item()
        if value is not None:
            value = value.detach().float()
            self._sum = value if self._sum is None else self._sum + value
            self._count += 1
        if step - self._read_at >= self.check_every and self._sum is not None:
            mean = reduce(self._sum / self._count).item()
            self.loss.update(mean, step)
            if not math.isfinite(mean):
                self.loss.best_step += step - self._read_at  # no reading, so these steps are no plateau
            self._sum, self._count, self._read_at = None, 0, step

    # -- the gradients' correlation ------------------------------------------------------------------------------

    def correlation_due(self, phase: int, step: int) -> bool:
        """Whether this batch is one in which gradients are compared."""
        until = self._untils[phase]
        return until is not None and until.correlation_below is not None and step % self.correlation_every == 0

    def watch(self, arrangement: LayerArrangement) -> None:
        """Compare the gradients of the next backward."""
        self._agreement = GradientAgreement(arrangement)
        self._watching.enter_context(self._agreement.watch())

    def unwatch(self) -> None:
        """The backward is over."""
        self._watching.close()

    def judge_correlation(self, phase: int, reduce: Reduce) -> None:
        """After the batch: if gradients were compared in it, keep the result."""
        agreement, self._agreement = self._agreement, None
        until = self._untils[phase]
        if agreement is None or until is None or until.correlation_below is None:
            return
        pairs = neighbours(agreement.arrangement.leaders)
        values = correlations(reduce(agreement.products(pairs)))
        self.correlations = dict(zip(pairs, values, strict=True))
        low = sum(value < until.correlation_below for value in values)
        self._streak = self._streak + 1 if low * 2 > len(values) else 0

    # -- state and telemetry -------------------------------------------------------------------------------------

    def measurements(self) -> dict[str, float]:
        """The values that the conditions look at."""
        values: dict[str, float] = {}
        if not math.isnan(self.loss.value):
            values["growth/trigger_loss"] = self.loss.value
            values["growth/plateau_steps"] = float(max(0, self._read_at - self.loss.best_step))
        if self.correlations:
            values["growth/mean_correlation"] = sum(self.correlations.values()) / len(self.correlations)
        return values

    def state_dict(self) -> dict[str, Any]:
        return {
            "loss": self.loss.state_dict(),
            "sum": None if self._sum is None else self._sum.clone(),
            "count": self._count,
            "read_at": self._read_at,
            "last_seen": self._last_seen,
            "streak": self._streak,
            "correlations": [[*pair, value] for pair, value in self.correlations.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loss.load_state_dict(state["loss"])
        self._sum, self._count = state["sum"], state["count"]
        self._read_at, self._streak = state["read_at"], state["streak"]
        self._last_seen = state["last_seen"]
        self.correlations = {(a, b): value for a, b, value in state["correlations"]}
