"""What saves did and cost: loggers' values, and the balance of a run."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_efficient.checkpointing.balance import checkpoint_balance
from lightning_efficient.checkpointing.engine import CheckpointEngine, Saved
from lightning_efficient.checkpointing.uploads import Uploaded
from lightning_efficient.checkpointing.writer import Written
from lightning_efficient.core.balance import Balance

__all__ = ["Account"]


class Account:
    """Of all saves so far."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}  # of the last one
        self._saves = self._skipped = self._written = 0
        self._blocked_seconds = self._persisted_seconds = 0.0

    def saved(self, saved: Saved) -> None:
        """A save is over for the training thread."""
        self._saves += 1
        self._skipped += saved.skipped
        self._blocked_seconds += saved.seconds
        self._values["checkpoint/blocked_ms"] = saved.seconds * 1e3
        self._values["checkpoint/copied_at_once_bytes"] = float(saved.copied_bytes)
        self._values["checkpoint/copied_later_bytes"] = float(saved.later_bytes)
        self._values["checkpoint/copied_ahead_bytes"] = float(saved.ahead_bytes)

    def written(self, written: Written | Uploaded) -> None:
        """A file has become durable, here or remotely."""
        if isinstance(written, Uploaded):
            self._values["checkpoint/upload_ms"] = written.upload_seconds * 1e3
            return
        self._written += 1
        self._persisted_seconds += written.persist_seconds
        self._values |= {
            "checkpoint/copy_ms": written.copy_seconds * 1e3,
            "checkpoint/persist_ms": written.persist_seconds * 1e3,
            "checkpoint/file_bytes": float(written.nbytes),
            "checkpoint/write_gigabytes_per_second": written.nbytes / max(written.persist_seconds, 1e-9) / 1e9,
        }

    def measurements(self, engine: CheckpointEngine, found: Mapping[str, float]) -> Mapping[str, float]:
        """What the last save cost, and what updates waited for it; nothing before the first one.

        Args:
            engine: That took and wrote them.
            found: What was found out about how often to save.
        """
        if not self._saves:
            return {}
        own = {
            "checkpoint/stall_ms": engine.last_stall * 1e3,
            "checkpoint/stalled_total_ms": engine.stalled_seconds * 1e3,
            "checkpoint/buffer_bytes": float(engine.pool.held_bytes),
            "checkpoint/saves": float(self._saves),
            "checkpoint/skipped": float(self._skipped),
            "checkpoint/written": float(self._written),
        }
        return {**self._values, **found, **own}

    def balance(self, engine: CheckpointEngine, overhead: float | None) -> Balance:
        """What saves and stalls cost, and what a save that waits for its file would have cost besides.

        Args:
            engine: That took and wrote them.
            overhead: Part of the run's time that checkpoints take at the advised interval, if it is known.
        """
        return checkpoint_balance(
            blocked_seconds=self._blocked_seconds,
            stalled_seconds=engine.stalled_seconds,
            persisted_seconds=self._persisted_seconds,
            held_bytes=engine.pool.held_bytes,
            written=self._written,
            file_bytes=self._values.get("checkpoint/file_bytes", 0.0),
            overhead=overhead,
        )
