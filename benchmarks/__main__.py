"""``python -m benchmarks NAME [--quick] [--device cpu|cuda] [--seeds N] [--out FOLDER]``."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from pathlib import Path

from benchmarks.harness import Options, write_results

NAMES = ("growth", "checkpoint", "activation", "offload", "precision", "plan", "together", "soak")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--quick", action="store_true", help="a few steps only: does it run? The figures mean nothing")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the result files")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error("--seeds is at least 1.")
    options = Options(
        quick=arguments.quick,
        device=arguments.device,
        seeds=tuple(range(arguments.seeds)),
        threads=arguments.threads,
        out=arguments.out,
    )
    warnings.filterwarnings("ignore", module="lightning")
    result = importlib.import_module(f"benchmarks.{arguments.name}").run(options)
    paths = write_results(result, options)
    print(f"\n{result.markdown()}")
    print(f"Written: {', '.join(map(str, paths))}\n")
    print(result.last_line())
    return 0


if __name__ == "__main__":
    sys.exit(main())
