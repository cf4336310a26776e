"""The benchmark of compressed activations: its arithmetic, and what of its GPU part can run without one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import activation, activation_gpu, activation_steps
from benchmarks.activation_codec import COPY, OURS, speeds
from benchmarks.activation_gpu import largest, largest_batches
from benchmarks.activation_losses import BLANKET, CLAIMED, ISSUE, LOSS_ARMS, Difference
from benchmarks.activation_steps import ARMS, HEADLINE, Job, Size, measured_steps
from benchmarks.harness import Options
from lightning_efficient import ActivationCompressionPlugin

TINY = Size(32, 128, 0.1, 1, context=64)


def options(device: str = "cpu") -> Options:
    return Options(quick=True, device=device, seeds=(0,), threads=1, out=None)  # type: ignore[arg-type]


def test_a_step_with_the_callback_is_exact_or_close_and_keeps_less(monkeypatch: pytest.MonkeyPatch) -> None:
    arms = {name: ARMS[name] for name in ("none", "activation checkpointing", "ours, lossless", HEADLINE)}
    monkeypatch.setattr(activation_steps, "ARMS", arms)
    table, measured = measured_steps(TINY, options(), mixed=False)
    assert [row[0] for row in table.rows] == list(arms)
    assert measured["ours, lossless"]["error"] == measured["activation checkpointing"]["error"] == 0
    assert 0 < measured[HEADLINE]["error"] < 0.3
    kept = [measured[name]["kept_bytes"] for name in ("none", "ours, lossless", HEADLINE)]
    assert kept == sorted(kept, reverse=True)
    for values in measured.values():
        assert values["kept_bytes"] <= values["peak_bytes"] <= 1.1 * values["bytes_say"]


def test_a_difference_says_what_would_show() -> None:
    one = Difference.of([2.0, 2.2, 2.4], [1.9, 2.0, 2.1])
    assert one.mean == pytest.approx(0.2)
    assert one.error == pytest.approx(0.1 / math.sqrt(3))
    assert one.gap == pytest.approx(2 * math.sqrt(3))
    assert one.detectable == pytest.approx(0.2 / math.sqrt(3))
    alone = Difference.of([2.0], [1.0])
    assert (alone.gap, alone.detectable) == (0, math.inf)


def test_the_arms_can_be_built_and_are_others() -> None:
    assert {*CLAIMED, ISSUE, BLANKET} <= set(LOSS_ARMS)
    arguments = [one for one in LOSS_ARMS.values() if one is not None]
    for one in arguments:
        ActivationCompressionPlugin(**one)
    assert len({repr(one) for one in arguments}) == len(arguments)


def test_all_codecs_run_or_say_why_not() -> None:
    table, found = speeds(1 << 12, 1, "cpu")
    assert len(table.rows) == 10
    assert found[f"{COPY}, fp32"]["encode_part"] == 1
    assert found[f"{OURS}, bf16"]["encode"] > 0


@pytest.mark.parametrize("limit", [0, 1, 2, 5, 8, 63, 64, 100])
def test_the_largest_is_found_by_halves(limit: int) -> None:
    asked: list[int] = []

    def fits(count: int) -> bool:
        asked.append(count)
        return count <= limit

    assert largest(fits, 64) == min(limit, 64)
    assert len(asked) <= 14
    assert max(asked) <= 64


def test_a_batch_that_does_not_fit_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = Job.loss

    def limited(self: Job, *blocks: Any) -> Tensor:
        if len(self.tokens) > (6 if blocks else 3):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss(self, *blocks)

    monkeypatch.setattr(Job, "loss", limited)
    monkeypatch.setattr(activation_gpu, "TRIED", ("none", "activation checkpointing"))
    table, found = largest_batches(TINY, "cpu", 1 << 30, most=8)
    assert found == {"none": 3, "activation checkpointing": 6}
    assert "| activation checkpointing | 6 | 2.00 |" in table.markdown()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        activation.run(options("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_parts_for_a_gpu_run_on_one() -> None:
    measured_steps(TINY, options("cuda"), mixed=True)
    speeds(1 << 16, 1, "cuda")
    _, found = largest_batches(TINY, "cuda", 1 << 30, most=4)
    assert set(found.values()) == {4}
    assert torch.cuda.get_per_process_memory_fraction() == 1
