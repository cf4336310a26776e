"""Resumed from any checkpoint, a run sees the batches, draws the numbers and runs the hooks that it would have."""

from __future__ import annotations

import importlib.util
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_efficient import AsyncCheckpointIO, compat
from lightning_efficient.core.resumable import ResumableDataLoader

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # a machine with one core
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),  # Python >= 3.12, in torch's workers
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata calls it
]

ITEMS, BATCH = 14, 3  # four batches; two items are left out
EPOCH = ITEMS // BATCH


# -- train loaders ---------------------------------------------------------------------------------------------------


def ours(workers: int = 0, items: int = ITEMS, **arguments: Any) -> ResumableDataLoader:
    return ResumableDataLoader(
        dataset=torch.arange(items),  # type: ignore[arg-type]
        batch_size=BATCH,
        shuffle=True,
        num_workers=workers,
        **arguments,
    )


class Eager:
    """A loader of others, with a state; its iterator reads the whole epoch as soon as it is made.

    Args:
        begins: What its iterator does that is made with the state of an epoch's end: begin the next one, or be empty.
    """

    def __init__(self, begins: bool = True, items: int = ITEMS) -> None:
        self.begins, self.items = begins, items
        self.epoch, self.index = -1, 0
        self.loaded: tuple[int, int] | None = None

    def __len__(self) -> int:
        return self.items // BATCH

    def __iter__(self) -> Iterator[Tensor]:
        self.epoch, self.index = self.loaded or (self.epoch + 1, 0)
        self.loaded = None
        if self.begins and self.index == self.items // BATCH:
            self.epoch, self.index = self.epoch + 1, 0
        order = torch.randperm(self.items, generator=torch.Generator().manual_seed(self.epoch))
        return map(self._count, order[: self.items // BATCH * BATCH].split(BATCH)[self.index :])

    def _count(self, batch: Tensor) -> Tensor:
        self.index += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.loaded = state_dict["epoch"], state_dict["index"]


class Lazy(Eager):
    """The same, but its iterator is a generator."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from super().__iter__()


class Unsized:
    """The same without a length: Lightning fetches a batch ahead, to know which is the last one."""

    def __init__(self, begins: bool = True) -> None:
        self.loader = Eager(begins)
        self.state_dict, self.load_state_dict = self.loader.state_dict, self.loader.load_state_dict

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.loader)


class Stream(IterableDataset):
    """Goes on, in the next epoch, where the last one has left it."""

    def __init__(self) -> None:
        self.next = 0

    def __iter__(self) -> Iterator[int]:
        while True:
            self.next += 1
            yield self.next
            if self.next % ITEMS == 0:
                return

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.next = state_dict["next"]


def plain(workers: int = 0) -> DataLoader:
    return DataLoader(torch.arange(ITEMS), BATCH, shuffle=True, drop_last=True, num_workers=workers)  # type: ignore[arg-type]


def of_torchdata(dataset: Any = None, workers: int = 0) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    dataset = torch.arange(ITEMS) if dataset is None else dataset
    shuffle = not isinstance(dataset, Stream)
    return StatefulDataLoader(dataset, BATCH, shuffle=shuffle, drop_last=True, num_workers=workers)


LOADERS: dict[str, Callable[[], Any]] = {
    "ours": ours,
    "eager": Eager,
    "eager, empty at the end": lambda: Eager(begins=False),
    "lazy": Lazy,
    "no length": Unsized,
    "no length, empty at the end": lambda: Unsized(begins=False),
    "two of ours": lambda: {"long": ours(), "short": ours(items=7, combined=True, seed=1)},
    "two eager": lambda: {"long": Eager(), "short": Eager(items=7)},
    "the shorter of two": lambda: CombinedLoader({"long": Eager(), "short": Eager(items=7)}, "min_size"),
    "the shorter of ours": lambda: CombinedLoader({"long": ours(), "short": ours(items=7)}, "min_size"),
}
if importlib.util.find_spec("torchdata"):
    LOADERS |= {"torchdata": of_torchdata, "torchdata, stream": lambda: of_torchdata(Stream())}


# -- runs ------------------------------------------------------------------------------------------------------------


class Noisy(pl.LightningModule):
    """Writes down all that happens; its losses depend on batch, order and random numbers."""

    def __init__(self, loader: Callable[[], Any], *, estimates: bool = False, validates: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(BATCH))
        self.loader, self.estimates, self.validates = loader, estimates, validates
        self.log_of: list[Any] = []

    def train_dataloader(self) -> Any:
        return self.loader()

    def val_dataloader(self) -> Any:
        return DataLoader(range(2))  # type: ignore[arg-type]  # draws a seed each time

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = list(batch.values()) if isinstance(batch, dict) else [batch]
        step = compat.log_step(self.trainer)
        self.log_of.append(("batch", self.current_epoch, batch_idx, step, [part.tolist() for part in parts]))
        return (self.weight - sum(parts) * torch.rand(BATCH)).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log_of.append(("validation", self.current_epoch, float(torch.rand(()))))

    def on_train_epoch_start(self) -> None:
        self.log_of.append(("epoch starts", self.current_epoch))

    def on_train_epoch_end(self) -> None:
        self.log_of.append(("epoch ends", self.current_epoch, self.global_step))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        if not self.estimates:
            return optimizer
        steps = max(20, int(self.trainer.estimated_stepping_batches))  # -1 without a length
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def batches(self) -> list[Any]:
        return [entry for entry in self.log_of if entry[0] == "batch"]


class Saves(ModelCheckpoint):
    """Notes what had happened before each file."""

    def __init__(self, root: Path, **when: Any) -> None:
        super().__init__(root, "{step}-{epoch}", save_top_k=-1, **when)
        self.before: dict[str, int] = {}

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        self.before[filepath] = len(trainer.lightning_module.log_of)  # type: ignore[arg-type]
        super()._save_checkpoint(trainer, filepath)


@dataclass
class Case:
    """A run, and how it is interrupted."""

    loader: Callable[[], Any]
    when: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)

    def fit(self, root: Path, resume: Any = None, *callbacks: Callback, **trainer: Any) -> tuple[Noisy, Saves]:
        torch.manual_seed(99 if resume else 0)
        model, saves = Noisy(self.loader, **self.model), Saves(root, **self.when)
        runner = pl.Trainer(
            **({"max_epochs": 3} | self.trainer | trainer),
            callbacks=[AsyncCheckpointIO(), *callbacks, saves],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=2 * model.validates,
        )
        try:
            runner.fit(model, ckpt_path=resume)
        except KeyError:
            assert callbacks
        assert "_on_before_fetch" not in vars(runner.fit_loop.epoch_loop)
        return model, saves

    def check(self, root: Path) -> None:
        """Resumed from each of its checkpoints, the run does the rest of what it did."""
        whole, saves = self.fit(root / "whole")
        assert len(saves.before) >= 2
        for path, before in saves.before.items():
            resumed, _ = self.fit(root / "resumed", path)
            assert_is_rest(resumed, whole, before, Path(path).name)


def assert_is_rest(resumed: Noisy, whole: Noisy, before: int, name: str) -> None:
    assert resumed.log_of == whole.log_of[before:], name
    assert torch.equal(resumed.weight, whole.weight), name


EACH_STEP = {"every_n_train_steps": 1}
AT_VALIDATION = {"save_on_train_epoch_end": False}
AT_EPOCH_END = {"save_on_train_epoch_end": True}
LONG = {"max_epochs": 50}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_from_each_step_the_same_batches_and_weights_c6_c12(workers: int, accumulate: int, tmp_path: Path) -> None:
    """Although the learning rate's schedule asks how many steps there will be, and so has the loader built early."""
    case = Case(lambda: ours(workers), EACH_STEP, {"estimates": True}, {"accumulate_grad_batches": accumulate})
    case.check(tmp_path)
    whole, _ = case.fit(tmp_path / "again")
    for epoch in range(3):
        seen = Counter(item for entry in whole.batches() if entry[1] == epoch for item in entry[4][0])
        assert len(seen) == EPOCH * BATCH
        assert set(seen.values()) == {1}


WHEN: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "step": (EACH_STEP, {}, True),
    "step, validating": (EACH_STEP, {"val_check_interval": 1, "limit_train_batches": 2}, True),
    "validation": (AT_VALIDATION, {}, True),
    "epoch": (AT_EPOCH_END, {}, False),
    "part of an epoch": (AT_EPOCH_END, {"limit_train_batches": 2}, True),
    "max_steps": (AT_EPOCH_END, {"max_steps": 7, **LONG}, False),
}


@pytest.mark.parametrize(
    ("loader", "when", "trainer", "validates", "estimates"),
    [  # the last changes from each to the next, in both directions: each pair is there, not each three
        pytest.param(loader, *WHEN[when], bool((row + column) % 2), id=f"{when}-{loader}")
        for row, loader in enumerate(LOADERS)
        for column, when in enumerate(WHEN)
    ],
)
def test_with_other_loaders_c12(
    loader: str, when: Any, trainer: Any, validates: bool, estimates: bool, tmp_path: Path
) -> None:
    Case(LOADERS[loader], when, {"estimates": estimates, "validates": validates}, trainer).check(tmp_path)


@pytest.mark.skipif("torchdata" not in LOADERS, reason="needs torchdata")
@pytest.mark.parametrize("estimates", [False, True])
def test_with_workers_of_torchdata_c12(estimates: bool, tmp_path: Path) -> None:
    Case(lambda: of_torchdata(workers=2), EACH_STEP, {"estimates": estimates}, {"max_epochs": 2}).check(tmp_path)


@pytest.mark.parametrize("every", [1, 2])
def test_with_loaders_that_are_built_anew_c12(every: int, tmp_path: Path) -> None:
    trainer = {"reload_dataloaders_every_n_epochs": every}
    Case(ours, EACH_STEP, {}, trainer).check(tmp_path / "ours")
    if every == 1:
        Case(Eager, AT_EPOCH_END, {}, trainer).check(tmp_path / "eager")


@pytest.mark.parametrize("validates", [False, True])
@pytest.mark.parametrize("loader", ["ours", "eager", "no length", "two of ours"])
@pytest.mark.parametrize("then", [{"max_epochs": 3, "max_steps": -1}, {"max_epochs": -1, "max_steps": 12}], ids=str)
@pytest.mark.parametrize("first", [EPOCH, 2 * EPOCH, EPOCH + 2])
def test_max_steps_and_then_more_c6(first: int, then: Any, loader: str, validates: bool, tmp_path: Path) -> None:
    """Saved at an epoch's end, be it one that ``max_steps`` has cut short: then the rest of that epoch comes first."""
    case = Case(LOADERS[loader], AT_EPOCH_END, {"validates": validates})
    whole, _ = case.fit(tmp_path / "whole", **then)
    short, saves = case.fit(tmp_path / "short", max_epochs=-1, max_steps=first)
    path = list(saves.before)[-1]
    resumed, _ = case.fit(tmp_path / "resumed", path, **then)
    early_end = int(first % EPOCH > 0)  # the only hook that the whole run does not know
    assert_is_rest(resumed, whole, len(short.log_of) - early_end, Path(path).name)


class Dies(Callback):
    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if len(pl_module.batches()) == self.batches:
            raise KeyError("killed")


@pytest.mark.parametrize("loader", ["ours", "eager", "no length"])
@pytest.mark.parametrize("lives", [(1, 1, 1, 1, 1, 1), (3, 2, 3, 2), (4, 4), (5, 3)], ids=str)
def test_each_item_once_an_epoch_however_often_it_dies_c12(lives: tuple[int, ...], loader: str, tmp_path: Path) -> None:
    case = Case(LOADERS[loader], EACH_STEP, {"estimates": True, "validates": True})
    whole, _ = case.fit(tmp_path / "whole")
    done: list[Any] = []
    path = None
    for i, batches in enumerate(lives):
        model, saves = case.fit(tmp_path / f"{i}", path, Dies(batches))
        path = list(saves.before)[-1]
        done += model.log_of[: saves.before[path]]
    last, _ = case.fit(tmp_path / "last", path)
    assert done + last.log_of == whole.log_of
    assert torch.equal(last.weight, whole.weight)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("estimates", [False, True])
def test_a_plain_loader_resumes_at_the_end_of_an_epoch_c6(estimates: bool, workers: int, tmp_path: Path) -> None:
    """After its last batch as well, with the validation before the next epoch; and nothing is said."""
    for name, when in {
        "epoch": AT_EPOCH_END,
        "last batch": {"every_n_train_steps": EPOCH},
        "val": AT_VALIDATION,
    }.items():
        Case(lambda: plain(workers), when, {"estimates": estimates, "validates": True}).check(tmp_path / name)


def batch_sampled() -> DataLoader:
    """Only the author of the batch sampler knows whether it keeps its place."""
    return DataLoader(torch.arange(4), batch_sampler=[[0, 1, 2], [1, 2, 3]])  # type: ignore[arg-type]


def distributed() -> DataLoader:
    sampler = DistributedSampler(torch.arange(ITEMS), num_replicas=1, rank=0)  # type: ignore[arg-type]
    return DataLoader(torch.arange(ITEMS), BATCH, sampler=sampler, drop_last=True)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize(
    ("loader", "named"),
    [
        (plain, "a DataLoader with a RandomSampler has forgotten its place"),
        (distributed, "a DataLoader with a DistributedSampler has forgotten its place"),
        (lambda: {"one": ours(), "other": plain(), "third": plain()}, "with a RandomSampler"),
        (ours, None),
        (batch_sampled, None),
    ],
    ids=["plain", "distributed", "dict", "ours", "batch sampler"],
)
def test_what_loses_its_place_is_named_once_c12(loader: Any, named: str | None, tmp_path: Path) -> None:
    case = Case(loader, EACH_STEP, trainer={"max_epochs": 1})
    _, saves = case.fit(tmp_path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        case.fit(tmp_path / "resumed", next(iter(saves.before)))
    texts = [str(w.message) for w in said if "has forgotten its place" in str(w.message)]
    assert len(texts) == (named is not None)
    if named is not None:
        assert named in texts[0]
        assert "lightning_efficient.ResumableDataLoader" in texts[0]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_only_a_fit_is_resumed(tmp_path: Path) -> None:
    """A validation loads the callbacks' states too; the fit after it begins at the beginning."""
    case = Case(ours, EACH_STEP, {"validates": True})
    whole, saves = case.fit(tmp_path)
    model = Noisy(ours, validates=True)
    trainer = pl.Trainer(
        max_epochs=3, callbacks=[AsyncCheckpointIO()], accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.validate(model, ckpt_path=list(saves.before)[5], verbose=False)
    model.log_of.clear()
    trainer.fit(model)
    assert [entry[4] for entry in model.batches()] == [entry[4] for entry in whole.batches()]
