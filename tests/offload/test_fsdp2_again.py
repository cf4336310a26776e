"""Two ranks with sharded parameters (FSDP2) for which everything is placed anew in the midst of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_efficient.coordination import ParameterChange
from tests.helpers.fitting import assert_same_tree
from tests.helpers.ranks import run_on_two_ranks
from tests.offload.sharding import DISK, local, ours, plain, run

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


class PlacesAnew(pl.Callback):
    """As whoever changes parameters has it done; counts the hooks of all modules in each batch."""

    def __init__(self) -> None:
        self.hooks: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        strategy: Any = trainer.strategy
        if trainer.global_step in (2, 3):
            strategy.before_parameters_change(trainer)
            strategy.on_parameters_changed(trainer, ParameterChange(reason="for this test"))
        self.hooks.append(sum(len(part._forward_pre_hooks) for part in module.modules()))


def placed_anew(rank: int, root: Path) -> None:
    place = {**DISK, "activation": "disk"}
    expected, counts = run(root / "plain", plain(), checkpoints=None), PlacesAnew()
    found = run(root / "ours", ours(place=place), before=[counts], checkpoints=None)
    assert found.losses == expected.losses
    assert_same_tree(local(found.optimizers), local(expected.optimizers), "optimizers")
    assert len(set(counts.hooks)) == 1, counts.hooks


def test_placed_anew_leaves_no_hooks_behind(tmp_path: Path) -> None:
    run_on_two_ranks(placed_anew, tmp_path, tmp_path, timeout=200)
