"""What checkpoints cost the training thread, and what they would have cost it besides."""

from __future__ import annotations

from lightning_efficient.core.balance import Balance
from lightning_efficient.core.units import digits, human_bytes

__all__ = ["checkpoint_balance"]


def checkpoint_balance(
    *,
    blocked_seconds: float,
    stalled_seconds: float,
    persisted_seconds: float,
    held_bytes: int,
    written: int,
    file_bytes: float,
    overhead: float | None,
) -> Balance:
    """Of all saves so far.

    Args:
        blocked_seconds: That the training thread spent in saves.
        stalled_seconds: That updates waited for copies.
        persisted_seconds: That files were being written, beside training.
        held_bytes: Of all buffers.
        written: Files that became durable.
        file_bytes: Size of the last one.
        overhead: Part of the run's time that checkpoints take at the advised interval, if it is known.
    """
    time = (
        "Took: the training thread's time in saves, and updates that waited for a copy. Saved: what the files took to "
        "write beside training, for which a save that waits would have stopped it."
    )
    if overhead is not None:
        time += (
            f" Against steps without a save, those with one (the writer's work on the same cores included) would cost "
            f"{digits(100 * overhead)} % of the time at the advised interval."
        )
    files = "1 file" if written == 1 else f"{written} files"
    return Balance(
        technique="checkpoint",
        cost_ms=1e3 * (blocked_seconds + stalled_seconds),
        gain_ms=1e3 * persisted_seconds,
        held_bytes=float(held_bytes),
        time=time,
        memory="Memory held: the buffers of the copies.",
        verdict=f"It wrote {files}, the last of {human_bytes(file_bytes)}." if written else "",
    )
