"""How the memory of parameters gets a place in a tier, and how they are given it back."""

from __future__ import annotations

import contextlib

import torch

from lightning_efficient.offload.streaming.residency import Residency
from lightning_efficient.offload.streaming.slots import Slot, record_of
from lightning_efficient.offload.tiers.host import keeps_versions
from lightning_efficient.offload.tiers.tier import TierError

__all__ = ["give_back", "keep", "place", "promote"]


def place(slot: Slot, device: torch.device, residency: Residency) -> None:
    """Move it to a tier; from now on it is on ``device`` when it is used.

    Raises:
        TierError: If there is no room.
    """
    slot.record = slot.tier.reserve([slot.nbytes], versioned=_versioned(slot))[0]
    if slot.storage.device != device or not slot.storage.resizable():  # it was left on a record's memory
        slot.tier.write(slot.record, slot.bytes.cpu()).wait()
        slot.move_to(torch.empty(slot.nbytes, dtype=torch.uint8, device=device))
        slot.mark_kept()
    residency.adopt(slot)
    slot.guard()


def promote(slot: Slot, residency: Residency) -> bool:
    """Give it a versioned record, if it is trained, in a tier that keeps versions, and has none; whether that was so.

    Raises:
        TierError: If there is no room.
    """
    if slot.record is None or slot.record.versioned or not _versioned(slot):
        return False
    residency.settle(slot)
    old, data = slot.record, torch.empty(slot.nbytes, dtype=torch.uint8)
    slot.tier.read(old, data).wait()
    new = slot.tier.reserve([slot.nbytes], versioned=True)[0]
    slot.tier.write(new, data).wait()
    slot.record = new
    slot.tier.release([old])
    return True


def keep(slot: Slot, residency: Residency) -> None:
    """Have its parameters as ordinary ones on the memory of its record, whose tier is about to be closed.

    What somebody has a view of, or what cannot be written, stays where it is.

    Raises:
        TierError: If its value is in the tier only, and cannot be read.
    """
    if slot.record is None:
        return
    if slot.resident and not slot.lent:
        with contextlib.suppress(TierError):  # of a write: the value is here
            residency.free(slot)
    if slot.resident:
        residency.restore(slot)
    else:
        residency.settle(slot)
        slot.move_to(slot.tier.keep(slot.record))
    slot.leave()


def give_back(slot: Slot, device: torch.device, residency: Residency) -> None:
    """Have its parameters on ``device``, as ordinary ones; its record is released.

    Raises:
        TierError: If its value cannot be read.
    """
    if slot.record is None:
        return
    if device == slot.storage.device:
        residency.restore(slot)
    else:
        if slot.resident:
            residency.free(slot)
        residency.settle(slot)
        data = torch.empty(slot.nbytes, dtype=torch.uint8)
        slot.tier.read(record_of(slot), data).wait()
        slot.move_to(data.to(device))
    slot.tier.release([slot.record])
    slot.leave()


def _versioned(slot: Slot) -> bool:
    return slot.trained and keeps_versions(slot.tier)
