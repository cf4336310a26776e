"""A training run whose optimizer state is divided among ranks, and then spread over each rank's tiers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from lightning_efficient.offload.on_the_way import TOGETHER_BYTES
from lightning_efficient.offload.placement import Attribute, Placement
from lightning_efficient.offload.sharded.engine import ShardedEngine, ShardedUpdates
from lightning_efficient.offload.sharded.joint_session import JointSession
from lightning_efficient.offload.sharded.owners import share_out
from lightning_efficient.offload.sharded.ranks import FirstError
from lightning_efficient.offload.tiers.disk import DiskTier
from lightning_efficient.offload.updates.engine import UpdateEngine
from lightning_efficient.offload.updates.handover import Handover
from lightning_efficient.offload.updates.schedule import Updates

__all__ = ["ShardedSession"]


class ShardedSession(JointSession):
    """A joint session that keeps the state of this rank's share of the parameters; always ``after_backward``.

    Attributes:
        engine: Of this rank.
    """

    engine: ShardedEngine
    _owner_of: dict[int, int]

    def collected_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """``optimizer.state_dict()`` with the state of all ranks, on rank zero; an empty one on the others.

        Each rank must call it; also possible after training.
        """
        first, state_dict = FirstError(), {}
        with first:
            state_dict = optimizer.state_dict()
        self._ranks.agree(first.error)
        found = self.engine.collect(optimizer, lambda: DiskTier(self.tiers.directory))
        if self._ranks.rank:
            return {}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        position = {id(parameter): index for index, parameter in enumerate(parameters)}
        state = dict(state_dict["state"])
        for unit, states in found.items():
            for parameter, whole in zip(unit.parameters, states, strict=True):
                if whole:
                    state[position[id(parameter)]] = whole
        return {**state_dict, "state": dict(sorted(state.items(), key=lambda item: str(item[0]).zfill(9)))}

    @property
    def divided(self) -> bool:
        """Whether this rank's optimizers have their share of the state only."""
        return hasattr(self, "engine")

    def _totals(self) -> dict[str, float]:
        totals = super()._totals()
        if self.divided:
            exchange = self.engine.exchange
            totals["sent_bytes"] = float(exchange.sent_bytes)
            totals["received_bytes"] = float(exchange.received_bytes)
            totals["exchange_wait_ms"] = exchange.waited_seconds * 1e3
        return totals

    def _attributes(self) -> list[Attribute]:
        self._owner_of = share_out(self._optimizers, self._ranks.size, TOGETHER_BYTES)
        elsewhere = {
            name
            for name, parameter in self._module.named_parameters()
            if self._owner_of.get(id(parameter), self._ranks.rank) != self._ranks.rank
        }
        return [
            attribute
            for attribute in super()._attributes()
            if attribute.kind not in ("optimizer_state", "master_weight") or attribute.name not in elsewhere
        ]

    def _place_what_came(self) -> None:
        super()._place_what_came()
        mine = {(attribute.kind, attribute.name) for attribute in self.attributes}  # the shares may be others now
        rows = [row for row in self.placement.rows if (row.attribute.kind, row.attribute.name) in mine]
        self.placement = Placement(tuple(rows), self.placement.rooms)

    def _hand_over(self) -> Handover | None:
        self.engine.bring_back()  # another rank may have what is this one's from now on
        return None

    def _new_engine(self, names: Mapping[int, str]) -> UpdateEngine:
        arguments = self._engine_arguments()
        return ShardedEngine(self._ranks, self._owner_of, self._optimizers, names, self._tier_of, **arguments)

    def _new_updates(self) -> Updates:
        return ShardedUpdates(self.engine, self._optimizers)
