"""How an engine gets the optimizer state of the one before it: what stays as it was keeps its record.

An optimizer may get other groups, or other parameters, while its state is elsewhere, and memory for all of it at once
there need not be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_efficient.offload.updates.layout import is_bulk
from lightning_efficient.offload.updates.units import Unit

if TYPE_CHECKING:
    from lightning_efficient.offload.updates.engine import UpdateEngine

__all__ = ["Handover"]


class Handover:
    """The units of an engine that is about to be replaced.

    Args:
        engine: Of which nobody asks updates any more.
    """

    def __init__(self, engine: UpdateEngine) -> None:
        self._engine = engine
        engine.settle()
        self._left = dict.fromkeys(engine.units)  # whose state is in the record still
        self._unit_of: dict[tuple[Optimizer, nn.Parameter], Unit] = {
            (unit.optimizer, parameter): unit for unit in engine.units for parameter in unit.parameters
        }
        self._lent: dict[Unit, list[tuple[dict[str, Any], int]]] = {}

    def lend(self) -> None:
        """All state is in the optimizers, to be read and replaced; what is in a record is mapped from there.

        So it takes no memory where it is on a disk. It is in memory of the host, wherever the parameter is.
        """
        for unit in list(self._left):
            if unit.placed is None:
                self._engine.take_back(unit)
                del self._left[unit]
                continue
            states = self._engine.states(unit)
            self._engine.put(unit, [
                {key: value if is_bulk(value) else self._engine.at_home(unit, parameter, key, value)
                 for key, value in state.items()}
                for parameter, state in zip(unit.parameters, states, strict=True)
            ])  # fmt: skip
            self._lent[unit] = [(_bulk(state), _version(state)) for state in states]

    def same(self, unit: Unit) -> Unit:
        """The unit with its record, if it was one before, in the same tier and with the same state; else itself."""
        before = self._unit_of.get((unit.optimizer, unit.parameters[0]))
        if (
            before not in self._left
            or before.placed is None
            or before.tier is not unit.tier
            or [id(one) for one in before.parameters] != [id(one) for one in unit.parameters]
            or not self._unchanged(before)
        ):
            return unit
        if self._lent.pop(before, None) is not None:
            for parameter in before.parameters:
                if state := before.optimizer.state.get(parameter):
                    before.optimizer.state[parameter] = {k: v for k, v in state.items() if not is_bulk(v)}
        del self._left[before]
        before.group_index = unit.group_index
        return before

    def make_way(self, unit: Unit) -> None:
        """The state of the parameters of ``unit`` is in the optimizer, in memory of its own."""
        for parameter in unit.parameters:
            before = self._unit_of.get((unit.optimizer, parameter))
            if before in self._left:
                self._give_up(before)

    def finish(self) -> None:
        """Of what is left the state is in the optimizers, if they still have it."""
        for unit in list(self._left):
            self._give_up(unit)

    def _give_up(self, unit: Unit) -> None:
        del self._left[unit]
        lent = self._lent.pop(unit, None)
        if lent is None:
            self._engine.take_back(unit)
            return
        for parameter, (bulk, _) in zip(unit.parameters, lent, strict=True):
            state = unit.optimizer.state.get(parameter, {})
            for key, value in bulk.items():
                if state.get(key) is value:
                    state[key] = value.to(parameter.device, copy=True)
        self._engine.release(unit)

    def _unchanged(self, unit: Unit) -> bool:
        return unit not in self._lent or all(
            _version(bulk) == version
            and (now := _bulk(unit.optimizer.state.get(parameter, {}))).keys() == bulk.keys()
            and all(now[key] is bulk[key] for key in bulk)
            for parameter, (bulk, version) in zip(unit.parameters, self._lent[unit], strict=True)
        )


def _bulk(state: dict[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if is_bulk(value)}


def _version(state: dict[str, Any]) -> int:
    """Counts what is written into it; all of a record have one counter, or one each."""
    return sum(value._version for value in _bulk(state).values())
