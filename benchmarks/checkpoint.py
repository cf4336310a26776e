"""What checkpoints cost a run, against none, Lightning's two ways, and torch's DCP; and whether they survive.

The arms of a round run one after the other in one process, in another order in each round; every figure is a ratio to,
or stands beside, the run without checkpoints of the same round.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO as LightningAsync
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from benchmarks.harness import Options, Result, Table, spread
from lightning_efficient import AsyncCheckpointIO
from lightning_efficient.checkpointing.archive import StorageLayout
from lightning_efficient.checkpointing.barrier import UpdateBarrier, owned_tensors
from lightning_efficient.checkpointing.skeleton import take_skeleton
from lightning_efficient.checkpointing.snapshot import Snapshot
from lightning_efficient.core.buffers import HostBuffer
from lightning_efficient.demos import ByteLanguageModel, StdlibDataModule

__all__ = ["run"]


class DistributedCheckpoint(pl.Callback, CheckpointIO):
    """torch's ``async_save``, the last one awaited before the next, as its recipe does."""

    def __init__(self, kept_stager: bool) -> None:
        self._stager = DefaultStager(StagingOptions(False, False, True, False)) if kept_stager else None
        self._last: Any = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self._wait()
        self._last = dcp.async_save(checkpoint, checkpoint_id=str(path), no_dist=True, async_stager=self._stager)

    def on_before_optimizer_step(self, *_: Any) -> None:
        if self._stager is not None and self._last is not None:
            self._last.staging_completion.result()

    def _wait(self) -> None:
        if self._last is not None:
            done: Future[Any] = getattr(self._last, "upload_completion", self._last)
            done.result()
            self._last = None

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        raise NotImplementedError("The benchmark only saves.")

    def remove_checkpoint(self, path: Any) -> None:
        self._wait()
        shutil.rmtree(path, ignore_errors=True)

    def teardown(self, *_: Any, **__: Any) -> None:
        self._wait()
        if self._stager is not None:
            self._stager.close()
            self._stager = None


class Pageable(AsyncCheckpointIO):
    """Ours without pinned memory."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self.engine.pool.may_pin = False


@dataclass(frozen=True)
class Arm:
    """One way to checkpoint: what goes into the Trainer's callbacks and plugins."""

    name: str
    build: Callable[[], tuple[list[Any], list[Any]]] | None  # None: no checkpoints


def _in_both(member: Any) -> tuple[list[Any], list[Any]]:
    return [member], [member]


ARMS = (
    Arm("none", None),
    Arm("Lightning, sync", lambda: ([], [TorchCheckpointIO()])),
    Arm("Lightning, async", lambda: ([], [LightningAsync()])),
    Arm("DCP, default stager", lambda: _in_both(DistributedCheckpoint(False))),
    Arm("DCP, kept stager", lambda: _in_both(DistributedCheckpoint(True))),
    Arm("ours", lambda: ([AsyncCheckpointIO(memory_cap=None)], [])),
    Arm("ours, to the host", lambda: ([AsyncCheckpointIO(memory_cap=None, staging="host")], [])),
    Arm("ours, pageable", lambda: ([Pageable(memory_cap=None, staging="host")], [])),
    Arm("ours, within the device", lambda: ([AsyncCheckpointIO(memory_cap=None, staging="device")], [])),
)
EVERYWHERE = 6
"""Arms from there on differ on a GPU only."""


@dataclass
class Cost:
    """What a run cost.

    Attributes:
        wall: Seconds from the first batch until everything is written.
        cpu: Likewise, of all threads.
        blocked: Milliseconds of the training thread in each save.
        stalled: Milliseconds that updates waited, in all; on a GPU those of the device too.
        buffers: Bytes of copy buffers after the first two saves, and at the end.
        slow_down: Median time of the step that follows a save, over that of the others.
    """

    wall: float = 0.0
    cpu: float = 0.0
    blocked: list[float] = field(default_factory=list)
    stalled: float = 0.0
    buffers: tuple[float, float] = (0.0, 0.0)
    slow_down: float = 1.0


