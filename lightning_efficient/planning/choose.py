"""Of all combinations: what fits, and what of that takes the least time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lightning_efficient.core.units import parse_bytes
from lightning_efficient.planning.facts import Profile, Seconds
from lightning_efficient.planning.model import Alone, Interplay, Parts, Prediction, predict
from lightning_efficient.planning.options import Option, as_mebibytes

__all__ = ["MARGIN", "Candidate", "best", "candidates", "frontier", "least", "with_room"]

MARGIN = 0.1
"""Of a budget that is left free: predictions are to be that good."""
_SAME = 0.02  # part of a step's time, or of a peak, by which they differ by chance


@dataclass(frozen=True)
class Candidate:
    """Some techniques together.

    Attributes:
        options: None: the configuration as it is.
        prediction: What they come to.
    """

    options: tuple[Option, ...]
    prediction: Prediction

    @property
    def name(self) -> str:
        """The keys of its options."""
        return " + ".join(option.key for option in self.options) or "as it is"

    @property
    def lossy(self) -> bool:
        """Whether it changes results."""
        return any(option.lossy for option in self.options)


def candidates(
    profile: Profile,
    parts: Parts,
    plain: Seconds,
    options: Sequence[Option],
    alone: Mapping[str, Alone],
    interplay: Sequence[Interplay] = (),
) -> list[Candidate]:
    """Every combination of options that were tried, the plain configuration first.

    Args:
        profile: Of plain training.
        parts: Its memory.
        plain: Its time of a batch.
        options: Those that were tried.
        alone: What each of them did, by key.
        interplay: What pairs of them did beyond that.
    """
    slots: dict[str, list[Option | None]] = {}
    for option in options:
        slots.setdefault(option.slot, [None]).append(option)
    found = []
    for chosen in itertools.product(*slots.values()):
        together = tuple(option for option in chosen if option is not None)
        if _compatible(together):
            prediction = predict(
                parts,
                plain,
                [alone[option.key] for option in together],
                interplay=interplay,
                waits=profile.waits,
                save_seconds=profile.run.save_seconds,
                save_interval=profile.save_interval,
            )
            found.append(Candidate(together, prediction))
    return sorted(found, key=lambda candidate: len(candidate.options))


def _compatible(options: Sequence[Option]) -> bool:
    """Whether not two of them keep what backward needs."""
    return sum("saved" in option.frees for option in options) < 2


def _allowed(found: Sequence[Candidate], lossy: bool) -> list[Candidate]:
    return [candidate for candidate in found if lossy or not candidate.lossy]


def best(found: Sequence[Candidate], budget: int | None, *, lossy: bool) -> Candidate | None:
    """The one of the least time that fits, and of those that take about as long the one with the fewest techniques.

    Args:
        found: All of them.
        budget: Bytes; None: any.
        lossy: Whether it may change results.
    """
    room = None if budget is None else budget * (1 - MARGIN)
    fitting = [each for each in _allowed(found, lossy) if room is None or each.prediction.peak <= room]
    if not fitting:
        return None
    least_time = min(each.prediction.seconds.wall for each in fitting)
    close = [each for each in fitting if each.prediction.seconds.wall <= least_time * (1 + _SAME)]
    return min(close, key=lambda each: (len(each.options), each.prediction.seconds.wall))


def least(found: Sequence[Candidate], *, lossy: bool) -> Candidate:
    """The one with the lowest peak, and of those with about the same the one with the fewest techniques."""
    allowed = _allowed(found, lossy)
    lowest = min(each.prediction.peak for each in allowed)
    close = [each for each in allowed if each.prediction.peak <= lowest * (1 + _SAME)]
    return min(close, key=lambda each: (len(each.options), each.prediction.peak))


def frontier(found: Sequence[Candidate], *, lossy: bool) -> list[Candidate]:
    """Those that no other beats in both memory and time, the fastest first."""
    order = sorted(_allowed(found, lossy), key=lambda each: (each.prediction.seconds.wall, len(each.options)))
    kept: list[Candidate] = []
    for each in order:
        if not kept or each.prediction.peak < kept[-1].prediction.peak * (1 - _SAME):
            kept.append(each)
    return kept


def with_room(candidate: Candidate, budget: int | None, movable: int) -> Candidate:
    """Give an offload that has an amount of memory what the budget leaves: then less has to move.

    Args:
        candidate: That was chosen.
        budget: Bytes for the whole process; None: nothing changes.
        movable: Bytes of parameters, gradients and optimizer state.
    """
    if budget is None:
        return candidate
    left = int(budget * (1 - MARGIN)) - candidate.prediction.peak
    options, more = [], 0
    for option in candidate.options:
        arguments = option.trainer.get("strategy", {}).get("init_args", {})
        if left > 0 and "memory_budget" in arguments:
            has = parse_bytes(arguments["memory_budget"]["host"], "memory_budget")
            more = max(0, min(left, movable - has))
            given = arguments | {"memory_budget": {"host": as_mebibytes(has + more)}}
            option = replace(option, trainer={"strategy": option.trainer["strategy"] | {"init_args": given}})
        options.append(option)
    peak = candidate.prediction.peak + more
    return Candidate(tuple(options), replace(candidate.prediction, peak=peak))
