"""What a technique cost and saved: a figure where it was measured, and words that say how."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Balance"]


@dataclass(frozen=True)
class Balance:
    """What a technique cost and saved, against the same steps without it; None where it was not measured.

    Times are sums over all batches so far, of the thread that trains. They only grow; they may begin anew with a fit.

    Attributes:
        technique: Who, as in the tags.
        cost_ms: By how much it made training longer.
        gain_ms: By how much it made training shorter.
        spared_bytes: Memory that would be taken without it, as of the last batch.
        held_bytes: Memory that it takes for itself.
        time: How the times were measured, and what is not in them; a sentence or two for a person.
        memory: Likewise, of the bytes.
        verdict: What came of it in this run, and why; empty where there is nothing to say.
    """

    technique: str
    cost_ms: float | None = None
    gain_ms: float | None = None
    spared_bytes: float | None = None
    held_bytes: float | None = None
    time: str = ""
    memory: str = ""
    verdict: str = ""

    def measurements(self) -> dict[str, float]:
        """What was measured, by tag."""
        values = {
            "cost_total_ms": self.cost_ms,
            "gain_total_ms": self.gain_ms,
            "spared_bytes": self.spared_bytes,
            "held_bytes": self.held_bytes,
        }
        return {f"{self.technique}/{name}": float(value) for name, value in values.items() if value is not None}
