"""Batches that spike, done again where optimizer state is elsewhere, and where the model has grown (X3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_efficient import (
    ActivationCompressionPlugin,
    AsyncCheckpointIO,
    GrowAndUnshareCallback,
    OffloadDDPStrategy,
    OffloadStrategy,
    RollbackPrecision,
)
from tests.helpers.fitting import Run, assert_same_tree, fit
from tests.helpers.ranks import run_on_two_ranks
from tests.precision.spiking import GUARD, AtBatch, Batches, Net, guarded, train
from tests.technique_settings import demo_data, demo_model

DISK = {"optimizer_state": "disk"}


@torch.no_grad()
def damage(module: Any) -> None:
    module.net[-1].weight.mul_(1e4)


@pytest.mark.parametrize("place", [DISK, DISK | {"parameter": "disk"}], ids=["state", "parameters too"])
def test_snapshots_of_checkpoints_are_restored_into_the_tiers(place: dict[str, str], tmp_path: Path) -> None:
    def go(name: str, *more: Callback) -> Any:
        every = ModelCheckpoint(tmp_path / name, every_n_train_steps=4, save_top_k=-1)
        strategy = OffloadStrategy(offload_dir=str(tmp_path), place=place)
        return train(guarded(), AsyncCheckpointIO(in_memory=1), *more, every, root=tmp_path, strategy=strategy)

    one, other = go("one", AtBatch(10, damage)), go("other")
    assert one.counts == {"spikes": 1, "rollbacks": 1, "healed_from_snapshot": 1}
    assert "snapshot of step 8" in one.plugin.events()[0].text
    assert_same_tree(one.state, other.state, "state")
    assert one.trainer.strategy.measurements()["offload/states_elsewhere"] > 0


def test_a_batch_that_is_bad_in_itself_is_left_out_where_nobody_keeps_snapshots(tmp_path: Path) -> None:
    def go(**data: Any) -> Any:
        strategy = OffloadStrategy(offload_dir=str(tmp_path), place=DISK)
        plugin = guarded(spike_guard=GUARD | {"snapshots": 0})
        return train(plugin, data=Batches(**data), root=tmp_path, strategy=strategy)

    one, other = go(bad={9: 100.0}), go(without=(9,))
    assert one.counts == {"spikes": 1, "skipped": 1}
    assert_same_tree(one.state, other.state, "state")


class DamagedAt(AtBatch):
    """The head is far too large from this step of the run on, until somebody notices."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.at:
            self.action(pl_module)


@torch.no_grad()
def damage_head(module: Any) -> None:
    module.model.head.weight.mul_(1e4)


def test_all_five_go_back_behind_the_growth(tmp_path: Path) -> None:
    """Growth at step 4, a snapshot at step 8, damage at step 10: as if that had not been."""

    def go(name: str, *more: Callback) -> Run:
        plugin = RollbackPrecision(
            high="fp32", pre_learning_steps=1000, only_if_faster=False, spike_guard=GUARD | {"factor": 10.0}
        )
        callbacks = [
            GrowAndUnshareCallback(mode="stack", stages=[{"depth": 1, "until": 4}, {"depth": 2}]),
            AsyncCheckpointIO(in_memory=1),
            ActivationCompressionPlugin(bits="lossless"),  # others draw other noise when a batch is replayed
            *more,
        ]
        return fit(
            None, module=demo_model(layers=2), data=demo_data(), root=tmp_path / name,
            build={
                "callbacks": callbacks, "plugins": [plugin], "strategy": OffloadStrategy(offload_dir="swap", place=DISK)
            },
            checkpoints=(8,), max_steps=12,
        )  # fmt: skip

    one, other = go("one", DamagedAt(10, damage_head)), go("other")
    [event] = [event for event in one.events if event.technique == "precision"]
    assert "healthy in high bits from the snapshot of step 8 on" in event.text
    assert_same_tree(one.weights, other.weights, "weights")
    assert_same_tree(one.optimizers, other.optimizers, "optimizers")
    assert one.losses == other.losses


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        ({}, r"OffloadStrategy keeps optimizer state elsewhere.*AsyncCheckpointIO\(in_memory=1\).*'snapshots': 0"),
        ({"schedule": "in_backward"}, "RollbackPrecision.*looks at gradients first.*schedule='auto'"),
        ({"schedule": "delayed"}, "RollbackPrecision.*looks at gradients first.*schedule='auto'"),
        ({"place": {"gradient": "disk"}}, "RollbackPrecision.*looks at their norm.*Leave this rule out"),
        ({"batch_feedback": True}, r"OffloadStrategy\(batch_feedback=True\) does parts of it again.*Leave one"),
    ],
)
def test_what_cannot_be_is_refused_by_name(strategy: dict[str, Any], words: str, tmp_path: Path) -> None:
    guard = GUARD | ({"snapshots": 0} if strategy else {})
    offload = OffloadStrategy(offload_dir=str(tmp_path), **{"place": DISK} | strategy)
    with pytest.raises(MisconfigurationException, match=words):
        train(guarded(spike_guard=guard), root=tmp_path, strategy=offload)


def on_rank(rank: int, root: Path) -> dict[str, Any]:
    def go(guard: dict[str, Any], **data: Any) -> Any:
        return train(
            guarded(spike_guard=guard), data=Batches(rank=rank, **data), module=Net(plain=True), root=root,
            strategy=OffloadDDPStrategy(offload_dir=str(root), place=DISK), devices=2, use_distributed_sampler=False,
        )  # fmt: skip

    try:
        go(GUARD)
    except MisconfigurationException as error:
        refused = str(error)
    bad = go(GUARD | {"snapshots": 0}, bad={9: 1000.0} if rank else {})
    without = go(GUARD | {"snapshots": 0}, without=(9,))
    weights = [{name: value.clone() for name, value in one.module.state_dict().items()} for one in (bad, without)]
    return {"refused": refused, "counts": bad.counts, "bad": weights[0], "without": weights[1]}


def test_ranks_leave_a_bad_batch_out_together(tmp_path: Path) -> None:
    for result in run_on_two_ranks(on_rank, tmp_path, tmp_path):
        assert "On several ranks it cannot go back: with spike_guard={'snapshots': 0, ...}" in result["refused"]
        assert result["counts"] == {"spikes": 1, "skipped": 1}
        assert_same_tree(result["bad"], result["without"], "as if it had not been there")
