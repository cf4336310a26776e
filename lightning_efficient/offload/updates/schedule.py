"""When each unit is updated: all behind backward, each within backward, or each right before its next use.

All three give the same weights to whoever reads them, bit for bit. In backward a gradient is freed as soon as it is
there, but nothing may need all of them (Lv et al. 2023, LOMO). Under the next forward the updates can wait for the norm
of all gradients, and transfers are hidden behind that forward (as in Yue et al. 2025, "GreedySnake").
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_efficient.core.before_update import right_before_update
from lightning_efficient.offload.updates.access import ParameterWatch
from lightning_efficient.offload.updates.engine import UpdateEngine
from lightning_efficient.offload.updates.gradients import GradientClaim, GradientStore
from lightning_efficient.offload.updates.units import Unit

__all__ = ["AfterBackward", "InBackward", "StaleWeightsError", "UnderForward", "Updates"]


class StaleWeightsError(RuntimeError):
    """A forward used weights whose update was still to come."""


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
        self._handles: list[RemovableHandle] = []
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))

    @property
    def begun(self) -> bool:
        """Whether a parameter has been updated by the backward that runs, which then cannot be done again."""
        return False

    def before_forward(self) -> None:
        """A training forward begins."""
        return

    def after_forward(self, results: Iterable[Tensor]) -> None:
        """It has ended; its ``results`` lead to what it used."""
        return

    def finish(self) -> None:
        """All updates that were begun are done, and the weights may be read."""
        return

    def detach(self) -> None:
        """The optimizers step by themselves again; what was still to be done is done."""
        self.finish()
        while self._handles:
            self._handles.pop().remove()

    @abstractmethod
    def _step(self, units: list[Unit]) -> None:
        """Update these, all of one optimizer; the gradients are complete."""

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
        return right_before_update(lambda: self._take_over(optimizer), args, kwargs)

    def _take_over(self, optimizer: Optimizer) -> None:
        units = [unit for unit in self._engine.units if unit.optimizer is optimizer]
        here = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        known = {id(parameter) for unit in units for parameter in unit.parameters}
        if here != known:
            raise RuntimeError(
                f"{type(optimizer).__name__} has other parameters than when offloading began ({len(here - known)} "
                f"came, {len(known - here)} went). Make all groups in `configure_optimizers`."
            )
        self._step(units)
        self._hidden[optimizer] = optimizer.param_groups
        optimizer.param_groups = [{**group, "params": []} for group in optimizer.param_groups]

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
        groups = self._hidden.pop(optimizer, None)
        if groups is not None:
            optimizer.param_groups = groups

    def _update_all(self, units: Iterable[Unit]) -> None:
        units = list(units)
        self._engine.commit()
        self._engine.expect(units)
        for unit in units:
            self._engine.update(unit, unit.group, _taken(self._gradients(unit)))

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
        self._updated: dict[nn.Parameter, None] = {}  # in the order of their updates
        self._order: list[Unit] = engine.units[::-1]
        for parameter in engine.unit_of:
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._gradient_came))

    @property
    def begun(self) -> bool:
        return bool(self._updated)

    def before_forward(self) -> None:
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
        unit = self._engine.unit_of[parameter]
        missing = self._missing.get(unit, set())
        missing.discard(parameter)
        if not missing:
            self._update(unit)

    def _update(self, unit: Unit) -> None:
        if not self._updated:
            self._engine.commit()
            self._engine.expect(self._order)
        gradients = [parameter.grad for parameter in unit.parameters]
        self._engine.update(unit, unit.group, gradients)
        for parameter, gradient in zip(unit.parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = None
                self._updated[parameter] = None

    def _step(self, units: list[Unit]) -> None:
        for unit in units:
            if any(parameter.grad is not None for parameter in unit.parameters):
                self._update(unit)
        for unit in units:
            self._expected[unit] = {parameter for parameter in unit.parameters if parameter in self._updated}
        ran = dict.fromkeys(self._engine.unit_of[parameter] for parameter in self._updated)
        self._order = list(dict.fromkeys((*ran, *self._order)))
        self._updated.clear()
        self._engine.expect(self._order)


class UnderForward(Updates):
    """Each unit right before the next forward uses it.

    Its gradients are held until then, also if somebody clears those of the parameters meanwhile. Whoever reads weights
    through the modules finds them updated; before anything else reads them, :meth:`finish` must be called.

    Args:
        engine: Of all ``optimizers``.
        optimizers: Whose steps are taken over.
        module: Whose parameters they update.
        store: Where gradients are that are not with their parameters.
    """

    def __init__(
        self,
        engine: UpdateEngine,
        optimizers: Sequence[Optimizer],
        module: nn.Module,
        store: GradientStore | None = None,
    ) -> None:
        super().__init__(engine, optimizers, store)
        self._waiting: dict[Unit, tuple[Mapping[str, Any], list[_Noted | GradientClaim | None]]] = {}
        self._order: list[Unit] = list(engine.units)
        self._ran: list[Unit] = []
        self._watch = ParameterWatch(module, self._used)
        self._unseen = set(self._watch.unseen)  # these do not wait

    def after_forward(self, results: Iterable[Tensor]) -> None:
        """See :meth:`Updates.after_forward`.

        Raises:
            StaleWeightsError: If it used a parameter, past its module, that had not been updated yet.
        """
        if not self._waiting:
            return
        used = _leaves(results)
        for unit in self._waiting:
            for name, parameter in zip(unit.names, unit.parameters, strict=True):
                if parameter in used:
                    raise StaleWeightsError(
                        f"The forward used {name} through a reference that is not its module's, before it was updated. "
                        "Get it from its module where it is used, or give schedule='after_backward'."
                    )
        self.finish()

    def finish(self) -> None:
        for unit in list(self._waiting):
            self._run(unit)

    def detach(self) -> None:
        super().detach()
        self._watch.detach()

    def _step(self, units: list[Unit]) -> None:
        self.finish()
        self._order = list(dict.fromkeys((*self._ran, *self._order)))  # as they were asked for the last time
        self._ran = []
        mine = set(units)
        at_once = [unit for unit in units if not self._unseen.isdisjoint(unit.parameters)]
        self._update_all(at_once)
        for unit in (unit for unit in self._order if unit in mine.difference(at_once)):
            group = {k: v.clone() if isinstance(v, Tensor) else v for k, v in unit.group.items() if k != "params"}
            self._waiting[unit] = group, [_noted(gradient) for gradient in self._gradients(unit)]
        if not at_once:
            self._engine.commit()
        self._engine.expect(self._waiting)

    def _used(self, parameter: nn.Parameter) -> None:
        if self._waiting and (unit := self._engine.unit_of.get(parameter)) in self._waiting:
            self._run(unit)

    def _run(self, unit: Unit) -> None:
        group, gradients = self._waiting.pop(unit)
        self._ran.append(unit)
        self._engine.update(unit, group, [None if gradient is None else gradient.take() for gradient in gradients])


@dataclass(frozen=True, eq=False)
class _Noted:
    """A gradient in memory, and how often it had been changed."""

    gradient: Tensor
    version: int

    def take(self) -> Tensor:
        if self.gradient._version != self.version:
            raise RuntimeError(
                "A gradient was changed in place after the optimizer's step and before its parameter was updated. "
                "Clear gradients with zero_grad(set_to_none=True), or give schedule='after_backward'."
            )
        return self.gradient


def _noted(gradient: Tensor | GradientClaim | None) -> _Noted | GradientClaim | None:
    return _Noted(gradient, gradient._version) if isinstance(gradient, Tensor) else gradient


def _taken(gradients: Iterable[Tensor | GradientClaim | None]) -> list[Tensor | None]:
    """All in memory."""
    return [gradient.take() if isinstance(gradient, GradientClaim) else gradient for gradient in gradients]


def _leaves(results: Iterable[Tensor]) -> set[Tensor]:
    """The parameters whose gradients a backward of ``results`` would compute."""
    found: set[Tensor] = set()
    seen: set[Any] = set()
    stack = [tensor.grad_fn for tensor in results]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found.add(variable)
        stack += [following for following, _ in node.next_functions]
    return found
