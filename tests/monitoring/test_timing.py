"""The arithmetic of times and rates, under clocks that the test sets."""

from __future__ import annotations

import pytest

from lightning_efficient.monitoring.record import RunRecord
from lightning_efficient.monitoring.timing import StepTimer


class Clock:
    """Nanoseconds that go on only when told to; the CPU's go half as fast."""

    def __init__(self) -> None:
        self.now = 1_000_000_000

    def pass_ms(self, milliseconds: float) -> None:
        self.now += int(milliseconds * 1e6)

    def wall(self) -> int:
        return self.now

    def cpu(self) -> int:
        return self.now // 2


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timer(clock: Clock) -> StepTimer:
    return StepTimer(clock.wall, clock.cpu)


def test_a_batch_and_the_wait_before_it(clock: Clock, timer: StepTimer) -> None:
    clock.pass_ms(3)
    timer.batch_start()
    clock.pass_ms(10)
    first = timer.batch_end()
    clock.pass_ms(2)
    timer.batch_start()
    clock.pass_ms(20)
    second = timer.batch_end()
    assert (first.step_ms, first.step_cpu_ms, first.data_wait_ms) == (10, 5, 3)
    assert (second.step_ms, second.step_cpu_ms, second.data_wait_ms) == (20, 10, 2)
    assert timer.train_seconds() == pytest.approx((0.035, 0.0175))


def test_validation_is_no_training_and_no_wait(clock: Clock, timer: StepTimer) -> None:
    timer.batch_start()
    clock.pass_ms(10)
    timer.batch_end()
    clock.pass_ms(1)
    timer.validation_start()
    clock.pass_ms(500)
    assert timer.train_seconds()[0] == pytest.approx(0.011)  # also while it goes on
    timer.validation_end()
    clock.pass_ms(2)
    timer.batch_start()
    clock.pass_ms(10)
    assert timer.batch_end().data_wait_ms == 3
    assert timer.train_seconds()[0] == pytest.approx(0.023)
    assert timer.validation_seconds() == pytest.approx(0.5)


def test_stopped_inside_a_validation(clock: Clock, timer: StepTimer) -> None:
    clock.pass_ms(10)
    timer.validation_start()
    clock.pass_ms(30)
    timer.stop()
    clock.pass_ms(1000)
    assert timer.train_seconds()[0] == pytest.approx(0.010)
    assert timer.validation_seconds() == pytest.approx(0.030)


def test_a_batch_that_is_skipped_is_waiting(clock: Clock, timer: StepTimer) -> None:
    timer.batch_start()
    clock.pass_ms(4)  # on_train_batch_start returned -1: the batch never ends
    timer.batch_start()
    clock.pass_ms(10)
    time = timer.batch_end()
    assert (time.step_ms, time.data_wait_ms) == (10, 4)


def test_throughput_counts_the_waits_and_not_the_validation(clock: Clock, timer: StepTimer) -> None:
    record = RunRecord()
    record.batch_unit = "tokens"
    record.start(timer)
    for step in range(4):
        clock.pass_ms(5)
        timer.batch_start()
        clock.pass_ms(15)
        record.batch(step, timer.batch_end(), 100, 1)
        if step == 1:
            assert record.window()["tokens_per_s"] == pytest.approx(200 / 0.040)
        timer.validation_start()
        clock.pass_ms(1000)
        timer.validation_end()
    window, totals = record.window(), record.totals()
    assert window["tokens_per_s"] == pytest.approx(200 / 0.040)
    assert window["step_ms"] == 15
    assert totals["tokens"] == 400
    assert totals["tokens_per_s"] == pytest.approx(400 / 0.080)
    assert totals["step_ms_median"] == totals["step_ms_p10"] == totals["step_ms_p90"] == 15
    assert totals["data_wait_seconds"] == pytest.approx(0.020)
    assert totals["train_cpu_seconds"] == pytest.approx(0.040)
    assert totals["validation_seconds"] == pytest.approx(4.0)


def test_a_resumed_record_goes_on_where_it_was(clock: Clock, timer: StepTimer) -> None:
    record = RunRecord()
    record.start(timer)
    timer.batch_start()
    clock.pass_ms(100)
    record.batch(0, timer.batch_end(), 8, 1)
    record.raise_to({"gradient_bytes": 50})
    clock.pass_ms(100)
    later = RunRecord()
    later.load_state_dict(record.state_dict())
    clock.pass_ms(10_000)  # between the two processes
    later.start(StepTimer(clock.wall, clock.cpu))
    assert later.timer is not None
    later.timer.batch_start()
    clock.pass_ms(50)
    later.batch(1, later.timer.batch_end(), 8, 1)
    later.raise_to({"gradient_bytes": 20})
    totals = later.totals()
    assert totals["train_seconds"] == pytest.approx(0.250)
    assert totals["batches"] == 2
    assert totals["samples_per_s"] == pytest.approx(16 / 0.250)
    assert totals["gradient_bytes"] == 50
    assert later.resumed == 1
    assert [point.seconds for point in later.series["efficiency/step_ms"].points()] == pytest.approx([0.1, 0.25])


def test_a_state_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="version 99"):
        RunRecord().load_state_dict({"version": 99})
