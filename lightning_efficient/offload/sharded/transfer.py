"""Optimizer state on its way from the rank that keeps it to one that writes a checkpoint, or to all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_efficient.core.buffers import HostBuffer
from lightning_efficient.offload.sharded.ranks import FirstError, Ranks
from lightning_efficient.offload.tiers.mapped_memory import drop_pages, is_of_a_record
from lightning_efficient.offload.tiers.tier import Tier
from lightning_efficient.offload.updates.layout import Layout, is_bulk

__all__ = ["StateForm", "StateTransfer", "kept"]

States = Sequence[Mapping[str, Any]]

_PIECE = 64 << 20  # bytes of a message, and of the device's memory that it takes


@dataclass(frozen=True)
class StateForm:
    """The state of a unit without its bulk; small, and to be pickled.

    Attributes:
        layout: Of the bulk, in one message.
        small: The other values of each parameter, on the host.
        keys: The names of all values of each parameter, in the optimizer's order.
        resident: For each parameter, those of the small values that are not on the host, but with the parameter.
        on_disk: Whether the bulk is on a disk.
    """

    layout: Layout
    small: list[dict[str, Any]]
    keys: list[list[str]]
    resident: list[set[str]]
    on_disk: bool

    @classmethod
    def of(cls, states: States) -> StateForm:
        """Of ``states``, one for each parameter."""
        light = [{key: value for key, value in state.items() if not is_bulk(value)} for state in states]
        return cls(
            Layout.of(states),
            [{k: v.cpu() if isinstance(v, Tensor) else v for k, v in state.items()} for state in light],
            [list(state) for state in states],
            [{k for k, v in state.items() if isinstance(v, Tensor) and v.device.type != "cpu"} for state in light],
            any(is_of_a_record(v) for state in states for v in state.values() if is_bulk(v)),
        )

    def states(self, bulk: Tensor | None, devices: Sequence[torch.device] | None = None) -> list[dict[str, Any]]:
        """The states again.

        Args:
            bulk: What was sent; None if there was nothing.
            devices: Where each parameter is, for values that were with it; None: all stay on the host.
        """
        views = self.layout.views(bulk, len(self.keys), to_save=True) if bulk is not None else [{} for _ in self.keys]
        found = []
        for index, (keys, small, large) in enumerate(zip(self.keys, self.small, views, strict=True)):
            whole: dict[str, Any] = {**small, **large}
            if devices is not None:
                whole |= {key: whole[key].to(devices[index]) for key in self.resident[index]}
            found.append({key: whole[key] for key in keys})
        return found


class StateTransfer:
    """Sends states unit by unit, through one buffer that is as large as the largest.

    Nothing here stops in the midst: a rank that has an error keeps up with the others, and says so in the end.

    Args:
        ranks: Among which.
        first: Gets the errors.
        nbytes: Of the largest bulk.

    Raises:
        OSError: If there is not that much memory.
    """

    def __init__(self, ranks: Ranks, first: FirstError, nbytes: int) -> None:
        self._ranks, self._first = ranks, first
        self._buffer = HostBuffer(nbytes)
        self._piece: Tensor | None = None
        if ranks.device.type != "cpu":
            self._piece = torch.empty(min(nbytes, _PIECE), dtype=torch.uint8, device=ranks.device)

    def send(self, form: StateForm, states: States, to: int | None) -> None:
        """Send the bulk of ``states`` to a rank, or to all."""
        data = self._buffer.tensor[: form.layout.nbytes]
        with self._first:
            form.layout.fill(data, states)
            for state in states:
                for value in state.values():
                    if isinstance(value, Tensor):
                        drop_pages(value)
        for piece in self._pieces(data):
            moved = piece if self._piece is None else self._piece[: piece.numel()].copy_(piece)
            if to is None:
                dist.broadcast(moved, self._ranks.rank)
            else:
                dist.send(moved, to)

    def receive(self, form: StateForm, owner: int, *, to_all: bool) -> Tensor | None:
        """The bulk, in the buffer, which the next call uses again; None if there is none."""
        data = self._buffer.tensor[: form.layout.nbytes]
        for piece in self._pieces(data):
            moved = piece if self._piece is None else self._piece[: piece.numel()]
            if to_all:
                dist.broadcast(moved, owner)
            else:
                dist.recv(moved, owner)
            if moved is not piece:
                piece.copy_(moved)
        return data if data.numel() else None

    @staticmethod
    def _pieces(data: Tensor) -> Iterable[Tensor]:
        return data.split(_PIECE) if data.numel() else ()


def kept(data: Tensor, tier: Tier | None) -> Tensor:
    """The bytes of ``data`` in memory of their own: on the disk of ``tier``, or in memory."""
    if tier is None:
        return data.clone()
    record = tier.reserve([data.numel()], versioned=False)[0]
    tier.write(record, data).wait()
    return tier.keep(record)
