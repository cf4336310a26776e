"""The benchmark of offloading on a GPU, as far as it can run without one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_arms, offload_gpu
from benchmarks.gpu_arms import ARMS, BASE, RIVALS, Job, Size, Skipped, built
from benchmarks.harness import Options
from benchmarks.offload_gpu import CHOSEN, DEVICE, HOST, Plan, limit_seconds, measure, step_table
from lightning_efficient.offload.site import SiteMeasurements

CPU = torch.device("cpu")
TINY = Size(1, 32, 16, 2)


def test_the_limit_is_the_longest_of_computing_link_host_and_disk() -> None:
    def limit(computing: float, *, on_host: bool, disk: float = math.inf, on_disk: float = 0.0) -> float:
        measured = SiteMeasurements(28 / 150, 55e9, disk, 12, 2, 2, on_disk)
        return limit_seconds(measured, 7_000_000_000, computing, on_host=on_host)

    assert limit(2.35, on_host=True) == limit(2.35, on_host=False) == 2.35
    assert limit(0.1, on_host=True) == pytest.approx(28 * 7 / 150)
    assert limit(0.1, on_host=False) == pytest.approx(12 * 7 / 55)
    assert limit(0.1, on_host=True, disk=6e9, on_disk=1.0) == pytest.approx(24 * 7 / 6)


def test_a_table_has_ratios_to_both_runs_in_memory_and_says_what_was_skipped() -> None:
    times: dict[str, float | str] = {BASE: 1.0, HOST: 1.25, "torchao": "not installed", f"{BASE}, again": 1.5}
    table, found = step_table("a size", times, {HOST: 1.0}, "how")
    assert found[HOST] == {"seconds": 1.25, "ratio": 1.0, "fraction": 0.8}
    assert "torchao" not in found
    assert "| torchao | skipped: not installed |" in table.markdown()


def test_all_of_it_runs_without_a_gpu(tmp_path: Path) -> None:
    plan = Plan(TINY, 1, TINY, 2, TINY, 10, 1 << 30, (1, 2), 32)
    result = measure(plan, CPU, tmp_path)
    assert result.figures["exact"] == 1
    assert result.figures["host_difference"] == 0, "the same kernels"
    assert result.figures["memory_flat"] == 1
    assert result.figures["fraction_of_limit"] > 0
    text = result.markdown()
    for name in (BASE, DEVICE, HOST, CHOSEN, *RIVALS):
        assert f"| {name} |" in text
    assert result.raw["largest"]["FSDP2 CPUOffloadPolicy"][0] > 0
    assert result.last_line().startswith("offload exact=1 host_difference=0 fraction_of_limit=")
    assert not any(tmp_path.rglob("*.spill"))


@pytest.mark.parametrize("name", list(RIVALS))
def test_rivals_run_or_are_skipped_with_a_word(name: str, tmp_path: Path) -> None:
    with contextlib.suppress(Skipped), built(RIVALS[name], TINY, CPU, tmp_path, 1.0) as job:
        job.step()
    assert not torch.distributed.is_initialized()


def test_what_a_rival_ends_with_is_its_word_and_what_we_end_with_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def breaks(job: Job, folder: Path) -> Iterator[None]:
        raise RuntimeError("no compiler\nand more")
        yield

    monkeypatch.setitem(RIVALS, "broken", breaks)
    with pytest.raises(Skipped, match=r"it ended with RuntimeError: no compiler$"), built(breaks, TINY, CPU, tmp_path):
        pass
    monkeypatch.delitem(RIVALS, "broken")
    with pytest.raises(RuntimeError, match="no compiler"), built(breaks, TINY, CPU, tmp_path):
        pass


def test_a_model_that_does_not_fit_ends_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Job) -> None:
        if len(self.model.blocks) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Job, "step", step)
    monkeypatch.setattr(offload_gpu, "RIVALS", {})
    plan = Plan(TINY, 1, TINY, 1, TINY, 1, 1 << 30, (1, 2, 3, 4), 32)
    table, found = offload_gpu._largest(plan, CPU, tmp_path)
    with built(ARMS[BASE], Size(2, 32, 512, 1), CPU, tmp_path / "two") as job:
        assert found[BASE][0] == job.elements
    assert "then out of memory" in table.markdown()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    options = Options(quick=True, device="cuda", seeds=(0,), threads=1, out=tmp_path)
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        offload_gpu.run(options)


@pytest.mark.gpu
def test_a_quick_plan_runs_on_a_gpu(tmp_path: Path) -> None:
    plan: Any = Plan(TINY, 2, TINY, 2, TINY, 10, 1 << 30, (1, 2), 64)
    result = measure(plan, torch.device("cuda", 0), tmp_path)
    assert result.figures["exact"] == 1
    assert gpu_arms.elsewhere(torch.device("cuda")) == "host"
