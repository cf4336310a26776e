"""The committed notebooks run, with few steps, and were committed executed."""

from __future__ import annotations

import json
import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from tests.helpers.scripts import Script

# Steps that are enough to come by everything: a checkpoint before the first kill, each phase of growth.
STEPS = {"00_quickstart": 4, "01_growth": 6, "02_checkpoints": 24, "06_together": 6}
NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def cells(path: Path) -> list[dict[str, Any]]:
    """The code cells of a notebook."""
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def _silences_itself_only() -> Iterator[None]:
    """Notebooks have Lightning say less, in a process of their own; here other tests follow that read what it says."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("undrawn", "_silences_itself_only")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LE_NOTEBOOK_STEPS", str(STEPS.get(path.stem, 12)))
    monkeypatch.setenv("LE_NOTEBOOK_WIDTH", "64")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", Script)  # five and three processes import Lightning
    mpl.use("agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells(path):
        exec(compile("".join(cell["source"]), str(path), "exec"), names)
    assert not list(tmp_path.iterdir()), "a notebook leaves no file behind"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_executed_and_clean(path: Path) -> None:
    executed = cells(path)
    assert all(cell["execution_count"] for cell in executed)
    outputs = [output for cell in executed for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
