"""Loggers that upload checkpoints, files that killed runs left, and the paths that callbacks name."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger

from lightning_efficient import AsyncCheckpointIO
from lightning_efficient.checkpointing import verify
from tests.helpers.quick import train

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


def every(root: Path, steps: int = 2, **arguments: Any) -> ModelCheckpoint:
    return ModelCheckpoint(root / "ck", "{step}", every_n_train_steps=steps, **({"save_top_k": -1} | arguments))


def names(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "ck").iterdir())


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are over before their checkpoints are there."""
    real = os.pwrite

    def pwrite(*arguments: Any) -> int:
        time.sleep(0.1)
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)


# -- loggers -----------------------------------------------------------------------------------------------------------


class Uploads(Logger):
    """Opens what a callback names, as a logger does that uploads it."""

    name = "uploads"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.told = 0
        self.uploaded: set[str] = set()

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, *_: Any, **__: Any) -> None:
        pass

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self.told += 1
        for path in {checkpoint_callback.best_model_path, checkpoint_callback.last_model_path} - {""}:
            verify(Path(path))
            self.uploaded.add(Path(path).name)


@pytest.mark.parametrize("save_last", [None, True, "link"])
def test_loggers_are_told_when_the_file_is_there(save_last: Any, slow_disk: None, tmp_path: Path) -> None:
    ours, plain = Uploads(), Uploads()
    train(tmp_path, AsyncCheckpointIO(), every(tmp_path, 4, save_last=save_last), logger=ours)
    train(tmp_path / "plain", every(tmp_path / "plain", 4, save_last=save_last), logger=plain)
    assert ours.told == plain.told
    assert {"step=12.ckpt"} <= ours.uploaded <= plain.uploaded


def test_they_are_told_of_the_best_of_several(slow_disk: None, tmp_path: Path) -> None:
    logger = Uploads()
    save = every(tmp_path, 3, save_top_k=2, monitor="step", mode="min")
    train(tmp_path, AsyncCheckpointIO(), save, logger=logger)
    assert logger.uploaded == {"step=3.ckpt"}


