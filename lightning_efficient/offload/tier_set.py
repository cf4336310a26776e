"""The tiers of a run: made when they are first needed, and how much may be in each."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_efficient.core.torch_internals import local_part
from lightning_efficient.offload.batches.free_memory import free_bytes
from lightning_efficient.offload.on_the_way import disk_buffer_bytes
from lightning_efficient.offload.placement import Placement, Room
from lightning_efficient.offload.tiers import numa
from lightning_efficient.offload.tiers.disk import DiskTier
from lightning_efficient.offload.tiers.host import HostTier
from lightning_efficient.offload.tiers.mapped_memory import is_of_a_record
from lightning_efficient.offload.updates.layout import is_bulk

__all__ = ["TierSet"]

_WAYS = {"read": "read", "written": "write"}
_RESERVED = 0.2  # of the memory that is free at the start, where no budget is given: for activations and others


class TierSet:
    """What there is beside the memory in which a run computes.

    Attributes:
        directory: See below.
        fastest: The tier in which the run computes.
        budgeted: Whether that is the memory of the host, with a budget that was given: for all that it holds.
        budget_bytes: That budget; None: there is none.
        disk_buffer_bytes: See :func:`~.on_the_way.disk_buffer_bytes`.

    Args:
        device: On which it computes.
        directory: For what goes to a disk; removed at the end if it was made, and is empty.
        budgets: Bytes by tier; ``fastest`` stands for that of the device. On a CPU that is the host's memory, and the
            least that is given for it counts. None, of a NUMA node: what is free there.
        host_share: Processes that share the memory of the host.
    """

    def __init__(
        self, device: torch.device, directory: Path, budgets: Mapping[str, int | None], *, host_share: int
    ) -> None:
        self.directory = directory
        self.fastest = "host" if device.type == "cpu" else "device"
        self._device, self._host_share = device, host_share
        same = {"fastest": self.fastest, "device": self.fastest}  # a CPU has no memory beside the host's
        self._budgets: dict[str, int] = {}
        for name, amount in budgets.items():
            tier = same.get(name, name)
            free = self._free_on_node(tier) if amount is None else amount
            self._budgets[tier] = min(free, self._budgets.get(tier, free))
        least = self._budgets.get("host") if self.fastest == "host" else None
        self.budgeted, self.budget_bytes = least is not None, least
        self.disk_buffer_bytes = disk_buffer_bytes(least)
        self._reserves: dict[str, int] = {}  # by device
        self._tiers: dict[str, DiskTier | HostTier] = {}
        self._made: Path | None = None

    def get(self, name: str) -> DiskTier | HostTier:
        """The tier of this name.

        Raises:
            TierError: If it cannot be made.
        """
        if name not in self._tiers:
            if name == "disk":
                self._made = self.directory if not self.directory.exists() else self._made
                self._tiers[name] = DiskTier(self.directory, buffer_bytes=self.disk_buffer_bytes)
            else:
                node = _node(name) if name.startswith("numa") else None
                budget = self._budgets.get(name)
                if budget is None:
                    budget = self._free_bytes(torch.device("cpu")) if node is None else self._free_on_node(name)
                self._tiers[name] = HostTier(budget, pinned=self._device.type == "cuda", numa_node=node)
        return self._tiers[name]

    def prepare(self, to_come: Callable[[str], int]) -> None:
        """Have room for records that will be reserved.

        Args:
            to_come: The bytes that will be, in the tier of this name.

        Raises:
            TierError: If there is not that much room.
        """
        for name, tier in self._tiers.items():
            if nbytes := to_come(name):
                tier.prepare(nbytes)

    def room(self, name: str) -> float:
        """The bytes of all records together that may be in this tier."""
        tier = self.get(name)
        return tier.budget_bytes if isinstance(tier, HostTier) else math.inf

    def commit(self) -> None:
        """See :meth:`~.tiers.tier.Tier.commit`, of all."""
        for tier in self._tiers.values():
            tier.commit()

    def close(self) -> None:
        """Nothing is left of them."""
        while self._tiers:
            self._tiers.popitem()[1].close()
        if self._made is not None:
            with contextlib.suppress(OSError):  # others are in it
                self._made.rmdir()
            self._made = None

    def rooms(
        self, parameters: Iterable[Tensor], optimizers: Sequence[Optimizer], placed: Placement | None = None
    ) -> list[Room]:
        """The tiers, fastest first, with what may be in them.

        Where no budget is given that is what is free, less a reserve, and what the ``parameters``, their gradients, the
        state of the ``optimizers`` and the records of what is ``placed`` take there already.
        """
        held = list(parameters)
        gradients = [parameter.grad for parameter in held if parameter.grad is not None]
        held += [gradient for gradient in gradients if gradient.layout is torch.strided]  # a sparse one is small
        for optimizer in optimizers:
            held += [value for state in optimizer.state.values() for value in state.values() if is_bulk(value)]
        parts = [local_part(tensor) for tensor in held]
        held = [part for part in parts if not is_of_a_record(part)]  # those are on a disk, or counted with their tier
        rooms = []
        if self.fastest == "device":
            rooms.append(Room("device", self._budgets.get("device", self._room(self._device, held))))
        own, host = 0, self._tiers.get("host")
        if placed is not None and isinstance(host, HostTier):  # what activations have there is free between steps
            own = min(host.taken_bytes, placed.used("host"))
        rooms.append(Room("host", self._budgets.get("host", self._room(torch.device("cpu"), held) + own)))
        rooms += [Room(tier, amount) for tier, amount in self._budgets.items() if tier.startswith("numa")]
        return [*rooms, Room("disk", self._budgets.get("disk"))]

    def unbudgeted(self, names: Iterable[str]) -> dict[str, int]:
        """What may be in those of the tiers ``names`` that :meth:`rooms` leaves out: NUMA nodes without a budget."""
        tiers = {name: self.get(name) for name in names if name.startswith("numa") and name not in self._budgets}
        return {name: tier.budget_bytes for name, tier in tiers.items() if isinstance(tier, HostTier)}

    @property
    def disk_seconds(self) -> float:
        """In which the disk was busy."""
        found = [tier.statistics() for tier in self._tiers.values() if not isinstance(tier, HostTier)]
        return sum(max(one.read_seconds, one.write_seconds) for one in found)

    @property
    def disk_bytes(self) -> float:
        """That the disk moved, in both directions together."""
        found = [tier.statistics() for tier in self._tiers.values() if not isinstance(tier, HostTier)]
        return float(sum(one.read_bytes + one.written_bytes for one in found))

    def totals(self) -> dict[str, float]:
        """What grows: bytes that were moved, and the time in which they were, by the tier's name."""
        values: dict[str, float] = {}
        for name, tier in self._tags():
            for moved, (nbytes, seconds) in _moved(tier).items():
                values |= {f"{name}_{moved}_bytes": float(nbytes), f"{name}_{moved}_ms": seconds * 1e3}
        return values

    def measurements(self, means: Mapping[str, float]) -> dict[str, float]:
        """By tag, without the technique's name.

        Args:
            means: Of :meth:`totals`, and of others, over steps.
        """
        values = dict(means)
        for name, tier in self._tags():
            held = tier.reserved_bytes if isinstance(tier, HostTier) else tier.statistics().file_bytes
            values[f"{name}_bytes"] = float(held)
            for moved, (nbytes, _) in _moved(tier).items():
                values[f"total_{name}_{moved}_bytes"] = float(nbytes)
                if milliseconds := values.pop(f"{name}_{moved}_ms", 0.0):
                    rate = values[f"{name}_{moved}_bytes"] / milliseconds / 1e6
                    values[f"{name}_{_WAYS[moved]}_gigabytes_per_second"] = rate
        return values

    def _tags(self) -> list[tuple[str, DiskTier | HostTier]]:
        return [(name.replace(":", "_"), tier) for name, tier in self._tiers.items()]

    def _free_bytes(self, device: torch.device) -> int:
        """What this process may still take there."""
        return free_bytes(device) // (self._host_share if device.type == "cpu" else 1)

    def _free_on_node(self, name: str) -> int:
        """Likewise, in the memory of a NUMA node.

        Raises:
            TierError: If there is no such node, or it may not be chosen.
        """
        numa.check_node(_node(name))
        free = numa.free_bytes(_node(name))
        everywhere = self._free_bytes(torch.device("cpu"))
        return everywhere if free is None else min(everywhere, free // self._host_share)

    def _room(self, device: torch.device, held: Iterable[Tensor]) -> int:
        there = sum(part.numel() * part.element_size() for part in held if part.device.type == device.type)
        free = self._free_bytes(device)
        return max(0, there + free - self._reserves.setdefault(device.type, int(_RESERVED * free)))


def _node(name: str) -> int:
    return int(name.partition(":")[2])


def _moved(tier: DiskTier | HostTier) -> dict[str, tuple[int, float]]:
    """Bytes and seconds, by direction."""
    if isinstance(tier, HostTier):
        read, written = tier.read_back, tier.written
        return {"read": (read.nbytes, read.seconds), "written": (written.nbytes, written.seconds)}
    found = tier.statistics()
    return {"read": (found.read_bytes, found.read_seconds), "written": (found.written_bytes, found.write_seconds)}
