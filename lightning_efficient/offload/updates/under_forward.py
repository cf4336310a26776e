"""Updates that wait for the next forward, where each takes place right before its parameters are used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_efficient.offload.updates.access import ParameterWatch
from lightning_efficient.offload.updates.awaited import await_no_more, await_update
from lightning_efficient.offload.updates.engine import UpdateEngine
from lightning_efficient.offload.updates.gradients import GradientStore
from lightning_efficient.offload.updates.held import HeldUpdate
from lightning_efficient.offload.updates.schedule import Updates
from lightning_efficient.offload.updates.units import Unit

__all__ = ["StaleWeightsError", "UnderForward"]


class StaleWeightsError(RuntimeError):
    """A forward used weights whose update was still to come."""


class UnderForward(Updates):
    """Each unit right before the next forward uses it.

    Its gradients are held until then, also if somebody clears those of the parameters meanwhile. Whoever computes with
    a weight meanwhile, however he came by it, finds it updated. The modules say so (:mod:`.access`) for parameters that
    are streamed, or of a class of their own, and for extensions, whose calls torch does not see; the parameters
    themselves (:mod:`.awaited`) for references that are no module's: neither sees it all. For code that does not say
    what it reads (memory shared with other libraries), :meth:`finish` must be called before.

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
        with self._torn_if_that_fails():
            self._update_all(at_once)
            for unit in (unit for unit in self._order if unit in mine.difference(at_once)):
                update = HeldUpdate.of(unit, self._gradients(unit))
                self._waiting[unit] = _Waiting(update, [parameter._version for parameter in unit.parameters])
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
        waiting.update.begin(self._engine)
        waiting.versions[:] = [parameter._version for parameter in unit.parameters]
        self._begun.add(unit)

    def _used(self, parameter: nn.Parameter) -> None:
        if self._waiting and (unit := self._engine.unit_of.get(parameter)) in self._waiting:
            self._run(unit)

    def _run(self, unit: Unit) -> None:
        waiting = self._waiting.pop(unit)
        await_no_more(unit.parameters)
        with self._torn_if_that_fails():
            for name, parameter, version in zip(unit.names, unit.parameters, waiting.versions, strict=True):
                if parameter._version != version:
                    raise RuntimeError(
                        f"{name} was changed through a view of it (such as parameter.detach()) that was "
                        "made before the optimizer's step, and before its update. Make the view where it is used, or "
                        "give schedule='after_backward'."
                    )
            self._ran.append(unit)
            waiting.update.run(self._engine, begun=unit in self._begun)
            self._begun.discard(unit)
            self._engine.join([unit])
        if not self._waiting:  # the next updates read while forward and backward run
            self._engine.expect(dict.fromkeys((*self._ran, *self._order)))


@dataclass(frozen=True, eq=False)
class _Waiting:
    """The update of a unit, and how often each of its parameters had been changed when it was held."""

    update: HeldUpdate
    versions: list[int]


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
