"""A long run of a tiny model with everything on, while things go wrong: does it stay as it was, and learn as it should?

The run is a process of its own; where SIGTERM ends it, the next one goes on from its newest checkpoint. Beside it the
same model trains plainly, without faults, once for each seed.
"""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness import Options, Result, Table, spread
from benchmarks.soak_faults import LAST, TERMINATED, WINDOWS, records
from benchmarks.together_runs import AT_WORK, TINY, context, fit, settings
from lightning_efficient.checkpointing.retention import newest_intact, step_of
from lightning_efficient.monitoring.report import RunReport, read_report

__all__ = ["growth_of", "run", "surplus"]

STEPS, QUICK = 20_000, 300
FLAT = 8 << 20  # bytes that the second half may grow by: less than a thousandth of a step's tensors for each step


def run(options: Options) -> Result:
    """All of it; on two cores about an hour."""
    steps = QUICK if options.quick else STEPS
    seeds = options.seeds[:2] if options.quick else options.seeds
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir=Path.cwd()))
    try:
        losses = []
        for seed in seeds:
            _process(_plain, folder / f"plain {seed}", steps, seed)
            losses.append(_loss(_report(folder / f"plain {seed}")))
            print(f"soak  plain, seed {seed}: {losses[-1]:.4f}", flush=True)
        runs = _until_the_end(folder / "soak", steps)
        report, lines = _report(folder / "soak"), records(folder / "soak" / "record")
        left = json.loads((folder / "soak" / "left.json").read_text())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    samples = [line for line in lines if "rss" in line and line["step"] >= steps / 2]
    grown, per_thousand = growth_of(samples)
    hits = Counter[str]()
    for line in lines:
        if "fault" in line:
            hits[line["fault"]] += line["hits"]
    most = {key: (samples[0][key], max(sample[key] for sample in samples)) for key in ("threads", "files")}
    gap = _gap(_loss(report), losses)
    restarts = runs - 1
    table = Table(
        f"{steps:,} steps with everything on, and faults",
        ("", "found", "should be"),
        [
            ("memory in the second half: growth (MiB)", f"{grown / 2**20:+.1f}", f"at most {FLAT / 2**20:.0f}"),
            ("its slope (KiB in 1,000 steps)", f"{per_thousand / 1024:+.0f}", "-"),
            *((f"{key}, in the middle and at most", "{} and {}".format(*most[key]), "the same") for key in most),
            ("left behind at the end", "; ".join(left) or "nothing", "nothing"),
            ("restarts after SIGTERM", f"{restarts}", f"{len(TERMINATED)}"),
            ("validation loss", f"{_loss(report):.4f}", f"plain: {spread(losses, 4)}"),
            ("its difference from plain, in standard errors", f"{gap:+.1f}", "at most 2"),
            *((f"{name}: did harm", f"{hits[name]} times", "more than 0") for name in WINDOWS),
        ],
        "Growth of memory: the median of the last quarter of the second half less that of the first. The standard "
        f"error is that of one run's difference from the mean of {len(losses)} plain ones, from the spread of these.",
    )
    for event in report.events:
        print(f"soak  step {event.step}: {event.technique}: {event.text}")
    return Result(
        "soak",
        {
            "steps": steps,
            "memory_growth_mib": grown / 2**20,
            "left_behind": len(left),
            "restarts": restarts,
            "loss_gap_se": gap,
            "faults_seen": f"{sum(hits[name] > 0 for name in WINDOWS)}/{len(WINDOWS)}",
        },
        [table],
        raw={"record": lines, "plain": losses, "loss": _loss(report), "left": left},
        notes=[
            "Faults: "
            + "; ".join(f"{name} in {_parts(windows)}" for name, windows in WINDOWS.items())
            + " of the run. "
            f"SIGTERM at {', '.join(f'{at:.0%}' for at in TERMINATED)}. A slow disk moves 50 MB/s; where it is full, "
            "no checkpoint can be written; under memory pressure the process gets 96 MiB more and no byte beyond; "
            "wrong products: each product in few bits is wrong by a factor of -4,096.",
        ],
    )


def _parts(windows: Sequence[tuple[float, float]]) -> str:
    return " and ".join(f"{begin:.0%} to {end:.0%}" for begin, end in windows)


