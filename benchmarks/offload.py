"""What offloading costs: optimizer state on a disk against all in memory, and against how others put it there.

Time: wall time of whole training steps (forward, backward, update), all arms in turn in each round, for that is what
waiting for a disk costs; the CPU time of the process stands beside it. Exact: weights and state after whole runs,
compared bit for bit (``benchmarks/exact.py``). Bounds and kills: processes of their own (``benchmarks/bounded.py``).
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import gpu_arms, offload_gpu
from benchmarks.bounded import kills, trains_in_bounds
from benchmarks.exact import exact_runs
from benchmarks.harness import Options, Result, Table, spread
from benchmarks.late_updates import late_losses
from lightning_efficient.demos.model import ByteTransformer
from lightning_efficient.offload.session import OffloadSession
from lightning_efficient.offload.settings import parse_settings
from lightning_efficient.offload.tiers.disk_bandwidth import measure_bandwidth

__all__ = ["run"]


@dataclass(frozen=True)
class Size:
    """A GPT and a batch."""

    layers: int
    width: int
    tokens: int
    rounds: int
    steps: int  # in each round

    def __str__(self) -> str:
        return f"{self.layers} layers of width {self.width}, {self.tokens:,} tokens a step"


HIDING = Size(8, 512, 1024, 15, 1)  # enough tokens to hide the transfers
BINDING = Size(8, 768, 16, 9, 5)  # the disk is what there is to wait for
QUICK = Size(2, 64, 32, 2, 1)


class Job:
    """A model, its optimizer, and one batch."""

    def __init__(self, size: Size, clip: float | None = None) -> None:
        self.clip, self.device = clip, torch.device("cpu")
        torch.manual_seed(0)
        context = min(256, size.tokens)
        heads = max(1, size.width // 64)
        self.model = ByteTransformer(layers=size.layers, width=size.width, heads=heads, context=context)
        self.optimizer = self.adamw()
        self.tokens, self.targets = torch.randint(0, 256, (2, size.tokens // context, context))
        self.before: Callable[[], None] = lambda: None
        self.after: Callable[[Tensor], None] = lambda loss: None

    def adamw(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    @property
    def state_bytes(self) -> int:
        return 2 * sum(parameter.numel() * 4 for parameter in self.model.parameters())

    def step(self) -> None:
        def closure() -> Tensor:
            self.before()
            loss = F.cross_entropy(self.model(self.tokens).flatten(0, 1), self.targets.flatten())
            self.after(loss)
            self.optimizer.zero_grad()
            loss.backward()
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            return loss

        self.optimizer.step(closure)


Arm = Callable[[Job, Path], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def in_memory(job: Job, folder: Path) -> Iterator[None]:
    yield


def ours(schedule: str) -> Arm:
    @contextlib.contextmanager
    def build(job: Job, folder: Path) -> Iterator[None]:
        settings = parse_settings(
            memory_budget=None,
            offload_dir=folder,
            place={"optimizer_state": "disk"},
            schedule=schedule,
            staging="256MiB",
            master_weights=False,
        )
        session = OffloadSession(
            job.model,
            [job.optimizer],
            settings,
            device=torch.device("cpu"),
            directory=folder,
            schedule=schedule,  # type: ignore[arg-type]
            complete=lambda: True,
        )
        session.start()
        updates = session.updates
        assert updates is not None
        job.before = updates.before_forward
        job.after = lambda loss: updates.after_forward([loss])
        yield
        session.close()

    return build


@contextlib.contextmanager
def memory_mapped(job: Job, folder: Path) -> Iterator[None]:
    """State in files that are mapped into memory (``torch.from_file``); the page cache decides what stays."""
    job.step()
    for number, (parameter, state) in enumerate(list(job.optimizer.state.items())):
        for key, value in state.items():
            if value.numel() > 1:
                path = folder / f"{number}-{key}"
                mapped = torch.from_file(str(path), shared=True, size=value.numel(), dtype=value.dtype)
                state[key] = mapped.view_as(value).copy_(value)
        assert parameter in job.optimizer.state
    yield
    job.optimizer.state.clear()


@contextlib.contextmanager
def buffered_files(job: Job, folder: Path) -> Iterator[None]:
    """A file a parameter, read, updated and written in turn, as one writes it first; nothing overlaps.

    With ``fdatasync`` and ``posix_fadvise``, so that the page cache does not keep all of it in memory after all.
    """
    import os

    job.step()
    paths: dict[Tensor, Path] = {}

    def save(parameter: Tensor, state: dict[str, Any]) -> None:
        path = paths.setdefault(parameter, folder / str(len(paths)))
        with path.open("wb", buffering=0) as file:
            for value in state.values():
                if value.numel() > 1:
                    file.write(memoryview(value.view(-1).numpy()).cast("B"))
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def load(parameter: Tensor, state: dict[str, Any]) -> None:
        with paths[parameter].open("rb", buffering=0) as file:
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.empty_like(parameter)
                file.readinto(memoryview(state[key].view(-1).numpy()).cast("B"))
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    for parameter, state in job.optimizer.state.items():
        save(parameter, state)
        del state["exp_avg"], state["exp_avg_sq"]
    plain = job.optimizer.step

    def step(closure: Callable[[], Tensor]) -> None:
        closure()
        groups = job.optimizer.param_groups
        for parameter in groups[0]["params"]:
            state = job.optimizer.state[parameter]
            load(parameter, state)
            job.optimizer.param_groups = [{**groups[0], "params": [parameter]}]
            plain()
            save(parameter, state)
            del state["exp_avg"], state["exp_avg_sq"]
        job.optimizer.param_groups = groups

    job.optimizer.step = step  # type: ignore[method-assign,assignment]
    yield


@contextlib.contextmanager
def fsdp2(job: Job, folder: Path) -> Iterator[None]:
    """Torch's own: ``fully_shard`` with ``CPUOffloadPolicy``, in a process group of one."""
    with gpu_arms.fsdp2(job, folder):  # type: ignore[arg-type]
        yield


