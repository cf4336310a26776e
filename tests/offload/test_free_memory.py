"""What is left of memory, by every limit there is, and which errors say that there was none."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from lightning_efficient.offload.batches import free_memory
from lightning_efficient.offload.batches.free_memory import empty_caches, free_bytes, is_out_of_memory, memory_pressure

CPU = torch.device("cpu")
_MIB = 1 << 20


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: out of memory\nCompile with ..."), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), False),
        (RuntimeError("out of memory"), False),
        (ValueError("DefaultCPUAllocator: can't allocate memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_o7_only_errors_of_allocators_count(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_o7_torch_itself_raises_one_of_them() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_o7_the_least_of_all_limits_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    own.write_text("4:memory:/a/b\n0::/c/d\n")
    monkeypatch.setattr(free_memory, "_OWN_CGROUPS", own)
    monkeypatch.setattr(free_memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(free_memory, "_left_by_limits", list)
    free_memory._groups.cache_clear()
    assert 0 < free_bytes(CPU) <= psutil.virtual_memory().total

    def group(path: str, limit: str, used: int, cached: int, v1: bool = False) -> None:
        folder = tmp_path / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(f"{limit}\n")
        (folder / ("memory.usage_in_bytes" if v1 else "memory.current")).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{'total_' if v1 else ''}inactive_file {cached}\n")
        free_memory._groups.cache_clear()

    group("c/d", "max", 10, 0)
    group("c", "9000", 8000, 500)
    assert free_bytes(CPU) == 1500  # of the group around the own one
    group("memory/a", str(2**63 - 4096), 10, 0, v1=True)
    group("memory/a/b", "5000", 4500, 100, v1=True)
    assert free_bytes(CPU) == 600
    group("c/d", "100", 200, 0)
    assert free_bytes(CPU) == 0


def test_o7_the_systems_pressure_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "some avg10=12.50 avg60=1.00 avg300=0.00 total=9\nfull avg10=2.00 avg60=0.00 avg300=0.00 total=1\n"
    monkeypatch.setattr(free_memory, "_OWN_CGROUPS", tmp_path / "none")
    monkeypatch.setattr(free_memory, "_PRESSURE", tmp_path / "pressure")
    free_memory._groups.cache_clear()
    assert memory_pressure() == 0.0
    (tmp_path / "pressure").write_text(text)
    assert memory_pressure() == 12.5
    (tmp_path / "pressure").write_text("")
    assert memory_pressure() == 0.0
    free_memory._groups.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="reads what only Linux tells")
def test_o7_limits_of_the_process_count() -> None:
    program = f"""
import resource, torch
from lightning_efficient.offload.batches.free_memory import free_bytes, _left_by_limits
status = dict(l.split(":", 1) for l in open("/proc/self/status"))
used = int(status["VmData"].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 100 * {_MIB}, resource.RLIM_INFINITY))
left = free_bytes(torch.device("cpu"))
assert 80 * {_MIB} < left <= 101 * {_MIB}, left
held = torch.ones(40 * {_MIB}, dtype=torch.uint8)
assert 30 * {_MIB} < left - free_bytes(torch.device("cpu")) < 50 * {_MIB}
resource.setrlimit(resource.RLIMIT_AS, (1, resource.RLIM_INFINITY))
assert free_bytes(torch.device("cpu")) == 0
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2], timeout=120)
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY


@pytest.mark.gpu
def test_o7_what_the_allocator_keeps_is_free() -> None:
    device = torch.device("cuda", 0)
    empty_caches(device)
    before = free_bytes(device)
    held = torch.ones(256 * _MIB, dtype=torch.uint8, device=device)
    assert abs(before - free_bytes(device) - 256 * _MIB) < 32 * _MIB
    del held  # torch keeps it
    assert abs(before - free_bytes(device)) < 32 * _MIB
    torch.cuda.set_per_process_memory_fraction(0.1, device)
    try:
        assert free_bytes(device) <= torch.cuda.get_device_properties(device).total_memory * 0.1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
