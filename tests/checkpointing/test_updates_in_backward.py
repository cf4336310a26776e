"""Layers one by one: updated within backward, copied while others still update (C7-C9)."""

from __future__ import annotations

import threading
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_efficient import AsyncCheckpointIO, GrowAndUnshareCallback
from lightning_efficient.checkpointing.copy_plan import Planner
from lightning_efficient.checkpointing.snapshot import Snapshot
from lightning_efficient.checkpointing.verification import tensor_names
from lightning_efficient.demos import ByteLanguageModel
from tests.checkpointing.test_checkpoint_io import every, names
from tests.helpers.fitting import assert_same_tree
from tests.helpers.models import ManualModel
from tests.helpers.quick import train
from tests.technique_settings import demo_model

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_updates_in_backward_are_those_of_plain_training_c7_c8_c9(accumulate: int, tmp_path: Path) -> None:
    io = AsyncCheckpointIO(optimizer_in_backward=True, verify="checksum")
    arguments = {"accumulate_grad_batches": accumulate, "max_steps": 6}
    _, ours = train(tmp_path, io, every(tmp_path, 1), **arguments)
    plain_save = every(tmp_path / "plain", 1)
    _, plain = train(tmp_path, plain_save, **arguments)
    assert_same_tree(dict(ours.state_dict()), dict(plain.state_dict()), "weights")
    for name in names(tmp_path):
        one, other = (torch.load(folder / "ck" / name, weights_only=True) for folder in (tmp_path, tmp_path / "plain"))
        assert_same_tree(dict(one["state_dict"]), dict(other["state_dict"]), name)
        assert_same_tree(one["optimizer_states"], other["optimizer_states"], name)
    assert not any(p._post_accumulate_grad_hooks for p in ours.parameters())


def test_layers_are_copied_in_the_order_of_their_updates_c7(tmp_path: Path) -> None:
    """The last layers change first, so they lie first in the file, and are copied first."""
    train(tmp_path, AsyncCheckpointIO(optimizer_in_backward=True), every(tmp_path, 4, save_top_k=1))
    with zipfile.ZipFile(tmp_path / "ck" / "step=12.ckpt") as archive:
        names_of = tensor_names(archive.read("archive/data.pkl"))
        members = sorted(archive.infolist(), key=lambda member: member.header_offset)
        order = [names_of[m.filename.split("/")[-1]] for m in members if "/data/" in m.filename]
    blocks = [name.split("blocks.")[1][0] for name in order if "state_dict.model.blocks." in name]
    assert blocks == sorted(blocks, reverse=True)


def test_growth_with_updates_in_backward_c8(tmp_path: Path) -> None:
    grow = {"stages": [{"depth": 2, "until": 4}, {"depth": 4}]}
    _, ours = train(tmp_path, GrowAndUnshareCallback(**grow), AsyncCheckpointIO(optimizer_in_backward=True))
    _, plain = train(tmp_path, GrowAndUnshareCallback(**grow))
    assert_same_tree(dict(ours.state_dict()), dict(plain.state_dict()), "weights")


def half() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))


class LooksAtGradients(ByteLanguageModel):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        pass


