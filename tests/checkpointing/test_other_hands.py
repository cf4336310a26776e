"""Weights that others than the optimizer change: every checkpoint is still the state at its save (C2, C4)."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_efficient import AsyncCheckpointIO
from lightning_efficient.checkpointing.snapshot import Snapshot
from tests.checkpointing.test_checkpoint_io import every, names
from tests.helpers.quick import train

pytestmark = [
    pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
]


@pytest.fixture(autouse=True)
def _slow_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the thread that copies only: whoever waits, copies at full speed."""
    real = Snapshot._copy_piece

    def slow(snapshot: Snapshot, *arguments: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.03)
        real(snapshot, *arguments)

    monkeypatch.setattr(Snapshot, "_copy_piece", slow)


class Truth(Callback):
    """The weights at each save."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, Tensor]] = {}

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.at[trainer.global_step] = {name: value.clone() for name, value in checkpoint["state_dict"].items()}

    def torn(self, root: Path) -> list[str]:
        saved = {name: torch.load(root / "ck" / name, weights_only=True) for name in names(root)}
        return [
            name
            for name, state in saved.items()
            if any(not torch.equal(v, self.at[state["global_step"]][k]) for k, v in state["state_dict"].items())
        ]


class TwoOptimizers(pl.LightningModule):
    """Between their updates, code shrinks what the second one owns, past torch's counting."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(64, 64)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=0.01) for net in (self.a, self.b)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        first.zero_grad()
        self.manual_backward(self.a(torch.ones(8)).square().mean())
        first.step()
        self.b.weight.data.mul_(0.9)
        second.zero_grad()
        self.manual_backward(self.b(torch.ones(64)).square().mean())
        second.step()


def test_between_two_optimizers_c2(tmp_path: Path) -> None:
    truth, io = Truth(), AsyncCheckpointIO()
    train(tmp_path, truth, io, every(tmp_path, 4), module=TwoOptimizers(), max_steps=24)
    assert len(truth.at) > 3
    assert truth.torn(tmp_path) == []
    assert len(io.engine.planner.volatile) == 1


class Swaps(pl.LightningModule):
    """Validates with other weights, swapped in past torch's counting, and undone."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.net, self.where = nn.Linear(8, 8), where

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(torch.ones(8)).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def swap(self) -> None:
        self.back = self.net.weight.detach().clone()
        self.net.weight.data.fill_(7.0)

    def restore(self) -> None:
        time.sleep(0.1)
        self.net.weight.data.copy_(self.back)

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        if self.where == "module":
            self.swap()

    def on_validation_end(self) -> None:
        self.restore()


class SwapsFirst(Callback):
    """Stands before AsyncCheckpointIO in the list."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if pl_module.where == "callback":
            pl_module.swap()


@pytest.mark.parametrize("where", ["module", "callback"])
def test_swapped_before_a_validation_begins_c4(where: str, tmp_path: Path) -> None:
    truth = Truth()
    train(
        tmp_path,
        SwapsFirst(),
        AsyncCheckpointIO(),
        truth,
        every(tmp_path, 4),
        module=Swaps(where),
        max_steps=16,
        val_check_interval=4,
        limit_val_batches=1,
        num_sanity_val_steps=0,
    )
    assert len(truth.at) == 4
    assert truth.torn(tmp_path) == []


class SamplesBetween(Swaps):
    """Swaps weights in and out after each batch, in a way that torch counts."""

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            back = self.net.weight.clone()
            self.net.weight.fill_(7.0)
            time.sleep(0.05)
            self.net.weight.copy_(back)


def test_swapped_in_and_out_after_the_batch_c4(tmp_path: Path) -> None:
    truth, io = Truth(), AsyncCheckpointIO()
    train(tmp_path, truth, io, every(tmp_path, 2), module=SamplesBetween("nowhere"))
    assert len(names(tmp_path)) == 6
    assert truth.torn(tmp_path) == []
    assert len(io.engine.planner.volatile) == 1


def test_a_change_that_is_going_on_during_the_copy_is_noticed_c4() -> None:
    """Torch counts it when it is over."""
    from tests.checkpointing.states import snapshot_of

    tensor = torch.zeros(10)
    snapshot = snapshot_of({"a": tensor}, watched={0: tensor})
    tensor.data[3:].fill_(1.0)  # the first half of the change
    snapshot.copy()
    tensor.add_(0.0)  # its end
    snapshot.wait([0])
    assert snapshot.torn == [0]


class SharedMemory(pl.LightningModule):
    """Six weights in one piece of memory, as cuDNN's."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.randn(6 * 200 * 200) * 0.01
        self.weights = nn.ParameterList([nn.Parameter(part.view(200, 200)) for part in flat.split(200 * 200)])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = torch.ones(200)
        for weight in self.weights:
            x = weight @ x
        return x.square().sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, fused=True)


def test_parameters_in_one_memory_updated_one_by_one_c7(tmp_path: Path) -> None:
    truth = Truth()
    io = AsyncCheckpointIO(optimizer_in_backward=True)
    train(tmp_path, truth, io, every(tmp_path, 2), module=SharedMemory())
    assert len(truth.at) == 6
    assert truth.torn(tmp_path) == []
