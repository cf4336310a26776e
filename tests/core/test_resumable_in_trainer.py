"""ResumableDataLoader under Lightning: resumed from any checkpoint, a run sees the batches it would have seen."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_efficient.core.resumable import ResumableDataLoader

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # a machine with one core
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),  # Python >= 3.12, in torch's workers
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
]


class Recorder(pl.LightningModule):
    """Records the batches it is given, as ``(epoch, batch_idx, batch)``."""

    def __init__(self, workers: int = 0, combined: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.workers = workers
        self.combined = combined
        self.seen: list[Any] = []

    def train_dataloader(self) -> Any:
        longer = loader(22, seed=1, num_workers=self.workers)  # 7 batches
        return {"longer": longer, "shorter": loader(9, seed=2, combined=True)} if self.combined else longer

    def val_dataloader(self) -> Any:
        return DataLoader(range(2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        values = {k: v.tolist() for k, v in batch.items()} if isinstance(batch, dict) else batch.tolist()
        self.seen.append((self.current_epoch, batch_idx, values))
        return self.weight * 0

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(items: int, **arguments: Any) -> ResumableDataLoader:
    return ResumableDataLoader(dataset=range(items), batch_size=3, shuffle=True, **arguments)  # type: ignore[arg-type]


def make_trainer(*callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_checkpointing=bool(callbacks),
        num_sanity_val_steps=0,
        **(silent | {"max_epochs": 3} | arguments),
    )


class CountingCheckpoint(ModelCheckpoint):
    """Notes beside each file how many batches the model had been given."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.seen_at: dict[str, int] = {}

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        self.seen_at[filepath] = len(trainer.lightning_module.seen)  # type: ignore[arg-type]
        super()._save_checkpoint(trainer, filepath)


EACH_STEP = {"every_n_train_steps": 1}
AT_VALIDATION = {"save_on_train_epoch_end": False}
AT_EPOCH_END = {"save_on_train_epoch_end": True}


@pytest.mark.parametrize(
    ("when", "trainer_arguments", "model_arguments"),
    [
        (EACH_STEP, {}, {}),
        (EACH_STEP, {"limit_train_batches": 5}, {}),
        (EACH_STEP, {"accumulate_grad_batches": 2}, {}),
        (EACH_STEP, {"limit_train_batches": 5, "accumulate_grad_batches": 2}, {}),
        (EACH_STEP, {"max_epochs": -1, "max_steps": 17}, {}),
        (EACH_STEP, {"limit_val_batches": 0}, {}),
        (EACH_STEP, {"reload_dataloaders_every_n_epochs": 1}, {}),
        (EACH_STEP, {"max_epochs": 2}, {"workers": 2}),
        (EACH_STEP, {}, {"combined": True}),
        (AT_VALIDATION, {}, {}),
        (AT_VALIDATION, {"val_check_interval": 2}, {}),
        (AT_VALIDATION, {"limit_train_batches": 5}, {}),
        (AT_VALIDATION, {"max_epochs": -1, "max_steps": 17}, {}),
        (AT_EPOCH_END, {}, {}),
        (AT_EPOCH_END, {"limit_val_batches": 0}, {}),
        (AT_EPOCH_END, {"limit_train_batches": 5, "accumulate_grad_batches": 2}, {}),
        (AT_EPOCH_END, {}, {"combined": True}),
    ],
)
def test_resumes_from_any_checkpoint(
    tmp_path: Path, when: dict[str, Any], trainer_arguments: dict[str, Any], model_arguments: dict[str, Any]
) -> None:
    whole = Recorder(**model_arguments)
    checkpoint = CountingCheckpoint(dirpath=tmp_path, save_top_k=-1, **when)
    trainer = make_trainer(checkpoint, **trainer_arguments)
    trainer.fit(whole)
    assert len(checkpoint.seen_at) >= 2

    for path, seen in checkpoint.seen_at.items():
        resumed = Recorder(**model_arguments)
        resuming = make_trainer(CountingCheckpoint(dirpath=tmp_path, save_top_k=0, **when), **trainer_arguments)
        resuming.fit(resumed, ckpt_path=path)
        assert resumed.seen == whole.seen[seen:], Path(path).name
        assert resuming.global_step == trainer.global_step
    assert not multiprocessing.active_children()


def test_a_second_fit_goes_on_with_the_next_epoch() -> None:
    whole, twice = Recorder(), Recorder()
    make_trainer(max_epochs=4).fit(whole)
    trainer = make_trainer(max_epochs=2)
    trainer.fit(twice)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(twice)
    assert twice.seen == whole.seen


def test_stops_persistent_workers() -> None:
    model = Recorder()
    make_trainer(max_epochs=2).fit(model, loader(22, seed=1, num_workers=1, persistent_workers=True))
    assert not multiprocessing.active_children()
    single = Recorder()
    make_trainer(max_epochs=2).fit(single)
    assert model.seen == single.seen


def test_overfit_batches_keeps_its_own_order() -> None:
    model = Recorder()
    make_trainer(max_epochs=2, overfit_batches=2, limit_val_batches=0).fit(model)
    assert len(model.seen) == 4


def test_resumed_from_the_end_of_an_epoch_again_and_again_the_order_stays(tmp_path: Path) -> None:
    """The second time, Lightning names the epoch that has ended; a run that is killed often would drift."""
    loader = ResumableDataLoader(dataset=range(12), batch_size=3, shuffle=True, seed=5)  # type: ignore[arg-type]
    orders = {}
    for epoch in range(5):
        loader.set_epoch(epoch)
        orders[epoch] = [batch.tolist() for batch in loader]
    state = None
    for true, named in ((0, 0), (1, 1), (2, 1), (3, 2), (4, 6)):
        resumed = ResumableDataLoader(dataset=range(12), batch_size=3, shuffle=True, seed=5)  # type: ignore[arg-type]
        if state is not None:
            resumed.load_state_dict(state)
        resumed.set_epoch(named)
        assert [batch.tolist() for batch in resumed] == orders[true]
        state = resumed.state_dict()
    middle = ResumableDataLoader(dataset=range(12), batch_size=3, shuffle=True, seed=5)  # type: ignore[arg-type]
    middle.load_state_dict({**state, "epoch": 3, "batches": 2, "shift": 2})  # type: ignore[dict-item]
    middle.set_epoch(1)
    assert [batch.tolist() for batch in middle] == orders[3][2:]
    middle.set_epoch(2)
    assert [batch.tolist() for batch in middle] == orders[4]
    middle.set_epoch(0)
    assert [batch.tolist() for batch in middle] == orders[0]
