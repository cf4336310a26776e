"""How far a run has grown: the phase it is in, whether the next is due, and what going there does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_efficient.growth.engine import Change, GrowingModule
from lightning_efficient.growth.operators import DEPTH_OPERATORS
from lightning_efficient.growth.settings import Phase, Settings
from lightning_efficient.growth.sharing import split_groups
from lightning_efficient.growth.triggers import Triggers

__all__ = ["Progress", "Switch"]


@dataclass(frozen=True)
class Switch:
    """One step from a smaller form to a larger one.

    Attributes:
        change: What became of the parameters.
        text: From what to what, and why, for a person.
    """

    change: Change
    text: str


class Progress:
    """Moves a module through its phases.

    Args:
        growing: The module.
        settings: What the user asked for.
        triggers: What ends a phase.

    Attributes:
        phase: Index of the present phase of the layers.
        last_switch: The step of the last switch, or None.
    """

    def __init__(self, growing: GrowingModule, settings: Settings, triggers: Triggers) -> None:
        self.growing = growing
        self.settings = settings
        self.triggers = triggers
        self.phases: list[Phase] = settings.phases(growing.full_depth)
        self.phase = 0
        self.last_switch: int | None = None

    @property
    def complete(self) -> bool:
        """Whether the module has become the full model."""
        return self.phase == len(self.phases) - 1 and self.growing.width == "wide"

    @property
    def uses_fractions(self) -> bool:
        """Whether a phase that is to come, or the width's, is bounded by a fraction of the run alone."""
        untils = [phase.until for phase in self.phases[self.phase :]]
        if self.settings.width and self.growing.width == "narrow":
            untils.append(self.settings.width.until)
        return any(until is not None and until.fraction is not None and until.step is None for until in untils)

    def phase_leaders(self) -> list[list[int]]:
        """The arrangement of each phase, as plain data for a checkpoint."""
        return [list(phase.leaders) for phase in self.phases]

    def begin(self, step: int) -> None:
        """A fit begins at ``step``; a later switch was one of an earlier fit, whose Trainer counted its own steps."""
        if self.last_switch is not None and self.last_switch > step:
            self.last_switch = None

    def form(self) -> str:
        """What the module is now, for a person."""
        growing = self.growing
        layers = str(Phase(growing.leaders, None)) if growing.leaders else ""
        width = f"width 1/{growing.twin.factor}" if growing.twin and growing.width == "narrow" else ""
        return ", ".join(part for part in (layers, width) if part) or "full width"

    def advance(self, step: int) -> Iterator[Switch]:
        """Make every switch that is due at ``step``; to be called at a safe point only.

        The gradients are cleared first: they belong to the update that has been made.
        """
        if self.settings.unshare == "by_correlation":
            yield from self._split_groups(step)
        while self.phase < len(self.phases) - 1 and (reason := self.triggers.due(self.phase, step)):
            self.phase += 1
            leaders = self.phases[self.phase].leaders
            operator = DEPTH_OPERATORS.get(self.settings.mode or "")
            source = operator(len(self.growing.leaders), len(leaders)) if operator else range(len(leaders))
            yield self._grow_layers(leaders, source, step, reason)
        if self.growing.width == "narrow" and (reason := self.triggers.width_due(step)):
            before = self.form()
            self.growing.module.zero_grad(set_to_none=True)
            change = self.growing.grow_width(state=self.settings.optimizer_state)
            yield self._switched(change, before, step, reason)

    def _split_groups(self, step: int) -> Iterator[Switch]:
        """After a reading of the gradients' correlation: split groups between layers that disagree."""
        until = self.phases[self.phase].until
        if not self.triggers.correlations or until is None or until.correlation_below is None:
            return
        present = self.growing.leaders
        leaders = split_groups(present, self.triggers.correlations, until.correlation_below)
        if leaders != present:
            if len(set(leaders)) == len(leaders):
                self.phase = len(self.phases) - 1
            reason = f"gradients correlated less than {until.correlation_below:g}"
            yield self._grow_layers(leaders, range(len(leaders)), step, reason)

    def _grow_layers(self, leaders: Sequence[int], source: Sequence[int], step: int, reason: str) -> Switch:
        before = self.form()
        self.growing.module.zero_grad(set_to_none=True)
        change = self.growing.grow_layers(
            leaders,
            source,
            state=self.settings.optimizer_state,
            summed_gradient=self.settings.gradient == "sum",
        )
        return self._switched(change, before, step, reason)

    def _switched(self, change: Change, before: str, step: int, reason: str) -> Switch:
        self.last_switch = step
        self.triggers.restart(step)
        return Switch(change, f"{before} -> {self.form()}: {reason}")

    # -- learning rate ---------------------------------------------------------------------------------------------

    @property
    def scales_learning_rate(self) -> bool:
        """Whether the user's learning rates are ever multiplied by another factor than one."""
        return self.settings.rewarm_steps > 0 or any(phase.lr_scale != 1.0 for phase in self.phases)

    def learning_rate_factor(self, step: int) -> float:
        """The factor for the optimizer step after ``step`` others."""
        factor = self.phases[self.phase].lr_scale
        if self.settings.rewarm_steps and self.last_switch is not None:
            factor *= min(1.0, (step - self.last_switch + 1) / self.settings.rewarm_steps)
        return factor

    # -- state and telemetry ---------------------------------------------------------------------------------------

    def measurements(self, step: int) -> dict[str, float]:
        """Phase, depth and what the parameters that are live now cost, plus the triggers' values."""
        growing = self.growing
        values = {f"growth/{name}": value for name, value in growing.sizes().items()}
        values["growth/phase"] = float(self.phase + (growing.twin is not None and growing.width == "wide"))
        if growing.leaders:
            values["growth/depth"] = float(len(growing.leaders))
        if self.settings.mode == "share":
            values["growth/distinct_layers"] = float(len(set(growing.leaders)))
        if self.scales_learning_rate:
            values["growth/lr_scale"] = self.learning_rate_factor(step)
        return values | self.triggers.measurements()

    def state_dict(self) -> dict[str, Any]:
        return {
            "phase": self.phase,
            "last_switch": self.last_switch,
            "triggers": self.triggers.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.phase, self.last_switch = state["phase"], state["last_switch"]
        self.triggers.load_state_dict(state["triggers"])
