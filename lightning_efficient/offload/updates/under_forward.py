"""Updates that wait for the next forward, where each takes place right before its parameters are used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_efficient.offload.updates.access import ParameterWatch
from lightning_efficient.offload.updates.awaited import await_no_more, await_update
from lightning_efficient.offload.updates.engine import UpdateEngine
from lightning_efficient.offload.updates.gradients import GradientClaim, GradientStore
from lightning_efficient.offload.updates.schedule import Updates
from lightning_efficient.offload.updates.units import Unit

__all__ = ["StaleWeightsError", "UnderForward"]


class StaleWeightsError(RuntimeError):
    """A forward used weights whose update was still to come."""


class UnderForward(Updates):
    """Each unit right before the next forward uses it.

    Its gradients are held until then, also if somebody clears those of the parameters meanwhile. Whoever computes with
    a weight meanwhile, however he came by it, finds it updated. For code that does not say what it reads (compiled
    modules, other languages), :meth:`finish` must be called before.

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
        self._waiting: dict[Unit, _Waiting] = {}
        self._begun: set[Unit] = set()  # of those, on the host
        self._order: list[Unit] = list(engine.units)
        self._ran: list[Unit] = []
        self._watch = ParameterWatch(module, self._used)
        outside = set(engine.unit_of).difference(module.parameters())
        self._unseen = outside.union(self._watch.unseen)  # these do not wait
        if engine.stream is not None:
            engine.stream.before_use = self._used

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
        super().finish()

    def detach(self) -> None:
        try:
            super().detach()
        finally:
            while self._waiting:  # what is left when an update has failed
                await_no_more(self._waiting.popitem()[0].parameters)
            self._begun.clear()
            if self._engine.stream is not None:
                self._engine.stream.before_use = None
            self._watch.detach()

    def _step(self, units: list[Unit]) -> None:
        self.finish()
        self._order = list(dict.fromkeys((*self._ran, *self._order)))  # as they were asked for the last time
        self._ran = []
        mine = set(units)
        resident = self._engine.stream is None  # where there is no way to be hidden behind the forward
        at_once = [
            unit for unit in units if (resident and unit.tier is None) or not self._unseen.isdisjoint(unit.parameters)
        ]
        self._update_all(at_once)
        for unit in (unit for unit in self._order if unit in mine.difference(at_once)):
            group = {k: v.clone() if isinstance(v, Tensor) else v for k, v in unit.group.items() if k != "params"}
            states = [unit.optimizer.state.get(parameter) for parameter in unit.parameters]
            gradients = [_noted(gradient) for gradient in self._gradients(unit)]
            versions = [parameter._version for parameter in unit.parameters]
            self._waiting[unit] = _Waiting(group, gradients, states, versions)
        if not at_once:
            self._engine.commit()
        self._engine.expect(self._waiting)
        for unit in list(self._waiting):
            if resident and self._engine.on_host(unit) and unit in self._waiting:
                self._begin(unit)
            for parameter in unit.parameters:
                if unit in self._waiting:
                    await_update(parameter, self._used)

    def _begin(self, unit: Unit) -> None:
        """The host need not wait until a forward uses the parameters: nobody reads them before :meth:`_run`."""
        waiting = self._waiting[unit]
        gradients = [one.gradient if isinstance(one, _Noted) else one for one in waiting.gradients]
        self._engine.update(unit, waiting.group, gradients)
        waiting.versions[:] = [parameter._version for parameter in unit.parameters]
        self._begun.add(unit)

    def _used(self, parameter: nn.Parameter) -> None:
        if self._waiting and (unit := self._engine.unit_of.get(parameter)) in self._waiting:
            self._run(unit)

    def _run(self, unit: Unit) -> None:
        waiting, known = self._waiting.pop(unit), unit.optimizer.state
        await_no_more(unit.parameters)
        self._updating_all = True
        for name, parameter, version in zip(unit.names, unit.parameters, waiting.versions, strict=True):
            if parameter._version != version:
                raise RuntimeError(
                    f"{name} was changed through a view of it (such as parameter.detach()) that was "
                    "made before the optimizer's step, and before its update. Make the view where it is used, or give "
                    "schedule='after_backward'."
                )
        self._ran.append(unit)
        taken_out: dict[Tensor, dict[str, Any]] = {
            parameter: state
            for parameter, state in zip(unit.parameters, waiting.states, strict=True)
            if state is not None and parameter not in known
        }
        known.update(taken_out)  # what somebody has taken out meanwhile, this update is still to have
        begun = unit in self._begun
        self._begun.discard(unit)
        gradients = [one.take() if isinstance(one, _Noted) else one for one in waiting.gradients]  # if unchanged
        if not begun:
            self._engine.update(unit, waiting.group, gradients)
        self._engine.join([unit])
        for taken in taken_out:
            known.pop(taken, None)
        self._updating_all = False
        if not self._waiting:  # the next updates read while forward and backward run
            self._engine.expect(dict.fromkeys((*self._ran, *self._order)))


@dataclass(frozen=True, eq=False)
class _Waiting:
    """What a unit's update will need, as it was at the optimizer's step.

    Attributes:
        group: Its hyperparameters.
        gradients: One for each of its parameters.
        states: What the optimizer had of each; None: nothing.
        versions: How often each had been changed.
    """

    group: Mapping[str, Any]
    gradients: list[_Noted | GradientClaim | None]
    states: list[dict[str, Any] | None]
    versions: list[int]


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
