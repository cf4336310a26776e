"""What is kept, and in how many bits, in words for the line at the start of a run."""

from __future__ import annotations

from collections.abc import Callable

from lightning_efficient.activation_compression.classify import EXACT, FP8
from lightning_efficient.activation_compression.compiled import stored_bits
from lightning_efficient.activation_compression.layers import outermost
from lightning_efficient.activation_compression.rates import LayerRates
from lightning_efficient.activation_compression.schedule import CubicSchedule
from lightning_efficient.activation_compression.settings import RateSchedule
from lightning_efficient.core.units import digits, human_bytes

__all__ = ["compiled_in_words", "rate_in_words"]

_UNITS: dict[str, tuple[str, Callable[[float], str]]] = {
    "bits": ("in {} bits", digits),
    "error_bound": ("with errors up to {}", digits),
    "memory_budget": ("within {}", human_bytes),
}


def rate_in_words(rates: LayerRates, schedule: RateSchedule | None, curve: CubicSchedule | None) -> str:
    """How what backward needs is kept.

    Args:
        rates: Of the run; not those of a budget.
        schedule: What the user asked for.
        curve: That schedule in this run.
    """
    if schedule is not None and curve is not None:
        words, number = _UNITS[schedule.of]
        first, last = number(curve.initial), number(curve.final)
        return f"{words.format(first)}, from step {curve.begin} to {curve.end} towards {last}"
    if rates.error_bound is not None:
        return _UNITS["error_bound"][0].format(digits(rates.error_bound))
    if rates.bits == EXACT:
        return "exactly, but each tensor once and masks in one bit"
    if rates.bits == FP8:
        return "in floats of 8 bits"
    return _UNITS["bits"][0].format(digits(rates.bits))


def compiled_in_words(compiled: list[str], rates: LayerRates, *, seen: bool) -> str:
    """The same for compiled modules, whose names are given; the empty one is that of the LightningModule.

    Args:
        compiled: One at least.
        rates: Of the run.
        seen: Whether this torch lets what they save be compressed within their graphs.
    """
    if not seen:
        return (
            "compiled modules cannot be seen into with this torch: all that they save gets 4 bits at least, after "
            "their forward pass"
        )
    what = f"inside {', '.join(outermost(compiled)) if compiled[0] else 'the compiled LightningModule'}"
    if rates.error_bound is not None:
        return f"{what}: after the forward pass, for how many bits a bound takes is not known before"
    bits = stored_bits(rates.bits)
    if bits == EXACT:
        return f"{what}: masks only, for all is exact"
    words = f"{what}: {bits} bits, and 8 for losses"
    if bits == rates.bits:
        return words
    given = "floats of 8 bits" if rates.bits == FP8 else f"{digits(rates.bits)} bits"
    return f"{words}; codes there are whole numbers of 4 or 8 bits, and not {given}"
