"""Updates that are one step behind: results differ from those of plain training.

The weights behind step i are those of an update with the gradients of step i - 1, so that there is a whole step to read
and write optimizer state in, also where something needs all gradients first. (Ren et al. 2021, "ZeRO-Offload", 5.2,
"one-step delayed parameter update", which is left out in the first steps, whose gradients change the fastest.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_efficient.offload.updates.engine import UpdateEngine
from lightning_efficient.offload.updates.gradients import GradientStore
from lightning_efficient.offload.updates.held import HeldUpdate
from lightning_efficient.offload.updates.schedule import Updates
from lightning_efficient.offload.updates.units import Unit

__all__ = ["Delayed"]


class Delayed(Updates):
    """Each unit within the next backward, as soon as that needs its weights no more.

    Gradients and hyperparameters are those of the optimizer's step; the weights are taken as they are by then, with
    whatever anybody has done to them meanwhile. Forward and backward of a step use the same weights. What the next
    backward has no gradient for is updated in the next step of the optimizer. :meth:`finish` brings all weights up to
    date, and the next step then begins with them; saving or loading the state of a module does so too.

    Args:
        engine: Of all ``optimizers``.
        optimizers: Whose steps are taken over.
        module: Whose parameters they update.
        complete: Asked at each gradient whether it is complete, or more micro-batches will add to it.
        store: Where gradients are that are not with their parameters; it must keep those of two steps.
        delays: Asked at each step whether its update may be late; else it takes place at once.
    """

    def __init__(
        self,
        engine: UpdateEngine,
        optimizers: Sequence[Optimizer],
        module: nn.Module,
        complete: Callable[[], bool],
        store: GradientStore | None = None,
        delays: Callable[[], bool] = lambda: True,
    ) -> None:
        super().__init__(engine, optimizers, store)
        self._complete, self._delays = complete, delays
        self._waiting: dict[Unit, HeldUpdate] = {}
        self._missing: dict[Unit, set[nn.Parameter]] = {}  # that this backward still needs, of those to be changed
        self._changed: set[nn.Parameter] = set()  # since the forward began
        self._ran: list[Unit] = []
        self._order: list[Unit] = engine.units[::-1]
        self._computing = False  # forward or backward, as far as is known
        self._mixed = False  # weights changed between them
        for parameter in engine.unit_of:
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._gradient_came))
        for part in module.modules():
            self._handles.append(part.register_state_dict_pre_hook(_Asked(self.finish)))
            self._handles.append(part.register_load_state_dict_pre_hook(_Asked(self.finish)))

    @property
    def behind(self) -> bool:
        """Whether weights are without the gradients of the last step."""
        return bool(self._waiting)

    @property
    def repeatable(self) -> bool:
        return not (self.begun or self._changed)

    def before_forward(self) -> None:
        self._engine.join()  # what the host was given in a step that somebody left out
        self._computing, self._mixed = True, False
        self._changed.clear()
        self._missing = {unit: set(update.changes) for unit, update in self._waiting.items()}
        if self._waiting:  # state may have been moved since they were expected
            self._engine.expect(self._waiting)

    def finish(self) -> None:
        self._mixed |= self._computing and self.behind
        for unit in list(self._waiting):
            self._run(unit)
        super().finish()

    def detach(self) -> None:
        try:
            super().detach()
        finally:
            self._waiting.clear()  # what is left when an update has failed

    def _step(self, units: list[Unit]) -> None:
        self._computing = False
        for unit in units:
            if unit in self._waiting:
                self._run(unit)
        self._engine.join(units)
        self._order = list(dict.fromkeys((*self._ran, *self._order)))
        self._ran = []
        if not self._delays():
            self._update_all(units)
            self._engine.expect(units)
            return
        mine = set(units)
        for unit in (unit for unit in self._order if unit in mine):
            update = HeldUpdate.of(unit, self._gradients(unit))
            if update.changes:
                self._waiting[unit] = update
        self._engine.expect(self._waiting)

    def _gradient_came(self, parameter: nn.Parameter) -> None:
        if self._mixed:
            raise RuntimeError(
                "Weights were asked for between the forward and the backward of a step (by state_dict(), a checkpoint, "
                "or finish_updates()), and updated for that, so that this backward would compute with others than its "
                "forward did. Ask in on_train_batch_start or on_train_batch_end, or give schedule='under_forward'."
            )
        if not self._complete():
            return
        if parameter in self._changed:
            raise RuntimeError(
                "A parameter's gradient came a second time in one backward, after the parameter had been updated: "
                "reentrant activation checkpointing does this with layers that are used more than once. Use "
                "use_reentrant=False, or give schedule='under_forward' or 'after_backward'."
            )
        unit = self._engine.unit_of[parameter]
        missing = self._missing.get(unit, set())
        missing.discard(parameter)
        if not missing and unit in self._waiting:
            self._run(unit)
            self._engine.relieve()

    def _run(self, unit: Unit) -> None:
        if not self._ran:
            self._engine.commit()
        update = self._waiting.pop(unit)
        self._ran.append(unit)
        self._changed.update(update.changes)
        with self._torn_if_that_fails():
            update.run(self._engine)
        if not self._waiting:  # the next updates read from now on
            self._engine.expect(dict.fromkeys((*self._ran, *self._order)))


class _Asked:
    """A hook of a module; in copies of the module, and where it is loaded, it does nothing."""

    def __init__(self, action: Callable[[], None] = lambda: None) -> None:
        self._action = action

    def __call__(self, *_: Any) -> None:
        self._action()

    def __reduce__(self) -> Any:
        return _Asked, ()
