"""How the rate goes from its first value to its last (Zhu & Gupta 2017, "To prune, or not to prune", equation 1)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CubicSchedule"]


@dataclass(frozen=True)
class CubicSchedule:
    """``s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (t_n - t_0))^3``: quickly at first, then ever more slowly.

    Attributes:
        initial: Value until step ``begin``.
        final: Value from step ``end`` on.
        begin: t_0, in optimizer steps.
        end: t_n.
    """

    initial: float
    final: float
    begin: int
    end: int

    def at(self, step: int) -> float:
        """The value at ``step``."""
        if step >= self.end:
            return self.final
        done = max(0, step - self.begin) / (self.end - self.begin)
        return self.final + (self.initial - self.final) * (1 - done) ** 3
