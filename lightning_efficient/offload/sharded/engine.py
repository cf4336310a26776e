"""The updates of one rank's share of the parameters, and of those of others as they arrive.

Gradients are the same on all ranks. The rank that owns a unit updates it, with the only copy of its optimizer state,
and the others get the new values: bit for bit what each of them would have computed. (Rajbhandari et al. 2020, "ZeRO",
5.1.) Transfers of optimizer state are so divided by the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_efficient.offload.sharded.exchange import ParameterExchange
from lightning_efficient.offload.sharded.owners import own_pieces, units_of
from lightning_efficient.offload.sharded.ranks import FirstError, Ranks
from lightning_efficient.offload.sharded.transfer import StateForm, StateTransfer, kept
from lightning_efficient.offload.tiers.tier import Tier
from lightning_efficient.offload.updates.engine import UpdateEngine
from lightning_efficient.offload.updates.layout import is_bulk
from lightning_efficient.offload.updates.schedule import AfterBackward
from lightning_efficient.offload.updates.units import Unit

__all__ = ["ShardedEngine", "ShardedUpdates"]


class ShardedEngine(UpdateEngine):
    """An engine that keeps the state of this rank's units only.

    Attributes:
        owner: The rank of each unit. The units, and their order, are the same on all ranks.
        exchange: Brings new values to the other ranks.

    Args:
        ranks: Among which the units are divided.
        owner_of: The rank of each parameter, by ``id``.
        *args: See :class:`~..updates.engine.UpdateEngine`.
        **kwargs: Likewise.
    """

    def __init__(self, ranks: Ranks, owner_of: Mapping[int, int], *args: Any, **kwargs: Any) -> None:
        self.ranks, self._owner_of = ranks, owner_of
        self.owner: dict[Unit, int] = {}
        self.exchange = ParameterExchange(ranks)
        first = FirstError()
        with first:
            super().__init__(*args, **kwargs)
        ranks.agree(first.error)

    def _make_units(
        self,
        optimizers: Sequence[Optimizer],
        names: Mapping[int, str],
        tier_of: Callable[[str], Tier | None],
        together_bytes: int,
    ) -> list[Unit]:
        first, own = FirstError(), []
        with first:
            own = list(own_pieces(optimizers, names, tier_of, together_bytes, self._is_mine))
        pieces = sorted((piece, rank) for rank, told in enumerate(self.ranks.tell(own)) for piece in told)
        self.ranks.agree(first.error)
        units = units_of(optimizers, [piece for piece, _ in pieces], names, tier_of)
        self.owner = {unit: rank for unit, (_, rank) in zip(units, pieces, strict=True)}
        for unit in units:
            if not self.mine(unit):
                unit.tier = None
                self._forget(unit)
        return units

    def _is_mine(self, parameter: int) -> bool:
        return self._owner_of[parameter] == self.ranks.rank

    def mine(self, unit: Unit) -> bool:
        """Whether this rank updates the unit."""
        return self.owner[unit] == self.ranks.rank

    def adopt(self, unit: Unit, states: Sequence[Mapping[str, Any]]) -> None:
        if self.mine(unit):
            super().adopt(unit, states)
        else:
            self._forget(unit)

    def move(self, tier_of: Callable[[str], Tier | None]) -> bool:
        own = {name for unit in self.units if self.mine(unit) for name in unit.names}
        return super().move(lambda name: tier_of(name) if name in own else None)

    def bring_back(self) -> None:
        """All state is in the optimizers of all ranks; each rank must call it.

        Raises:
            OtherRankError: If another rank cannot read what it has.
        """
        first = FirstError()
        forms, own, transfer = self._forms(self.units, first)
        for unit in self.units:
            form = forms[unit]
            if self.mine(unit):
                transfer.send(form, own[unit], None)
                continue
            data = transfer.receive(form, self.owner[unit], to_all=True)
            with first:
                devices = [parameter.device for parameter in unit.parameters]
                states = form.states(data, devices)
                self.put(unit, [_copied(state, device) for state, device in zip(states, devices, strict=True)])
        with first:
            super().bring_back()
        self.ranks.agree(first.error)

    def collect(self, optimizer: Optimizer, new_tier: Callable[[], Tier]) -> dict[Unit, list[dict[str, Any]]]:
        """The states of all units of ``optimizer`` that other ranks own, on rank zero; nothing on the others.

        Each rank must call it. In memory is one unit at a time; what its owner has on a disk is on a disk here too.

        Args:
            optimizer: Whose units.
            new_tier: Makes a disk tier for them, which is closed in the end.

        Raises:
            OtherRankError: If another rank cannot read what it has.
        """
        first, found = FirstError(), {}
        units = [unit for unit in self.units if unit.optimizer is optimizer and self.owner[unit] != 0]
        forms, own, transfer = self._forms(units, first)
        tier: Tier | None = None
        for unit in units:
            form = forms[unit]
            if self.mine(unit):
                transfer.send(form, own.pop(unit), 0)
            elif self.ranks.rank == 0:
                data = transfer.receive(form, self.owner[unit], to_all=False)
                if first.error is None:
                    with first:
                        if form.on_disk and tier is None:
                            tier = new_tier()
                        found[unit] = form.states(None if data is None else kept(data, tier if form.on_disk else None))
        with first:
            if tier is not None:
                tier.close()
        self.ranks.agree(first.error)
        return found

    def _forms(
        self, units: Sequence[Unit], first: FirstError
    ) -> tuple[dict[Unit, StateForm], dict[Unit, list[dict[str, Any]]], StateTransfer]:
        """What all ranks have to send, the states of this one, and a way for them."""
        own: dict[Unit, list[dict[str, Any]]] = {}
        forms: list[StateForm] = []
        with first:
            self._settle()
            own = {unit: self.states(unit) for unit in units if self.mine(unit)}
            forms = [StateForm.of(states) for states in own.values()]
        self.ranks.agree(first.error)  # else the others would not know what to expect
        told = [iter(rank) for rank in self.ranks.tell(forms)]
        all_forms = {unit: next(told[self.owner[unit]]) for unit in units}
        with first:
            largest = max((form.layout.nbytes for form in all_forms.values()), default=0)
            transfer = StateTransfer(self.ranks, first, largest)
        self.ranks.agree(first.error)
        return all_forms, own, transfer

    def _settle(self) -> None:
        self.join()
        if any(unit.placed is not None for unit in self.units):
            self._staging.flush()

    @staticmethod
    def _forget(unit: Unit) -> None:
        for parameter in unit.parameters:
            unit.optimizer.state.pop(parameter, None)


def _copied(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """With the bulk in memory of its own beside the parameter."""
    return {key: value.to(device, copy=True) if is_bulk(value) else value for key, value in state.items()}


class ShardedUpdates(AfterBackward):
    """All units in ``Optimizer.step``: this rank's with their state, the others' as they come.

    They come while the next unit is updated. All ranks go on only when each has done its share.
    """

    _engine: ShardedEngine

    def _step(self, units: list[Unit]) -> None:
        engine, first = self._engine, FirstError()
        with first:
            engine.commit()
            engine.expect(units)
            self._check_frozen(units)
        with self._torn_if_that_fails():
            own = [unit for unit in units if engine.mine(unit)]
            for unit in (unit for unit in own if engine.on_host(unit) and first.error is None):
                with first:  # the next are stepped while the first are sent
                    engine.update(unit, unit.group, [parameter.grad for parameter in unit.parameters])
            for unit in units:
                if engine.mine(unit) and first.error is None:
                    with first:
                        if not engine.on_host(unit):
                            engine.update(unit, unit.group, [parameter.grad for parameter in unit.parameters])
                        engine.join([unit])
                engine.exchange.post(engine.owner[unit], [p for p in unit.parameters if p.requires_grad])
            engine.exchange.finish()
            engine.ranks.agree(first.error)
        engine.expect(units)

    @staticmethod
    def _check_frozen(units: list[Unit]) -> None:
        for unit in units:
            for name, parameter in zip(unit.names, unit.parameters, strict=True):
                if not parameter.requires_grad and parameter.grad is not None:
                    raise RuntimeError(
                        f"{name} has a gradient and does not require one, so that the ranks would not send each other "
                        "its new values. Clear the gradient where you freeze it: parameter.grad = None."
                    )
