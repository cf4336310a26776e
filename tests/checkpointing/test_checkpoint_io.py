"""AsyncCheckpointIO in a Trainer: with ModelCheckpoint as users know it, through errors, and exactly resumed."""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
import warnings
import weakref
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO as LightningAsync
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_efficient import AsyncCheckpointIO, GrowAndUnshareCallback
from lightning_efficient.checkpointing import CheckpointDamagedError, CheckpointSaveError, verify
from lightning_efficient.checkpointing.snapshot import Snapshot
from lightning_efficient.coordination import SnapshotSource, find
from lightning_efficient.demos import ByteLanguageModel
from tests.helpers.fitting import assert_same_tree
from tests.helpers.quick import train
from tests.technique_settings import demo_data, demo_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def every(root: Path, steps: int = 2, **arguments: Any) -> ModelCheckpoint:
    return ModelCheckpoint(root / "ck", "{step}", every_n_train_steps=steps, **({"save_top_k": -1} | arguments))


def names(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "ck").iterdir())


# -- what is on the disk ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"save_top_k": 1},
        {"save_top_k": 2, "monitor": "step", "mode": "max"},
        {"save_top_k": 2, "monitor": "step", "mode": "min", "save_last": True},
        {"save_top_k": 1, "monitor": "step", "mode": "max", "save_last": "link"},
        {"save_top_k": -1, "save_last": "link"},
        {"save_top_k": 0, "save_last": True},
        {"save_top_k": 1, "save_weights_only": True},
    ],
    ids=str,
)
def test_the_files_are_those_of_plain_lightning_c10(settings: dict[str, Any], tmp_path: Path) -> None:
    plain, _ = train(tmp_path / "plain", every(tmp_path / "plain", **settings))
    ours, _ = train(tmp_path / "ours", AsyncCheckpointIO(), every(tmp_path / "ours", **settings))
    assert names(tmp_path / "ours") == names(tmp_path / "plain")
    for name in names(tmp_path / "ours"):
        path, other = tmp_path / "ours" / "ck" / name, tmp_path / "plain" / "ck" / name
        assert path.is_symlink() == other.is_symlink()
        verify(path)
        loaded, expected = torch.load(path, weights_only=True), torch.load(other, weights_only=True)
        assert_same_tree(dict(loaded["state_dict"]), dict(expected["state_dict"]), name)
        assert loaded["global_step"] == expected["global_step"]
    for which in ("best_model_path", "last_model_path"):
        path, other = (Path(getattr(trainer.checkpoint_callback, which)) for trainer in (ours, plain))
        assert path.name == other.name
        assert path.exists() == other.exists()


def test_a_stock_trainer_goes_on_from_it_c10(tmp_path: Path) -> None:
    train(tmp_path, AsyncCheckpointIO(), every(tmp_path, 4))
    _, whole = train(tmp_path / "plain", max_steps=12)
    _, resumed = train(tmp_path / "stock", resume=tmp_path / "ck" / "step=4.ckpt")
    assert_same_tree(dict(resumed.state_dict()), dict(whole.state_dict()), "weights")


def test_equal_names_get_versions_while_the_first_is_pending_c10(tmp_path: Path) -> None:
    def save() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "ck", "same", every_n_train_steps=2, save_top_k=-1, monitor="step")

    train(tmp_path, AsyncCheckpointIO(), save())
    ours = names(tmp_path)
    for path in (tmp_path / "ck").iterdir():
        path.unlink()
    train(tmp_path, save())
    assert ours == names(tmp_path)


def test_saved_after_validation_and_at_the_end_of_epochs_c4(tmp_path: Path) -> None:
    for where in ("validation", "epoch"):
        save = ModelCheckpoint(
            tmp_path / where / "ck", "{step}", save_top_k=-1, save_on_train_epoch_end=where == "epoch"
        )
        train(tmp_path / where, AsyncCheckpointIO(), save, limit_val_batches=1, num_sanity_val_steps=0)
        plain = ModelCheckpoint(
            tmp_path / where / "p", "{step}", save_top_k=-1, save_on_train_epoch_end=where == "epoch"
        )
        train(tmp_path / where, plain, limit_val_batches=1, num_sanity_val_steps=0)
        assert names(tmp_path / where)
        for name in names(tmp_path / where):
            one, other = (torch.load(tmp_path / where / folder / name, weights_only=True) for folder in ("ck", "p"))
            assert_same_tree(dict(one["state_dict"]), dict(other["state_dict"]), name)


