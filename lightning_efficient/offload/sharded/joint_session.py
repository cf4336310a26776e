"""A training run of several ranks, each with tiers of its own, which go on together or end together."""

from __future__ import annotations

from typing import Any

from lightning_efficient.offload.session import OffloadSession
from lightning_efficient.offload.sharded.ranks import FirstError, Ranks
from lightning_efficient.offload.updates.handover import Handover

__all__ = ["JointSession"]


class JointSession(OffloadSession):
    """A session of each of several ranks, which begin, change and save together.

    Args:
        ranks: Of the run.
        *args: See :class:`~..session.OffloadSession`.
        **kwargs: Likewise.

    Raises:
        OtherRankError: If another rank cannot; here, and from whatever all ranks do together.
    """

    def __init__(self, ranks: Ranks, *args: Any, **kwargs: Any) -> None:
        self._ranks = ranks
        first = FirstError()
        with first:
            super().__init__(*args, **kwargs)
        try:
            ranks.agree(first.error)
        except BaseException:
            if first.error is None:  # else it has been done
                self.close()
            raise

    def begin_again(self) -> None:
        with self._ranks.agreed():
            self._place()
        if self.updates is not None:
            self._begin()

    def adapt(self) -> bool:
        moved = False
        with self._ranks.agreed():
            moved = super().adapt()
        return moved

    def _lend(self) -> Handover | None:
        self.engine.bring_back()
        return None

    @property
    def _host_share(self) -> int:
        return self._ranks.on_host

    def _place_what_came(self) -> None:
        with self._ranks.agreed():
            super()._place_what_came()

    def _begin(self) -> None:
        first = FirstError()
        with first:
            super()._begin()
        self._ranks.agree(first.error)
