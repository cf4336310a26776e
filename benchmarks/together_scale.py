"""The largest model that trains within a limit of memory, plainly and with the suite; the time of plain's largest."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import Options, Table, spread
from benchmarks.together_trial import ARMS, SUITE, TOKENS, Like, Trial, tried

__all__ = ["Scale", "Size", "grid", "largest", "measured_scale"]

LIMIT = {"cpu": 1 << 30, "cuda": 4 << 30}
QUICK_MOST = 4e6  # parameters of the models of a quick run
LEARNING = 9  # steps: behind the eighth it is known for which operations low bits pay
TIMED = 5  # steps behind them
NEAR = 0.98  # of the limit: peaks of two runs differ by up to that; behind it a run as long as the timed ones decides
RATIO = 1.12  # of the parameters of neighbours in the grid
EXPECTED = 12  # places in the grid from plain's largest to the suite's: where the search for that begins


@dataclass(frozen=True)
class Size:
    """Of a byte language model: about 64 channels for each block."""

    width: int
    layers: int

    @property
    def parameters(self) -> int:
        """Of its blocks, which are nearly all of it."""
        return self.layers * (12 * self.width**2 + 13 * self.width)

    def __str__(self) -> str:
        return f"{self.parameters / 1e6:.1f} M ({self.layers} layers of width {self.width})"


@dataclass(frozen=True)
class Scale:
    """What the search came to.

    Attributes:
        ratio: Parameters of the suite's largest model over those of plain's, whichever way of plain has the larger one.
        time_ratio: Of a token with the suite over plain, at plain's largest size: processor time, or on a GPU wall
            time. Of the two ways of plain, each at its own largest size, the larger ratio.
        tables: For a person.
        raw: All trials.
    """

    ratio: float
    time_ratio: float
    tables: list[Table]
    raw: dict[str, Any]


def grid(least: float = 1e6, most: float = 4e9) -> list[Size]:
    """The sizes that are tried, each with about :data:`RATIO` times the parameters of the one before."""
    found: list[Size] = []
    for step in range(int(math.log(most / least, RATIO)) + 1):
        wanted = least * RATIO**step
        width = max(64, round((wanted * 64 / 12) ** (1 / 3) / 64) * 64)
        size = Size(width, max(2, round(wanted / (12 * width**2))))
        if not found or size.parameters > found[-1].parameters:
            found.append(size)
    return found


def largest(sizes: Sequence[Size], fits: Callable[[Size], bool], start: int = 0) -> Size | None:
    """The largest size that fits, if all smaller ones do too: by ever longer strides, and then by halves.

    Args:
        sizes: In order.
        fits: Tries one.
        start: Index of the first one to be tried.
    """
    good, bad, stride = -1, len(sizes), 2
    at = min(start, len(sizes) - 1)
    while bad - good > 1:
        if fits(sizes[at]):
            good = at
        else:
            bad = at
        if bad == len(sizes):
            at, stride = min(good + stride, bad - 1), stride * 2
        elif good == -1:
            at, stride = max(bad - stride, 0), stride * 2
        else:
            at = (good + bad) // 2
    return sizes[good] if good >= 0 else None


def measured_scale(options: Options) -> Scale:
    """Search the largest size of each arm, then time both ways at plain's.

    Args:
        options: Of the benchmark.
    """
    limit, steps = LIMIT[options.device], 2 if options.quick else 4
    rounds, learning = (1, 1) if options.quick else (3, LEARNING)
    sizes = grid(most=QUICK_MOST) if options.quick else grid()
    trials: list[dict[str, Any]] = []

    def trial(arm: str, size: Size, steps: int, learning: int = 1, like: Like = None) -> Trial:
        shape = {"width": size.width, "layers": size.layers}
        where = {"device": options.device, "threads": options.threads}
        found = tried(arm, **shape, limit=limit, steps=steps, learning=learning, like=like, **where)  # type: ignore[arg-type]
        trials.append({"arm": arm, "width": size.width, "layers": size.layers, "like": like, **vars(found)})
        words = found.error or f"{statistics.median(found.wall):.2f} s a step"
        print(f"scale  {arm:<44} {size!s:<36} {found.peak / 2**20:6.0f} MiB  {words}", flush=True)
        return found

    best: dict[str, tuple[Size, Trial]] = {}
    for arm in ARMS:

        def fits(size: Size, arm: str = arm) -> bool:
            found = trial(arm, size, steps)
            if found.error is None and NEAR * limit < found.peak <= limit:  # runs differ, and longer ones take more
                found = max(found, trial(arm, size, learning + TIMED, learning), key=lambda one: one.peak)
            good = found.error is None and found.peak <= limit
            if good and (arm not in best or size.parameters > best[arm][0].parameters):
                best[arm] = size, found
            return good

        known = [sizes.index(size) for size, _ in best.values()]
        start = max(known, default=len(sizes) // 4) + (EXPECTED if arm == SUITE else 0)
        if largest(sizes, fits, start=start) is None:
            raise RuntimeError(f"{arm}: not even {sizes[0]} trains within {limit / 2**20:.0f} MiB.")
    base = max((best[arm][0] for arm in ARMS[:2]), key=lambda size: size.parameters)
    times = {arm: _times(trial, arm, best[arm][0], limit, rounds, learning) for arm in ARMS[:2]}
    rows = [
        (arm, str(size), f"{found.peak / 2**20:.0f}", f"{size.parameters / base.parameters:.2f}")
        for arm, (size, found) in best.items()
    ]
    header = ("", "largest model", "peak (MiB)", "parameters / plain's")
    where = "of resident memory, of the whole process" if options.device == "cpu" else "that torch has for tensors"
    note = (
        f"{TOKENS:,} tokens a step, AdamW, clipped; each trial is a process of its own that trains {steps} steps, "
        f"near the limit also one of {learning + TIMED}, for a longer one takes a little more. "
        "Peak: the kernel's high-water mark of resident memory from the start of the process on: Python, torch and "
        f"Lightning are in it, and the making of the model. Sizes are {RATIO - 1:.0%} apart. The suite: optimizer "
        "state, gradients and parameters on a disk as far as they do not fit, activations in 8 or 4 bits, products in "
        "int8, with fp32 around them on a CPU; growth has no part in it, for the full model trains, and checkpoints "
        "are not saved."
    )
    clock = "cpu" if options.device == "cpu" else "wall"
    ratio_rows = [
        (arm, str(best[arm][0]), spread(found["cpu"], 2), spread(found["wall"], 2), f"{max(found['peak']) / 2**20:.0f}")
        for arm, found in times.items()
    ]
    return Scale(
        best[SUITE][0].parameters / base.parameters,
        max(statistics.median(values[clock]) for values in times.values()),
        [
            Table(f"Within {limit / 2**20:.0f} MiB {where}", header, rows, note),
            Table(
                "Time of a token with the suite over plain's, at plain's own largest size",
                ("plain", "size", "CPU time", "time", "largest peak of the suite (MiB)"),
                ratio_rows,
                f"Steps behind the first {learning + 1}, in which low bits learn; {rounds} rounds, by turns. The "
                "suite is added to plain's own module and precision here, with its activation checkpointing: optimizer "
                "state on a disk, activations in 4 bits, products in int8; only if that went beyond the limit it has a "
                "budget as above.",
            ),
        ],
        {"limit": limit, "trials": trials, "time_ratios": times},
    )


def _times(
    trial: Callable[..., Trial], plain: str, size: Size, limit: int, rounds: int, learning: int
) -> Mapping[str, list[float]]:
    """Of a step with the suite over plain, by clock, for each round: the medians of the steps behind learning.

    And the suite's peaks.
    """
    like: Like = "fp32" if plain == ARMS[0] else "bf16"
    first = trial(SUITE, size, learning + 1, learning, like)
    if first.error is not None or first.peak > NEAR * limit:
        like = None
    found: dict[str, list[float]] = {"cpu": [], "wall": [], "peak": []}
    for number in range(rounds):
        pair = {
            arm: trial(arm, size, learning + TIMED, learning, like if arm == SUITE else None)
            for arm in ((plain, SUITE) if number % 2 == 0 else (SUITE, plain))
        }
        found["peak"].append(pair[SUITE].peak)
        for clock in ("cpu", "wall"):
            one, other = (statistics.median(getattr(pair[arm], clock)[learning + 1 :]) for arm in (SUITE, plain))
            found[clock].append(one / other)
    return found
