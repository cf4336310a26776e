"""What is told of a product that was computed again."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_efficient.precision.nodes import Role

__all__ = ["Retry"]


@dataclass(frozen=True)
class Retry:
    """A product that was computed again in high bits.

    Attributes:
        node: Its name.
        role: Which of the three.
        reason: The sign of failure.
    """

    node: str
    role: Role
    reason: str
