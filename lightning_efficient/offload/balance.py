"""What offloading cost a run, and what memory it spared."""

from __future__ import annotations

from collections import defaultdict

from lightning_efficient.core.balance import Balance
from lightning_efficient.core.units import human_bytes
from lightning_efficient.offload.placement import Placement

__all__ = ["offload_balance"]


def offload_balance(placement: Placement, fastest: str, *, waited_seconds: float | None, held_bytes: int) -> Balance:
    """Of a run so far.

    Args:
        placement: What is where.
        fastest: The tier in which all of it would be without offloading.
        waited_seconds: That computing waited for transfers, or for steps on the host; None: the host cannot see it.
        held_bytes: Of what is on its way.
    """
    away: dict[tuple[str, str], int] = defaultdict(int)
    for row in placement.rows:
        if row.tier != fastest and row.attribute.nbytes:
            away[row.attribute.kind.replace("_", " "), row.tier] += row.attribute.nbytes
    time = (
        "Took: what computing waited for transfers. Not in it: the processor time of their threads, and that updates "
        "are made unit by unit, which takes `offload/update_ms` where a run without it makes them all at once."
    )
    if waited_seconds is None:
        time = "Took: not measured; a device waits behind the host's back."
    return Balance(
        technique="offload",
        cost_ms=None if waited_seconds is None else 1e3 * waited_seconds,
        spared_bytes=float(sum(away.values())),
        held_bytes=float(held_bytes),
        time=time,
        memory=f"Memory saved: what the plan has elsewhere than in the {fastest}'s memory. Memory held: buffers of "
        "optimizer state on its way.",
        verdict=_verdict(placement, fastest, away),
    )


def _verdict(placement: Placement, fastest: str, away: dict[tuple[str, str], int]) -> str:
    if not away:
        return "Everything fitted, and nothing was moved."
    said = ", ".join(f"{human_bytes(size)} of {kind} on {tier}" for (kind, tier), size in away.items())
    needed = sum(row.attribute.nbytes for row in placement.rows)
    room = next((room.nbytes for room in placement.rooms if room.tier == fastest), None)
    if room is None or needed > room:
        return f"It had {said}."
    return (
        f"It had {said}, because it was told to: all that it places, {human_bytes(needed)}, would have fitted into the "
        f"{human_bytes(room)} that there are."
    )