# -- nothing tears ---------------------------------------------------------------------------------------------------


class Normed(pl.LightningModule):
    """BatchNorm, whose buffers change in forward, a fused optimizer, and weights that are clamped after each step."""

    def __init__(self, clamp: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Linear(64, 1))
        self.clamp = clamp
        self.truth: dict[int, dict[str, torch.Tensor]] = {}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(torch.randn(16, 32)).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        if self.clamp:
            self.net[0].weight.data.clamp_(-0.05, 0.05)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)


class Truth(Callback):
    """The state at the moment of each save."""

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        pl_module.truth[trainer.global_step] = {n: v.clone() for n, v in checkpoint["state_dict"].items()}


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
def test_no_checkpoint_is_torn_c1_c2_c4(clamp: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Normed(clamp)
    io = AsyncCheckpointIO(verify="checksum")
    later: list[int] = []
    real = io.engine.save

    def save(*arguments: Any, **more: Any) -> Any:
        saved = real(*arguments, **more)
        later.append(saved.later_bytes)
        return saved

    monkeypatch.setattr(io.engine, "save", save)
    train(tmp_path, Truth(), io, every(tmp_path, 1), module=module, max_steps=30)
    for step, truth in module.truth.items():
        saved = torch.load(tmp_path / "ck" / f"step={step}.ckpt", weights_only=True)
        assert_same_tree(dict(saved["state_dict"]), truth, f"step {step}")
    assert len(module.truth) == 30
    assert len(io.engine.planner.volatile) == int(clamp)
    assert max(later) > 0


# -- exact resume ----------------------------------------------------------------------------------------------------


def dropout_model() -> ByteLanguageModel:
    return demo_model(dropout=0.2)


def test_dropout_draws_what_it_would_have_drawn_c6(tmp_path: Path) -> None:
    pl.seed_everything(3, verbose=False)
    _, whole = train(tmp_path, AsyncCheckpointIO(), every(tmp_path, 1), module=dropout_model())
    for step in (1, 5, 8, 11):
        pl.seed_everything(99, verbose=False)
        resume = tmp_path / "ck" / f"step={step}.ckpt"
        _, resumed = train(tmp_path / "r", AsyncCheckpointIO(), module=dropout_model(), resume=resume)
        assert_same_tree(dict(resumed.state_dict()), dict(whole.state_dict()), f"resumed at {step}")


class Order(pl.LightningModule):
    """Notes the order of the batches of a plain, shuffled DataLoader."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)
        self.seen: list[list[float]] = []

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.arange(12.0).view(12, 1), batch_size=3, shuffle=True)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch.flatten().tolist())
        return self.net(batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_order_of_the_next_epoch_is_what_it_would_have_been_c6(tmp_path: Path) -> None:
    def run(root: Path, resume: Any = None) -> list[list[float]]:
        module = Order()
        save = [] if resume else [ModelCheckpoint(root, "{step}", save_top_k=-1)]
        trainer = pl.Trainer(
            max_epochs=4,
            default_root_dir=root,
            callbacks=[AsyncCheckpointIO(), *save],
            enable_checkpointing=not resume,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, ckpt_path=resume)
        return module.seen

    pl.seed_everything(1, verbose=False)
    whole = run(tmp_path / "whole")
    for epoch in (1, 2, 3):
        pl.seed_everything(1, verbose=False)
        assert run(tmp_path / f"{epoch}", tmp_path / "whole" / f"step={4 * epoch}.ckpt") == whole[4 * epoch :]


# -- errors ------------------------------------------------------------------------------------------------------------


class FullDisk:
    """No room left from the ``after``-th write on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int, until: int = 10**9) -> None:
        self.writes = 0
        real = os.pwrite

        def pwrite(*arguments: Any) -> int:
            self.writes += 1
            if after < self.writes <= until:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments)

        monkeypatch.setattr(os, "pwrite", pwrite)


def test_a_full_disk_ends_the_run_within_a_step_c10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FullDisk(monkeypatch, after=2)
    save = every(tmp_path, 2, save_top_k=1)
    with pytest.raises(
        CheckpointSaveError, match=r"step=6.ckpt' of step 6 could not be saved: OSError: .*No space"
    ) as e:
        train(tmp_path, AsyncCheckpointIO(), save, max_steps=100)
    assert isinstance(e.value.__cause__, OSError)
    assert names(tmp_path) == ["step=4.ckpt"]
    verify(tmp_path / "ck" / "step=4.ckpt")


