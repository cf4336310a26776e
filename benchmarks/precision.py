"""What guarded training in few bits saves and costs, against fp32 and bf16-mixed, in health and under faults.

Time: CPU time of the process for whole training steps, each arm beside the other that it is compared with. Loss: whole
runs.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.activation_losses import Difference
from benchmarks.harness import Options, Result, Table
from benchmarks.precision_faults import HARMLESS, Outcome, measured_faults, ratios
from benchmarks.precision_gpu import run_on_gpu
from benchmarks.precision_losses import CLAIMED, Healthy, measured_health
from benchmarks.precision_steps import (
    BF16,
    FP32,
    OURS_IN_BF16,
    OURS_IN_FP32,
    QUICK,
    SIZE,
    limit,
    measured_products,
    measured_steps,
)

__all__ = ["run"]

THREADS = (1, 2)
HEADLINES = ("time_vs_bf16", "time_vs_fp32", "protection_overhead", "healthy_low_share", "fault_loss_ratio")


def run(options: Options) -> Result:
    """All of it; about half an hour on two cores."""
    if options.device == "cuda":
        return run_on_gpu()
    torch.set_num_threads(options.threads)  # of what is not timed
    tables: list[Table] = []
    raw: dict[str, Any] = {}
    figures: dict[str, float | str] = {}
    size = QUICK if options.quick else SIZE
    for threads in THREADS:
        products, kernels = measured_products(size, threads)
        found, steps = measured_steps(size, threads)
        tables += [products, *found]
        raw[f"{threads} threads"] = {"products": kernels, **steps}
        figures |= {
            f"{name}_{threads}_threads" if threads > 1 else name: value
            for name, value in _speed(steps, kernels).items()
        }
    health_tables, health = measured_health(options)
    fault_tables, faults = measured_faults(options)
    raw["health"] = {task: {arm: dataclasses.asdict(one) for arm, one in arms.items()} for task, arms in health.items()}
    raw["faults"] = {
        fault: {arm: [dataclasses.asdict(one) for one in runs] for arm, runs in arms.items()}
        for fault, arms in faults.items()
    }
    figures |= _health(health) | _faults(faults)
    first = {name: figures[name] for name in HEADLINES if name in figures}
    return Result(
        "precision",
        first | figures,
        [*tables, *health_tables, *fault_tables],
        raw=raw,
        notes=[
            "GPT (byte-level) on the standard library's sources, AdamW (fused), clipped to a norm of 1: the whole "
            "step, with all that the plugin does in it. time_vs_fp32 is that of int8 with fp32 around it, "
            "time_vs_bf16 that of int8 with bf16-mixed around it: each against what it takes the place of. CPU time "
            "of the process, the two arms one right behind the other; median and range over the rounds.",
            "limit_vs_fp32: the step of fp32, were only its products as fast as those of int8 are here, and all else "
            "as before and nothing for quantizing: what this processor has to give. torch_int8_vs_fp32: products "
            "alone, by torch's kernel.",
            "protection_overhead: against the same plugin that looks for no sign, whole steps side by side, whose "
            "noise is larger than it. protection_by_part: the time within a step that goes into looking at "
            "results; what is looked at while a tensor is quantized (one of 17 runs of its numbers), and kept then to "
            "compute some results again (16 of its columns), is not in it.",
            "In few bits, computed again: of all operations of main learning, and of those tried in few bits. Gap: "
            "difference from the run in fp32 of the same seed, the mean over its standard error.",
            "fault_loss_ratio: the largest of all faults, over that of fp32, the median over the seeds; "
            "fault_loss_ratio_unprotected: the smallest of those faults that few bits do not stand.",
        ],
    )


def _speed(steps: Mapping[str, Any], kernels: Mapping[str, Any]) -> dict[str, float | str]:
    def ratio(one: str, other: str) -> float:
        return statistics.median(steps["ratios"][f"{one} / {other}"]["cpu"])

    return {
        "time_vs_bf16": ratio(OURS_IN_BF16, BF16),
        "time_vs_fp32": ratio(OURS_IN_FP32, FP32),
        "protection_overhead": max(ratio(one, f"{one}, unprotected") - 1 for one in (OURS_IN_FP32, OURS_IN_BF16)),
        "protection_by_part": max(_signs(steps["parts"][one]) for one in (OURS_IN_FP32, OURS_IN_BF16)),
        "limit_vs_fp32": limit(steps["parts"], kernels),
        "products_vs_fp32": kernels["all"]["int8"] / kernels["all"]["fp32"],
        "bf16_products_vs_fp32": kernels["all"]["bf16"] / kernels["all"]["fp32"],
        "torch_int8_vs_fp32": kernels["all"]["torch"] / kernels["all"]["fp32"],
    }


def _signs(parts: Mapping[str, float]) -> float:
    """Time for signs of failure, over that of the rest of the step."""
    return parts["signs"] / (sum(parts.values()) - parts["signs"])


def _health(found: Mapping[str, Mapping[str, Healthy]]) -> dict[str, float | str]:
    claimed = [arms[name] for arms in found.values() for name in CLAIMED]
    gaps = [Difference.of(arms[name].losses, arms["fp32"].losses).gap for arms in found.values() for name in CLAIMED]
    return {
        "healthy_low_share": min(min(one.low) for one in claimed),
        "healthy_retries": max(max(one.retries) for one in claimed),
        "healthy_loss_gap": max(gaps),
    }


def _faults(found: Mapping[str, dict[str, list[Outcome]]]) -> dict[str, float | str]:
    if not found:
        return {}
    recoveries = [one.recovery for arms in found.values() for one in arms["protected"]]
    return {
        "fault_loss_ratio": max(statistics.median(ratios(arms, "protected")) for arms in found.values()),
        "fault_loss_ratio_unprotected": min(
            statistics.median(ratios(arms, "unprotected")) for name, arms in found.items() if name not in HARMLESS
        ),
        "fault_recovery_steps": "not all" if None in recoveries else max(one for one in recoveries if one is not None),
    }
