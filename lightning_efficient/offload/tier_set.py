"""The tiers of a run: made when they are first needed, and how much may be in each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_efficient.core.torch_internals import local_part
from lightning_efficient.offload.batches.free_memory import free_bytes
from lightning_efficient.offload.placement import Room
from lightning_efficient.offload.tiers.disk import DiskTier
from lightning_efficient.offload.tiers.host import HostTier
from lightning_efficient.offload.updates.layout import is_bulk

__all__ = ["TierSet"]

_RESERVED = 0.2  # of the memory that is free at the start, where no budget is given: for activations and others


class TierSet:
    """What there is beside the memory in which a run computes.

    Args:
        device: On which it computes.
        directory: For what goes to a disk; removed at the end if it was made, and is empty.
        budgets: Bytes by tier; ``fastest`` stands for that of the device.
        host_share: Processes that share the memory of the host.
    """

    def __init__(self, device: torch.device, directory: Path, budgets: Mapping[str, int], *, host_share: int) -> None:
        self.directory = directory
        self.fastest = "host" if device.type == "cpu" else "device"
        self._device, self._host_share = device, host_share
        self._budgets = dict(budgets)
        if (amount := self._budgets.pop("fastest", None)) is not None:
            self._budgets.setdefault(self.fastest, amount)
        if self.fastest == "host" and "device" in self._budgets:
            self._budgets.setdefault("host", self._budgets.pop("device"))
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
                self._tiers[name] = DiskTier(self.directory)
            else:
                node = int(name.partition(":")[2]) if name.startswith("numa") else None
                budget = self._budgets.get(name) or self._free_bytes(torch.device("cpu"))
                self._tiers[name] = HostTier(budget, pinned=self._device.type == "cuda", numa_node=node)
        return self._tiers[name]

    def prepare_disk(self, nbytes: int) -> None:
        """Have room for records that will be reserved, if anything goes to a disk.

        Raises:
            TierError: If there is not that much room.
        """
        disk = self._tiers.get("disk")
        if nbytes and disk is not None and not isinstance(disk, HostTier):
            disk.prepare(nbytes)

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

    def rooms(self, parameters: Iterable[Tensor], optimizers: Sequence[Optimizer]) -> list[Room]:
        """The tiers, fastest first, with what may be in them.

        Where no budget is given that is what is free, less a reserve, and what the ``parameters``, their gradients and
        the state of the ``optimizers`` take there already.
        """
        held = list(parameters)
        held += [parameter.grad for parameter in held if parameter.grad is not None]
        for optimizer in optimizers:
            held += [value for state in optimizer.state.values() for value in state.values() if is_bulk(value)]
        rooms = []
        if self.fastest == "device":
            rooms.append(Room("device", self._budgets.get("device", self._room(self._device, held))))
        rooms.append(Room("host", self._budgets.get("host", self._room(torch.device("cpu"), held))))
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
        """What grows: bytes that were moved, and the time in which they were, by the disk's name."""
        values: dict[str, float] = {}
        for name, tier in self._tiers.items():
            if not isinstance(tier, HostTier):
                found = tier.statistics()
                values |= {f"{name}_read_bytes": float(found.read_bytes), f"{name}_read_ms": found.read_seconds * 1e3}
                values |= {f"{name}_written_bytes": float(found.written_bytes)}
                values |= {f"{name}_write_ms": found.write_seconds * 1e3}
        return values

    def measurements(self, means: Mapping[str, float]) -> dict[str, float]:
        """By tag, without the technique's name.

        Args:
            means: Of :meth:`totals`, and of others, over steps.
        """
        values = dict(means)
        for name, tier in self._tiers.items():
            if isinstance(tier, HostTier):
                values[f"{name.replace(':', '_')}_bytes"] = float(tier.reserved_bytes)
                continue
            found = tier.statistics()
            values[f"{name}_bytes"] = float(found.file_bytes)
            values[f"total_{name}_read_bytes"] = float(found.read_bytes)
            values[f"total_{name}_written_bytes"] = float(found.written_bytes)
            for moved, way in (("read", "read"), ("written", "write")):
                if milliseconds := values.pop(f"{name}_{way}_ms", 0.0):
                    rate = values[f"{name}_{moved}_bytes"] / milliseconds / 1e6
                    values[f"{name}_{way}_gigabytes_per_second"] = rate
        return values

    def _free_bytes(self, device: torch.device) -> int:
        """What this process may still take there."""
        return free_bytes(device) // (self._host_share if device.type == "cpu" else 1)

    def _room(self, device: torch.device, held: Iterable[Tensor]) -> int:
        there = sum(local_part(t).numel() * t.element_size() for t in held if t.device.type == device.type)
        free = self._free_bytes(device)
        return max(0, there + free - self._reserves.setdefault(device.type, int(_RESERVED * free)))
