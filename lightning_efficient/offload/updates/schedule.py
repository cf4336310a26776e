"""When each unit is updated: all behind backward, each within backward, or (``under_forward.py``) before its next use.

All three give the same weights to whoever reads them, bit for bit; a fourth (``delayed.py``) does not. In backward a
gradient is freed as soon as it is there, but nothing may need all of them (Lv et al. 2023, LOMO). Under the next
forward the updates can wait for the norm of all gradients, and transfers are hidden behind that forward (as in Yue et
al. 2025, "GreedySnake").
"""

from __future__ import annotations

import contextlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_efficient.core.before_update import right_before_update
from lightning_efficient.core.torch_internals import first_step_post_hook
from lightning_efficient.offload.updates.engine import UpdateEngine
from lightning_efficient.offload.updates.gradients import GradientClaim, GradientStore
from lightning_efficient.offload.updates.units import Unit

__all__ = ["AfterBackward", "InBackward", "Updates"]


class Updates(ABC):
    """Runs an engine's updates in place of the optimizers' own.

    Args:
        engine: Of all ``optimizers``.
        optimizers: Whose steps are taken over; what they find to do themselves is nothing.
        store: Where gradients are that are not with their parameters.
    """

    def __init__(
        self, engine: UpdateEngine, optimizers: Sequence[Optimizer], store: GradientStore | None = None
    ) -> None:
        self._engine = engine
        self._store = store
        self._hidden: dict[Optimizer, list[dict[str, Any]]] = {}
        self._stepping: dict[Optimizer, FrameType] = {}  # who called the hook before the step in progress
        self._updating_all = False
        self._handles: list[RemovableHandle] = []
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(first_step_post_hook(optimizer, self._after_step))

    @property
    def begun(self) -> bool:
        """Whether some parameters have been updated in the step in progress, and others have not."""
        return self._updating_all

    @property
    def repeatable(self) -> bool:
        """Whether the step in progress can be done again: no weight has changed since it began."""
        return not self.begun

    def before_forward(self) -> None:
        """A training forward begins."""
        return

    def after_forward(self, results: Iterable[Tensor]) -> None:
        """It has ended; its ``results`` lead to what it used."""
        return

    def finish(self) -> None:
        """All updates that were begun are done, and the weights may be read."""
        self._engine.join()

    def detach(self) -> None:
        """The optimizers step by themselves again; what was still to be done is done."""
        try:
            if self._engine.host is None or not self._engine.host.failed:
                self.finish()
        finally:
            for optimizer, groups in self._hidden.items():  # of a step that has failed
                optimizer.param_groups = groups
            self._stepping.clear()
            while self._handles:
                self._handles.pop().remove()

    @abstractmethod
    def _step(self, units: list[Unit]) -> None:
        """Update these, all of one optimizer; the gradients are complete."""

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
        caller = _caller()
        if (outer := self._stepping.get(optimizer)) is not None and _is_within(caller, outer):
            return None  # the step of a class calls that of its base class, and torch calls the hooks of both
        self._stepping[optimizer] = caller
        return right_before_update(lambda: self._take_over(optimizer), args, kwargs)

    def _take_over(self, optimizer: Optimizer) -> None:
        self._engine.follow_groups(optimizer)
        units = [unit for unit in self._engine.units if unit.optimizer is optimizer]
        self._step(units)
        self._hidden[optimizer] = optimizer.param_groups
        optimizer.param_groups = [{**group, "params": []} for group in optimizer.param_groups]

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
        if self._stepping.get(optimizer) is not _caller():
            return
        del self._stepping[optimizer]
        groups = self._hidden.pop(optimizer, None)
        if groups is not None:
            optimizer.param_groups = groups

    def _update_all(self, units: Iterable[Unit]) -> None:
        units = list(units)
        self._engine.commit()
        self._engine.expect(units)
        with self._torn_if_that_fails():
            for unit in units:
                self._engine.update(unit, unit.group, self._gradients(unit))
                self._engine.relieve()
            self._engine.join(units)

    @contextlib.contextmanager
    def _torn_if_that_fails(self) -> Iterator[None]:
        """What is updated after it, on the way out for one, makes no whole step of it."""
        before, self._updating_all = self._updating_all, True
        yield
        self._updating_all = before

    def _gradients(self, unit: Unit) -> list[Tensor | GradientClaim | None]:
        """Those of its parameters, wherever they are."""
        if self._store is None:
            return [parameter.grad for parameter in unit.parameters]
        return [self._store.claim(p) if self._store.holds(p) else p.grad for p in unit.parameters]


