"""``python -m lightning_efficient.demos.compare``: the demo task plain and with the suite, side by side.

Each run is a process of its own in a folder of its own, started from the same configuration files that a user would
write, so that its peak memory is its own, and so is all that it writes. Every figure comes from the two runs' reports.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from lightning_efficient.monitoring.command import write_comparison
from lightning_efficient.monitoring.comparison import Comparison
from lightning_efficient.monitoring.runs import read_run
from lightning_efficient.monitoring.sheet import terminal

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run both, print the table, write the report.

    Returns:
        The exit status: 0 only if both runs ended well and the figures could be read.
    """
    parser = argparse.ArgumentParser(prog="python -m lightning_efficient.demos.compare", description=__doc__)
    parser.add_argument("--configs", type=Path, default=Path("configs"), help="folder of base.yaml and the overlays")
    parser.add_argument(
        "--overlays",
        nargs="+",
        default=["all"],
        help="what is on in the second run: all, or some of growth, checkpoint, activation, offload, precision",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for both runs and the report")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps of each run, instead of base.yaml's")
    options = parser.parse_args(arguments)
    base = options.configs.resolve() / "base.yaml"
    overlays = [base.with_name(f"{name}.yaml") for name in options.overlays]
    for path in (base, *overlays):
        if not path.is_file():
            parser.error(f"{path} does not exist; run this in the repository, or give --configs.")

    began = time.monotonic()
    folder = options.out.resolve() / time.strftime("%Y%m%d-%H%M%S")
    runs = {"plain": [], "+".join(options.overlays): overlays}
    for name, extra in runs.items():
        print(f"\n=== {name} ===", flush=True)
        status = _fit(folder, name, [base, *extra], options.steps)
        if status != 0:
            print(f"The {name} run failed with exit status {status}.", file=sys.stderr)
            return 1
    found = [read_run(folder / name) for name in runs]
    comparison = Comparison(found, "val_bits_per_byte", "The demo task, plain and with the suite")
    print(f"\n{terminal(comparison)}\n")
    print(f"Report: {write_comparison(folder, comparison)}")
    print(f"TensorBoard: tensorboard --logdir {folder}")
    print(f"Both runs took {time.monotonic() - began:.0f} s in all.")
    return 0


def _fit(folder: Path, name: str, configs: list[Path], steps: int | None) -> int:
    command = [sys.executable, "-W", "ignore", "-m", "lightning_efficient", "fit"]
    for config in configs:
        command += ["--config", str(config)]
    command += ["--trainer.logger=lightning.pytorch.loggers.TensorBoardLogger"]
    command += [f"--trainer.logger.init_args.{key}={value}" for key, value in _logger_arguments(folder, name).items()]
    if steps is not None:
        command += [f"--trainer.limit_train_batches={steps}", f"--trainer.val_check_interval={max(1, steps // 16)}"]
    (folder / name).mkdir(parents=True)
    imports = [sys.path[0], *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, imports))}  # from another folder
    return subprocess.run(command, cwd=folder / name, env=environment, check=False).returncode


def _logger_arguments(folder: Path, name: str) -> dict[str, str]:
    return {"save_dir": str(folder), "name": name, "version": "."}


if __name__ == "__main__":
    sys.exit(main())