def growth_of(samples: Sequence[Mapping[str, int]]) -> tuple[float, float]:
    """By how many bytes resident memory grew from the first quarter of the samples to the last, and in 1,000 steps."""
    sizes = [sample["rss"] for sample in samples]
    quarter = max(1, len(sizes) // 4)
    slope = statistics.linear_regression([sample["step"] for sample in samples], sizes).slope if len(sizes) > 1 else 0.0
    return statistics.median(sizes[-quarter:]) - statistics.median(sizes[:quarter]), slope * 1000


def _gap(loss: float, plain: Sequence[float]) -> float:
    """By how many of its standard errors one run's loss is above the mean of plain runs."""
    if len(plain) < 2:
        return 0.0
    error = statistics.stdev(plain) * math.sqrt(1 + 1 / len(plain))
    return (loss - statistics.fmean(plain)) / error if error else 0.0


def _report(folder: Path) -> RunReport:
    newest = max(folder.rglob("efficiency_report.json"), key=lambda path: path.stat().st_mtime_ns)
    return read_report(newest)


def _loss(report: RunReport) -> float:
    return report.metrics["val_loss"][-1].value


# -- the processes -----------------------------------------------------------------------------------------------------


def _until_the_end(folder: Path, steps: int) -> int:
    """Run, and again from the newest checkpoint for as long as SIGTERM ends it; how many runs there were.

    Raises:
        RuntimeError: If a run ends otherwise.
    """
    for number in range(1, len(TERMINATED) + 2):
        checkpoint = newest_intact(folder / "checkpoints") if number > 1 else None
        at = step_of(checkpoint) if checkpoint else 0
        print(f"soak  run {number} from step {at}", flush=True)
        _process(_soaked, folder, steps, checkpoint, may_end=True)
        if (folder / "left.json").exists():
            return number
        if sum("terminated" in line for line in records(folder / "record")) < number:
            break
    raise RuntimeError("The run ended, and nobody had asked it to.")


def _process(work: Any, *args: Any, may_end: bool = False) -> None:
    process = context().Process(target=work, args=args)
    process.start()
    process.join()
    if process.exitcode and not may_end:
        raise RuntimeError(f"The run in {args[0]} ended with exit code {process.exitcode}.")


def _plain(folder: Path, steps: int, seed: int) -> None:
    fit(folder, _settings(folder, steps, seed, overlays=()))


def _soaked(folder: Path, steps: int, checkpoint: Path | None) -> None:
    warm = folder.parent / f"warm {os.getpid()}"
    fit(warm, _settings(warm, 2, 0, overlays=()))  # what Lightning leaves by itself
    before = _surroundings()
    whole = _settings(folder, steps, 0)
    faults = {"steps": steps, "every": max(1, steps // 400), "record": str(folder / "record")}
    whole["trainer"]["callbacks"].append({"class_path": "benchmarks.soak_faults.Faults", "init_args": faults})
    fit(folder, whole, checkpoint)
    left = [*surplus(_surroundings(), before), *_hooks(LAST[0])]
    left += [path.name for path in (folder / "checkpoints").iterdir() if path.suffix != ".ckpt"]
    left += [path.name for path in (folder / "swap").glob(".*")]
    (folder / "left.json").write_text(json.dumps(left))


def _settings(folder: Path, steps: int, seed: int, overlays: tuple[str, ...] = ("all",)) -> dict[str, Any]:
    changes: dict[str, Any] = {**TINY, "StdlibDataModule": {**TINY["StdlibDataModule"], "validation_bytes": 33 * 400}}
    changes["StdlibDataModule"]["seed"] = seed
    if overlays:
        changes |= {
            **AT_WORK,
            "OffloadStrategy": {"memory_budget": None, "place": {"optimizer_state:*blocks*": "disk"}},
            "RollbackPrecision": {**AT_WORK["RollbackPrecision"], "pre_learning_steps": min(50, steps // 20)},
            "AsyncCheckpointIO": {"on_error": "warn"},
            "ModelCheckpoint": {"every_n_train_steps": max(5, steps // 200)},
        }
    trainer = {
        "limit_train_batches": steps,
        "val_check_interval": steps // 2,
        "log_every_n_steps": max(10, steps // 400),
    }
    whole = settings(folder, overlays=overlays, trainer=trainer, changes=changes)
    return whole | {"seed_everything": seed}


def _surroundings() -> Counter[str]:
    """Threads, open files and hooks on everything, by name."""
    gc.collect()
    found = Counter(f"thread {thread.name.rstrip('0123456789')}" for thread in threading.enumerate())
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found[f"file {os.readlink(f'/proc/self/fd/{descriptor}').partition(':')[0]}"] += 1
        except OSError:  # that of the listing itself
            continue
    for place in ("torch.nn.modules.module", "torch.optim.optimizer"):
        hooks = {name: value for name, value in vars(sys.modules[place]).items() if name.startswith("_global_")}
        found.update({name: len(value) for name, value in hooks.items() if "hook" in name and isinstance(value, dict)})
    found["saved-tensor hooks"] = int(torch._C._autograd._top_saved_tensors_default_hooks(False) is not None)
    return +found


def surplus(after: Counter[str], before: Counter[str]) -> list[str]:
    """What there is more of than before, in words."""
    return [f"{number} more of {name}" for name, number in (after - before).items()]


def _hooks(module: nn.Module) -> list[str]:
    """Hooks on a module or its parameters that a new one of its class would not have."""
    hyperparameters = getattr(module, "hparams", {}).items()
    new = type(module)(**{name: value for name, value in hyperparameters if not name.startswith("_")})  # the CLI's own
    return surplus(_hooks_on(module), _hooks_on(new))


def _hooks_on(module: nn.Module) -> Counter[str]:
    found = Counter[str]()
    for path, sub in module.named_modules():
        found.update({f"{path}.{name}": len(value or ()) for name, value in vars(sub).items() if "hooks" in name})
    for name, parameter in module.named_parameters():
        for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            found[f"{name}.{kind}"] = len(getattr(parameter, kind, None) or ())
    return +found