class AfterBackward(Updates):
    """All units in ``Optimizer.step``, one after another. Gradients stay until the user clears them."""

    def _step(self, units: list[Unit]) -> None:
        self._update_all(units)
        self._engine.expect(units)


class InBackward(Updates):
    """Each unit when its gradients are complete, while the backward of earlier layers still runs.

    A unit waits for those of its parameters that had a gradient in the step before (at first: for all); what is left
    when backward has ended is updated then.

    Args:
        engine: Of all ``optimizers``.
        optimizers: Whose steps are taken over.
        complete: Asked at each gradient whether it is complete, or more micro-batches will add to it.
        store: Where gradients are that are not with their parameters; those that are complete must be.
    """

    def __init__(
        self,
        engine: UpdateEngine,
        optimizers: Sequence[Optimizer],
        complete: Callable[[], bool],
        store: GradientStore | None = None,
    ) -> None:
        super().__init__(engine, optimizers, store)
        self._complete = complete
        self._expected = {unit: {p for p in unit.parameters if p.requires_grad} for unit in engine.units}
        self._missing: dict[Unit, set[nn.Parameter]] = {}  # of those expected, in the backward that runs
        self._came: set[nn.Parameter] = set()  # whose gradient is complete, and that are not updated
        self._updated: dict[nn.Parameter, None] = {}  # in the order of their updates
        self._order: list[Unit] = engine.units[::-1]
        for parameter in engine.unit_of:
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._gradient_came))

    @property
    def begun(self) -> bool:
        return bool(self._updated)

    def before_forward(self) -> None:
        self._came.clear()
        self._updated.clear()
        self._missing = {unit: set(expected) for unit, expected in self._expected.items()}

    def _gradient_came(self, parameter: nn.Parameter) -> None:
        if not self._complete():
            return
        if parameter in self._updated:
            raise RuntimeError(
                "A parameter's gradient came a second time in one backward, after the parameter had been updated: "
                "reentrant activation checkpointing does this with layers that are used more than once. Use "
                "use_reentrant=False, or give schedule='under_forward' or 'after_backward'."
            )
        self._came.add(parameter)
        unit = self._engine.unit_of[parameter]
        missing = self._missing.get(unit, set())
        missing.discard(parameter)
        if not missing:  # what others have may be of earlier micro-batches only
            self._update(unit, [p.grad if p in self._came else None for p in unit.parameters])

    def _update(self, unit: Unit, gradients: Sequence[Tensor | GradientClaim | None]) -> None:
        if not self._updated:
            self._engine.commit()
            self._engine.expect(self._order)
        self._engine.update(unit, unit.group, gradients)
        for parameter, gradient in zip(unit.parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = None
                self._came.discard(parameter)
                self._updated[parameter] = None
        self._engine.relieve()

    def _step(self, units: list[Unit]) -> None:
        for unit in units:
            gradients = self._gradients(unit)
            if any(gradient is not None for gradient in gradients):
                self._update(unit, gradients)
        self._engine.join(units)
        for unit in units:
            self._expected[unit] = {parameter for parameter in unit.parameters if parameter in self._updated}
        ran = dict.fromkeys(self._engine.unit_of[parameter] for parameter in self._updated)
        self._order = list(dict.fromkeys((*ran, *self._order)))
        self._updated.clear()
        self._engine.expect(self._order)


def _caller() -> FrameType:
    """Of the function that asks: a frame, which is the same for all that one call of torch's step calls itself.

    No function keeps its own frame: that is a cycle of references, which holds the step's tensors for some more steps.
    """
    if not hasattr(sys, "_getframe"):
        raise RuntimeError("This Python does not show its frames, which offloading needs. Use CPython.")
    return sys._getframe(2)


def _is_within(frame: FrameType | None, outer: FrameType) -> bool:
    """Whether ``outer`` is still running, and called ``frame``; an error may have ended it before its last hook."""
    while frame is not None and frame is not outer:
        frame = frame.f_back
    return frame is not None
