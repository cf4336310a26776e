"""Growth turns the strategy's offload on when the full model begins (G6)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_efficient import GrowAndUnshareCallback, OffloadStrategy
from lightning_efficient.coordination import ParameterChange
from tests.helpers.fitting import assert_same_tree
from tests.technique_settings import demo_data, demo_model


class OffloadingStrategy(SingleDeviceStrategy):
    """Stands for a strategy that can offload: remembers when it was told to, and what changed before."""

    def __init__(self) -> None:
        super().__init__(device="cpu")
        self.enabled_at: list[int] = []
        self.changes: list[ParameterChange] = []

    def enable_offload(self, trainer: pl.Trainer) -> None:
        self.enabled_at.append(trainer.global_step)

    def on_parameters_changed(self, trainer: pl.Trainer, change: ParameterChange) -> None:
        self.changes.append(change)


def fit(callback: GrowAndUnshareCallback, root: Path, **arguments: object) -> pl.Trainer:
    trainer = pl.Trainer(
        max_steps=10,
        default_root_dir=root,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **arguments,  # type: ignore[arg-type]
    )
    trainer.fit(demo_model(), demo_data())
    return trainer


STAGES = [{"depth": 1, "until": 3}, {"depth": 2, "until": 6}, {"depth": 4}]


def test_offload_begins_with_the_full_model_and_not_before_g6(tmp_path: Path) -> None:
    strategy = OffloadingStrategy()
    fit(GrowAndUnshareCallback(stages=STAGES, offload_on_switch=True), tmp_path, strategy=strategy)
    assert strategy.enabled_at == [6]


def test_offload_stays_off_unless_asked_for_g6(tmp_path: Path) -> None:
    strategy = OffloadingStrategy()
    fit(GrowAndUnshareCallback(stages=STAGES), tmp_path, strategy=strategy)
    assert strategy.enabled_at == []


def test_offload_waits_for_the_width_too_g4_g6(tmp_path: Path) -> None:
    strategy = OffloadingStrategy()
    grow = GrowAndUnshareCallback(mode="stack", stages=STAGES, width={"factor": 2, "until": 8}, offload_on_switch=True)
    fit(grow, tmp_path, strategy=strategy)
    assert strategy.enabled_at == [8]


@pytest.mark.parametrize("scale", [{}, {"lr_scale": 0.5, "rewarm_steps": 3}], ids=["as given", "scaled"])
def test_updates_of_a_strategy_that_offloads_are_those_without_it_g6(scale: dict[str, Any], tmp_path: Path) -> None:
    def weights(**arguments: object) -> dict[str, Any]:
        grow = GrowAndUnshareCallback(mode="share", unit=2, until=5, **scale)
        return fit(grow, tmp_path, **arguments).lightning_module.state_dict()

    offload = OffloadStrategy(offload_dir=str(tmp_path), place={"optimizer_state": "disk"})
    assert_same_tree(weights(strategy=offload), weights(), "weights")


def test_updates_in_backward_cannot_be_scaled_g6(tmp_path: Path) -> None:
    grow = GrowAndUnshareCallback(mode="share", unit=2, until=5, rewarm_steps=3)
    with pytest.raises(MisconfigurationException, match=r"GrowAndUnshareCallback scales the learning rate.*'auto'"):
        fit(grow, tmp_path, strategy=OffloadStrategy(schedule="in_backward"))


def test_a_strategy_without_offload_is_refused_by_name_g6(tmp_path: Path) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"offload_on_switch=True needs .*SingleDeviceStrategy has none"
    ):
        fit(GrowAndUnshareCallback(stages=STAGES, offload_on_switch=True), tmp_path, accelerator="cpu", devices=1)


def test_listeners_hear_of_every_switch_by_name_g6_g8(tmp_path: Path) -> None:
    strategy = OffloadingStrategy()
    fit(GrowAndUnshareCallback(stages=STAGES), tmp_path, strategy=strategy)
    first, second = strategy.changes
    assert all(name.startswith("model.blocks.1.") for name in first.added)
    assert {name.split(".")[2] for name in second.added} == {"2", "3"}
    assert not first.removed
    assert not first.replaced
    assert "1 layer -> 2 layers" in first.reason
