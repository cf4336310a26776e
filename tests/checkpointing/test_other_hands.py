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

from lightning_efficient import AsyncCheckpointIO, GrowAndUnshareCallback
from lightning_efficient.checkpointing import writer
from lightning_efficient.checkpointing.snapshot import Snapshot, TornSnapshotError
from lightning_efficient.core.durable_file import DurableFile
from tests.checkpointing.states import snapshot_of
from tests.checkpointing.test_checkpoint_io import every, names
from tests.helpers.fitting import assert_same_tree
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


@pytest.fixture
def _late_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that copies gets to nothing: all that may be copied later is copied by who waits for it."""
    real = Snapshot.copy

    def late(snapshot: Snapshot, *arguments: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            real(snapshot, *arguments)

    monkeypatch.setattr(Snapshot, "copy", late)


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


VALIDATES = {"limit_val_batches": 1, "num_sanity_val_steps": 0}


@pytest.mark.usefixtures("_late_copies")
@pytest.mark.parametrize("where", ["module", "callback"])
@pytest.mark.parametrize("in_backward", [False, True])
def test_swapped_before_a_validation_begins_c4(where: str, in_backward: bool, tmp_path: Path) -> None:
    """Every save stands right before a validation; from the third on, copies have begun before it."""
    truth, io = Truth(), AsyncCheckpointIO(optimizer_in_backward=in_backward)
    often = {"val_check_interval": 4, "check_val_every_n_epoch": None}
    train(
        tmp_path, SwapsFirst(), io, truth, every(tmp_path, 4), module=Swaps(where), max_steps=20, **VALIDATES, **often
    )
    assert len(truth.at) == 5
    assert truth.torn(tmp_path) == []


@pytest.mark.usefixtures("_late_copies")
@pytest.mark.parametrize("where", ["module", "callback"])
def test_swapped_before_a_validation_after_an_accumulating_batch_c4(where: str, tmp_path: Path) -> None:
    """No update stands between the save, which follows the fourth batch, and the validation after the fifth."""
    truth = Truth()
    arguments = {"module": Swaps(where), "accumulate_grad_batches": 2, "val_check_interval": 5}
    train(tmp_path, SwapsFirst(), AsyncCheckpointIO(), truth, every(tmp_path, 1), **arguments, **VALIDATES)
    assert len(truth.at) == 12
    assert truth.torn(tmp_path) == []


class ShrinksFirst(Callback):
    """Stands before AsyncCheckpointIO in the list."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.net.weight.data.mul_(0.5)


@pytest.mark.usefixtures("_late_copies")
def test_changed_at_the_end_of_an_epoch_c7(tmp_path: Path) -> None:
    """Every save stands right before it; from the third on, copies have begun before the save."""
    truth, io = Truth(), AsyncCheckpointIO(optimizer_in_backward=True)
    train(tmp_path, ShrinksFirst(), io, truth, every(tmp_path, 10), module=Swaps("nowhere"), max_steps=40)
    assert len(truth.at) == 4
    assert truth.torn(tmp_path) == []


class Stops(Callback):
    """Stands behind it."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 6


@pytest.mark.usefixtures("_late_copies")
def test_changed_at_the_end_of_an_epoch_that_was_not_foreseen_c4(tmp_path: Path) -> None:
    """When our hook of the batch runs, nobody has asked for a stop yet."""
    truth = Truth()
    train(tmp_path, ShrinksFirst(), AsyncCheckpointIO(), Stops(), truth, every(tmp_path, 2), module=Swaps("nowhere"))
    assert sorted(truth.at) == [2, 4, 6]
    assert truth.torn(tmp_path) == []


class ShrinksAfterTheSave(Swaps):
    """After each batch, past torch's counting: a module's hook follows those of all callbacks."""

    def on_train_batch_end(self, *_: Any) -> None:
        self.net.weight.data.mul_(0.9)

    def on_validation_end(self) -> None:
        pass


@pytest.mark.usefixtures("_late_copies")
def test_copies_ahead_are_not_left_to_a_place_that_is_not_known_c7(tmp_path: Path) -> None:
    """The saves of steps 4 and 8 stand before a validation; that of step 12 is the first of another kind."""
    truth, io = Truth(), AsyncCheckpointIO(optimizer_in_backward=True)
    module = ShrinksAfterTheSave("nowhere")
    train(tmp_path, io, truth, every(tmp_path, 4), module=module, max_steps=20, val_check_interval=4, **VALIDATES)
    assert len(truth.at) == 5
    assert truth.torn(tmp_path) == []
    assert len(io.engine.planner.volatile) == 1


class Saves(Truth):
    """After every third batch, before others change weights, into files of its own."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def on_save_checkpoint(self, *_: Any) -> None:
        pass  # others save at the same steps

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if (step := trainer.global_step) % 3 == 0:
            self.at[step] = {name: value.clone() for name, value in pl_module.state_dict().items()}
            trainer.save_checkpoint(self.root / "ck" / f"step={step}.ckpt")


class Shrinks(Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.net.weight.data.mul_(0.9)


@pytest.mark.usefixtures("_late_copies")
def test_what_is_known_of_one_place_is_not_taken_for_granted_at_another_c2(tmp_path: Path) -> None:
    """What ModelCheckpoint saves changes no more before the update; what is saved from another callback does."""
    saves = Saves(tmp_path)
    other = every(tmp_path / "other", 2)
    train(tmp_path, AsyncCheckpointIO(), saves, Shrinks(), other, module=Swaps("nowhere"))
    assert sorted(saves.at) == [3, 6, 9, 12]
    assert saves.torn(tmp_path) == []


def test_layers_that_are_copied_by_growth_are_saved_as_they_were_c4(tmp_path: Path) -> None:
    """The save of step 4 is still being copied when the switch moves the state of the layers."""
    for name, io in (("ours", [AsyncCheckpointIO()]), ("plain", [])):
        grow = GrowAndUnshareCallback(mode="interleave", stages=[{"depth": 2, "until": 4}, {"depth": 4}])
        train(tmp_path / name, grow, *io, every(tmp_path / name, 2), max_steps=6)
    for step in (4, 6):
        files = (tmp_path / name / "ck" / f"step={step}.ckpt" for name in ("ours", "plain"))
        one, other = (torch.load(file, weights_only=True) for file in files)
        assert_same_tree(dict(one["state_dict"]), dict(other["state_dict"]), "weights")
        assert_same_tree(one["optimizer_states"], other["optimizer_states"], "optimizer")


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
    tensor = torch.zeros(10)
    snapshot = snapshot_of({"a": tensor}, watched={0: tensor})
    tensor.data[3:].fill_(1.0)  # the first half of the change
    snapshot.copy()
    tensor.add_(0.0)  # its end
    snapshot.wait([0])
    assert snapshot.torn == [0]


def test_a_change_that_ends_while_the_file_is_written_costs_the_file_c4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy was compared before that; the last look is right before the file gets its name."""
    tensor = torch.zeros(10)
    snapshot = snapshot_of({"a": tensor}, watched={0: tensor})
    tensor.data[3:].fill_(1.0)  # the first half of the change
    snapshot.copy()
    real = DurableFile.append

    def append(file: DurableFile, piece: memoryview) -> None:
        tensor.add_(0.0)  # its end
        real(file, piece)

    monkeypatch.setattr(DurableFile, "append", append)
    with pytest.raises(TornSnapshotError, match="'a' changed"):
        writer._persist(snapshot, tmp_path / "a.ckpt")
    assert not list(tmp_path.iterdir())


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