ARMS: dict[str, Arm] = {
    "all in memory": in_memory,
    "ours, in_backward": ours("in_backward"),
    "ours, under_forward": ours("under_forward"),
    "ours, after_backward": ours("after_backward"),
    "memory-mapped files": memory_mapped,
    "buffered files": buffered_files,
    "FSDP2 CPUOffloadPolicy (host memory)": fsdp2,
}
CLIPPED: dict[str, Arm] = {
    "all in memory": in_memory,
    "ours, under_forward": ours("under_forward"),
    "ours, delayed (changes results)": ours("delayed"),
}


def _steps(
    size: Size, folder: Path, arms: dict[str, Arm] = ARMS, clip: float | None = None
) -> tuple[Table, dict[str, Any]]:
    folder.mkdir()
    jobs = {name: Job(size, clip) for name in arms}
    wall: dict[str, list[float]] = {name: [] for name in arms}
    cpu: dict[str, list[float]] = {name: [] for name in arms}
    with contextlib.ExitStack() as stack:
        for number, (name, build) in enumerate(arms.items()):
            place = folder / str(number)
            place.mkdir()
            stack.enter_context(build(jobs[name], place))
            for _ in range(2):  # warm-up, and what the first step learns
                jobs[name].step()
        rates: list[float] = []
        for turn in range(size.rounds):
            rates.append(measure_bandwidth(folder, seconds=0.3).mixed_bytes_per_second)
            names = list(jobs)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                time.sleep(0.2)  # what the last arm has left to the disk
                jobs[name].step()  # transfers that a run of steps would have begun before
                begin, begin_cpu = time.perf_counter(), time.process_time()
                for _ in range(size.steps):
                    jobs[name].step()
                wall[name].append((time.perf_counter() - begin) / size.steps)
                cpu[name].append((time.process_time() - begin_cpu) / size.steps)
    base = "all in memory"
    nbytes = jobs[base].state_bytes
    disk = [2 * nbytes / rate for rate in rates]
    limits = [max(pair) for pair in zip(wall[base], disk, strict=True)]
    rows, found = [], {}
    for name in arms:
        ratios = [a / b for a, b in zip(wall[name], wall[base], strict=True)]
        cpu_ratios = [a / b for a, b in zip(cpu[name], cpu[base], strict=True)]
        fractions = [limit / seconds for limit, seconds in zip(limits, wall[name], strict=True)]
        found[name] = {"wall": wall[name], "cpu": cpu[name], "ratios": ratios, "fractions": fractions}
        milliseconds = f"{statistics.median(wall[name]) * 1e3:.0f}"
        rows.append((name, milliseconds, spread(ratios, 2), spread(cpu_ratios, 2), spread(fractions, 2)))
        print(f"{size}  " + "  ".join(rows[-1]), flush=True)
    note = (
        f"{nbytes / 1e6:.0f} MB of state. The limit is the larger of the step in memory and of the time that the disk "
        f"needs to read and write the state ({spread([seconds * 1e3 for seconds in disk], 0)} ms at "
        f"{spread([rate / 1e9 for rate in rates], 2)} GB/s, measured in each round with the tier's own code)."
    )
    header = ("", "step (ms)", "time / in memory", "CPU time / in memory", "fraction of the limit")
    title = str(size) if clip is None else f"{size}, clipped"
    return Table(title, header, rows, note), {"arms": found, "limit_seconds": limits, "disk_seconds": disk}


