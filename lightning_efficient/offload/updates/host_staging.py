"""Records for steps on the host: those in its memory are changed where they are, those on a disk are brought in."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_efficient.offload.tiers.host import HostTier
from lightning_efficient.offload.tiers.tier import Tier
from lightning_efficient.offload.updates.staging import Lease, Placed, Staging

__all__ = ["HostStaging"]


class HostStaging(Staging):
    """See :class:`~.staging.Staging`; a record of a tier that is memory of the host is lent itself.

    Such a record must not be versioned: the change cannot be taken back.
    """

    @staticmethod
    def lends(tier: Tier) -> bool:
        """Whether records of ``tier`` are changed where they are."""
        return isinstance(tier, HostTier)

    def expect(self, records: Iterable[Placed]) -> None:
        super().expect(placed for placed in records if not self.lends(placed.tier))

    def read(self, placed: Placed) -> Lease:
        if isinstance(placed.tier, HostTier):
            return Lease(placed, placed.tier.memory(placed.record), None)
        return super().read(placed)

    def write(self, lease: Lease, placed: Placed | None = None) -> None:
        if lease.buffer is not None:
            super().write(lease, placed)

    def drop(self, lease: Lease) -> None:
        if lease.buffer is not None:
            super().drop(lease)