class Watch(pl.Callback):
    """Times the fit and each call of ``Trainer.save_checkpoint``."""

    def __init__(self, io: AsyncCheckpointIO | None) -> None:
        self.cost = Cost()
        self.io = io
        self.held: list[float] = []
        self.saved = False
        self.marks: list[tuple[bool, Any]] = []  # whether a save came before this step, and when it began

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        save = trainer.save_checkpoint

        def timed(*arguments: Any, **more: Any) -> None:
            began = time.perf_counter()
            save(*arguments, **more)
            self.cost.blocked.append((time.perf_counter() - began) * 1e3)
            self.saved = True
            if self.io is not None:
                self.held.append(float(self.io.engine.pool.held_bytes))

        trainer.save_checkpoint = timed  # type: ignore[method-assign]
        self.began = time.perf_counter(), time.process_time()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if pl_module.device.type == "cuda":  # when the device begins with it
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((self.saved, now))
        self.saved = False

    def _slow_down(self) -> float:
        times: dict[bool, list[float]] = {True: [], False: []}
        for (saved, begin), (_, end) in zip(self.marks[5:], self.marks[6:], strict=False):
            times[saved].append(end - begin if isinstance(begin, float) else begin.elapsed_time(end))
        return statistics.median(times[True]) / statistics.median(times[False]) if all(times.values()) else 1.0

    def ended(self) -> Cost:
        self.cost.wall = time.perf_counter() - self.began[0]
        self.cost.cpu = time.process_time() - self.began[1]
        if self.marks and not isinstance(self.marks[0][1], float):
            torch.cuda.synchronize()
        self.cost.slow_down = self._slow_down()
        if self.io is not None:
            self.cost.stalled = self.io.engine.stalled_seconds * 1e3
            self.cost.buffers = self.held[min(2, len(self.held) - 1)], self.held[-1]
        return self.cost


class Alternate(pl.Callback):
    """Saves every ``every`` steps in every second span of as many steps, and notes the CPU time of each span."""

    def __init__(self, folder: str, every: int) -> None:
        self.folder, self.every = folder, every
        self.began: list[float] = []  # spans, in CPU seconds of all threads

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if index % self.every == 0:
            self.began.append(time.process_time())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        span, step = divmod(index, self.every)
        if step == 0 and span % 2:
            trainer.save_checkpoint(f"{self.folder}/{span}.ckpt")
            trainer.strategy.remove_checkpoint(f"{self.folder}/{span - 2}.ckpt")

    def ratios(self) -> list[float]:
        """CPU time of each span with a save over the mean of its two neighbours; those that took memory left out."""
        spans = [end - begin for begin, end in zip(self.began, self.began[1:], strict=False)]
        return [2 * spans[n] / (spans[n - 1] + spans[n + 1]) for n in range(5, len(spans) - 1, 2)]


@dataclass(frozen=True)
class Size:
    """A model, and how long and how often."""

    title: str
    width: int
    layers: int
    steps: int
    every: int
    arms: Sequence[str]


SMALL = Size("about 300 MB every 8 steps", 512, 8, 82, 8, [arm.name for arm in ARMS])
LARGE = Size("about 1.2 GB every 4 steps", 1024, 8, 26, 4, ["none", "Lightning, sync", "Lightning, async", "ours"])
TINY = Size("a few MB every 2 steps (quick)", 64, 2, 10, 2, [arm.name for arm in ARMS])


