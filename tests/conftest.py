"""Every test: one thread, a fixed seed, a folder of its own."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from lightning_efficient.monitoring import plots
from tests.helpers.processes import look_only_at_what_comes


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, so that results and times do not depend on the cores; nothing is written beside ``tmp_path``."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)  # half of the time that compiling takes


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plots of reports are empty files: nobody looks at them, and to draw them takes longer than to train."""
    monkeypatch.setattr(plots, "draw", lambda panels, path: path.touch())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped, with the reason, where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Those tests that collect garbage need not look through all tests and all that they import."""
    look_only_at_what_comes()
