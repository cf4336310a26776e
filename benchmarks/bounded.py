"""Offloading in processes of its own: within a bound of memory, and killed with -9 at random moments.

The bound is the budget that ``OffloadStrategy`` is given and 64 MiB. Held against it is all resident memory of the
process, anonymous and of files, above its base: what it has with Python, torch, Lightning and this package imported and
its data made, right before it makes a Trainer and a model.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import resource
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from benchmarks.harness import Table
from lightning_efficient import AsyncCheckpointIO, OffloadStrategy
from lightning_efficient.core.memory_meter import MemoryMeter
from lightning_efficient.demos import ByteLanguageModel, StdlibDataModule
from lightning_efficient.offload.tiers.spill_header import verify

__all__ = ["Bounds", "Kills", "kills", "trains_in_bounds"]

_ALLOWANCE = 64 << 20  # beside the budget: what torch, Lightning and a batch need
_STACKS = 96 << 20  # of threads, which count as allocated though next to nothing of them is used


class _Wide(pl.LightningModule):
    """Linear layers, and so next to no activations."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layers(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-5, fused=True)


class _Within(pl.Callback):
    """From the start of training on the process gets no more memory than ``allowed``, where that is said.

    Args:
        allowed: Bytes that ``RLIMIT_DATA`` counts.
        meter: Of resident memory.
    """

    def __init__(self, allowed: int | None, meter: MemoryMeter) -> None:
        self.allowed, self.meter = allowed, meter
        self.losses: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.allowed is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (self.allowed,) * 2)

    def on_train_batch_start(self, *_: Any) -> None:
        if not self.losses:
            self.meter.start()  # until then the model was made

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


@dataclass(frozen=True)
class _Arm:
    """A run within bounds.

    Attributes:
        kinds: What is on the disk; empty: nothing is offloaded.
        budget: For all that the strategy has in memory, in bytes.
        limited: Whether the system gives no more than the bound.
    """

    kinds: tuple[str, ...]
    budget: int
    limited: bool = True

    @property
    def bound(self) -> int:
        return self.budget + _ALLOWANCE


