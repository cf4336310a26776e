"""Memory of a host tier: one slab for each copy of a record."""

from __future__ import annotations

from lightning_efficient.core.buffers import HostBuffer, round_up
from lightning_efficient.offload.tiers import numa
from lightning_efficient.offload.tiers.tier import TierError

__all__ = ["Slab", "Slabs"]


class Slab:
    """Room for one copy of a record, which takes memory when it is first used."""

    def __init__(self, slabs: Slabs, nbytes: int) -> None:
        self.nbytes = nbytes
        self._slabs = slabs
        self._buffer: HostBuffer | None = None

    def memory(self) -> HostBuffer:
        """Of at least the record's size.

        Raises:
            TierError: If it cannot be had.
        """
        if self._buffer is None:
            self._buffer = self._slabs.allocate(self.nbytes)
            self._slabs.taken_bytes += self.nbytes
        return self._buffer

    @property
    def taken_bytes(self) -> int:
        """Of memory, up to now."""
        return 0 if self._buffer is None else self.nbytes


class Slabs:
    """Slabs of one kind, within a budget.

    Attributes:
        budget_bytes: For all.
        reserved_bytes: Of it, whether their memory has been taken or not.
        taken_bytes: Of memory.

    Args:
        tier: Whose they are, for messages.
        budget_bytes: See above.
        pinned: Whether they are locked for copies from and to a GPU.
        node: NUMA node that they are on; None: the nearest.
    """

    def __init__(self, tier: str, budget_bytes: int, pinned: bool, node: int | None) -> None:
        self.budget_bytes, self.reserved_bytes, self.taken_bytes = budget_bytes, 0, 0
        self._tier, self._pinned, self._node = tier, pinned, node

    def check(self, nbytes: int) -> None:
        """Whether the budget has room for so much more.

        Raises:
            TierError: If it has not, or the node has not.
        """
        if self.reserved_bytes + nbytes > self.budget_bytes:
            raise TierError(
                f"The {self._tier} tier has {self.reserved_bytes:,} of its budget_bytes={self.budget_bytes:,} in use, "
                f"and {nbytes:,} bytes more are needed (two copies of each versioned record). Give it a "
                "larger budget, or offload less there."
            )
        free = None if self._node is None else numa.free_bytes(self._node)
        if free is not None and nbytes > free:
            raise TierError(
                f"NUMA node {self._node} has {free:,} bytes free, and {nbytes:,} bytes more are needed. "
                "Offload less there."
            )

    def take(self, nbytes: int) -> Slab:
        """One more; the memory is taken later."""
        self.check(round_up(nbytes))
        return self.take_unchecked(nbytes)

    def take_unchecked(self, nbytes: int) -> Slab:
        """One more, also beyond the budget."""
        slab = Slab(self, round_up(nbytes))
        self.reserved_bytes += slab.nbytes
        return slab

    def give_back(self, slab: Slab) -> None:
        """Its memory is free once nobody uses it."""
        self.reserved_bytes -= slab.nbytes
        self.taken_bytes -= slab.taken_bytes

    def allocate(self, nbytes: int) -> HostBuffer:
        """Memory of this kind.

        Raises:
            TierError: If there is none.
        """
        try:
            buffer = HostBuffer(nbytes)
            if self._node is not None:
                numa.bind(
                    buffer.address, buffer.nbytes, self._node
                )  # before any page is touched, or pinned in its place
            if self._pinned:
                buffer.pin()
        except TierError:
            raise
        except (OSError, RuntimeError) as error:
            raise TierError(
                f"The {self._tier} tier cannot take {nbytes:,} bytes of memory: {error} Give it a smaller budget_bytes"
                f"{', or pinned=False' if self._pinned else ''}."
            ) from error
        return buffer