class Shared(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(torch.ones(2)).sum()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        with warnings.catch_warnings(action="ignore"):
            optimizer.param_groups[0]["params"] *= 2
        return optimizer


@pytest.mark.parametrize(
    ("module", "arguments", "what"),
    [
        (demo_model, {"gradient_clip_val": 1.0}, "gradient clipping"),
        (demo_model, {"plugins": [half()]}, "a gradient scaler"),
        (lambda: demo_model(ManualModel), {}, "manual optimization"),
        (lambda: demo_model(LooksAtGradients), {}, "an on_before_optimizer_step of your module"),
        (lambda: Shared(), {}, "a parameter that is updated twice"),
    ],
    ids=["clipping", "scaler", "manual", "hook", "shared"],
)
@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
def test_what_needs_all_gradients_is_refused_c8(
    module: Any, arguments: dict[str, Any], what: str, tmp_path: Path
) -> None:
    with pytest.raises(MisconfigurationException, match=f"and {what}"):
        train(tmp_path, AsyncCheckpointIO(optimizer_in_backward=True), module=module(), **arguments)


# -- copies that begin before the step is over -----------------------------------------------------------------------


class Follows(Callback):
    """What was copied while the backward of the step that is saved was still going on."""

    def __init__(self, io: AsyncCheckpointIO, monkeypatch: pytest.MonkeyPatch) -> None:
        self.io = io
        self.in_backward = False
        self.copied: dict[int, int] = {}
        self.ahead: dict[int, int] = {}
        self.step = 0
        real = Snapshot._copy_piece

        def copy(snapshot: Snapshot, *arguments: Any) -> None:
            real(snapshot, *arguments)
            if self.in_backward and snapshot.step == self.step:
                self.copied[snapshot.step] = self.copied.get(snapshot.step, 0) + 1

        monkeypatch.setattr(Snapshot, "_copy_piece", copy)

    def on_before_backward(self, trainer: pl.Trainer, *_: Any) -> None:
        self.in_backward, self.step = True, trainer.global_step + 1

    def on_after_backward(self, *_: Any) -> None:
        end = time.monotonic() + 5
        while self.io.engine.ahead._snapshot is not None and self.step not in self.copied and time.monotonic() < end:
            time.sleep(0.001)  # until one of the copies that have begun is made
        self.in_backward = False

    def on_save_checkpoint(self, trainer: pl.Trainer, *_: Any) -> None:
        self.ahead[trainer.global_step - 1] = int(self.io.measurements().get("checkpoint/copied_ahead_bytes", 0))


def test_a_layer_is_copied_while_others_still_wait_for_their_update_c7_c9(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of step i is begun in the backward of step i, and is that of plain training."""
    io = AsyncCheckpointIO(optimizer_in_backward=True)
    follows = Follows(io, monkeypatch)
    train(tmp_path, follows, io, every(tmp_path, 2))
    train(tmp_path / "plain", every(tmp_path / "plain", 2))
    for name in names(tmp_path):
        one, other = (torch.load(folder / "ck" / name, weights_only=True) for folder in (tmp_path, tmp_path / "plain"))
        assert_same_tree(dict(one["state_dict"]), dict(other["state_dict"]), name)
        assert_same_tree(one["optimizer_states"], other["optimizer_states"], name)
    # Of the first save nothing is known, that of step 4 is compared, from step 6 on it counts.
    assert set(follows.copied) == {4, 6, 8, 10, 12}
    assert io.measurements()["checkpoint/copied_ahead_bytes"] > 0
    assert io.measurements()["checkpoint/copied_later_bytes"] == 0


class ClampsAtTheEnd(Callback):
    """Changes a weight after its update and before the save, past torch's counting."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.model.blocks[0].attention.output.weight.data.clamp_(-0.02, 0.02)


class MovesNowAndThen(Callback):
    """The same, counted by torch, from step 7 on."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step > 6:
            with torch.no_grad():
                pl_module.model.blocks[0].attention.output.weight.mul_(0.9)


@pytest.mark.parametrize("changes", [ClampsAtTheEnd, MovesNowAndThen])
def test_what_changes_between_its_update_and_the_save_is_saved_as_it_is_then_c7(changes: Any, tmp_path: Path) -> None:
    train(tmp_path, changes(), AsyncCheckpointIO(optimizer_in_backward=True), every(tmp_path, 2))
    train(tmp_path / "plain", changes(), every(tmp_path / "plain", 2))
    for name in names(tmp_path):
        one, other = (torch.load(folder / "ck" / name, weights_only=True) for folder in (tmp_path, tmp_path / "plain"))
        assert_same_tree(dict(one["state_dict"]), dict(other["state_dict"]), name)


def test_a_thread_that_copies_late_hides_no_change_c7(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other code changes uncounted is found by comparison, also if nothing was copied when it changed."""
    real = Snapshot.copy

    def late(snapshot: Snapshot, *arguments: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            real(snapshot, *arguments)

    train(tmp_path / "plain", ClampsAtTheEnd(), every(tmp_path / "plain", 2))
    monkeypatch.setattr(Snapshot, "copy", late)
    train(tmp_path, ClampsAtTheEnd(), io := AsyncCheckpointIO(optimizer_in_backward=True), every(tmp_path, 2))
    assert len(io.engine.planner.volatile) == 1
    for name in names(tmp_path):
        one, other = (torch.load(folder / "ck" / name, weights_only=True) for folder in (tmp_path, tmp_path / "plain"))
        assert_same_tree(dict(one["state_dict"]), dict(other["state_dict"]), name)


def test_a_save_that_does_not_come_leaves_nothing_behind_c7(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was expected after every step, and asked for after a few."""
    io = AsyncCheckpointIO(optimizer_in_backward=True)
    monkeypatch.setattr(AsyncCheckpointIO, "_save_follows", lambda *_: True)
    train(tmp_path, io, every(tmp_path, 3))
    assert len(names(tmp_path)) == 4
    assert not io.engine.pool._lent


def test_what_was_never_compared_does_not_count_as_copied_ahead_c7() -> None:
    """Tensors that an optimizer owns later than others."""
    planner = Planner()
    planner.note_calibrated([(1, 8)], "here")
    assert planner.calibrated([(1, 8)], "here")
    assert not planner.calibrated([(1, 8), (2, 8)], "here")
