"""What only shows where the callback itself decides: the values around a switch inside ``fit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_efficient import GrowAndUnshareCallback, load_grown
from tests.growth.networks import BatchNormLayer, Layer, Residual, copied, same

STEPS = 6


class Regression(pl.LightningModule):
    """Stands still at a learning rate of zero; then only switches change its weights."""

    def __init__(self, depth: int, layer: type = Layer, rate: float = 0.0) -> None:
        super().__init__()
        self.net = Residual(depth, layer=layer)
        self.rate = rate

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.rate)


class Snapshots(Callback):
    """The outputs in evaluation mode, and the buffers, at the start of every batch; before or after the switch."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.buffers: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.eval()
        with torch.no_grad():
            self.outputs.append(pl_module.net(torch.linspace(-1, 1, 12).view(4, 3)))
        pl_module.train()
        self.buffers.append(copied(dict(pl_module.named_buffers())))


def fit(module: pl.LightningModule, callbacks: list[Callback], folder: Path, **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        callbacks=callbacks,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **({"max_steps": STEPS, "enable_checkpointing": False} | options),
    )
    trainer.fit(module, DataLoader(torch.randn(4 * STEPS, 3), batch_size=4))
    return trainer


@pytest.mark.parametrize(
    "stages",
    [[{"unit": 2, "until": 3}, {}], [{"unit": 1, "until": 2}, {"unit": 2, "until": 4}, {}]],
    ids=["one switch", "two switches"],
)
@pytest.mark.parametrize("layer", [Layer, BatchNormLayer])
def test_no_switch_of_sharing_changes_a_bit_of_the_output_g2(stages: Any, layer: type, tmp_path: Path) -> None:
    """Layers that share go on to have running statistics of their own, also where they still share after a switch."""
    before, after = Snapshots(), Snapshots()
    grow = GrowAndUnshareCallback(layers="layers.*", mode="share", stages=stages)
    fit(Regression(4, layer, rate=0.05), [before, grow, after], tmp_path)
    assert len(grow.events()) == len(stages) - 1
    for step in range(STEPS):
        assert same(after.buffers[step], before.buffers[step]), step
        assert torch.equal(after.outputs[step], before.outputs[step]), step


@pytest.mark.parametrize("mode", ["stack", "interleave", "middle"])
@pytest.mark.parametrize("depths", [(2, 4, 8), (2, 3, 5)])
def test_load_grown_grows_as_the_run_would_have_done_g3(mode: Any, depths: tuple[int, ...], tmp_path: Path) -> None:
    """At a learning rate of zero the run's last weights are those of its first checkpoint, grown stage by stage."""
    stages = [{"depth": depth, "until": 2 * (i + 1)} for i, depth in enumerate(depths[:-1])] + [{}]
    grow = GrowAndUnshareCallback(layers="layers.*", mode=mode, stages=stages)
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    module = Regression(depths[-1])
    fit(module, [grow, save], tmp_path, enable_checkpointing=True)
    assert len(module.net.layers) == depths[-1]
    loaded = load_grown(Regression(depths[-1]), tmp_path / "step=1.ckpt", grown=True)
    assert same(loaded.state_dict(), module.state_dict())


def test_conditions_on_correlation_of_a_single_layer_do_not_stop_the_run_g5(tmp_path: Path) -> None:
    stages = [{"depth": 1, "until": {"correlation_below": 0.5, "step": 3}}, {}]
    grow = GrowAndUnshareCallback(layers="layers.*", stages=stages, mode="stack", correlation_every_n_steps=1)
    module = Regression(2, rate=0.01)
    fit(module, [grow], tmp_path)
    assert len(module.net.layers) == 2


def test_groups_that_disagree_split_without_changing_the_output_g5(tmp_path: Path) -> None:
    """A threshold that nothing reaches: at the first reading every group falls apart."""
    before, after = Snapshots(), Snapshots()
    grow = GrowAndUnshareCallback(
        layers="layers.*",
        mode="share",
        unit=2,
        until={"correlation_below": 1.0, "step": 5},
        unshare="by_correlation",
        correlation_every_n_steps=1,
    )
    module = Regression(4, BatchNormLayer, rate=0.05)
    fit(module, [before, grow, after], tmp_path)
    assert len({id(layer.linear.weight) for layer in module.net.layers}) == 4
    for step in range(STEPS):
        assert torch.equal(after.outputs[step], before.outputs[step]), step


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"max_steps": 2}, {"max_steps": 4}], ids=str)
def test_a_dry_run_of_a_few_steps_works_with_the_default_stages(options: Any, tmp_path: Path) -> None:
    """Fractions of so short a run round to the same step; nobody should have to change the callback for it."""
    module = Regression(8, rate=0.01)
    grow = GrowAndUnshareCallback(layers="layers.*", mode="stack")
    fit(module, [grow], tmp_path, **options)
