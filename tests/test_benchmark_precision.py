"""The benchmark of guarded low bits: its arithmetic, its faults, and what of its GPU part can run without one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch

from benchmarks import precision
from benchmarks.harness import Options, Table
from benchmarks.precision_faults import FAULTS, HARMLESS, Outcome, Plan, ratios, run_with_fault
from benchmarks.precision_gpu import ARMS as GPU_ARMS
from benchmarks.precision_gpu import BASE, measure
from benchmarks.precision_losses import CLAIMED, HEALTHY_ARMS, DigitsMlp, Healthy, trained
from benchmarks.precision_parts import PARTS, Watch
from benchmarks.precision_steps import (
    ARMS,
    FP32,
    OURS_IN_BF16,
    OURS_IN_FP32,
    PAIRS,
    Size,
    beside,
    limit,
    measured_products,
    measured_steps,
)
from benchmarks.precision_training import Counts
from lightning_efficient.precision import formats, kinds, tiles

TINY = Size(32, 1, 1, 32, 1)
SHORT = Plan(pre_learning=10, begin=15, end=20, steps=24)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Time that passes when it is told to, for the process as for all."""
    now = [0.0]
    monkeypatch.setattr(time, "process_time", lambda: now[0])
    monkeypatch.setattr(time, "perf_counter", lambda: 2 * now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    return passes


def test_two_arms_run_one_behind_the_other_each_first_by_turns(clock: Callable[[float], None]) -> None:
    order = ""

    def run(name: str, seconds: float) -> None:
        nonlocal order
        order += name
        clock(seconds)

    found = beside(lambda: run("a", 3.0), lambda: run("b", 2.0), rounds=3, each=2)
    assert found.cpu == found.wall == [1.5] * 3
    assert order == "bbaa" + "aabb" + "bbaa"


def test_a_part_within_another_counts_for_itself_only(clock: Callable[[float], None]) -> None:
    watch = Watch()

    def product(seconds: float) -> str:
        clock(seconds)
        return "done"

    with watch.part("step"):
        clock(1.0)
        with watch.part("engine"):
            clock(2.0)
            assert watch.around(product, "product")(4.0) == "done"
            clock(8.0)
        clock(16.0)
    assert watch.seconds == {"step": 17.0, "engine": 10.0, "product": 4.0}


def test_all_arms_step_and_all_parts_are_seen() -> None:
    tables, found = measured_steps(TINY, 1)
    assert list(found["ratios"]) == [f"{one} / {other}" for one, other, _ in PAIRS]
    assert list(found["parts"]) == list(ARMS)
    for arm, parts in found["parts"].items():
        expected = {"all else", "optimizer", *(part for _, _, part in PARTS)}
        if not arm.startswith("int8"):
            expected = {"all else", "optimizer", "clipping"}
        elif arm.endswith("unprotected"):
            expected.remove("signs")
        if tiles._library() is not None:  # they convert sums where they make them
            expected.discard("results from int32")
        assert set(parts) == expected, arm
    assert len(tables[0].rows) == len(PAIRS)
    assert [row[0] for row in tables[1].rows][-1] == "whole step"
    products, kernels = measured_products(TINY, 1)
    assert len(products.rows) == 10
    assert kernels["all"]["int8"] > 0
    assert limit(found["parts"], kernels) != 1


def test_the_limit_has_only_products_faster() -> None:
    parts = {FP32: {"all else": 1.5, "optimizer": 0.5}}
    assert limit(parts, {"all": {"fp32": 1.6, "int8": 0.4}}) == pytest.approx(0.4)


def test_shares_are_of_what_was_tried() -> None:
    found = Counts(low=9, high=3, retries=1).since(Counts(low=0, high=2, retries=0))
    assert found == {"low": 9, "high": 1, "retries": 1}
    assert found.low_share == 0.9
    assert found.retry_share == 0.1
    empty = Counts(low=0, high=0, retries=0)
    assert empty.low_share == empty.retry_share == 0


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_nothing_to_fp32_and_leaves_nothing_behind(name: str) -> None:
    before = formats.SharedExponent.encode, kinds.MatMul.in_integers
    model, images = DigitsMlp(), torch.rand(6, 1, 8, 8)
    with torch.no_grad():
        model.layers[3].weight[:, 0] = 0  # type: ignore[index]
    exact = model(images)
    with FAULTS[name](model, 50):
        torch.testing.assert_close(model(images), exact, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(images), exact)
    assert (formats.SharedExponent.encode, kinds.MatMul.in_integers) == before


@pytest.mark.parametrize("name", [name for name in FAULTS if name not in HARMLESS and name != "drifting range"])
def test_a_fault_is_seen_and_computed_again(name: str) -> None:
    pytest.importorskip("sklearn")
    outcome = run_with_fault(FAULTS[name], "protected", 0, SHORT)
    assert outcome.low[0] == 1
    assert outcome.low[1] < 1
    assert outcome.retries > 0


def test_without_protection_nothing_is_computed_again() -> None:
    pytest.importorskip("sklearn")
    spoilt = FAULTS["corrupted result, forward only"]
    outcome = run_with_fault(spoilt, "unprotected", 0, SHORT)
    assert outcome.low[:2] == (1, 1)
    assert outcome.loss == math.inf, "the weights are not finite any more"
    exact = run_with_fault(spoilt, "fp32", 0, SHORT)
    assert math.isfinite(exact.loss)
    assert ratios({"protected": [Outcome(3.0)], "fp32": [exact]}, "protected") == [3.0 / exact.loss]


def test_healthy_runs_are_counted_from_the_end_of_pre_learning() -> None:
    pytest.importorskip("sklearn")
    loss, counts = trained("MLP on digits", HEALTHY_ARMS[CLAIMED[0]], 0, 8)
    assert counts == {"low": 6 * 8, "high": 0, "retries": 0}, "the input of the first layer needs no gradient"
    assert loss < 2.5
    assert trained("MLP on digits", None, 0, 8)[1] is None


def options(device: str = "cpu") -> Options:
    return Options(quick=True, device=device, seeds=(0,), threads=1, out=None)  # type: ignore[arg-type]


def test_the_last_line_begins_with_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table("a table", (), ())
    ratios_of = {f"{one} / {other}": {"cpu": [0.5, 0.75, 1.0]} for one, other, _ in PAIRS}
    ratios_of[f"{OURS_IN_FP32} / {FP32}"] = {"cpu": [0.3]}
    ratios_of[f"{OURS_IN_BF16} / {OURS_IN_BF16}, unprotected"] = {"cpu": [1.0, 1.02]}
    guarded = {OURS_IN_FP32: {"all else": 1.0, "signs": 0.02}, OURS_IN_BF16: {"all else": 2.0, "signs": 0.02}}
    steps = {"ratios": ratios_of, "parts": {FP32: {"all else": 2.0}, **guarded}}
    kernels = {"all": {"fp32": 1.0, "bf16": 0.5, "int8": 0.25, "torch": 0.3}}
    health = {"a task": dict.fromkeys(CLAIMED, Healthy([1.0], [0.95], [0.01])) | {"fp32": Healthy([1.0])}}
    runs = {"fp32": [Outcome(1.0)], "unprotected": [Outcome(12.0)], "protected": [Outcome(1.04, recovery=41)]}
    monkeypatch.setattr(precision, "measured_products", lambda *arguments: (table, kernels))
    monkeypatch.setattr(precision, "measured_steps", lambda *arguments: ([table], steps))
    monkeypatch.setattr(precision, "measured_health", lambda options: ([table], health))
    monkeypatch.setattr(precision, "measured_faults", lambda options: ([table], {"a fault": runs}))
    result = precision.run(options())
    assert result.last_line().startswith(
        "precision time_vs_bf16=0.75 time_vs_fp32=0.3 protection_overhead=0.01 healthy_low_share=0.95 "
        "fault_loss_ratio=1.04 "
    )
    assert result.figures["limit_vs_fp32"] == 0.625
    assert result.figures["fault_recovery_steps"] == 41
    assert result.figures["fault_loss_ratio_unprotected"] == 12


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        precision.run(options("cuda"))


def test_the_part_for_a_gpu_runs_and_skips_what_is_not_there() -> None:
    result = measure((TINY,), torch.device("cpu"))
    text = result.markdown()
    for name in (BASE, *GPU_ARMS):
        assert name in text
    assert "skipped: it needs a GPU" in text
    assert set(result.figures) == {
        "fp8_time_vs_bf16", "int8_time_vs_bf16", "protection_overhead", "time_vs_bf16_when_small",
    }  # fmt: skip
