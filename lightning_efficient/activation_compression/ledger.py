"""What was kept, instead of what, and what it took."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_efficient.core.balance import Balance
from lightning_efficient.core.units import human_bytes

__all__ = ["Ledger", "PassSizes"]


class Ledger:
    """Of one forward pass and the backward pass that follows.

    Attributes:
        by: Bytes of the saved tensors, and bytes that are kept, by layer, kind of operation, and way. What is kept by
            reference is not in it.
        live: Bytes that are kept now, by layer, whichever pass they are of; what compiled code keeps is not in it.
        encode_seconds: Of the host, in this pass.
        decode_seconds: Likewise.
        earlier_seconds: Both, of all passes before.
    """

    def __init__(self) -> None:
        self.by: dict[tuple[str, str, str], tuple[int, int]] = {}
        self.live: dict[str, int] = {}
        self.encode_seconds = self.decode_seconds = self.earlier_seconds = 0.0

    def open(self) -> None:
        """Begin anew."""
        self.by = {}
        self.earlier_seconds += self.encode_seconds + self.decode_seconds
        self.encode_seconds = self.decode_seconds = 0.0

    def add(self, layer: str, kind: str, way: str, nbytes: int, kept_nbytes: int) -> None:
        """``kept_nbytes`` are kept instead of ``nbytes``."""
        self.passed(layer, kind, way, nbytes, kept_nbytes)
        self.live[layer] = self.live.get(layer, 0) + kept_nbytes

    def freed(self, layer: str, kept_nbytes: int) -> None:
        """They are kept no more."""
        left = self.live.pop(layer, 0) - kept_nbytes
        if left:
            self.live[layer] = left

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

    @property
    def live_bytes(self) -> int:
        """Of all layers."""
        return sum(self.live.values())

    def balance(self, *, clocked: bool) -> Balance:
        """What encoding and decoding took so far, and what the last pass did not keep.

        Args:
            clocked: Whether the host's clock sees all of it.
        """
        seconds = self.earlier_seconds + self.encode_seconds + self.decode_seconds
        kept, saved = human_bytes(self.kept_bytes), human_bytes(self.saved_bytes)
        return Balance(
            technique="activations",
            cost_ms=seconds * 1e3 if clocked else None,
            spared_bytes=float(self.saved_bytes - self.kept_bytes),
            time="Took: encoding and decoding, on the host's clock."
            if clocked
            else "Took: not measured; the host's clock does not see what a device, or compiled code, encodes.",
            memory="Memory saved: what backward needs, less what was kept of it, counted at the end of a forward pass.",
            verdict=f"The last forward pass kept {kept} for backward, instead of {saved}." if self.by else "",
        )

    def table(self) -> str:
        """In Markdown, in the order of the forward pass."""
        rows = ["| layer | operation | kept as | saved (KiB) | kept (KiB) |", "|---|---|---|---:|---:|"]
        for (layer, kind, way), (saved, kept) in self.by.items():
            rows.append(f"| {layer or '(training step)'} | {kind} | {way} | {saved / 1024:.1f} | {kept / 1024:.1f} |")
        rows.append(f"| **all** | | | {self.saved_bytes / 1024:.1f} | {self.kept_bytes / 1024:.1f} |")
        if self.live:
            held = ", ".join(f"{layer or '(training step)'} {size / 1024:.1f}" for layer, size in self.live.items())
            rows += ["", f"Kept still (KiB): {held}."]
        return "\n".join(rows)


@dataclass
class PassSizes:
    """What one forward pass saved.

    Attributes:
        numbers: Of each unit that has a rate: how many, and bytes of each.
        fixed: Bytes that are kept in any case, by layer.
        saved: Bytes without compression, by layer.
    """

    numbers: dict[tuple[str, str], tuple[float, int]] = field(default_factory=dict)
    fixed: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    saved: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, unit: tuple[str, str], numel: int, itemsize: int) -> None:
        """``unit`` keeps so many numbers more."""
        before, _ = self.numbers.get(unit, (0, itemsize))
        self.numbers[unit] = before + numel, itemsize

    @property
    def saved_bytes(self) -> float:
        return sum(self.saved.values())

    def state_dict(self) -> dict[str, Any]:
        numbers = [[*unit, *numel] for unit, numel in self.numbers.items()]
        return {"numbers": numbers, "fixed": dict(self.fixed), "saved": dict(self.saved)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> PassSizes:
        numbers = {(kind, layer): (numel, itemsize) for kind, layer, numel, itemsize in state["numbers"]}
        return cls(numbers, defaultdict(float, state["fixed"]), defaultdict(float, state["saved"]))
