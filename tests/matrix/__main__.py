"""``python -m tests.matrix``: runs all cells that are not recorded yet, and writes the page."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tests.matrix.cells import CELLS
from tests.matrix.exclusions import EXCLUSIONS, refused
from tests.matrix.page import write_page
from tests.matrix.record import load, note, versions
from tests.matrix.running import Outcome, run_cell


def main() -> int:
    """Returns the number of cells that are neither green nor refused."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("--only", default="", help="cells whose names contain this")
    parser.add_argument("--most", type=int, default=len(CELLS), help="so many, then stop; the next call goes on")
    parser.add_argument("--again", action="store_true", help="also cells that are recorded with these versions")
    default = Path(tempfile.gettempdir()) / "lightning_efficient_matrix"
    parser.add_argument("--scratch", type=Path, default=default, help="for runs to compare with, and compiled code")
    given = parser.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(given.scratch / "inductor"))
    # What torch takes from this cache, ActivationCompressionPlugin does not see, and cannot measure.
    os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")
    order = [*(cell.name for cell in CELLS), *(exclusion.name for exclusion in EXCLUSIONS)]

    def due(name: str) -> bool:
        known = load().get(name, {})
        fresh = known.get("versions") == versions() and known.get("state") in ("green", "refused")
        return given.only in name and (given.again or not fresh)

    for exclusion in (one for one in EXCLUSIONS if due(one.name)):
        with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
            reason = refused(exclusion, Path(folder))
        note({exclusion.name: Outcome("refused" if reason else "broken", reason)}, order=order)
    for cell in [cell for cell in CELLS if due(cell.name)][: given.most]:
        outcome = run_cell(cell, given.scratch)
        note({cell.name: outcome}, order=order)
        print(f"{outcome.state:8} {outcome.seconds:6.1f} s  {cell.name}  {outcome.reason}", flush=True)
    record = load()
    write_page(record)
    left = [name for name in order if record.get(name, {}).get("state") not in ("green", "refused")]
    print(f"{len(order) - len(left)} of {len(order)} are green or refused", *left[:5], sep="\n")
    return len(left)


if __name__ == "__main__":
    sys.exit(min(1, main()))