def run(options: Options) -> Result:
    """All of it; about ten minutes. On a GPU: :mod:`benchmarks.offload_gpu`."""
    if options.device == "cuda":
        return offload_gpu.run(options)
    torch.set_num_threads(options.threads)
    folder = Path(tempfile.mkdtemp(prefix="offload-", dir=Path.cwd()))
    try:
        exact = exact_runs(folder / "exact", options)
        tables = [exact.table]
        raw: dict[str, Any] = {"clipped": exact.clipped}
        sizes = (QUICK, QUICK) if options.quick else (HIDING, BINDING)
        measured = []
        for number, size in enumerate(sizes):
            table, values = _steps(size, folder / f"steps-{number}")
            tables.append(table)
            measured.append(values)
            raw[f"{number}: {size}"] = values
        clipped_ratios = {}
        for number, size in enumerate(sizes):
            table, values = _steps(size, folder / f"clipped-{number}", CLIPPED, clip=1.0)
            tables.append(table)
            raw[f"{number}: {size}, clipped"] = values
            clipped_ratios[number] = {name: statistics.median(arm["ratios"]) for name, arm in values["arms"].items()}
        table, losses, gaps = late_losses(folder / "late", options)
        tables.append(table)
        raw["late updates"] = losses
        bounds = trains_in_bounds(folder / "bounds", quick=options.quick)
        tables.append(bounds.table)
        killed = kills(folder / "kills", number=5 if options.quick else 50)
        tables.append(killed.table)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    hiding, binding = (values["arms"] for values in measured)
    best = ("ours, in_backward", "ours, under_forward")

    def fraction(name: str) -> float:
        return statistics.median(binding[name]["fractions"])

    return Result(
        "offload",
        {
            "exact": int(exact.equal),
            "rss_bound": int(bounds.held),
            "disk_step_ratio": max(statistics.median(hiding[name]["ratios"]) for name in best),
            "disk_fraction_of_limit": min(fraction(name) for name in best),
            "mmap_fraction_of_limit": fraction("memory-mapped files"),
            "buffered_fraction_of_limit": fraction("buffered files"),
            "fsdp2_step_ratio": statistics.median(hiding["FSDP2 CPUOffloadPolicy (host memory)"]["ratios"]),
            "kills": f"{killed.survived}/{killed.number}",
            "clipped_step_ratio": clipped_ratios[0]["ours, under_forward"],
            "delayed_step_ratio": clipped_ratios[0]["ours, delayed (changes results)"],
            "delayed_loss_gap": gaps[0],
            "delayed_loss_gap_small_steps": gaps[1],
        },
        tables,
        raw=raw,
        notes=[
            "GPT (byte-level), AdamW (fused). Wall time of whole steps, one after another in each round; median and "
            "range over the rounds of the ratio to the step in memory of the same round.",
            "FSDP2 with CPUOffloadPolicy is torch's own offloading: on a CPU all of it stays in memory, and what its "
            "wrappers cost is what shows.",
            "Memory-mapped files stay in the page cache where there is room, as there was here: their memory is not "
            "bounded.",
        ],
    )
