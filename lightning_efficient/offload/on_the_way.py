"""Memory for what is on its way between tiers: how much each kind takes, and what a budget leaves for it."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_efficient.core.buffers import PAGE, round_up
from lightning_efficient.offload.placement import Kind, Placement

__all__ = ["STAGING_BYTES", "TOGETHER_BYTES", "OnTheWay", "disk_buffer_bytes"]

TOGETHER_BYTES = 4 << 20
"""Of parameters that are updated in one go, for records that are worth a disk's while."""
STAGING_BYTES = 256 << 20
"""For records on their way, if nothing else is said and none is larger."""
_PARTS = {"optimizer_state": 1, "activation": 2, "gradient": 4, "updates on the host": 2}
"""What is on its way has memory of its own, by kind: so much of `staging` (a half, a quarter)."""
_SHARE = 8  # of a budget, that a plan leaves to what is on its way at least, if that needs so much
_STAGED: tuple[Kind, ...] = ("parameter", "gradient", "activation")  # which a disk's own buffers are for


_BUFFERS = 32 << 20
"""The disk tier's own memory, for tensors that do not begin at a page."""
_SHARE_OF_BUFFERS = 16  # of a budget: a sixteenth, if that is less
_USERS = 5  # of these buffers, a page each at least


def disk_buffer_bytes(budget: int | None) -> int:
    """The disk tier's own memory, with this budget for the host's memory."""
    return _BUFFERS if budget is None else min(_BUFFERS, max(_USERS * PAGE, budget // _SHARE_OF_BUFFERS))


@dataclass(frozen=True)
class OnTheWay:
    """How much memory is for what is on its way.

    Attributes:
        given: By the user, for records of optimizer state; None: what is of use, and fits.
        on_host: Whether the host steps.
        disk_buffer_bytes: See :func:`disk_buffer_bytes`.
    """

    given: int | None
    on_host: bool
    disk_buffer_bytes: int

    def kinds(self, placement: Placement) -> set[str]:
        """What is on its way at all."""
        kinds: set[str] = {row.attribute.kind for row in placement.rows if row.tier != placement.rooms[0].tier}
        if self.on_host and "optimizer_state" in kinds:
            kinds.add("updates on the host")
        return kinds & _PARTS.keys()

    @staticmethod
    def part(kind: str, staging_bytes: int) -> int:
        """Of one kind."""
        return staging_bytes // _PARTS[kind]

    def largest(self, placement: Placement, *kinds: Kind) -> int:
        """The bytes of the largest thing that is elsewhere, of these kinds or any."""
        fastest = placement.rooms[0].tier
        rows = [row for row in placement.rows if row.tier != fastest]
        return max((r.attribute.nbytes for r in rows if not kinds or r.attribute.kind in kinds), default=0)

    def wanted(self, placement: Placement) -> int:
        """``staging``, where memory is not short: as given, or enough for two of the largest records."""
        if self.given is not None:
            return self.given
        return max(STAGING_BYTES, 2 * self.largest(placement) + TOGETHER_BYTES)

    def total(self, placement: Placement, staging_bytes: int) -> int:
        """All memory of the host that is taken beside what is placed there, with so much ``staging``."""
        first, largest = placement.rooms[0].tier, self.largest(placement, "gradient")
        away = [row for row in placement.rows if row.tier != first]
        total = largest  # the gradient that is at work
        for kind in self.kinds(placement):
            part = self.part(kind, staging_bytes)
            if kind == "gradient":  # one may be larger than its part; where each is used at once, none leaves
                leave = any(row.attribute.kind == "gradient" and row.attribute.name != "*" for row in away)
                part = max(largest, part) if leave else 0
            total += part
        return total + self.disk_buffer_bytes * self._staged(placement)

    def enough(self, placement: Placement, nbytes: int) -> int:
        """The budget for ``nbytes``, what is on its way among them: in a larger one the disk's own memory is more."""
        if not self._staged(placement):
            return nbytes
        fixed = nbytes - self.disk_buffer_bytes
        return fixed + min(_BUFFERS, max(_USERS * PAGE, (fixed - 1) // (_SHARE_OF_BUFFERS - 1)))

    def least(self, placement: Placement) -> int:
        """The :meth:`total` that cannot be less: with ``staging`` as given, or one record, the largest."""
        return self.total(placement, self._least(placement))

    def preferred(self, placement: Placement) -> int:
        """The :meth:`total` that a plan leaves room for: two records, and an eighth of the budget if it is of use."""
        budget = placement.rooms[0].nbytes or 0
        two = round_up(2 * self.largest(placement, "optimizer_state"))
        return self.total(placement, self.given or max(PAGE, two, min(self.wanted(placement), budget // _SHARE)))

    def fitted(self, placement: Placement, room: int) -> int:
        """``staging`` whose :meth:`total` fits into ``room``, but not less than the least nor more than is wanted."""
        if self.given is not None:
            return self.given
        low, high = self._least(placement) // PAGE, max(self._least(placement), self.wanted(placement)) // PAGE
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.total(placement, middle * PAGE) <= room else (low, middle - 1)
        return low * PAGE

    @staticmethod
    def _staged(placement: Placement) -> bool:
        """Whether a disk's own memory is used: what else goes there begins at pages."""
        return any(row.tier == "disk" and row.attribute.kind in _STAGED for row in placement.rows)

    def _least(self, placement: Placement) -> int:
        return self.given or max(PAGE, round_up(self.largest(placement, "optimizer_state")))
