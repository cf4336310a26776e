"""The whole suite in one: how large a model trains, how soon it learns, whether it survives, what is predicted."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import plan
from benchmarks.harness import Options, Result, Table, spread
from benchmarks.together_kills import killed_and_resumed
from benchmarks.together_losses import difference, measured_losses
from benchmarks.together_scale import measured_scale

__all__ = ["import_times", "run"]

_IMPORT = """
import time, lightning.pytorch, lightning
begin, cpu = time.perf_counter(), time.process_time()
import lightning_efficient
wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
import torch
print(1e3 * wall, 1e3 * cpu, int(torch.cuda.is_initialized()))
"""


def run(options: Options) -> Result:
    """All of it; on two cores about forty minutes."""
    folder = Path(tempfile.mkdtemp(prefix="together-", dir=Path.cwd()))
    try:
        imports = import_times(3 if options.quick else 15)
        scale = measured_scale(options)
        losses = measured_losses(folder / "losses", options)
        killed = killed_and_resumed(folder / "kills", kills=3 if options.quick else 50)
        planned = plan.run(options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows = [(name, spread(values, 0)) for name, values in imports.items() if name != "initialised"]
    imported = Table("import lightning_efficient, behind import lightning", ("", "milliseconds"), rows)
    return Result(
        "together",
        {
            "model_scale": scale.ratio,
            "time_per_token_ratio": scale.time_ratio,
            "time_to_loss_ratio": losses.median,
            "resume_exact": f"{killed.exact}/{killed.kills}",
            **{key: value for key, value in planned.figures.items() if key != "plan_checked"},
            "import_ms": statistics.median(imports["wall"]),
            "plan_checked": planned.figures["plan_checked"],
            "import_initialises": max(imports["initialised"]),
            "final_loss_difference": difference(losses),
        },
        [*scale.tables, losses.table, killed.table, *planned.tables, imported],
        raw={
            "scale": scale.raw,
            "losses": {"ratios": losses.ratios, "finals": losses.finals},
            "kills": {"amid": dict(killed.amid), "problems": killed.problems},
            "imports": imports,
            "plan": planned.raw,
        },
        notes=[
            "model_scale, time_per_token_ratio: see the first two tables. time_to_loss_ratio: processor time of "
            "training to plain's final validation loss over plain's, the median over the seeds. resume_exact: kills of "
            "runs that ended bit-equal to the uninterrupted one, of all.",
            "import_ms: wall time of the import in fresh processes that have imported lightning, the median; "
            "import_initialises: 1 if it has initialised an accelerator.",
            *planned.notes,
        ],
    )


def import_times(rounds: int) -> dict[str, list[float]]:
    """Milliseconds of ``import lightning_efficient`` behind Lightning's, in fresh processes, by clock."""
    found: dict[str, list[float]] = {"wall": [], "cpu": [], "initialised": []}
    for number in range(rounds + 1):
        command = [sys.executable, "-W", "ignore", "-c", _IMPORT]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        if number:  # the first one compiles, and brings the files into memory
            for values, word in zip(found.values(), done.stdout.split(), strict=True):
                values.append(float(word))
    return found
