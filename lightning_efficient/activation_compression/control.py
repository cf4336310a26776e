"""Before and after each training step: what is measured in it, and the rates that follow from what was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_efficient.activation_compression.adaptive import AdaptiveRates, Choice
from lightning_efficient.activation_compression.blocks import Blocks
from lightning_efficient.activation_compression.classify import EXACT, Classifier
from lightning_efficient.activation_compression.collect import Collector, LayerMeasurement
from lightning_efficient.activation_compression.ledger import PassSizes
from lightning_efficient.activation_compression.plan import MemoryPlan, MemoryPlanner, make_plan
from lightning_efficient.activation_compression.rates import LayerRates
from lightning_efficient.activation_compression.store import Unit
from lightning_efficient.core.units import human_bytes

__all__ = ["AdaptiveControl", "BudgetControl"]

Momentum = Callable[[Tensor], Tensor | None]

_LEAST = 2  # bits of linear inputs in a plan, and while there is none
_LOOK_AGAIN = 50  # steps: even a batch that fits uncompressed may save more one day than others of its shapes
_CHANGE = 0.25  # bits on average by which a schedule has to go on before bits are given anew


class AdaptiveControl:
    """Measures two steps out of every W: gradients in the first, how they differ from batch to batch in the second.

    Args:
        rates: Of the run.
        adaptive: Remembers and chooses.

    Attributes:
        choice: The last one.
    """

    def __init__(self, rates: LayerRates, adaptive: AdaptiveRates) -> None:
        self.adaptive = adaptive
        self.choice: Choice | None = None
        self._rates = rates
        self._next = 0
        self._first: dict[str, Tensor] = {}  # of the gradients, while the second step is waited for
        self._collector: Collector | None = None
        self._average: float | None = None
        self._stale = True
        self._predicted: float | None = None  # of the errors that were measured last

    def reset(self, classifier: Classifier) -> None:
        """Forget all: another model, or another run."""
        self.abandon(classifier)
        self.adaptive.measured, self.choice, self._average, self._predicted = {}, None, None, None
        self._stale = True
        self.again()

    def abandon(self, classifier: Classifier) -> None:
        """Measure no more in this step."""
        if self._collector is not None:
            self._collector.close()
        self._collector = classifier.saved.observer = classifier.after = None

    def again(self) -> None:
        """The layers are others now: measure soon."""
        self._next, self._first = 0, {}

    @property
    def measuring(self) -> bool:
        """Whether the step that goes on is measured."""
        return self._collector is not None

    def begin(self, step: int, classifier: Classifier, momentum: Callable[[], Momentum]) -> None:
        """A batch begins, after ``step`` optimizer steps."""
        if step >= self._next or self._first:
            collector = self._collector = Collector(self._rates.bound, momentum())
            classifier.saved.observer, classifier.after = collector, collector.after

    def end(self, step: int, classifier: Classifier, agree: Callable[[Any], Any]) -> bool:
        """The batch is over.

        Args:
            step: As in :meth:`begin`.
            classifier: Likewise.
            agree: Gives what the first rank says.

        Returns:
            Whether there is something new.
        """
        collector, self._collector = self._collector, None
        if collector is None:
            return False
        classifier.saved.observer = classifier.after = None
        samples = {layer: sample.cpu() for layer, sample in collector.gradient_samples().items()}
        measured = {} if self._first else collector.measurements()
        collector.close()
        measured, samples = agree((measured, samples))
        if self._first:
            self.adaptive.take_noise(self._first, samples)
            self._first = {}
        else:
            self._next = step + self.adaptive.every
            if not measured:
                return False
            numbers = classifier.sizes.numbers  # the rate is that of all that a unit keeps
            sizes = {one.unit: numbers.get(one.unit, (one.numel, 0))[0] for one in measured.values()}
            self.adaptive.take({layer: replace(one, numel=sizes[one.unit]) for layer, one in measured.items()})
            self._predicted = self.choice.predicted if self.choice is not None else None
            self._first = samples
        self._stale = True
        return True

    def choose(self, average_bits: float | None, sizes: Mapping[Unit, float] | None = None) -> Choice | None:
        """Rates for the batch to come, with this budget; see :meth:`AdaptiveRates.choose`."""
        if not self.adaptive.measured:
            return None
        moved = average_bits is not None and (self._average is None or abs(average_bits - self._average) >= _CHANGE)
        if self._stale or moved or sizes is not None:
            self._average, self._stale = average_bits, False
            self.choice = self.adaptive.choose(self._rates, average_bits, sizes)
        return self.choice

    def measurements(self) -> dict[str, float]:
        """What the gradients' errors were when they were measured, what had been predicted of them, and the rates."""
        values = {"gradient_error": self.adaptive.measured_error()} if self.adaptive.measured else {}
        if self._predicted is not None:
            values["gradient_error_predicted"] = self._predicted
        if self.choice is not None:
            values["guarded"] = float(len(self.choice.guarded))
            if self.choice.noise is not None:
                values["noise_ratio"] = self.choice.noise
            for (kind, layer), bits in self.choice.bits.items():
                values[f"bits/{layer or 'step'}/{kind}"] = float(bits)
            for (kind, layer), bound in self.choice.bounds.items():
                values[f"error_bound/{layer or 'step'}/{kind}"] = bound
        return values

    def table(self) -> str:
        """What each layer's rate is, and why, in Markdown."""
        header = "| layer | rate of | gradient error | allowed | noise of batches | nonzero inputs | rate |"
        rows = [header, "|---|---|---:|---:|---:|---:|---|"]
        for layer, one in self.adaptive.measured.items():
            rows.append(f"| {layer or '(training step)'} | {' of '.join(one.unit)} | {self._row(one)} |")
        return "\n".join(rows)

    def _row(self, one: LayerMeasurement) -> str:
        size = math.sqrt(one.gradient_squares) or 1.0
        error = f"{math.sqrt(one.error_squares) / size:.3f}" if one.error_squares is not None else "-"
        noise = f"{math.sqrt(one.noise_squares) / size:.2f}" if one.noise_squares is not None else "-"
        rate = "-"
        if self.choice is not None and one.unit in self.choice.bits:
            rate = f"{self.choice.bits[one.unit]} bits"
        elif self.choice is not None and one.unit in self.choice.bounds:
            rate = f"{self.choice.bounds[one.unit]:.2e}"
        guarded = " (guard)" if self.choice is not None and one.unit in self.choice.guarded else ""
        allowed = math.sqrt(self.adaptive.allowed(one)) / size
        return f"{error} | {allowed:.3f} | {noise} | {one.nonzero:.2f} | {rate}{guarded}"

    def state_dict(self) -> dict[str, Any]:
        return {
            "measured": self.adaptive.state_dict(),
            "first": dict(self._first),
            "next": self._next,
            "average": self._average,
            "stale": self._stale,
            "predicted": self._predicted,
            "choice": self.choice.state_dict() if self.choice is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.adaptive.load_state_dict(state["measured"])
        self._first, self._next = dict(state["first"]), state["next"]
        self._average, self._stale, self._predicted = state["average"], state["stale"], state["predicted"]
        if state.get("choice") is not None:  # made with the rates of a step that is past
            self.choice = Choice.from_state(state["choice"])
        elif not self._stale:
            self.choice = self.adaptive.choose(self._rates, self._average)


class BudgetControl:
    """Gives each batch the plan for its size.

    Args:
        rates: Of the run; they follow the plan.
        budget: Bytes (int or whole float), or a part of what is saved without compression where ``is_part``.
        is_part: See there.
        group_size: See :func:`quantize`.
        blocks: Modules that can be made again.

    Attributes:
        plan: For the batch that goes on; None: nothing is known yet.
    """

    def __init__(self, rates: LayerRates, budget: float, is_part: bool, group_size: int, blocks: Blocks) -> None:
        self.budget = budget
        self.plan: MemoryPlan | None = None
        self.blocks = blocks
        self._is_part = is_part
        self._rates = rates
        self._group_size = group_size
        self._planner = MemoryPlanner()
        self._signature = ""
        self._size = 0
        self._sizes: Mapping[Unit, float] = {}  # that are predicted of the batch that goes on
        self._plans: dict[str, MemoryPlan] = {}
        self._told: set[str] = set()

    def in_words(self) -> str:
        """How what backward needs is kept."""
        amount = f"{self.budget:.0%} of what it takes" if self._is_part else human_bytes(self.budget)
        return f"within {amount}, with a plan for each size of batch"

    def reset(self) -> None:
        """Forget all: another model, or another run."""
        self.plan, self._planner = None, MemoryPlanner()
        self._plans.clear()
        self._told.clear()
        self.blocks.impure.clear()

    def again(self) -> None:
        """The layers are others now: what they save is not known, and what was told of them no longer true."""
        self._planner = MemoryPlanner()
        self._plans.clear()
        self._told.clear()

    def begin(self, step: int, batch: Sequence[Tensor], classifier: Classifier) -> None:
        """A batch begins, after ``step`` optimizer steps."""
        self._signature = " ".join("x".join(map(str, tensor.shape)) for tensor in batch)
        self._size = sum(tensor.numel() for tensor in batch)
        sizes = self._planner.predict(self._signature, self._size)
        self._sizes = {unit: numel for unit, (numel, _) in sizes.numbers.items()} if sizes is not None else {}
        self.plan = None
        self._rates.bits, self._rates.chosen = _LEAST, {}
        classifier.offloaded, self.blocks.recomputed = frozenset(), frozenset()
        if sizes is not None:
            self.plan = make_plan(
                sizes,
                self.budget * sizes.saved_bytes if self._is_part else self.budget,
                self._rates.floor,
                group_size=self._group_size,
                blocks=self.blocks.candidates,
                host=any(tensor.is_cuda for tensor in batch),
                known=self._planner.knows(self._signature) and step % _LOOK_AGAIN != 0,
            )
            self._rates.chosen = self.plan.levels
            classifier.offloaded, self.blocks.recomputed = self.plan.offloaded, frozenset(self.plan.recomputed)

    def share(self, units: Iterable[Unit]) -> tuple[float, dict[Unit, float]] | None:
        """Bits on average that the plan gives to these units, and the numbers that each of them will keep.

        None if it leaves some raw, or if there is none.
        """
        if self.plan is None:
            return None
        sizes = {unit: self._sizes.get(unit, 0.0) for unit in units}
        levels = {unit: self.plan.levels.get(unit, _LEAST) for unit in units}
        total = sum(sizes.values())
        if not total or EXACT in levels.values():
            return None
        return sum(level * sizes[unit] for unit, level in levels.items()) / total, sizes

    def end(self, sizes: PassSizes | None) -> bool:
        """The batch is over.

        Args:
            sizes: What it saved; None: nobody looked.

        Returns:
            Whether there is something to tell: it was the first of its shapes, or of these the first that fits, or the
            first that does not.
        """
        recomputed = self.plan.recomputed if self.plan is not None else ()
        if sizes is not None:
            self._planner.note(self._signature, self._size, sizes, recomputed)
        if self.plan is None:
            return False
        self._plans[self._signature] = self.plan
        news = self._signature if self.plan.fits else f"{self._signature} beyond"
        new = news not in self._told
        self._told.add(news)
        return new

    @property
    def fits(self) -> bool:
        """Whether the plan for this batch is within the budget."""
        return self.plan is None or self.plan.fits

    def event(self) -> str:
        """What the plan for this batch is, in a sentence."""
        plan = self.plan
        if plan is None:
            return ""
        text = (
            f"Plan for saved tensors: a batch of {self._signature} keeps "
            f"{plan.describe() or 'nothing that has a rate'}; "
            f"{plan.predicted_bytes / 2**20:.1f} MiB predicted, {plan.budget_bytes / 2**20:.1f} MiB allowed."
        )
        return text if plan.fits else f"{text} It does not fit: give memory_budget more, or the batch less."

    def table(self) -> str:
        """Plans by the shapes of the batch, in Markdown."""
        rows = ["| batch | plan | predicted (KiB) | budget (KiB) |", "|---|---|---:|---:|"]
        for signature, plan in self._plans.items():
            numbers = f"{plan.predicted_bytes / 1024:.1f} | {plan.budget_bytes / 1024:.1f}"
            rows.append(f"| {signature} | {plan.describe()} | {numbers} |")
        return "\n".join(rows)

    def state_dict(self) -> dict[str, Any]:
        return {"planner": self._planner.state_dict(), "impure": sorted(self.blocks.impure), "told": sorted(self._told)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._planner.load_state_dict(state["planner"])
        self.blocks.impure, self._told = set(state["impure"]), set(state["told"])
