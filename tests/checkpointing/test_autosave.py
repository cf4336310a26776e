"""How often to save: found, said, and driven (C11)."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_efficient import AsyncCheckpointIO
from lightning_efficient.checkpointing import CheckpointSaveError
from tests.checkpointing.test_checkpoint_io import FullDisk, every, names
from tests.helpers.fitting import assert_same_tree
from tests.helpers.models import ManualModel
from tests.helpers.quick import train
from tests.technique_settings import demo_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*will be saved to the same directory"),
]


def driving(root: Path, **arguments: Any) -> AsyncCheckpointIO:
    return AsyncCheckpointIO(frequency="drive", dirpath=str(root / "ck"), **arguments)


def steps(root: Path) -> list[int]:
    return sorted(int(name[5:-5]) for name in names(root) if name.startswith("step="))


@pytest.mark.filterwarnings("ignore:.*will be saved to the same directory")
def test_it_saves_by_itself_and_keeps_the_newest_c11(tmp_path: Path) -> None:
    io = driving(tmp_path)
    _, module = train(tmp_path, io, max_steps=200)
    saved = [name for name in names(tmp_path) if name != "last.ckpt"]
    assert len(saved) == 2
    newest = torch.load(tmp_path / "ck" / "last.ckpt", weights_only=True)["global_step"]
    assert f"step={newest}.ckpt" in saved
    assert newest >= 15
    assert "checkpoint/interval_batches" in io.measurements()
    resumed_io = driving(tmp_path)
    _, resumed = train(tmp_path, resumed_io, max_steps=200, resume=tmp_path / "ck" / "last.ckpt")
    assert_same_tree(dict(resumed.state_dict()), dict(module.state_dict()), "weights")
    assert len([name for name in names(tmp_path) if name != "last.ckpt"]) == 2


def test_it_advises_whoever_saves_c11(tmp_path: Path) -> None:
    io = AsyncCheckpointIO()
    train(tmp_path, io, every(tmp_path, 8, save_top_k=1), max_steps=100)
    assert io.measurements()["checkpoint/interval_batches"] >= 1
    assert io.measurements()["checkpoint/overhead_percent"] >= 0


def test_the_files_of_other_runs_stay_c11(tmp_path: Path) -> None:
    """Two folds with one object, and a run that goes on elsewhere from one of their files."""
    io = AsyncCheckpointIO(frequency="drive")
    for fold in ("a", "b"):
        train(tmp_path / fold, io, max_steps=150)
    files = {fold: sorted((tmp_path / fold / "checkpoints").iterdir()) for fold in ("a", "b")}
    assert min(len(found) for found in files.values()) >= 2
    assert all(path.exists() for path in files["a"])
    start = (tmp_path / "a" / "checkpoints" / "last.ckpt").resolve()
    train(tmp_path / "c", AsyncCheckpointIO(frequency="drive"), max_steps=300, resume=start)
    assert sorted((tmp_path / "a" / "checkpoints").iterdir()) == files["a"]
    assert list((tmp_path / "c" / "checkpoints").iterdir())


class Counts(Callback):
    """Stands behind the one that saves, and has a state that each batch changes."""

    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.batches}


def test_all_callbacks_have_seen_the_batch_that_is_saved_c6(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path, driving(tmp_path), Counts(), max_steps=30)
    saved = torch.load(tmp_path / "ck" / "last.ckpt", weights_only=True)
    assert saved["callbacks"]["Counts"]["batches"] == saved["global_step"]
    assert [type(callback).__name__ for callback in trainer.callbacks].count("Autosave") == 0, "it left"


def test_an_interval_is_found_though_writing_takes_many_steps_c11(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def slow(*arguments: Any) -> int:
        time.sleep(0.5)
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", slow)
    io = driving(tmp_path)
    train(tmp_path, io, max_steps=600)
    step_seconds = io._autosave.tuner.step_seconds
    assert step_seconds is not None
    writing = 0.5 / step_seconds  # in batches; when the interval was chosen a batch may have taken twice the time
    assert io.measurements()["checkpoint/interval_batches"] > writing / 2, "else one would begin in another"


def test_a_state_over_the_cap_is_driven_too_c11(tmp_path: Path) -> None:
    io = driving(tmp_path, memory_cap="64KiB")
    train(tmp_path, io, max_steps=150)
    measured = io.measurements()
    assert measured["checkpoint/interval_batches"] >= 1
    assert measured["checkpoint/written"] == measured["checkpoint/saves"]


def test_a_state_over_the_cap_that_cannot_be_written_follows_on_error_c10(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FullDisk(monkeypatch, after=0)
    with pytest.raises(CheckpointSaveError, match="No space left"):
        train(tmp_path, AsyncCheckpointIO(memory_cap="64KiB"), every(tmp_path, 2))
    with pytest.warns(UserWarning, match="No space left"):
        trainer, _ = train(tmp_path, AsyncCheckpointIO(memory_cap="64KiB", on_error="warn"), every(tmp_path, 2))
    assert trainer.global_step == 12


def test_batches_count_whatever_steps_they_make_c11(tmp_path: Path) -> None:
    """Two optimizers make two steps of the Trainer in a batch."""
    io = driving(tmp_path, keep=100)
    train(tmp_path, io, module=demo_model(ManualModel), max_steps=80)
    assert steps(tmp_path)


def test_accumulated_batches_are_not_saved_between_c11(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path, driving(tmp_path, keep=100), max_steps=40, accumulate_grad_batches=2)
    assert trainer.global_step == 40
    assert steps(tmp_path)
    for step in steps(tmp_path):
        loops = torch.load(tmp_path / "ck" / f"step={step}.ckpt", weights_only=True)["loops"]["fit_loop"]
        assert loops["epoch_loop.batch_progress"]["total"]["ready"] % 2 == 0
