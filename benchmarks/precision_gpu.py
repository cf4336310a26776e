"""Training steps of a wide transformer on a GPU: few bits of ours against compiled bf16 and torchao's float8.

``python -m benchmarks precision --device cuda``. It has not been run on a GPU yet.
"""

from __future__ import annotations

import gc
import importlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from benchmarks.gpu_arms import Skipped
from benchmarks.harness import Result, Table, spread
from benchmarks.precision_steps import LEARNING, Size, beside
from benchmarks.precision_training import Training, rollback
from lightning_efficient.demos.model import ByteTransformer

__all__ = ["ARMS", "BASE", "GPU_SIZES", "measure", "run_on_gpu"]

GPU_SIZES = (Size(4096, 2, 4, 2048, 9), Size(512, 4, 4, 512, 15))
"""One where few bits shall save time, and one where they shall not cost any."""

Arm = Callable[[nn.Module, torch.device], tuple[nn.Module, Any]]
"""The model as it is trained, and the precision plugin."""


def _mixed(device: torch.device) -> Any:
    return MixedPrecision("bf16-mixed", device.type)


def _compiled(model: nn.Module, device: torch.device) -> nn.Module:
    """On a CPU, where only tests run this, as it is."""
    return torch.compile(model) if device.type == "cuda" else model  # type: ignore[return-value]


def bf16(model: nn.Module, device: torch.device) -> tuple[nn.Module, Any]:
    return _compiled(model, device), _mixed(device)


def torchao(recipe: str) -> Arm:
    """``torchao.float8``, as its documentation has it."""

    def build(model: nn.Module, device: torch.device) -> tuple[nn.Module, Any]:
        if device.type != "cuda":
            raise Skipped("it needs a GPU")
        try:
            float8 = importlib.import_module("torchao.float8")
        except ImportError as error:
            raise Skipped("not installed") from error
        config = float8.Float8LinearConfig.from_recipe_name(recipe)

        def takes_part(module: nn.Module, name: str) -> bool:  # its kernels want multiples of 16
            return isinstance(module, nn.Linear) and not (module.in_features % 16 or module.out_features % 16)

        float8.convert_to_float8_training(model, config=config, module_filter_fn=takes_part)
        return _compiled(model, device), _mixed(device)

    return build


def ours(low: str, *, protect: bool = True) -> Arm:
    def build(model: nn.Module, device: torch.device) -> tuple[nn.Module, Any]:
        precision = rollback(
            "bf16", low=low, protect=protect, only_if_faster=True, inner=_mixed(device), pre_learning_steps=LEARNING
        )
        return _compiled(model, device), precision

    return build


BASE = "bf16, compiled"
ARMS: dict[str, Arm] = {
    "torchao float8, tensorwise": torchao("tensorwise"),
    "torchao float8, rowwise": torchao("rowwise"),
    "ours, fp8": ours("fp8"),
    "ours, fp8, unprotected": ours("fp8", protect=False),
    "ours, int8": ours("int8"),
    "ours, int8, unprotected": ours("int8", protect=False),
}


def run_on_gpu() -> Result:
    """Both sizes; about ten minutes.

    Raises:
        SystemExit: If there is no GPU.
    """
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a CUDA device, and torch sees none.")
    return measure(GPU_SIZES, torch.device("cuda"))


def measure(sizes: Sequence[Size], device: torch.device) -> Result:
    """Each arm beside compiled bf16; the figures are those of the first size, and the worst of the others."""
    tables, raw = [], dict[str, dict[str, list[float]]]()
    for size in sizes:
        base, found, rows = _step(size, bf16, device), dict[str, list[float]](), []
        for name, arm in ARMS.items():
            try:
                found[name] = beside(_step(size, arm, device), base, size.rounds, 3).wall
                rows.append((name, spread(found[name])))
            except (Skipped, torch.OutOfMemoryError) as error:
                rows.append((name, f"skipped: {error}"))
            gc.collect()
            print(f"{size}  " + "  ".join(rows[-1]), flush=True)
        raw[str(size)] = found
        tables.append(Table(f"A training step: {size}", ("", f"time / {BASE}"), rows))

    def ratio(size: Size, name: str) -> float:
        return statistics.median(raw[str(size)][name])

    first, *small = sizes
    names = "ours, fp8", "ours, int8"
    figures = {
        "fp8_time_vs_bf16": ratio(first, names[0]),
        "int8_time_vs_bf16": ratio(first, names[1]),
        "protection_overhead": max(ratio(first, name) / ratio(first, f"{name}, unprotected") - 1 for name in names),
        "time_vs_bf16_when_small": max((ratio(size, name) for size in small for name in names), default=1.0),
    }
    notes = ["Time on the clock, each arm right before or behind compiled bf16; median and range."]
    return Result("precision", figures, tables, raw, notes)


def _step(size: Size, arm: Arm, device: torch.device) -> Callable[[], None]:
    torch.manual_seed(0)
    with device:
        heads = max(1, size.width // 128)
        model = ByteTransformer(layers=size.blocks, width=size.width, heads=heads, context=size.context)
        tokens, targets = torch.randint(0, 256, (2, size.sequences, size.context))
    trained, precision = arm(model, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    training = Training(trained, optimizer, precision, 1.0)

    def loss(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten())

    def step() -> None:
        training.step(loss)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(LEARNING + 2):
        step()
    return step
