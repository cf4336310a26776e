"""The matrix of what goes together: all of it is recorded, and what is repeated here agrees with the record (X2)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.matrix.cells import CELLS, PLACES, Cell, combinations
from tests.matrix.exclusions import EXCLUSIONS, refused, said
from tests.matrix.page import PAGE, page
from tests.matrix.record import load
from tests.matrix.running import refusals, run_cell

RECORD = load()
FIVE = ("stack", "checkpoint", "activations", "offload", "precision")

REPEATED = [
    Cell(FIVE, "one device", False, "bf16-mixed"),
    Cell(("share", *FIVE[1:]), "DDP", False, "fp32"),
    Cell(("activations", "precision"), "one device", True, "fp32"),
    Cell(FIVE[1:], "FSDP2", False, "bf16-mixed"),
]
"""Green ones: each technique on each way to train where it can be, and most of the ways that code may take."""


def test_every_cell_is_recorded_green_or_refused_with_a_reason() -> None:
    names = [*(cell.name for cell in CELLS), *(exclusion.name for exclusion in EXCLUSIONS)]
    assert set(names) == set(RECORD), "run `make matrix`"
    for name, entry in RECORD.items():
        assert entry["state"] in ("green", "refused"), f"{name}: {entry}"
        assert entry["state"] == "green" or len(entry["reason"]) > 40, name
        assert {"date", "versions"} <= set(entry)


def test_the_page_is_what_is_recorded() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(RECORD)


def test_cells_are_all_pairs_on_all_ways_to_train() -> None:
    techniques = {"stack", "share", *FIVE}
    pairs = {frozenset(names) for names in combinations() if len(names) == 2}
    assert pairs == {frozenset({a, b}) for a in techniques for b in techniques if a != b} - {
        frozenset({"stack", "share"})
    }
    assert {names for names in combinations() if len(names) > 2} == {FIVE, ("share", *FIVE[1:]), FIVE[1:]}
    assert len(CELLS) == len({cell.name for cell in CELLS}) == len(combinations()) * len(PLACES) * 2 * 2


@pytest.mark.parametrize("cell", REPEATED, ids=lambda cell: cell.name)
def test_some_are_green_again(cell: Cell, tmp_path: Path) -> None:
    outcome = run_cell(cell, tmp_path, backend="aot_eager")
    assert (outcome.state, outcome.reason) == ("green", "")
    assert RECORD[cell.name]["state"] == "green"


def test_those_that_are_refused_are_refused_again(tmp_path: Path) -> None:
    cells = [cell for cell in CELLS if not cell.compiled and RECORD[cell.name]["state"] == "refused"]
    assert cells
    for place in PLACES:
        here = [cell for cell in cells if cell.place == place]
        if here:
            assert refusals(here, tmp_path) == {cell.name: RECORD[cell.name]["reason"] for cell in here}


@pytest.mark.parametrize("exclusion", EXCLUSIONS, ids=lambda exclusion: exclusion.name)
def test_settings_that_exclude_each_other_are_refused_again(exclusion: object, tmp_path: Path) -> None:
    here = said(0, exclusion.name, tmp_path) if exclusion.place == "one device" else refused(exclusion, tmp_path)
    assert here == RECORD[exclusion.name]["reason"]