def _memory() -> dict[str, int]:
    """Of this process: resident bytes, and those that ``RLIMIT_DATA`` counts."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {name: int(fields[key].split()[0]) * 1024 for name, key in (("resident", "VmRSS"), ("data", "VmData"))}


def _bounded_run(folder: Path, arm: _Arm, width: int, layers: int, steps: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(16 * steps, width))
    base, meter = _memory(), MemoryMeter()
    meter.start()
    strategy: Any = OffloadStrategy(
        memory_budget={"host": arm.budget}, offload_dir=folder, place=dict.fromkeys(arm.kinds, "disk")
    )
    within = _Within(base["data"] + arm.bound + _STACKS if arm.limited else None, meter)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=strategy if arm.kinds else "auto", max_epochs=1, callbacks=[within],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    found: dict[str, Any] = {}
    try:
        trainer.fit(_Wide(width, layers), torch.utils.data.DataLoader(data, batch_size=16))
    except (RuntimeError, MemoryError) as error:
        found["error"] = str(error).splitlines()[0][:120]
    found |= {"losses": within.losses, "grown": meter.peak_bytes() - base["resident"]}
    (folder / "found.json").write_text(json.dumps(found))


@dataclass(frozen=True)
class Bounds:
    """Whether training kept to its bound of memory.

    Attributes:
        held: Whether it did, where AdamW alone got no memory.
        table: For a person.
    """

    held: bool
    table: Table


def trains_in_bounds(folder: Path, *, quick: bool) -> Bounds:
    """Train a model whose AdamW state does not fit into a budget, with and without offloading.

    Args:
        folder: For the disk tier and results.
        quick: A smaller model, and fewer steps.
    """
    folder.mkdir(parents=True)
    width, layers, steps = (1024, 48, 3) if quick else (2048, 16, 20)
    largest = 4 * width * width
    parameters = largest * layers
    state = 2 * largest
    needed = parameters + largest + 2 * state  # the gradient of one, which is updated at once, and two records
    everything = ("optimizer_state", "gradient", "parameter")
    arms = {
        "AdamW in memory": _Arm((), needed),
        "state on a disk": _Arm(("optimizer_state",), needed),
        "state, gradients, parameters on a disk": _Arm(everything, 6 * largest, limited=False),
    }
    rows, found = [], {}
    for number, (name, arm) in enumerate(arms.items()):
        place = folder / str(number)
        place.mkdir()
        arguments = (place, arm, width, layers, steps)
        process = multiprocessing.get_context("spawn").Process(target=_bounded_run, args=arguments)
        process.start()
        process.join()
        found[name] = json.loads((place / "found.json").read_text())
        outcome = found[name].get("error", f"trained {len(found[name]['losses'])} steps")
        sizes = (f"{nbytes / 2**20:.0f}" for nbytes in (arm.budget, arm.bound, found[name]["grown"]))
        rows.append((name, *sizes, outcome))
        print("bounds  " + "  ".join(rows[-1]), flush=True)

    def kept(name: str) -> bool:
        return "error" not in found[name] and found[name]["grown"] <= arms[name].bound

    held = "error" in found["AdamW in memory"] and kept("state on a disk")
    held &= kept("state, gradients, parameters on a disk")
    title = f"{parameters / 2**20:.0f} MiB of parameters within a bound"
    header = ("", "budget (MiB)", "bound (MiB)", "resident memory grew at most by (MiB)", "outcome")
    note = (
        "The budget holds all parameters, the gradient of the largest, and the optimizer state of two on its way; or, "
        "where everything is on the disk, what six of the parameters take. The bound is that and "
        f"{_ALLOWANCE >> 20} MiB. Held against it is all resident memory, anonymous and of files, above what the "
        "process has when everything is imported and the data are made, from the first step on (before it the model "
        "is made in memory). In the first two rows the system gives no more anonymous memory either (RLIMIT_DATA), "
        "from the start of training on. Nothing is said to the C library in the environment."
    )
    return Bounds(held, Table(title, header, rows, note))


# -- kills -------------------------------------------------------------------------------------------------------------


def _killed_run(folder: Path, steps: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ByteLanguageModel(layers=10, width=64, heads=4, context=32, learning_rate=1e-3, warmup_steps=4)
    data = StdlibDataModule(context=32, batch_size=4, train_bytes=33 * 4 * 4096, validation_bytes=33 * 8)
    saves = ModelCheckpoint(dirpath=folder / "checkpoints", every_n_train_steps=5, save_top_k=1, save_last="link")
    last = folder / "checkpoints" / "last.ckpt"
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, limit_val_batches=0, logger=False,
        strategy=OffloadStrategy(offload_dir=folder / "swap", place={"optimizer_state": "disk"}, staging="1MiB"),
        callbacks=[AsyncCheckpointIO(resume="auto"), saves],
        default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, data, ckpt_path=last if last.exists() else None)
    torch.save(
        {"weights": model.state_dict(), "optimizer": trainer.optimizers[0].state_dict()["state"]}, folder / "end.pt"
    )


@dataclass(frozen=True)
class Kills:
    """What a series of kills came to.

    Attributes:
        number: Runs that were killed.
        survived: Kills after which all was well.
        table: For a person.
    """

    number: int
    survived: int
    table: Table


def kills(folder: Path, *, number: int) -> Kills:
    """Kill a run with -9 at ``number`` random moments, go on from its checkpoint each time, and compare the end.

    Args:
        folder: For everything.
        number: Of kills.
    """
    steps = 30 * number  # more than the killed runs come to
    chance = random.Random(0)
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["benchmarks.bounded"])
    whole, killed = folder / "whole", folder / "killed"
    for place in (whole, killed):
        place.mkdir(parents=True)
    process = fork.Process(target=_killed_run, args=(whole, steps))
    process.start()
    process.join()
    survived, chunks = 0, 0
    problems: list[str] = []
    for kill in range(number):
        process = fork.Process(target=_killed_run, args=(killed, steps))
        process.start()
        before = len(problems)
        deadline = time.monotonic() + 60
        old = {path.name for path in _spilled(killed)}
        while not {path.name for path in _spilled(killed)} - old:  # it has begun to train
            if not process.is_alive() or time.monotonic() > deadline:
                problems.append(f"kill {kill}: the run had not begun to train")
                break
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 1.5))
        process.kill()
        process.join()
        for path in _spilled(killed):
            report = verify(path)
            chunks += len(report.accepted)
            if report.torn:
                problems.append(f"kill {kill}: {len(report.torn)} of {len(report.accepted)} accepted records are torn")
        survived += len(problems) == before
    process = fork.Process(target=_killed_run, args=(killed, steps))
    process.start()
    process.join()
    if left := _spilled(killed):
        problems.append(f"{len(left)} files stayed")
    ends = [torch.load(place / "end.pt") for place in (whole, killed)]
    same = all(torch.equal(ends[0]["weights"][name], value) for name, value in ends[1]["weights"].items())
    same &= all(
        torch.equal(ends[0]["optimizer"][p][key], value)
        for p, state in ends[1]["optimizer"].items()
        for key, value in state.items()
    )
    if not same:
        problems.append("the end is not that of the run that was not killed")
        survived = 0
    row = (f"{survived} of {number}", f"{chunks}", "yes" if same else "no", "; ".join(problems[:3]) or "none")
    header = ("kills survived", "accepted records looked at", "end bit-equal to the uninterrupted run", "problems")
    return Kills(number, survived, Table("Killed with -9 at random moments", header, [row]))


def _spilled(folder: Path) -> list[Path]:
    return [path for path in (folder / "swap").glob(".*") if path.is_file()]
