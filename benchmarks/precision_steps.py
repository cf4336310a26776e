"""A whole training step in fp32, in bf16-mixed and in int8: how long it takes, and what of it is what.

This machine's speed changes by the second, so two arms are only compared where they ran one right behind the other,
each first by turns.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Table, spread
from benchmarks.precision_parts import parts_of
from benchmarks.precision_training import Training, plain, rollback
from lightning_efficient.demos import StdlibDataModule
from lightning_efficient.demos.model import ByteTransformer
from lightning_efficient.precision import integers

__all__ = [
    "ARMS", "BF16", "FP32", "OURS_IN_BF16", "OURS_IN_FP32", "PAIRS", "QUICK", "SIZE", "Size", "Steps", "Times",
    "beside", "limit", "measured_products", "measured_steps",
]  # fmt: skip

CLIP = 1.0
LEARNING = 10  # steps, the fewest that a plugin with "auto" learns in


@dataclass(frozen=True)
class Size:
    """A byte language model, a batch, and how often it is measured."""

    width: int
    blocks: int
    sequences: int
    context: int
    rounds: int

    def __str__(self) -> str:
        tokens = self.sequences * self.context
        return f"{self.blocks} blocks of width {self.width}, {tokens:,} tokens"


SIZE = Size(1024, 2, 4, 256, 7)
QUICK = Size(128, 1, 1, 128, 2)

FP32, BF16 = "fp32", "bf16-mixed"
OURS_IN_FP32, OURS_IN_BF16 = f"int8, {FP32} around it", f"int8, {BF16} around it"
_UNPROTECTED = ", unprotected"
ARMS: dict[str, Callable[[], Any]] = {
    FP32: lambda: plain("fp32"),
    BF16: lambda: plain("bf16"),
    OURS_IN_FP32: lambda: rollback("fp32", pre_learning_steps=LEARNING),
    OURS_IN_BF16: lambda: rollback("bf16", pre_learning_steps=LEARNING),
    OURS_IN_FP32 + _UNPROTECTED: lambda: rollback("fp32", pre_learning_steps=LEARNING, protect=False),
    OURS_IN_BF16 + _UNPROTECTED: lambda: rollback("bf16", pre_learning_steps=LEARNING, protect=False),
}


class Steps:
    """One arm: its model and optimizer, on the standard library's sources."""

    def __init__(self, size: Size, arm: str) -> None:
        torch.manual_seed(0)
        heads = max(1, size.width // 64)
        model = ByteTransformer(layers=size.blocks, width=size.width, heads=heads, context=size.context)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.training = Training(model, optimizer, ARMS[arm](), CLIP)
        data = StdlibDataModule(context=size.context, batch_size=size.sequences)
        data.setup("fit")
        self._batches = iter(data.train_dataloader())
        self._protected = not arm.endswith(_UNPROTECTED)
        for _ in range(
            (LEARNING if arm.startswith("int8") else 0) + 1
        ):  # one more, in which buffers and kernels are made
            self()

    def __call__(self) -> None:
        batch = next(self._batches)

        def loss(model: nn.Module) -> Tensor:
            logits = model(batch[:, :-1])
            return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

        with contextlib.nullcontext() if self._protected else _without_statistics():
            self.training.step(loss)


class _Unmeasured(integers._Quantizing):
    """Quantizing counts nothing: who looks for no signs has no use for that."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen = None


def _without_statistics() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(integers, "_Quantizing", _Unmeasured)


@dataclass
class Times:
    """Of two arms that ran one right behind the other.

    Attributes:
        cpu: Ratios of the process's CPU time, one for each round.
        wall: Of the time on the clock.
    """

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Of CPU time, the median."""
        return statistics.median(self.cpu)


def beside(one: Callable[[], object], other: Callable[[], object], rounds: int, each: int = 1) -> Times:
    """How much longer ``one`` takes than ``other``, ``each`` of them so many times in a round."""
    found = Times()
    for number in range(rounds):
        seconds: dict[int, tuple[float, float]] = {}
        for which in (0, 1) if number % 2 else (1, 0):
            begin = time.process_time(), time.perf_counter()
            for _ in range(each):
                (one, other)[which]()
            seconds[which] = time.process_time() - begin[0], time.perf_counter() - begin[1]
        found.cpu.append(seconds[0][0] / seconds[1][0])
        found.wall.append(seconds[0][1] / seconds[1][1])
    return found


PAIRS: tuple[tuple[str, str, int], ...] = (
    (BF16, FP32, 1),
    *(
        (ours, other, times)
        for ours in (OURS_IN_FP32, OURS_IN_BF16)
        for other, times in ((FP32, 1), (BF16, 1), (ours + _UNPROTECTED, 9))
    ),
)
"""Arms that are compared, and how many times as many rounds it takes."""


def measured_steps(size: Size, threads: int) -> tuple[list[Table], dict[str, dict[str, Any]]]:
    """Tables of ratios and of parts, and all that was measured."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _measured_steps(size, threads)
    finally:
        torch.set_num_threads(before)


def _measured_steps(size: Size, threads: int) -> tuple[list[Table], dict[str, dict[str, Any]]]:
    steps = {arm: Steps(size, arm) for arm in ARMS}
    rows, ratios = [], dict[str, Any]()
    for one, other, times in PAIRS:
        found = beside(steps[one], steps[other], times * size.rounds)
        ratios[f"{one} / {other}"] = {"cpu": found.cpu, "wall": found.wall}
        rows.append((one, other, spread(found.cpu), spread(found.wall)))
        print(f"{size}  {threads} thread(s)  " + "  ".join(rows[-1]), flush=True)
    where = f"{size}, {threads} thread{'s' if threads > 1 else ''}"
    header = "", "beside", "CPU time", "time on the clock"
    tables = [Table(f"A training step: {where}", header, rows)]
    parts = {arm: parts_of(steps[arm], steps[arm].training.optimizer, size.rounds) for arm in ARMS}
    names = list(dict.fromkeys(name for found in parts.values() for name in found))
    lines = [
        (name, *(f"{found[name] * 1e3:.1f}" if name in found else "-" for found in parts.values())) for name in names
    ]
    lines.append(("whole step", *(f"{sum(found.values()) * 1e3:.1f}" for found in parts.values())))
    note = "Medians; columns are not of the same moment, so compare within one."
    tables.append(Table(f"What a step is made of, CPU time in ms: {where}", ("", *parts), lines, note))
    return tables, {"ratios": ratios, "parts": parts}


def measured_products(size: Size, threads: int) -> tuple[Table, dict[str, Any]]:
    """The products of a step alone: below that no step can be. Those in int8 are ours and torch's, to the bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    width, tokens = size.width, size.sequences * size.context
    rows, found = [], dict[str, Any]()
    try:
        for inside, outside, count in ((width, width, 4), (width, 4 * width, 1), (4 * width, width, 1)):
            for role in ("forward", "grad-input", "grad-weight"):
                floats = [torch.randn(*shape) for shape in ((tokens, inside), (outside, inside), (tokens, outside))]
                codes = [(one * 40).clamp(-127, 127).char() for one in floats]
                run = {
                    "fp32": _product(role, floats, torch.mm),
                    "bf16": _product(role, [one.bfloat16() for one in floats], torch.mm),
                    "int8": _product(role, codes, functools.partial(integers.multiply, exponent=0)),
                    "torch": _product(role, codes, torch._int_mm),
                }
                for once in run.values():
                    once()  # kernels are made
                times = {kind: beside(run[kind], run["fp32"], size.rounds, 2) for kind in run if kind != "fp32"}
                seconds = _seconds(run["fp32"], size.rounds)
                name = f"{inside} to {outside}, {role}"
                found[name] = {
                    "fp32_seconds": seconds, "in_a_step": count * size.blocks,
                    **{kind: times[kind].ratio for kind in times},
                }  # fmt: skip
                work = 2 * tokens * inside * outside
                rate = f"{work / seconds / 1e9:.0f}"
                rows.append((name, rate, *(spread(times[kind].cpu) for kind in times)))
    finally:
        torch.set_num_threads(before)
    total = {
        kind: sum(one["fp32_seconds"] * one["in_a_step"] * one.get(kind, 1) for one in found.values()) for kind in run
    }
    found["all"] = total
    rows.append(("all of a step", "", *(f"{total[kind] / total['fp32']:.3f}" for kind in times)))
    header = "", "fp32 (GFLOP/s of CPU time)", "bf16 / fp32", "int8 / fp32", "torch's int8 / fp32"
    note = "Ours with the sums converted to float32; torch's without."
    title = f"Products alone: {size}, {threads} thread{'s' if threads > 1 else ''}"
    return Table(title, header, rows, note), found


def _product(role: str, tensors: list[Tensor], multiply: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
    x, weight, gradient = tensors
    pairs = {
        "forward": (x, weight.t()), "grad-input": (gradient, weight), "grad-weight": (gradient.t(), x)
    }  # fmt: skip
    one, other = pairs[role]
    return lambda: multiply(one, other)


def _seconds(run: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        begin = time.process_time()
        run()
        times.append(time.process_time() - begin)
    return statistics.median(times)


def limit(parts: Mapping[str, Mapping[str, float]], products: Mapping[str, Any]) -> float:
    """A step in which nothing but the products became faster, as int8's kernels are, over that of fp32."""
    whole = sum(parts[FP32].values())
    return 1 - (products["all"]["fp32"] - products["all"]["int8"]) / whole
