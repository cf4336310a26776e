"""A byte language model that trains for a few steps, in a process of its own: what memory and time that takes."""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["ARMS", "CONTEXT", "SUITE", "TOKENS", "Like", "Trial", "tried"]

Like = Literal["fp32", "bf16"] | None
CONTEXT, TOKENS = 128, 1024
SUITE = "the suite"
ARMS = ("plain, fp32", "plain, bf16-mixed, activation checkpointing", SUITE)
_SAVED = {8: 20, 4: 12}  # bytes of what backward needs, for each token and channel of a block, by bits
_BESIDE = 100 << 20  # what else a run takes: temporary tensors, the Trainer, what the C library keeps
_MAKING = 8 << 20  # beside all parameters, while they are made and go to their places
_LEAST = 32 << 20
_FUSE = 512 << 20  # beyond the limit, where a run that will not fit ends before it troubles others


@dataclass(frozen=True)
class Trial:
    """What became of a run.

    Attributes:
        peak: Bytes, of the whole process from its start on, or of the device.
        wall: Seconds of each step.
        cpu: Seconds of the process, likewise.
        error: What it ended with, if it did not train.
    """

    peak: int
    wall: list[float]
    cpu: list[float]
    error: str | None = None


def tried(
    arm: str,
    width: int,
    layers: int,
    *,
    limit: int,
    steps: int,
    learning: int = 1,
    device: str = "cpu",
    threads: int = 1,
    like: Like = None,
) -> Trial:
    """Train in a new process.

    Args:
        arm: One of :data:`ARMS`.
        width: Of the model.
        layers: Of the model.
        limit: Bytes that it may have, by which the suite chooses its budget.
        steps: How many.
        learning: Of these, in which low bits learn.
        device: ``cpu`` or ``cuda``.
        threads: Of torch.
        like: The suite trains the module of the plain arm that has this precision (with its activation checkpointing,
            where it has that), in that precision, with optimizer state on a disk and the rest in memory; None: within
            a budget.
    """
    asked = {
        "arm": arm, "width": width, "layers": layers, "limit": limit, "steps": steps, "device": device,
        "threads": threads, "learning": learning, "like": like,
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.together_trial", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return Trial(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        return Trial(0, [], [], f"the process ended with {done.returncode}: {last[:100]}")


def _status(key: str) -> int:
    """Of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _run(asked: Mapping[str, Any]) -> Trial:
    import lightning.pytorch as pl
    import torch
    from torch.utils.checkpoint import checkpoint

    from lightning_efficient.demos import ByteLanguageModel, StdlibDataModule

    class Timed(pl.Callback):
        """Times each batch, from its start to the next one's."""

        def __init__(self) -> None:
            self.marks: list[tuple[float, float]] = []

        def on_train_batch_start(self, *_: Any) -> None:
            self._mark()

        def on_train_end(self, *_: Any) -> None:
            self._mark()

        def _mark(self) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            self.marks.append((time.perf_counter(), time.process_time()))

    device, limit, steps = asked["device"], asked["limit"], asked["steps"]
    torch.set_num_threads(asked["threads"])
    pl.seed_everything(0, verbose=False)
    size = {key: asked[key] for key in ("width", "layers")}
    data = StdlibDataModule(context=CONTEXT, batch_size=TOKENS // CONTEXT, train_bytes=(CONTEXT + 1) * 8 * (steps + 1))
    data.setup("fit")
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
        held = 0
    else:
        held = _status("VmRSS")
        resource.setrlimit(resource.RLIMIT_DATA, (_status("VmData") + limit - held + _FUSE,) * 2)
    timed, error = Timed(), None
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        try:
            model = ByteLanguageModel(heads=max(1, size["width"] // 64), context=CONTEXT, **size)
            if asked["arm"] == ARMS[1] or asked["like"] == "bf16":
                for block in model.model.blocks:
                    whole = block.forward
                    block.forward = lambda x, whole=whole: checkpoint(whole, x, use_reentrant=False)
            pl.Trainer(
                accelerator="gpu" if device == "cuda" else "cpu", devices=1, max_steps=steps, limit_val_batches=0,
                gradient_clip_val=1.0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False, default_root_dir=folder,
                **_arguments(asked, limit - held, device, callbacks=[timed], **size),
            ).fit(model, data)  # fmt: skip
        except (RuntimeError, MemoryError, ValueError, OSError) as caught:
            error = str(caught).splitlines()[0][:200] or type(caught).__name__
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")
    times = [
        tuple(b - a for a, b in zip(*pair, strict=True)) for pair in zip(timed.marks, timed.marks[1:], strict=False)
    ]
    return Trial(peak, [wall for wall, _ in times], [cpu for _, cpu in times], error)


def _arguments(
    asked: Mapping[str, Any], room: int, device: str, *, width: int, layers: int, callbacks: list[Any]
) -> dict[str, Any]:
    """Of the Trainer.

    Args:
        asked: Of :func:`tried`.
        room: Bytes that are left for the run.
        device: ``cpu`` or ``cuda``.
        width: Of the model.
        layers: Of the model.
        callbacks: Beside those of the arm.
    """
    if asked["arm"] != SUITE:
        return {"precision": "32-true" if asked["arm"] == ARMS[0] else "bf16-mixed", "callbacks": callbacks}
    from lightning_efficient import ActivationCompressionPlugin, OffloadStrategy, RollbackPrecision

    if asked["like"]:  # without a budget, for which freed memory goes back to the system, and that takes time
        bits, high = 4, asked["like"]
        offload: dict[str, Any] = {"place": {"optimizer_state": "disk"}, "staging": "32MiB"}
    else:
        bits, offload = _within(room, device, width, layers)
        high = "fp32" if device == "cpu" else "bf16"
    return {
        "strategy": OffloadStrategy(**offload),
        "plugins": [RollbackPrecision(low="int8", high=high, pre_learning_steps=asked["learning"])],
        "callbacks": [ActivationCompressionPlugin(bits=bits), *callbacks],
    }


def _within(room: int, device: str, width: int, layers: int) -> tuple[int, dict[str, Any]]:
    """Bits of activations, and arguments of the strategy, that leave the run ``room``."""
    parameters, units = 4 * layers * (12 * width**2 + 13 * width), TOKENS * width * layers
    bits = 8 if 4 * parameters + _SAVED[8] * units + _BESIDE <= room else 4
    budget = max(min(room - _SAVED[bits] * units - _BESIDE, room - parameters - _MAKING), _LEAST)
    return bits, {"memory_budget": {"host" if device == "cpu" else "device": budget}}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(dataclasses.asdict(_run(json.loads(sys.argv[1])))))