def run(options: Options) -> Result:
    """All arms and the torn and killed runs; about half an hour on one core."""
    torch.set_num_threads(options.threads)
    sizes = [TINY] if options.quick else [SMALL, LARGE]
    costs = {size.title: _rounds(size, options) for size in sizes}
    main = costs[sizes[0].title]
    steady = _steady(sizes[0], 13 if options.quick else 81, options)
    torn, torn_without = (_torn(10 if options.quick else 200, barrier) for barrier in (True, False))
    kills = _kills(5 if options.quick else 200)
    ours, rival = (_blocked(main[name]) for name in ("ours", "Lightning, async"))
    cpu, wall = (_ratios(main, "ours", what) for what in ("cpu", "wall"))
    figures: dict[str, float | str] = {
        "blocked_ms": statistics.median(ours),
        "blocked_ratio": statistics.median(ours) / statistics.median(rival),
        "run_cpu_ratio": statistics.median(cpu),
        "steady_cpu_ratio": statistics.median(steady),
        "run_wall_ratio": statistics.median(wall),
        "step_slow_down": statistics.median(cost.slow_down for cost in main["ours"]),
        "stalled_ms_per_save": statistics.median(c.stalled / len(c.blocked) for c in main["ours"]),
        "steady_state_new_bytes": max(c.buffers[1] - c.buffers[0] for c in main["ours"]),
        "torn": torn,
        "torn_without_barrier": torn_without,
        "kills_survived": f"{kills['survived']}/{kills['kills']}",
    }
    return Result(
        "checkpoint",
        figures,
        [_table(size, costs[size.title]) for size in sizes],
        raw={
            "costs": {t: {n: [vars(c) for c in runs] for n, runs in arms.items()} for t, arms in costs.items()},
            "steady": steady,
            "kills": kills,
        },
        notes=[
            "Byte-level language model, AdamW, ModelCheckpoint with save_top_k=1, one Trainer per run. Blocked: time "
            "in Trainer.save_checkpoint; the first save of a run is left out, it takes the memory. Total and CPU time "
            "are from the first batch until all is written, over the run without checkpoints of the same round. Next "
            "step: median time of the step after a save, over that of the others; on a GPU as the device sees it.",
            f"Steady: in one run of ours, after its first saves, the CPU time of {sizes[0].every} steps with one save "
            f"over the mean of that of the {sizes[0].every} before and after, without: {spread(steady, 3)} of "
            f"{len(steady)}, quartiles {_quartiles(steady)}.",
            "DCP: the default stager copies before it returns; the kept one stages in a thread and is awaited before "
            "the next update, as its recipe says.",
            f"Torn: snapshots that are not the state they were taken of, of {10 if options.quick else 200} under fused "
            "AdamW with BatchNorm and a slowed copy; then the same without the barrier, which must tear.",
            "Kills: runs that checkpoint after every step and keep one file, killed with -9 at random moments. To "
            "survive is an intact checkpoint, at most two steps old, never older than one before, and no stray file.",
        ],
    )


def _rounds(size: Size, options: Options) -> dict[str, list[Cost]]:
    there = ARMS if options.device == "cuda" else ARMS[:EVERYWHERE]
    arms = [arm for arm in there if arm.name in size.arms]
    costs: dict[str, list[Cost]] = {arm.name: [] for arm in arms}
    _fit(arms[0], size, options)  # warm-up
    for number, seed in enumerate(options.seeds):
        for arm in [*arms[number % len(arms) :], *arms[: number % len(arms)]]:
            cost = _fit(arm, size, options, seed)
            costs[arm.name].append(cost)
            blocked = statistics.median(cost.blocked[1:]) if cost.blocked else 0.0
            print(f"{size.title}  round {number}  {arm.name:<20} wall {cost.wall:6.1f} s  CPU {cost.cpu:6.1f} s  "
                  f"blocked {blocked:7.1f} ms", flush=True)  # fmt: skip
    return costs


def _fit(arm: Arm, size: Size, options: Options, seed: int = 0) -> Cost:
    pl.seed_everything(seed, verbose=False)
    with tempfile.TemporaryDirectory(dir=options.out.parent if options.out.parent.is_dir() else None) as folder:
        callbacks, plugins = arm.build() if arm.build else ([], [])
        watch = Watch(next((c for c in callbacks if isinstance(c, AsyncCheckpointIO)), None))
        if arm.build:
            callbacks.append(ModelCheckpoint(folder, "{step}", every_n_train_steps=size.every, save_top_k=1))
        trainer = _trainer([watch, *callbacks], plugins, size.steps, bool(arm.build), options)
        trainer.fit(*_job(size, seed))
        return watch.ended()


