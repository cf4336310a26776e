"""The updates of one rank's shards of all parameters.

A shard's optimizer state is as the user's optimizer makes it: tensors that are spread over the ranks like the
parameter, of which this rank's part lies in its record. (Rajbhandari et al. 2021, "ZeRO-Infinity", 5: each rank moves
its own shard of the optimizer state, so that all ranks' links and disks work.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_efficient.core.torch_internals import spread_of
from lightning_efficient.offload.sharded.owners import Piece, own_pieces, units_of
from lightning_efficient.offload.sharded.ranks import FirstError, Ranks
from lightning_efficient.offload.tiers.tier import Tier
from lightning_efficient.offload.updates.engine import UpdateEngine
from lightning_efficient.offload.updates.staging import Lease
from lightning_efficient.offload.updates.subset_step import updates_by_element
from lightning_efficient.offload.updates.units import Unit

__all__ = ["ShardEngine", "communicates"]


def communicates(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether a step for parameters of this group has the ranks wait for one another, for it needs whole matrices."""
    return any(spread_of(p) is not None for p in group["params"]) and not updates_by_element(optimizer, group)


class ShardEngine(UpdateEngine):
    """An engine whose units, and their order, are the same on all ranks; where their state is, is each rank's affair.

    Ranks have parts of different sizes, or none, and other budgets. A unit ends where it would on any rank, so that
    none is larger than one rank wants it, and an optimizer that communicates finds all ranks at the same parameter.

    Args:
        ranks: Of the run.
        *args: See :class:`~..updates.engine.UpdateEngine`.
        **kwargs: Likewise.
    """

    def __init__(self, ranks: Ranks, *args: Any, **kwargs: Any) -> None:
        self._ranks = ranks
        self._communicating: set[tuple[Optimizer, int]] = set()
        self._all_know = False
        super().__init__(*args, **kwargs)

    def agree(self, error: Exception | None) -> None:
        """Go on if no rank has an error; all of them must call it.

        Raises:
            OtherRankError: If another rank has one. A rank that has one itself raises that.
        """
        if error is not None and self._all_know:
            raise error
        self._ranks.agree(error)

    def _make_units(
        self,
        optimizers: Sequence[Optimizer],
        names: Mapping[int, str],
        tier_of: Callable[[str], Tier | None],
        together_bytes: int,
    ) -> list[Unit]:
        first, own = FirstError(), []
        with first:
            self._communicating = {
                (optimizer, index)
                for optimizer in optimizers
                for index, group in enumerate(optimizer.param_groups)
                if communicates(optimizer, group)
            }
            own = list(own_pieces(optimizers, names, tier_of, together_bytes, lambda _: True))
        told = self._ranks.tell(own)
        self._ranks.agree(first.error)
        ends = sorted({(piece.optimizer, piece.group, piece.end) for rank in told for piece in rank})
        return units_of(optimizers, list(_between(ends)), names, tier_of)

    def _lease(self, unit: Unit) -> Lease | None:
        if (unit.optimizer, unit.group_index) not in self._communicating:
            return super()._lease(unit)
        lease, first = None, FirstError()
        with first:
            lease = super()._lease(unit)
        try:
            self._ranks.agree(first.error)  # else the others would wait within the step
        except BaseException:
            self._all_know = True
            raise
        return lease


def _between(ends: Sequence[tuple[int, int, int]]) -> list[Piece]:
    """Pieces from each end of the same group to the next."""
    pieces: list[Piece] = []
    for optimizer, group, end in ends:
        last = pieces[-1] if pieces and (pieces[-1].optimizer, pieces[-1].group) == (optimizer, group) else None
        pieces.append(Piece(optimizer, group, 0 if last is None else last.end, end))
    return pieces
