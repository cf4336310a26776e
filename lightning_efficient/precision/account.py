"""What is said of a run in low bits: lines of the log, loggers' values, events.

A part of ``precision.py``.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_efficient import compat, telemetry
from lightning_efficient.core.balance import Balance
from lightning_efficient.precision.engine import Engine
from lightning_efficient.precision.formats import Format
from lightning_efficient.precision.nodes import ROLES, Node
from lightning_efficient.precision.status import SIGNS

__all__ = ["GUARDED", "LAYOUT", "Account", "in_words"]

_LINES = 20  # for retries; then a line for every hundredth
LAYOUT: dict[str, dict[str, list[object]]] = {
    "precision": {
        "share of work in low bits": ["Multiline", [r"precision/low_share"]],
        "products computed again": ["Multiline", [r"precision/retries.*"]],
        **{
            f"exponents of {which}s: lowest, median, highest": [
                "Margin", [f"precision/exponent_{which}{end}" for end in ("", "_lowest", "_highest")]
            ]
            for which in ("input", "weight", "gradient")
        },
    }
}  # fmt: skip
"""Of TensorBoard's page of scalars."""
GUARDED: list[object] = ["Multiline", [r"precision/(spikes|healed.*|skipped|scale_retries)"]]
"""With a guard of the loss: batches done again."""


def in_words(low: Format, high: str, learn_until: int | None, *, timed: bool, guarded: bool) -> str:
    """What is done, for the line at the start of a run; the arguments are those of ``RollbackPrecision``."""
    learns = "until limits settle" if learn_until is None else f"for {learn_until} batches"
    where = "faster and healthy" if timed else "healthy"
    emulated = " (emulated: nothing is faster)" if low.emulated else ""
    spikes = "; batches whose loss spikes are done again" if guarded else ""
    return (
        f"RollbackPrecision computes products in {high} {learns}, then in {low.name}{emulated} where that is {where}, "
        f"and again in {high} at a sign of failure{spikes}"
    )


