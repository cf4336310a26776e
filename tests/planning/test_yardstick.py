"""When the piece of work is timed by which the machine's speed is told."""

from __future__ import annotations

import itertools

import pytest

from lightning_efficient.planning import yardstick
from lightning_efficient.planning.yardstick import Yardstick


class Clock:
    """Stands for ``time``: a process that works through its first looks, and then is quiet."""

    def __init__(self, busy: int) -> None:
        self.now, self.worked, self.looks, self.busy = 0.0, 0.0, 0, busy

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.worked

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.worked += seconds if self.looks < self.busy else 0.0
        self.looks += 1


@pytest.mark.parametrize(("busy", "looks"), [(0, 1), (3, 4), (1000, 100)])
def test_it_waits_until_the_process_is_quiet_and_not_for_ever(
    busy: int, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(busy)
    monkeypatch.setattr(yardstick, "time", clock)
    yardstick._wait_until_quiet()
    assert clock.looks == pytest.approx(looks, abs=1 if busy > 100 else 0)


def test_it_is_the_mean_of_the_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    rod = Yardstick()
    assert rod.seconds == (0.0, 0.0)
    took = itertools.chain([1.0] * 9, [50.0], [3.0] * 9, [50.0])  # the last of each was disturbed

    class Ticking(Clock):
        def process_time(self) -> float:
            return 2 * self.now

    clock = Ticking(0)
    monkeypatch.setattr(yardstick, "time", clock)
    monkeypatch.setattr(yardstick, "_wait_until_quiet", lambda: None)
    monkeypatch.setattr(yardstick.torch, "mm", lambda *_, **__: clock.sleep(next(took)))
    rod.measure()
    rod.measure()
    assert rod.seconds == pytest.approx((2.0, 4.0))