def test_warn_goes_on_and_names_only_files_that_are_there_c10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FullDisk(monkeypatch, after=2)
    save = every(tmp_path, 2, save_top_k=1, monitor="step", mode="max", save_last="link")
    io = AsyncCheckpointIO(on_error="warn")
    with pytest.warns(UserWarning, match="No space left on device"):
        trainer, _ = train(tmp_path, io, save)
    assert trainer.global_step == 12
    assert names(tmp_path) == ["last.ckpt", "step=4.ckpt"]
    assert (tmp_path / "ck" / "last.ckpt").exists()
    assert not save.best_model_path or Path(save.best_model_path).exists()
    assert Path(save.last_model_path).exists()
    assert any("No space left" in event.text for event in io.events())


def test_retry_outlasts_a_short_trouble_c10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FullDisk(monkeypatch, after=2, until=4)
    io = AsyncCheckpointIO(on_error="retry")
    monkeypatch.setattr(io.engine._writer, "_retry_seconds", 0.01)
    train(tmp_path, io, every(tmp_path, 2, save_top_k=1))
    assert names(tmp_path) == ["step=12.ckpt"]


def test_an_error_at_the_very_end_is_not_lost_c10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FullDisk(monkeypatch, after=0)
    with pytest.raises(CheckpointSaveError, match=r"step=12\.ckpt"):
        train(tmp_path, AsyncCheckpointIO(), every(tmp_path, 12))


class MovesAWeight(Callback):
    """After the save of step 6 and before its copy, in a way that torch counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moved = threading.Event()
        real = Snapshot._copy_piece

        def copy(snapshot: Snapshot, *arguments: Any) -> None:
            if snapshot.step == 6 and threading.current_thread() is not threading.main_thread():
                self.moved.wait(30)
            real(snapshot, *arguments)

        monkeypatch.setattr(Snapshot, "_copy_piece", copy)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 6:
            with torch.no_grad():
                pl_module.model.blocks[0].attention.output.weight.mul_(0.9)
            self.moved.set()


@pytest.mark.parametrize("on_error", ["warn", "retry"])
def test_a_torn_snapshot_is_no_file_and_the_next_one_is_whole_c4(
    on_error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io = AsyncCheckpointIO(on_error=on_error)
    with pytest.warns(UserWarning, match=r"step=6.ckpt'.*'state_dict.model.blocks.0.attention.output.weight' changed"):
        train(tmp_path, io, MovesAWeight(monkeypatch), every(tmp_path, 2))
    assert names(tmp_path) == [f"step={step}.ckpt" for step in (10, 12, 2, 4, 8)]
    assert len(io.engine.planner.volatile) == 1, "it is copied at once from then on"


def test_the_last_save_is_not_skipped_c10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.2)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    io = AsyncCheckpointIO(when_busy="skip")
    train(tmp_path, io, every(tmp_path, 1, save_top_k=1))
    assert io.measurements()["checkpoint/skipped"] > 0
    assert names(tmp_path) == ["step=12.ckpt"]


@pytest.mark.filterwarnings("ignore:AsyncCheckpointIO is in `plugins` only")
def test_a_save_after_the_run_is_there_when_it_returns_c10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The object stays the Trainer's IO if it was given as a plugin, and nobody would ask it any more."""
    for callbacks in ([], [AsyncCheckpointIO()]):
        io = callbacks[0] if callbacks else AsyncCheckpointIO()
        trainer, _ = train(tmp_path, *callbacks, plugins=[io])
        trainer.save_checkpoint(tmp_path / "after.ckpt")
        verify(tmp_path / "after.ckpt")
        with monkeypatch.context() as patch:
            FullDisk(patch, after=0)
            with pytest.raises(CheckpointSaveError, match="No space left"):
                trainer.save_checkpoint(tmp_path / "more.ckpt")