def test_they_are_told_during_the_run(tmp_path: Path) -> None:
    class Waits(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 5:
                io.engine.drain()
            if trainer.global_step == 6:
                self.told = logger.told

    logger, io, waits = Uploads(), AsyncCheckpointIO(), Waits()
    train(tmp_path, io, waits, every(tmp_path, 4), logger=logger)
    assert waits.told == 1


class Fails(Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 6:
            raise KeyError("the user's own")


@pytest.mark.parametrize("on_exception", [False, True])
def test_they_are_told_after_an_exception(on_exception: bool, slow_disk: None, tmp_path: Path) -> None:
    logger = Uploads()
    save = every(tmp_path, 3, save_last=True, save_on_exception=on_exception)
    with pytest.raises(KeyError, match="the user's own"):
        train(tmp_path, Fails(), AsyncCheckpointIO(), save, logger=logger)
    assert logger.uploaded == {"last.ckpt", "step=6.ckpt"}
    assert logger.told == 4


@pytest.mark.parametrize("fails", [False, True])
def test_a_logger_is_left_as_it_was(fails: bool, tmp_path: Path) -> None:
    own: list[Any] = []
    patched, plain = Uploads(), Uploads()
    patched.after_save_checkpoint = own.append  # type: ignore[method-assign]
    before = [dict(vars(logger)).keys() for logger in (patched, plain)]
    for _ in range(2):
        try:
            train(
                tmp_path,
                AsyncCheckpointIO(),
                every(tmp_path, 4),
                *([Fails()] if fails else []),
                logger=[patched, plain],
            )
        except KeyError:
            assert fails
    assert [vars(logger).keys() for logger in (patched, plain)] == before
    assert patched.after_save_checkpoint == own.append
    assert plain.after_save_checkpoint.__func__ is Uploads.after_save_checkpoint  # type: ignore[attr-defined]
    assert len(own) == plain.told == (2 if fails else 6)


def test_a_logger_that_is_there_twice_is_told_twice(tmp_path: Path) -> None:
    logger = Uploads()
    train(tmp_path, AsyncCheckpointIO(), every(tmp_path, 12), logger=[logger, logger])
    assert logger.told == 2
    assert "after_save_checkpoint" not in vars(logger)


def test_they_are_not_told_of_a_file_that_did_not_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = Uploads()
    full_disk(monkeypatch, after=1)
    with pytest.warns(UserWarning, match="No space left"):
        train(tmp_path, AsyncCheckpointIO(on_error="warn"), every(tmp_path, 4, save_top_k=1), logger=logger)
    assert logger.uploaded == {"step=4.ckpt"}


# -- leftovers ---------------------------------------------------------------------------------------------------------

STRAY = ".lightning-efficient-99999-0-step=2.ckpt.tmp"


def test_strays_beside_the_checkpoint_to_resume_from_are_swept_c10(tmp_path: Path) -> None:
    train(tmp_path, AsyncCheckpointIO(), every(tmp_path, 4))
    (tmp_path / "ck" / STRAY).write_bytes(b"half")
    (tmp_path / "ck" / "mine.tmp").write_text("the user's")
    save = every(tmp_path / "other", 4)
    train(tmp_path / "other", AsyncCheckpointIO(), save, resume=tmp_path / "ck" / "step=8.ckpt")
    assert names(tmp_path) == ["mine.tmp", "step=12.ckpt", "step=4.ckpt", "step=8.ckpt"]


@pytest.mark.parametrize("resume", ["step=8.ckpt", "./step=8.ckpt", "../ck/step=8.ckpt"])
def test_however_it_is_named_c10(resume: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, AsyncCheckpointIO(), every(tmp_path, 8))
    (tmp_path / "ck" / STRAY).write_bytes(b"half")
    monkeypatch.chdir(tmp_path / "ck")
    train(tmp_path / "other", AsyncCheckpointIO(), resume=resume)
    assert names(tmp_path) == ["step=8.ckpt"]


# -- paths that are named ----------------------------------------------------------------------------------------------


def full_disk(monkeypatch: pytest.MonkeyPatch, *, after: int, until: int = 10**9) -> None:
    """No room left from one save on, until another."""
    real, files = os.pwrite, set()

    def pwrite(descriptor: int, *arguments: Any) -> int:
        files.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        if after < len(files) <= until:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, *arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.filterwarnings("ignore:AsyncCheckpointIO. .*No space left")
@pytest.mark.parametrize("save_top_k", [1, -1])
def test_the_best_is_the_newest_that_is_there_c10(
    save_top_k: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, after=2)
    save = every(tmp_path, save_top_k=save_top_k)
    trainer, module = train(tmp_path, AsyncCheckpointIO(on_error="warn"), save)
    assert trainer.global_step == 12
    assert save.best_model_path == str(tmp_path / "ck" / "step=4.ckpt")
    verify(Path(save.best_model_path))
    trainer.validate(module, trainer.datamodule, ckpt_path="best", verbose=False)


@pytest.mark.filterwarnings("ignore:AsyncCheckpointIO. .*No space left")
def test_the_best_is_the_best_that_is_there_c10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_disk(monkeypatch, after=3)
    save = every(tmp_path, save_top_k=2, monitor="step", mode="max")
    train(tmp_path, AsyncCheckpointIO(on_error="warn"), save)
    assert names(tmp_path) == ["step=4.ckpt", "step=6.ckpt"]
    assert not [path for path in save.best_k_models if not Path(path).exists()]
    assert save.best_model_path == str(tmp_path / "ck" / "step=6.ckpt")


def test_what_is_not_saved_for_want_of_memory_is_not_named_c10(slow_disk: None, tmp_path: Path) -> None:
    logger, io, save = Uploads(), AsyncCheckpointIO(when_busy="skip", memory_cap="3MiB"), every(tmp_path, 1)
    train(tmp_path, io, save, logger=logger)
    assert io.measurements()["checkpoint/skipped"] > 0
    assert Path(save.best_model_path).exists()


def test_paths_of_a_run_without_a_failure_are_those_of_plain_lightning(slow_disk: None, tmp_path: Path) -> None:
    saves = [every(tmp_path / who, 3, save_top_k=2, monitor="step", save_last=True) for who in ("ours", "plain")]
    train(tmp_path, AsyncCheckpointIO(), saves[0])
    train(tmp_path, saves[1])
    ours, plain = (
        [Path(path).name for path in (save.best_model_path, save.last_model_path, *save.best_k_models)]
        for save in saves
    )
    assert ours == plain
    assert saves[0].best_model_score == saves[1].best_model_score
