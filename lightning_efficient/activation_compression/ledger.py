"""What was kept, instead of what, and what it took."""

from __future__ import annotations

__all__ = ["Ledger"]


class Ledger:
    """Of one forward pass and the backward pass that follows.

    Attributes:
        by: Bytes of the saved tensors, and bytes that are kept, by layer, kind of operation, and way. What is kept by
            reference is not in it.
        live_bytes: Kept now, whichever pass it is of; what compiled code keeps is not in it.
        encode_seconds: Of the host, in this pass.
        decode_seconds: Likewise.
    """

    def __init__(self) -> None:
        self.by: dict[tuple[str, str, str], tuple[int, int]] = {}
        self.live_bytes = 0
        self.encode_seconds = self.decode_seconds = 0.0

    def open(self) -> None:
        """Begin anew."""
        self.by = {}
        self.encode_seconds = self.decode_seconds = 0.0

    def add(self, layer: str, kind: str, way: str, nbytes: int, kept_nbytes: int) -> None:
        """``kept_nbytes`` are kept instead of ``nbytes``."""
        self.passed(layer, kind, way, nbytes, kept_nbytes)
        self.live_bytes += kept_nbytes

    def passed(self, layer: str, kind: str, way: str, nbytes: int, kept_nbytes: int) -> None:
        """Likewise, but compiled code keeps them, and does not say how long."""
        before, kept_before = self.by.get((layer, kind, way), (0, 0))
        self.by[layer, kind, way] = before + nbytes, kept_before + kept_nbytes

    @property
    def saved_bytes(self) -> int:
        """Of the tensors that were saved, each storage once."""
        return sum(saved for saved, _ in self.by.values())

    @property
    def kept_bytes(self) -> int:
        """What is kept of them."""
        return sum(kept for _, kept in self.by.values())

    def table(self) -> str:
        """In Markdown, in the order of the forward pass."""
        rows = ["| layer | operation | kept as | saved (KiB) | kept (KiB) |", "|---|---|---|---:|---:|"]
        for (layer, kind, way), (saved, kept) in self.by.items():
            rows.append(f"| {layer or '(training step)'} | {kind} | {way} | {saved / 1024:.1f} | {kept / 1024:.1f} |")
        rows.append(f"| **all** | | | {self.saved_bytes / 1024:.1f} | {self.kept_bytes / 1024:.1f} |")
        return "\n".join(rows)
