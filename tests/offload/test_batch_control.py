"""The control of the batch against a device that is a formula: it settles, does not swing, and comes back."""

from __future__ import annotations

import io
import itertools
import random
from dataclasses import dataclass, field

import pytest
import torch

from lightning_efficient.offload.batches.batch_control import BatchController, StepMeasurement

_MIB = 1 << 20


@dataclass
class Device:
    """Memory and time of a step by formula; what is asked for beyond ``total`` fails."""

    total: int = 1000 * _MIB
    resident: int = 300 * _MIB
    fixed: int = 50 * _MIB
    per_sample: int = 30 * _MIB
    others: int = 0
    pressure: float = 0.0
    idle_share: float = 0.0
    step_s: float = 1.0
    parts: list[int] = field(default_factory=list)
    failures: int = 0

    def step(self, control: BatchController, samples: int = 32, per_sample: int | None = None) -> int:
        """One batch, with as many attempts as it takes."""
        free = self.total - self.resident - self.others
        while True:
            parts = control.parts(samples)
            need = self.fixed + (per_sample or self.per_sample) * -(-samples // parts)
            if need <= free:
                break
            self.failures += 1
            assert control.out_of_memory(samples, parts, free), "one sample does not fit"
        self.parts.append(parts)
        control.observe(
            StepMeasurement(
                samples=samples,
                parts=parts,
                used_bytes=self.resident,
                free_bytes=free,
                peak_bytes=self.resident + need,
                step_s=self.step_s,
                idle_s=self.idle_share * self.step_s,
                pressure_percent=self.pressure,
            )
        )
        return parts


def test_o7_it_settles_at_the_largest_parts_that_fit_and_stays() -> None:
    device, control = Device(), BatchController(patience=5)
    for _ in range(500):
        device.step(control)
    assert device.parts == [2] * 500  # 16 samples: 530 MiB of 700; 32: 1010
    assert device.failures == 1
    assert control.limit == 16


def test_o7_a_batch_that_fits_is_never_split() -> None:
    device, control = Device(per_sample=10 * _MIB), BatchController()
    assert {device.step(control) for _ in range(100)} == {1}
    assert control.limit is None
    assert not device.failures


def test_o7_it_splits_ahead_of_failure_when_memory_goes_and_merges_when_it_is_back() -> None:
    device, control = Device(per_sample=15 * _MIB), BatchController(patience=5)
    assert device.step(control) == 1  # 530 MiB
    device.others = 169 * _MIB  # 531 MiB left: it would fit, barely
    device.step(control)
    assert device.step(control) == 2
    for _ in range(100):
        device.step(control)
    assert set(device.parts[2:]) == {2}
    device.others = 0
    after = [device.step(control) for _ in range(100)]
    assert after == sorted(after, reverse=True)
    assert after[-1] == 1
    assert after.index(1) == 5  # patience
    assert not device.failures


def test_o7_one_batch_of_long_samples_does_not_split_all_later_ones() -> None:
    device, control = Device(per_sample=10 * _MIB), BatchController(patience=5)
    for _ in range(10):
        device.step(control)
    assert device.step(control, per_sample=40 * _MIB) == 2
    assert device.failures == 1
    after = [device.step(control) for _ in range(300)]
    assert after[0] == 4  # those samples left 10 MiB of 700
    assert after[-1] == 1
    assert device.failures == 1


def test_o7_tries_that_fail_become_rare() -> None:
    """Fragmentation: by the numbers a whole batch would fit, and it never does."""
    device, control = Device(per_sample=10 * _MIB), BatchController(patience=4)
    for _ in range(4000):
        size = -(-32 // control.parts(32))
        if size == 32:
            assert control.out_of_memory(32, 1, 700 * _MIB)
            device.failures += 1
        device.step(control)
    assert 5 <= device.failures <= 11  # about log2(4000 / 4)


def test_o7_it_goes_back_when_larger_parts_are_slower() -> None:
    device, control = Device(per_sample=10 * _MIB), BatchController(patience=5)
    control.split(4, 32)
    for _ in range(12):
        device.step(control)
        device.step_s = 3.0 if control.limit is None or control.limit > 8 else 1.0  # it swaps
    assert set(device.parts) == {4, 2}
    later = [device.step(control) for _ in range(8)]
    assert later[-1] == 4


def test_o7_larger_parts_are_tried_sooner_when_the_device_idles() -> None:
    steps = {}
    for share in (0.0, 0.5):
        device, control = Device(per_sample=5 * _MIB, idle_share=share), BatchController(patience=10)
        control.split(2, 32)
        while device.step(control) == 2:
            pass
        steps[share] = len(device.parts)
    assert steps == {0.0: 11, 0.5: 6}


def test_o7_pressure_of_the_system_splits_and_prevents_merging() -> None:
    device, control = Device(per_sample=5 * _MIB, pressure=50.0), BatchController(patience=10)
    for _ in range(30):
        device.step(control)
    assert device.parts[:11] == [1] * 10 + [2]
    device.pressure = 0.0
    for _ in range(100):
        device.step(control)
    assert device.parts[-1] == 1


def test_o7_random_memory_never_makes_it_swing() -> None:
    rng = random.Random(0)
    device, control = Device(per_sample=12 * _MIB), BatchController(patience=20)
    limits = []
    for _ in range(2000):
        device.others = rng.randrange(0, 300) * _MIB  # whole batches need 434 MiB of 400 to 700
        device.step(control, samples=rng.choice((32, 32, 32, 7)))
        limits.append(control.limit)
    assert device.failures <= 8
    assert sum(a != b for a, b in itertools.pairwise(limits)) <= 20


def test_o7_a_short_batch_is_split_by_its_size_not_by_the_number() -> None:
    device, control = Device(), BatchController()
    device.step(control)
    assert control.limit == 16
    assert control.parts(5) == 1
    assert control.parts(17) == 2
    assert control.parts(33) == 3
    for _ in range(100):
        device.step(control, samples=17)
    assert control.limit == 16


def test_o7_one_sample_that_does_not_fit_ends_it() -> None:
    control = BatchController()
    assert control.out_of_memory(3, 1, 100)
    assert control.parts(3) == 2
    assert control.out_of_memory(3, 2, 100)
    assert control.parts(3) == 3
    assert not control.out_of_memory(3, 3, 100)


def test_o7_ranks_take_the_smallest_parts_of_all() -> None:
    told: list[int] = []

    def agree(number: int) -> int:
        told.append(number)
        return max(number, -4)  # another rank holds 4 samples

    control = BatchController(agree=agree)
    assert control.parts(16) == 4
    assert control.parts(6) == 2
    assert control.limit == 4
    assert len(told) == 2


def test_o7_the_state_loads_and_decides_the_same() -> None:
    device, control = Device(), BatchController(patience=7)
    for _ in range(20):
        device.step(control)
    device.others = -400 * _MIB
    device.step(control)
    file = io.BytesIO()
    torch.save(control.state_dict(), file)
    file.seek(0)
    other, twin = BatchController(patience=7), Device(others=device.others)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert [device.step(control) for _ in range(50)] == [twin.step(other) for _ in range(50)]
    assert other.state_dict() == control.state_dict()
    with pytest.raises(ValueError, match="version 7"):
        other.load_state_dict({"version": 7})


@pytest.mark.parametrize("arguments", [{"margin": 1.0}, {"margin": 0.01}, {"reserve": -0.1}, {"patience": 0}])
def test_arguments_out_of_range_are_named(arguments: dict) -> None:
    with pytest.raises(ValueError, match=r"(reserve|patience)="):
        BatchController(**arguments)
