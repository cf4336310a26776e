"""The peak of a span of time, which only the kernel's or the allocator's mark can see."""

from __future__ import annotations

import sys

import pytest
import torch

from lightning_efficient.core import memory_meter
from lightning_efficient.core.memory_meter import MemoryMeter

_MIB = 1024**2


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark is Linux's")
def test_a_peak_between_two_samples_is_seen_and_an_older_one_is_not() -> None:
    older = torch.ones(128 * _MIB, dtype=torch.uint8)
    del older
    meter = MemoryMeter()
    meter.start()
    if meter.needs_samples:
        pytest.skip("this system does not let a process set its high-water mark back")
    assert meter.peak_bytes() - meter.start_bytes < 16 * _MIB
    inside = torch.ones(64 * _MIB, dtype=torch.uint8)
    del inside
    assert 60 * _MIB < meter.peak_bytes() - meter.start_bytes < 80 * _MIB
    assert meter.sample() - meter.start_bytes < 16 * _MIB


def test_without_the_kernels_mark_samples_make_the_peak(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(memory_meter, "_CLEAR_REFS", tmp_path / "no" / "such")
    meter = MemoryMeter(torch.device("cpu"))
    meter.start()
    assert meter.needs_samples
    assert "sampled" in meter.source
    held = torch.ones(64 * _MIB, dtype=torch.uint8)
    meter.sample()
    del held
    assert meter.peak_bytes() - meter.start_bytes > 60 * _MIB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_peak_of_a_cuda_device() -> None:
    device = torch.device("cuda", 0)
    meter = MemoryMeter(device)
    meter.start()
    held = torch.ones(64 * _MIB, dtype=torch.uint8, device=device)
    del held
    assert meter.peak_bytes() - meter.start_bytes == 64 * _MIB
    assert not meter.needs_samples


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark is Linux's")
def test_a_meter_keeps_its_peak_when_another_one_starts() -> None:
    whole, step = MemoryMeter(), MemoryMeter()
    whole.start()
    held = torch.ones(64 * _MIB, dtype=torch.uint8)
    del held
    step.start()
    if step.needs_samples:
        pytest.skip("this system does not let a process set its high-water mark back")
    assert step.peak_bytes() - step.start_bytes < 16 * _MIB
    assert whole.peak_bytes() - whole.start_bytes > 60 * _MIB
