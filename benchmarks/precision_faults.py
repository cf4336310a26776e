"""Faults that few bits do not stand and many do: what they do to the loss, unprotected and protected.

All come from outside: hooks on the model, which change nothing in exact arithmetic, and wrappers around the encoder and
the products in few bits, which fp32 does not have.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.activation_losses import digits_loaders
from benchmarks.harness import Options, Table, spread
from benchmarks.precision_losses import DigitsMlp
from benchmarks.precision_training import Counts, Training, counted, plain, rollback
from lightning_efficient.precision import formats, kinds

__all__ = ["FAULTS", "PLAN", "QUICK", "Fault", "Outcome", "Plan", "measured_faults", "run_with_fault"]

OUTLIER = 2.0**12
JUMP = 2.0**10
DRIFT = 1.12  # times as large each step
SPOILT = -(2.0**12)
WORST = 1000.0  # and more
_SILENT = 0  # channel of the first hidden layer whose outgoing weights are and stay zero


@dataclass(frozen=True)
class Plan:
    """Of a run, in steps."""

    pre_learning: int
    begin: int
    end: int
    steps: int


PLAN = Plan(pre_learning=50, begin=200, end=290, steps=400)
QUICK = Plan(pre_learning=4, begin=8, end=12, steps=20)

Fault = Callable[[DigitsMlp, int], AbstractContextManager[Any]]
"""What is around a step: of the model, and the number of the step since the fault began."""


@contextlib.contextmanager
def _hooked(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _outlier(size: Callable[[int], float]) -> Fault:
    """The channel that nobody reads is large."""

    def fault(model: DigitsMlp, number: int) -> AbstractContextManager[Any]:
        def enlarge(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            mask = torch.arange(output.shape[1]) == _SILENT
            return output.masked_fill(mask, size(number))

        return _hooked(model.layers[2].register_forward_hook(enlarge))

    return fault


def _scaled(factors: Callable[[int], Tensor]) -> Fault:
    """The middle layer's input is larger, sample by sample, and its output is made smaller again: powers of two."""

    def fault(model: DigitsMlp, number: int) -> AbstractContextManager[Any]:
        middle = model.layers[3]
        assert isinstance(middle, nn.Linear)

        def enlarge(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            return (args[0] * factors(len(args[0])),)

        def reduce(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            return (output - middle.bias) / factors(len(output)) + middle.bias

        return _hooked(middle.register_forward_pre_hook(enlarge), middle.register_forward_hook(reduce))

    return fault


def _some(samples: int) -> Tensor:
    """Every second sample's factor."""
    return torch.where(torch.arange(samples) % 2 == 0, JUMP, 1.0)[:, None]


def _zeroed(gradients: bool) -> Fault:
    """The encoder sees zeros instead of what it is given: inputs, or gradients."""

    def fault(model: DigitsMlp, number: int) -> AbstractContextManager[Any]:
        true, weights = formats.SharedExponent.encode, {p.data_ptr() for p in model.parameters()}

        def encode(self: Any, values: Tensor, *, gradient: bool = False, **rest: Any) -> formats.Encoded:
            struck = gradient == gradients and values.data_ptr() not in weights
            return true(self, torch.zeros_like(values) if struck else values, gradient=gradient, **rest)

        return mock.patch.object(formats.SharedExponent, "encode", encode)

    return fault


def _spoilt(*roles: str) -> Fault:
    """Results of products in few bits are wrong by a factor."""

    def fault(model: DigitsMlp, number: int) -> AbstractContextManager[Any]:
        true = kinds.MatMul.in_integers

        def in_integers(self: Any, role: str, *rest: Any) -> Tensor | None:
            found = true(self, role, *rest)
            return found * SPOILT if found is not None and role in roles else found

        return mock.patch.object(kinds.MatMul, "in_integers", in_integers)

    return fault


FAULTS: dict[str, Fault] = {
    "none": lambda model, number: contextlib.nullcontext(),
    "outlier channel": _outlier(lambda number: OUTLIER),
    "drifting range": _outlier(lambda number: DRIFT**number),
    "scale jump, all samples": _scaled(lambda samples: torch.full((samples, 1), JUMP)),
    "scale jump, every second sample": _scaled(_some),
    "zeroed samples, inputs": _zeroed(gradients=False),
    "zeroed samples, gradients": _zeroed(gradients=True),
    "corrupted result, forward only": _spoilt("forward"),
    "corrupted result, grad-input only": _spoilt("grad_input"),
    "corrupted result, grad-weight only": _spoilt("grad_weight"),
    "corrupted result, all three": _spoilt("forward", "grad_input", "grad_weight"),
}
HARMLESS = ("none", "scale jump, all samples")
"""To few bits too, as each tensor's exponent is its own."""
ARMS: dict[str, Callable[[int], Any]] = {
    "fp32": lambda pre_learning: plain("fp32"),
    "unprotected": lambda pre_learning: rollback("fp32", protect=False, pre_learning_steps=pre_learning),
    "protected": lambda pre_learning: rollback("fp32", pre_learning_steps=pre_learning),
}


@dataclass(frozen=True)
class Outcome:
    """Of one run.

    Attributes:
        loss: Its mean from the beginning of the fault on; infinite if it ended in what is not finite.
        low: Part of the operations that were in few bits: before the fault, while it lasted, and after it.
        retries: While it lasted.
        recovery: Steps after it until as many operations as before, or nine in ten of those, are in few bits; None: not
            within the run.
    """

    loss: float
    low: tuple[float, float, float] = (0.0, 0.0, 0.0)
    retries: int = 0
    recovery: int | None = 0


def run_with_fault(fault: Fault, arm: str, seed: int, plan: Plan) -> Outcome:
    """Train on digits, with the fault in its steps of the plan."""
    torch.manual_seed(seed)
    model, loaders = DigitsMlp(), digits_loaders(seed)
    assert loaders is not None
    _silence(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    training = Training(model, optimizer, ARMS[arm](plan.pre_learning))
    nodes = getattr(training.precision, "nodes", {})
    losses: list[float] = []
    counts = [Counts(low=0, high=0, retries=0)]
    while len(losses) < plan.steps:
        for images, labels in loaders[0]:
            number = len(losses)
            within = plan.begin <= number < plan.end
            with fault(model, number - plan.begin) if within else contextlib.nullcontext():
                losses.append(float(training.step(lambda model: F.cross_entropy(model(images), labels))))  # noqa: B023
            counts.append(counted(nodes))
            if len(losses) == plan.steps:
                break
    loss = statistics.fmean(losses[plan.begin :])
    loss = loss if math.isfinite(loss) else math.inf
    return Outcome(loss, *_shares(counts, plan)) if nodes else Outcome(loss)


def _silence(model: DigitsMlp) -> None:
    weight = model.layers[3].weight
    assert isinstance(weight, nn.Parameter)
    mask = torch.arange(weight.shape[1]) == _SILENT
    with torch.no_grad():
        weight.masked_fill_(mask, 0.0)
    weight.register_hook(lambda gradient: gradient.masked_fill(mask, 0.0))


def _shares(counts: Sequence[Counts], plan: Plan) -> tuple[tuple[float, float, float], int, int | None]:
    marks = counts[plan.pre_learning], counts[plan.begin], counts[plan.end], counts[plan.steps]
    phases = [after.since(before) for before, after in itertools.pairwise(marks)]
    before, within, behind = (phase.low_share for phase in phases)
    each = [after.since(one).low_share for one, after in itertools.pairwise(counts[plan.end :])]
    recovery = next((number for number, share in enumerate(each) if share >= 0.9 * before), None)
    return (before, within, behind), phases[1]["retries"], recovery


def measured_faults(options: Options) -> tuple[list[Table], dict[str, dict[str, list[Outcome]]]]:
    """A table, and the outcomes by fault and arm; nothing where scikit-learn is not installed."""
    if digits_loaders(0) is None:
        return [], {}
    plan = QUICK if options.quick else PLAN
    found: dict[str, dict[str, list[Outcome]]] = {}
    rows = []
    for name, fault in FAULTS.items():
        found[name] = {arm: [run_with_fault(fault, arm, seed, plan) for seed in options.seeds] for arm in ARMS}
        rows.append((name, *_columns(found[name])))
        print("faults  " + "  ".join(rows[-1]), flush=True)
    header = (
        "fault", "loss in fp32", "unprotected / fp32", "protected / fp32", "in few bits before, within, after",
        "computed again", "steps to recover",
    )  # fmt: skip
    note = (
        f"MLP on digits, SGD; the fault is there in steps {plan.begin} to {plan.end} of {plan.steps}, and the loss is "
        "the mean from its beginning to the end of the run, over that of fp32 under the same fault where it touches "
        "fp32. Shares and steps are those of the protected runs. 1000: or more."
    )
    return [Table(f"Faults, {len(options.seeds)} seeds", header, rows, note)], found


def ratios(found: dict[str, list[Outcome]], arm: str) -> list[float]:
    """Losses over those of fp32, seed by seed."""
    return [one.loss / exact.loss for one, exact in zip(found[arm], found["fp32"], strict=True)]


def _columns(found: dict[str, list[Outcome]]) -> tuple[str, ...]:
    protected = found["protected"]
    shares = ", ".join(f"{statistics.fmean(one.low[place] for one in protected):.2f}" for place in range(3))
    return (
        spread([one.loss for one in found["fp32"]], 4),
        spread([min(ratio, WORST) for ratio in ratios(found, "unprotected")], 2),
        spread(ratios(found, "protected")),
        shares,
        f"{statistics.fmean(one.retries for one in protected):.1f}",
        spread([one.recovery for one in protected], 0),
    )
