"""Checkpoints of two ranks with sharded parameters: with and without offload, as folders and as files (O3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_efficient import OffloadFSDP2Strategy
from tests.helpers.fitting import assert_same_tree, make_trainer
from tests.helpers.ranks import run_on_two_ranks
from tests.offload.sharding import (
    AFTER,
    RANKS,
    STEPS,
    assert_same_checkpoints,
    contents,
    local,
    ours,
    plain,
    run,
    sharded,
)
from tests.technique_settings import demo_data

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


def resumed(rank: int, root: Path, in_folders: bool, optimizer: str) -> None:
    form = {"save_distributed_checkpoint": in_folders}

    def go(name: str, strategy: Any, **arguments: Any) -> Any:
        return run(root / name, strategy, module=sharded(optimizer=optimizer), **arguments)

    whole, mine = go("plain", plain(**form)), go("ours", ours(**form))
    torch.distributed.barrier()
    own, theirs = mine.checkpoints[AFTER], whole.checkpoints[AFTER]
    ways = {
        "ours-ours": (own, ours(**form)),
        "ours-plain": (own, plain(**form)),
        "plain-ours": (theirs, ours(**form)),
        "plain-ours-in-memory": (theirs, ours(place=None, schedule="after_backward", **form)),
    }
    for name, (path, strategy) in ways.items():
        again = go(name, strategy, ckpt_path=path, checkpoints=(STEPS,))
        assert again.losses == whole.losses[AFTER:], name
        assert_same_tree(local(again.weights), local(whole.weights), f"{name}: weights")
        assert_same_tree(local(again.optimizers), local(whole.optimizers), f"{name}: optimizers")
        assert_same_checkpoints(again, whole, STEPS, name)
        torch.distributed.barrier()


@pytest.mark.parametrize(("in_folders", "optimizer"), [(True, "SGD"), (False, "AdamW")])
def test_resumed_runs_go_on_bit_for_bit_o3(in_folders: bool, optimizer: str, tmp_path: Path) -> None:
    run_on_two_ranks(resumed, tmp_path, tmp_path, in_folders, optimizer, timeout=300)


def between_forms(rank: int, root: Path) -> None:
    whole = run(root / "whole", plain(), checkpoints=None)
    folder = run(root / "folder", ours(), checkpoints=(AFTER,))
    file = run(root / "file", ours(save_distributed_checkpoint=False), checkpoints=(AFTER,))
    torch.distributed.barrier()
    for name, path in (("folder", folder.checkpoints[AFTER]), ("file", file.checkpoints[AFTER])):
        strategy = ours(save_distributed_checkpoint=name == "file")
        again = run(root / f"from-{name}", strategy, ckpt_path=path, checkpoints=None)
        assert again.losses == whole.losses[AFTER:], name
        assert_same_tree(local(again.weights), local(whole.weights), f"from a {name}")


def test_a_folder_goes_on_as_a_file_and_the_other_way_o3(tmp_path: Path) -> None:
    run_on_two_ranks(between_forms, tmp_path, tmp_path, timeout=300)


class Returns(pl.Callback):
    """Loads, behind a step, what was saved behind an earlier one: as the learning rate finder does."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "behind-two"
        self.state: list[Any] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == 2 and not self.state:
            trainer.save_checkpoint(self.path)
            self.state.append(self._state(trainer, pl_module))
        if trainer.global_step == 4 and len(self.state) == 1:
            trainer.strategy.load_checkpoint(self.path)
            self.state.append(self._state(trainer, pl_module))
            if isinstance(trainer.strategy, OffloadFSDP2Strategy):
                self.elsewhere = trainer.strategy.measurements()["offload/states_elsewhere"]

    @staticmethod
    def _state(trainer: pl.Trainer, module: pl.LightningModule) -> Any:
        return local([dict(module.state_dict()), trainer.optimizers[0].state_dict()["state"]])


def loaded_while_training(rank: int, root: Path, schedule: str) -> None:
    runs = []
    for name, strategy in (("plain", plain()), ("ours", ours(schedule=schedule))):
        callback = Returns(root / name)
        runs.append(run(root / name, strategy, after=[callback], checkpoints=None))
        assert_same_tree(callback.state[1], callback.state[0], name)
        if name == "ours":
            assert callback.elsewhere == len(list(runs[-1].module.parameters()))
    one, other = runs
    assert other.losses == one.losses
    assert_same_tree(local(other.optimizers), local(one.optimizers), "optimizers")


@pytest.mark.parametrize("schedule", ["in_backward", "after_backward"])
def test_a_checkpoint_is_loaded_while_state_is_elsewhere_o3(schedule: str, tmp_path: Path) -> None:
    run_on_two_ranks(loaded_while_training, tmp_path, tmp_path, schedule, timeout=200)


def evaluated(rank: int, root: Path) -> None:
    """Fit, evaluated, and fit again by the same Trainer; and evaluated by one that does not train."""
    found = []
    for name, build in (("plain", plain), ("ours", lambda: ours(memory_budget="192KiB"))):
        finished = run(root / name, build(), limit_val_batches=1)
        torch.distributed.barrier()
        trainer, module, data = finished.trainer, finished.module, demo_data()
        path = finished.checkpoints[AFTER]
        values = [trainer.validate(module, data, ckpt_path=path, verbose=False)]
        trainer.fit_loop.epoch_loop.max_steps = STEPS + 2
        trainer.fit(module, data, ckpt_path=finished.checkpoints[STEPS])
        values.append(local(dict(module.state_dict())))
        other = make_trainer(strategy=build(), **RANKS, default_root_dir=root, limit_val_batches=1)
        values.append(other.validate(sharded(), data, ckpt_path=path, verbose=False))
        found.append(values)
    assert_same_tree(found[1], found[0], "values")


def test_fit_evaluated_and_fit_again_o3(tmp_path: Path) -> None:
    run_on_two_ranks(evaluated, tmp_path, tmp_path, timeout=300)


class SavesFirst(pl.Callback):
    """Saves before the first step, where torch makes optimizer state by a step of zeros."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 0:
            trainer.save_checkpoint(self.path)


def saved_early_and_late(rank: int, root: Path) -> None:
    runs, late = [], []
    for name, strategy in (("plain", plain()), ("ours", ours())):
        runs.append(run(root / name, strategy, before=[SavesFirst(root / f"{name}-early")], checkpoints=None))
        late.append(root / f"{name}-late")
        runs[-1].trainer.save_checkpoint(late[-1])
    torch.distributed.barrier()
    one, other = runs
    assert other.losses == one.losses
    if rank == 0:
        assert_same_tree(contents(root / "ours-early"), contents(root / "plain-early"), "before the first step")
        assert_same_tree(contents(late[1]), contents(late[0]), "after training")
    assert_same_tree(
        local(other.trainer.optimizers[0].state_dict()), local(one.trainer.optimizers[0].state_dict()), "optimizer"
    )


def test_saved_before_the_first_step_and_after_the_last_o3(tmp_path: Path) -> None:
    run_on_two_ranks(saved_early_and_late, tmp_path, tmp_path, timeout=200)