def _steady(size: Size, spans: int, options: Options) -> list[float]:
    pl.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory(dir=options.out.parent if options.out.parent.is_dir() else None) as folder:
        alternate = Alternate(folder, size.every)
        trainer = _trainer([AsyncCheckpointIO(memory_cap=None), alternate], [], spans * size.every + 1, False, options)
        trainer.fit(*_job(size, 0))
    return alternate.ratios()


def _trainer(
    callbacks: list[pl.Callback], plugins: list[Any], steps: int, checkpoints: bool, options: Options
) -> pl.Trainer:
    return pl.Trainer(
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=1,
        max_steps=steps,
        limit_val_batches=0,
        callbacks=callbacks,
        plugins=plugins,
        logger=False,
        enable_checkpointing=checkpoints,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _job(size: Size, seed: int) -> tuple[pl.LightningModule, pl.LightningDataModule]:
    model = ByteLanguageModel(layers=size.layers, width=size.width, context=64)
    return model, StdlibDataModule(context=64, batch_size=2, seed=seed)


def _quartiles(values: Sequence[float]) -> str:
    low, _, high = statistics.quantiles(values)
    return f"{low:.3f} to {high:.3f}"


def _blocked(costs: Sequence[Cost]) -> list[float]:
    return [blocked for cost in costs for blocked in cost.blocked[1:]]


def _ratios(costs: Mapping[str, Sequence[Cost]], arm: str, what: str) -> list[float]:
    return [getattr(a, what) / getattr(b, what) for a, b in zip(costs[arm], costs["none"], strict=True)]


def _table(size: Size, costs: Mapping[str, Sequence[Cost]]) -> Table:
    rows = []
    for name, runs in costs.items():
        blocked = _blocked(runs)
        shown = f"{statistics.median(blocked):.1f} (max {max(blocked):.1f})" if blocked else "-"
        slow = f"{statistics.median(run.slow_down for run in runs):.2f}"
        wall, cpu = spread(_ratios(costs, name, "wall"), 2), spread(_ratios(costs, name, "cpu"), 3)
        rows.append((name, shown, wall, cpu, slow))
    header = ("", "blocked (ms)", "total time / none", "CPU time / none", "next step / others")
    return Table(size.title, header, rows)


# -- torn snapshots ----------------------------------------------------------------------------------------------------


def _torn(rounds: int, with_barrier: bool) -> int:
    """How many snapshots are not the state that they were taken of."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    barrier = UpdateBarrier()
    if with_barrier:
        barrier.attach()

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()

    def slowly(snapshot: Snapshot) -> None:
        for number in snapshot.layout.records:
            snapshot.copy([number])
            time.sleep(0.001)

    step()
    torn = 0
    for _ in range(rounds):
        skeleton = take_skeleton({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        layout = StorageLayout([(n, storage.nbytes()) for n, storage in enumerate(skeleton.storages)])
        truth = [bytes(storage) for storage in skeleton.storages]
        snapshot = Snapshot(layout, HostBuffer(layout.end), 0)
        snapshot.offer(dict(enumerate(skeleton.storages)))
        owned = {tensor.untyped_storage().data_ptr() for tensor in owned_tensors(optimizer)}
        snapshot.copy([n for n, storage in enumerate(skeleton.storages) if storage.data_ptr() not in owned])
        barrier.protect(snapshot, skeleton.numbers)
        thread = threading.Thread(target=slowly, args=(snapshot,))
        thread.start()
        step()
        thread.join()
        view, records = snapshot.buffer.view, layout.records
        torn += any(bytes(view[records[n].start : records[n].end]) != content for n, content in enumerate(truth))
    barrier.detach()
    return torn


def _kills(count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.kills", folder, "--kills", str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)