class Fails(Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 6:
            raise KeyError("the user's own")


def test_the_users_exception_is_not_masked_c10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FullDisk(monkeypatch, after=0)
    with pytest.raises(KeyError, match="the user's own"), pytest.warns(UserWarning, match="No space left"):
        train(tmp_path, Fails(), AsyncCheckpointIO(), every(tmp_path, 6))


def test_what_was_asked_for_is_written_before_an_exception_leaves_c10(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        train(tmp_path, AsyncCheckpointIO(), every(tmp_path, 2), Fails())
    assert names(tmp_path) == ["step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]
    verify(tmp_path / "ck" / "step=6.ckpt")


def test_after_a_failed_fit_the_next_one_starts_afresh_c10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io = AsyncCheckpointIO()
    with monkeypatch.context() as patch:
        FullDisk(patch, after=0)
        with pytest.raises(CheckpointSaveError):
            train(tmp_path, io, every(tmp_path, 2))
    train(tmp_path, io, every(tmp_path, 12))
    assert names(tmp_path) == ["step=12.ckpt"]


class CannotPickle(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"function": lambda: None}


def test_what_cannot_be_pickled_is_said_at_once_c10(tmp_path: Path) -> None:
    with pytest.raises(CheckpointSaveError, match=r"cannot be pickled.*state_dict of your callbacks"):
        train(tmp_path, AsyncCheckpointIO(), CannotPickle(), every(tmp_path, 2))


# -- loading ---------------------------------------------------------------------------------------------------------


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_refused_by_name_c10(tmp_path: Path) -> None:
    train(tmp_path, AsyncCheckpointIO(), every(tmp_path, 4))
    damage(tmp_path / "ck" / "step=8.ckpt")
    with pytest.raises(CheckpointDamagedError, match=r"step=8.ckpt' is damaged: the bytes of '"):
        train(tmp_path, AsyncCheckpointIO(), resume=tmp_path / "ck" / "step=8.ckpt")


def test_auto_takes_the_newest_intact_one_beside_it_c10(tmp_path: Path) -> None:
    _, whole = train(tmp_path, AsyncCheckpointIO(), every(tmp_path, 2))
    for step in (8, 12):
        damage(tmp_path / "ck" / f"step={step}.ckpt")
    resume = tmp_path / "ck" / "step=12.ckpt"
    with pytest.warns(UserWarning, match=r"Loading '.*step=10.ckpt' instead"):
        trainer, resumed = train(tmp_path, AsyncCheckpointIO(resume="auto"), resume=resume)
    assert trainer.global_step == 12
    assert_same_tree(dict(resumed.state_dict()), dict(whole.state_dict()), "weights")


def test_a_pending_save_is_waited_for_c10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the learning-rate finder does: it saves, trains, and loads what it saved."""
    io = AsyncCheckpointIO()
    real, gate = os.pwrite, threading.Event()

    def slow(*arguments: Any) -> int:
        gate.wait(0.05)
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", slow)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        finder = LearningRateFinder(num_training_steps=4, update_attr=False)
        train(tmp_path, io, finder, module=demo_model(learning_rate=1e-3))


def test_strays_of_killed_runs_are_swept_c10(tmp_path: Path) -> None:
    (tmp_path / "ck").mkdir()
    stray = tmp_path / "ck" / ".lightning-efficient-99999-0-step=2.ckpt.tmp"
    stray.write_bytes(b"half")
    (tmp_path / "ck" / "mine.tmp").write_text("the user's")
    train(tmp_path, AsyncCheckpointIO(), every(tmp_path, 6))
    assert names(tmp_path) == ["mine.tmp", "step=12.ckpt", "step=6.ckpt"]


# -- where it is put -------------------------------------------------------------------------------------------------


def test_as_a_plugin_alone_it_copies_everything_and_says_so_once_c5(tmp_path: Path) -> None:
    io = AsyncCheckpointIO()
    with pytest.warns(UserWarning, match="in `plugins` only") as said:
        _, module = train(tmp_path, every(tmp_path, 2, save_top_k=1), plugins=[io])
    assert sum("in `plugins` only" in str(w.message) for w in said) == 1
    assert names(tmp_path) == ["step=12.ckpt"]
    saved = torch.load(tmp_path / "ck" / "step=12.ckpt", weights_only=True)
    assert_same_tree(dict(saved["state_dict"]), dict(module.state_dict()), "weights")


def test_in_both_places_it_is_one_object_c5(tmp_path: Path) -> None:
    io = AsyncCheckpointIO()
    train(tmp_path, io, every(tmp_path, 2), plugins=[io])
    assert len(names(tmp_path)) == 6


@pytest.mark.parametrize("plugin", [AsyncCheckpointIO, LightningAsync])
def test_two_that_write_are_refused_c5(plugin: Any, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"two AsyncCheckpointIO|would both write"):
        train(tmp_path, AsyncCheckpointIO(), plugins=[plugin()])


def test_the_trainer_gets_its_own_io_back(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path, AsyncCheckpointIO(), every(tmp_path, 2))
    assert type(trainer.strategy.checkpoint_io) is TorchCheckpointIO
    trainer.validate(demo_model(), demo_data(), verbose=False)


def test_a_save_asked_for_by_a_signal_is_there_when_it_returns_c10(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Requeue(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                path = tmp_path / "hpc_ckpt_1.ckpt"
                trainer.save_checkpoint(path)
                seen.append(path.exists())

    train(tmp_path, AsyncCheckpointIO(), Requeue())
    assert seen == [True]


def test_growth_in_the_same_run_c2(tmp_path: Path) -> None:
    """Parameters that come and go are followed."""
    grow = {"stages": [{"depth": 2, "until": 4}, {"depth": 4}]}
    io = AsyncCheckpointIO(verify="checksum")
    _, whole = train(tmp_path, GrowAndUnshareCallback(**grow), io, every(tmp_path, 1))
    balance = io.balance()
    assert balance.cost_ms > io.measurements()["checkpoint/blocked_ms"] > 0  # of all saves, not of the last one
    assert balance.gain_ms > 0
    assert "files, the last of" in balance.verdict
    _, plain = train(tmp_path / "plain", GrowAndUnshareCallback(**grow))
    assert_same_tree(dict(whole.state_dict()), dict(plain.state_dict()), "weights")
    for step in (3, 4, 5):
        _, resumed = train(
            tmp_path, GrowAndUnshareCallback(**grow), AsyncCheckpointIO(), resume=tmp_path / "ck" / f"step={step}.ckpt"
        )
        assert_same_tree(dict(resumed.state_dict()), dict(whole.state_dict()), f"resumed at {step}")


# -- what stays in memory ----------------------------------------------------------------------------------------------


def test_others_find_the_last_good_state(tmp_path: Path) -> None:
    class Asks(Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            source = find(trainer, SnapshotSource)
            io.engine.drain()
            self.state = source.last_good().load()
            source.discard_after(9)
            self.left = source.last_good()

    io, asks = AsyncCheckpointIO(in_memory=1), Asks()
    train(tmp_path, io, asks, every(tmp_path, 5))
    assert asks.state["global_step"] == 10
    saved = torch.load(tmp_path / "ck" / "step=10.ckpt", weights_only=True)
    assert_same_tree(dict(asks.state["state_dict"]), dict(saved["state_dict"]), "weights")
    assert asks.left is None


def test_a_new_fit_does_not_find_the_last_ones_state(tmp_path: Path) -> None:
    class Asks(Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            self.found = find(trainer, SnapshotSource).last_good()

    io, asks = AsyncCheckpointIO(in_memory=1), Asks()
    train(tmp_path, io, every(tmp_path, 5))
    assert io.last_good() is not None
    train(tmp_path, io, asks, every(tmp_path, 5))
    assert asks.found is None


@pytest.mark.parametrize("in_memory", [0, 1])
def test_the_model_is_let_go_after_the_run(in_memory: int, tmp_path: Path) -> None:
    """The object may live on; it keeps copies, not what they were made of."""
    io = AsyncCheckpointIO(in_memory=in_memory)
    trainer, module = train(tmp_path, io, every(tmp_path, 2))
    weight = weakref.ref(module.model.blocks[0].attention.output.weight.untyped_storage())
    moments = [weakref.ref(state["exp_avg"]) for state in trainer.optimizers[0].state.values()]
    del trainer, module
    for name in ("log", "log_dict"):  # which Lightning leaves in callbacks
        io.__dict__.pop(name, None)
    gc.collect()
    assert weight() is None
    assert not any(moment() is not None for moment in moments)


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory_cap": "lots"}, "memory_cap='lots' is no amount of memory"),
        ({"in_memory": -1}, "in_memory=-1 is no number of checkpoints"),
        ({"when_busy": "panic"}, "when_busy='panic' is not allowed. Use one of 'wait', 'skip', 'eager'"),
        ({"verify": True}, "verify=True is not allowed"),
        ({"resume": "always"}, "resume='always' is not allowed"),
        ({"on_error": "ignore"}, "on_error='ignore' is not allowed"),
        ({"frequency": "often"}, "frequency='often' is not allowed"),
        ({"keep": 0}, "keep=0 is no number of checkpoints. Use 1 or more"),
        ({"max_overhead": 3.5}, "max_overhead=3.5 is no part of the run's time"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AsyncCheckpointIO(**arguments)


def test_remote_paths_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'s3://bucket/a\.ckpt' is on remote storage.*local_dir="):
        AsyncCheckpointIO().save_checkpoint({}, "s3://bucket/a.ckpt")
    with pytest.raises(TypeError, match="no storage_options"):
        AsyncCheckpointIO().save_checkpoint({}, "a.ckpt", storage_options={})
