"""What compressed activations save and cost, against none, recomputation, ``save_on_cpu`` and a plain quantizer.

Peak: bytes allocated above the step's start, counted by torch's profiler in a step of its own. Time: CPU time of the
process for forward and backward and all that the callback does, each arm beside a plain step in each round. Loss:
whole runs with the Trainer.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks.activation_codec import OURS, predictions, speeds
from benchmarks.activation_gpu import largest_batches
from benchmarks.activation_losses import BLANKET, CLAIMED, ISSUE, Difference, measured_losses
from benchmarks.activation_steps import GPU_SIZES, HEADLINE, QUICK, SIZES, measured_steps
from benchmarks.harness import Options, Result, Table

__all__ = ["run"]

GPU_LIMIT = 8 << 30  # bytes within which the largest batch is sought


def run(options: Options) -> Result:
    """All of it; about 40 minutes on one core."""
    torch.set_num_threads(options.threads)
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a CUDA device, and torch sees none.")
    tables: list[Table] = []
    raw: dict[str, Any] = {}
    for size in QUICK if options.quick else GPU_SIZES if on_gpu else SIZES:
        for mixed in (False, True):
            table, measured = measured_steps(size, options, mixed)
            tables.append(table)
            raw[table.title] = measured
    first = list(raw)[:2]
    headline, mixed_headline = (raw[title][HEADLINE] for title in first)
    prediction, sigma, bias, beyond = predictions(8 if options.quick else 64)
    numel = 1 << (16 if options.quick else 28 if on_gpu else 24)
    speed, rates = speeds(numel, 3 if options.quick else 15, options.device)
    largest: dict[str, int] = {}
    if on_gpu:
        size = (QUICK if options.quick else GPU_SIZES)[0]
        table, largest = largest_batches(size, options.device, GPU_LIMIT, 8 if options.quick else 4096)
        tables.append(table)
    loss_tables, losses = measured_losses(options)

    def gaps(*arms: str) -> list[float]:
        return [Difference.of(found[arm], found["none"]).gap for found in losses.values() for arm in arms]

    figures = {
        "peak_ratio": headline["peak_ratio"],
        "time_ratio": statistics.median(headline["time_ratios"]),
        "checkpointing_peak_ratio": raw[first[0]]["activation checkpointing"]["peak_ratio"],
        "checkpointing_time_ratio": statistics.median(raw[first[0]]["activation checkpointing"]["time_ratios"]),
        "bf16_peak_ratio": mixed_headline["peak_ratio"],
        "bf16_time_ratio": statistics.median(mixed_headline["time_ratios"]),
        "peak_over_bytes_say": headline["peak_bytes"] / headline["bytes_say"],
        "encode_over_copy": rates[f"{OURS}, fp32"]["encode_part"],
        "loss_gap": max(gaps(*CLAIMED)),
        "loss_gap_adaptive_8_to_2_bits": max(gaps(ISSUE)),
        "loss_gap_2_bits_everywhere": min(gaps(BLANKET)),
        "sigma_error": max(abs(value) for value in sigma.values()),
        "bias": max(bias.values()),
        "beyond_4_se": max(beyond.values()),
    }
    if largest:
        figures["largest_batch_ratio"] = largest[HEADLINE] / max(1, largest["none"])
    return Result(
        "activation",
        figures,
        [*tables, prediction, speed, *loss_tables],
        raw={
            "steps": raw,
            "losses": losses,
            "sigma": sigma,
            "bias": bias,
            "speeds": rates,
            "largest": largest,
        },
        notes=[
            "Four-layer GPT (byte-level), forward and backward; ours: with all that the callback does in a step of the "
            "Trainer. Peak: bytes allocated above those before the step, in a step of its own. Time: CPU time of the "
            "process (on a GPU: wall time), over that of a step without anything right before or after; median and "
            "range over the rounds.",
            "Kept, gradients and the widest operation: what is kept when forward is over, the gradients of all "
            "weights, and three times the largest tensor that an operation saves (it, the gradient that comes, the one "
            "that goes). The peak can be below, for not all of that is there at once.",
            "Error of the gradient: the norm of the difference from the exact one over its norm, one draw.",
            "Gap: difference from the run without compression of the same seed (same weights, batches and dropout), "
            "the mean over its standard error; loss_gap is the largest of all tasks and of the arms that shall not "
            "hurt, loss_gap_2_bits_everywhere the smallest of all tasks.",
            "Codec: wall time; bytes are those of the numbers, not of the codes.",
        ],
    )