class Account:
    """Of one run.

    Attributes:
        events: When operations had learnt.
        all_learnt: Whether that was said of those that there are.

    Args:
        engine: Computes.
        nodes: All that there are.
    """

    def __init__(self, engine: Engine, nodes: Mapping[str, Node]) -> None:
        self._engine, self._nodes = engine, nodes
        self.events: list[telemetry.Event] = []
        self.all_learnt = False
        self._said = 0
        self._logged = (0, 0)
        self._share: float | None = None  # that was logged

    def batch_ended(self, trainer: pl.Trainer, values: Mapping[str, float], unmet: Collection[str]) -> None:
        """Log, and say when all have learnt.

        Args:
            trainer: The running one.
            values: Others' to be logged.
            unmet: Patterns to exclude operations that none of them has met.
        """
        if telemetry.due(trainer):
            own = self.measurements()
            telemetry.log(trainer, {**own, **values, **self._by_operation()})
            self._share = own.get("precision/low_share")
            self._logged = self._engine.low_work, self._engine.work
        nodes = self._nodes
        if self.all_learnt or not nodes or not all(node.learning.done for node in nodes.values()):
            return
        self.all_learnt = True
        low = self._engine.low
        high = self._high()
        text = f"{len(nodes) - len(high)} of {len(nodes)} operations train in {low.name}"
        text += ", emulated (nothing is faster)" if low.emulated else ""
        if len(high) == len(nodes):
            text += ": for each it would take longer, or cannot be. Only a spike guard has something to do then"
        elif high:
            text += f"; {len(high)} stay high, too small for it to be faster, or not possible: {', '.join(high[:5])}"
            text += " and others" if len(high) > 5 else ""
        telemetry.say(trainer, f"RollbackPrecision: {text}.")
        if unmet:
            rank_zero_warn(
                f"RollbackPrecision: no operation is called as exclude={list(unmet)} says; see precision_map()."
            )
        self.events.append(telemetry.Event(compat.log_step(trainer), "precision", text))

    def note_retries(self, trainer: pl.Trainer | None) -> None:
        """Say what the engine has computed again since the last time."""
        retries, self._engine.retries = self._engine.retries, []
        for retry in retries:
            self._said += 1
            if self._said <= _LINES or self._said % 100 == 0:
                text = f"{retry.node}, {retry.role} in high bits again (retry {self._said}): {retry.reason}"
                telemetry.say(trainer, text)

    def measurements(self) -> dict[str, float]:
        """Share of low bits since the last time it was logged, and what had to be computed again so far.

        Who asks right behind the log, as a monitor with the same interval does, gets the share that was logged.
        """
        engine = self._engine
        engine.refresh()
        low, work = engine.low_work - self._logged[0], engine.work - self._logged[1]
        share = low / work if work else self._share
        values = {} if share is None else {"precision/low_share": share}
        statuses = [product.status for node in self._nodes.values() for product in node.products.values()]
        values["precision/retries"] = float(sum(status.retries for status in statuses))
        for place, sign in enumerate(SIGNS):
            if count := sum(status.signs[place] for status in statuses):
                values[f"precision/retries_{(sign or 'other').replace(' ', '_')}"] = float(count)
        return values

    def balance(self, snapshot_bytes: float | None) -> Balance:
        """What few bits cost and saved so far.

        Args:
            snapshot_bytes: That a guard of the loss holds; None: there is none, or nothing yet.
        """
        engine = self._engine
        clocked = not any(other is not None for other in engine.on_devices.values())
        time = (
            "Took: finding the operations, learning, products that failed, and those that took longer in few bits. "
            "Saved: what products took less in few bits, guards included, than the same ones in high bits while they "
            "learnt; nothing where they had learnt before the run was resumed."
        )
        low, high = len(self._nodes) - len(self._high()), len(self._high())
        verdict = f"{low} of {low + high} operations train in {engine.low.name}"
        if not self.all_learnt:
            verdict = (
                f"Not all of its {low + high} operations had learnt yet, which each does when it is new: in high bits, "
                "with few bits beside them"
            )
        elif high and not low:
            verdict = (
                f"All {high} operations were left in high bits: for products as small as these few bits would take "
                "longer, or cannot be. What it took is finding that out"
            )
        elif high:
            verdict += f"; {high} were left in high bits, for few would take longer there, or cannot be"
        return Balance(
            technique="precision",
            cost_ms=1e3 * engine.times.cost if clocked else None,
            gain_ms=1e3 * engine.times.gain if clocked else None,
            held_bytes=snapshot_bytes,
            time=time if clocked else "Not measured: a device computes behind the host's back.",
            memory="" if snapshot_bytes is None else "Memory held: snapshots of the guard of the loss.",
            verdict=f"{verdict}." if self._nodes else "",
        )

    def _high(self) -> list[str]:
        """Names of the operations that stay in high bits."""
        return [name for name, node in self._nodes.items() if all(map(node.stays_high, ROLES))]

    def _by_operation(self) -> dict[str, float]:
        values: dict[str, float] = {}
        exponents = defaultdict[str, list[float]](list)
        for name, node in self._nodes.items():
            retries = sum(product.status.retries for product in node.products.values())
            if retries:
                values[f"precision/retries/{name}"] = float(retries)
            for which, tracker in node.tensors.items():
                if tracker.last is not None:
                    values[f"precision/exponent/{name}.{which}"] = float(tracker.last)
                    exponents[which].append(float(tracker.last))
        for which, found in exponents.items():
            values[f"precision/exponent_{which}_lowest"] = min(found)
            values[f"precision/exponent_{which}"] = statistics.median_low(found)
            values[f"precision/exponent_{which}_highest"] = max(found)
        return values

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and text."""
        return {
            "all_learnt": self.all_learnt, "events": [[event.step, event.text] for event in self.events],
            "work": [self._engine.low_work, self._engine.work, *self._logged],
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What :meth:`state_dict` returned."""
        self.all_learnt = state["all_learnt"]
        self.events = [telemetry.Event(step, "precision", text) for step, text in state["events"]]
        self._engine.low_work, self._engine.work, *logged = state["work"]
        self._logged = logged[0], logged[1]
