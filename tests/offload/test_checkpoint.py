"""Checkpoints that memory need not hold: written straight to the disk, whole or not at all, and read from the file."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_efficient import OffloadStrategy
from lightning_efficient.core.durable_file import DurableFile
from lightning_efficient.offload import checkpoint as checkpoint_module
from lightning_efficient.offload.checkpoint import save_streamed
from tests.helpers.fitting import assert_same_tree, make_trainer
from tests.helpers.processes import context

WIDTH, LAYERS = 1024, 8
FILE_BYTES = 3 * 4 * WIDTH * WIDTH * LAYERS  # parameters, and AdamW's state
STAGING = 16 << 20


def some_state(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(1 << 20, generator=generator)
    return {"a": shared, "b": shared[100:200], "half": shared.half(), "empty": torch.empty(0), "text": ["x", 1, None]}


class Wide(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layers(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.ones(8, WIDTH)), batch_size=4)


class Peak:
    """The most anonymous memory within it, beyond what there was."""

    def __enter__(self) -> Peak:
        self.before = self.most = anonymous()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()
        self.grown = self.most - self.before

    def _watch(self) -> None:
        while not self._over.is_set():
            self.most = max(self.most, anonymous())
            time.sleep(0.001)


def anonymous() -> int:
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


class UntilTraining(pl.Callback):
    """Ends a :class:`Peak` when the first batch begins, and keeps what it found."""

    def __init__(self, peak: Peak) -> None:
        self.peak = peak

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.peak._over.is_set():
            self.peak.__exit__()


def save_and_load(folder: Path) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)

    def trainer(*callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
        strategy = OffloadStrategy(place={"optimizer_state": "disk"}, offload_dir="swap", staging=STAGING)
        return make_trainer(*callbacks, strategy=strategy, default_root_dir=folder, **arguments)

    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint("0.ckpt")  # whatever is made when one is saved for the first time
            with Peak() as self.peak:
                trainer.save_checkpoint("1.ckpt")

    saves = Saves()
    trainer(saves, max_steps=1).fit(Wide())
    module = Wide()
    loading = Peak()
    loading.__enter__()
    trainer(UntilTraining(loading), max_steps=2).fit(module, ckpt_path="1.ckpt")
    Path("found.json").write_text(json.dumps({"save": saves.peak.grown, "load": loading.grown}))


def test_memory_does_not_grow_with_the_file_o8(tmp_path: Path) -> None:
    process = context().Process(target=save_and_load, args=(tmp_path,))
    process.start()
    process.join()
    found = json.loads((tmp_path / "found.json").read_text())
    assert (tmp_path / "1.ckpt").stat().st_size > FILE_BYTES
    assert found["save"] < 16 << 20  # a buffer of 8 MiB, and the pickled rest
    assert found["load"] < STAGING + (16 << 20)
    saved = torch.load(tmp_path / "1.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    assert len(saved) == LAYERS
    assert all(state["exp_avg"].count_nonzero() for state in saved.values())


def test_the_file_is_the_one_that_torch_writes(tmp_path: Path) -> None:
    expected = io.BytesIO()
    torch.save(some_state(), expected)
    save_streamed(some_state(), tmp_path / "deep" / "er" / "a.ckpt")
    assert (tmp_path / "deep" / "er" / "a.ckpt").read_bytes() == expected.getvalue()
    assert os.listdir(tmp_path / "deep" / "er") == ["a.ckpt"]


def test_a_full_disk_is_said_and_what_was_there_stays_o5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ckpt"
    save_streamed(some_state(1), path)
    real, left = DurableFile.append, [1]

    def append(self: DurableFile, piece: memoryview) -> None:
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left.pop()
        real(self, piece[: 1 << 20])

    monkeypatch.setattr(DurableFile, "append", append)
    with pytest.raises(OSError, match=r"could not be written \(No space left on device\): .* Free space there") as told:
        save_streamed({"large": torch.zeros(8 << 20), "more": torch.zeros(1 << 20)}, path)
    assert told.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["a.ckpt"]
    assert_same_tree(torch.load(path), some_state(1), "checkpoint")


def test_what_cannot_be_pickled_is_told_as_ever(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"pickle|local object"):
        save_streamed({"a": torch.zeros(3), "b": lambda: None}, tmp_path / "a.ckpt")
    assert not os.listdir(tmp_path)


def killed_while_it_writes(path: Path) -> None:
    real = DurableFile.append

    def append(self: DurableFile, piece: memoryview) -> None:
        real(self, piece)
        os.kill(os.getpid(), signal.SIGKILL)

    DurableFile.append = append  # type: ignore[method-assign]
    save_streamed({"large": torch.zeros(8 << 20)}, path)


def test_a_kill_leaves_the_old_file_and_the_next_save_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    save_streamed(some_state(1), path)
    process = context().Process(target=killed_while_it_writes, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2
    assert_same_tree(torch.load(path), some_state(1), "checkpoint")
    save_streamed(some_state(2), path)
    assert os.listdir(tmp_path) == ["a.ckpt"]
    assert_same_tree(torch.load(path), some_state(2), "checkpoint")


class Own(TorchCheckpointIO):
    """Of the user."""


@pytest.mark.parametrize(
    ("given", "path", "streamed"),
    [
        (None, "a.ckpt", True),
        (None, "memory://folder/a.ckpt", False),
        (Own, "a.ckpt", False),
        (AsyncCheckpointIO, "a.ckpt", False),
    ],
)
def test_only_what_lightning_does_by_default_is_done_otherwise(
    given: Any, path: str, streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = checkpoint_module.durable_stream, []
    monkeypatch.setattr(checkpoint_module, "durable_stream", lambda path: [seen.append(path), real(path)][1])
    plugins = [] if given is None else [given()]
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(max_steps=1, strategy=OffloadStrategy(offload_dir="swap"), plugins=plugins)
    trainer.fit(Wide())
    before = trainer.strategy.checkpoint_io
    trainer.save_checkpoint(path)
    trainer.strategy.teardown()
    assert trainer.strategy.checkpoint_io is before
    assert bool(seen) == streamed
    assert trainer.strategy.checkpoint_io.load_checkpoint(path, weights_only=True)["global_step"] == 1


class OfSeveralTypes(torch.optim.Optimizer):
    """Keeps its state in three of them."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    kinds = {"mean": p.dtype, "half": torch.bfloat16, "count": torch.int32}
                    state = self.state[p] or {key: torch.zeros_like(p, dtype=dtype) for key, dtype in kinds.items()}
                    self.state[p] = state
                    state["mean"].lerp_(p.grad, 0.1)
                    state["half"].copy_(state["mean"])
                    state["count"].add_(1)
                    p.sub_(state["mean"], alpha=group["lr"])
        return loss


class Narrow(pl.LightningModule):
    kind: Any = torch.optim.AdamW

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*[nn.Linear(32, 32) for _ in range(3)])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layers(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return self.kind(self.parameters())

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.ones(24, 32)), batch_size=4)


class Typed(Narrow):
    kind = OfSeveralTypes


class SavesEach(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(f"{trainer.global_step}.ckpt")


quiet = pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers", "ignore:You're resuming from a checkpoint"
)


@quiet
def test_state_of_several_types_is_saved_as_without_offloading_o3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, list[Any]] = {}
    for name in ("ours", "plain"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        for path in (None, "3.ckpt"):
            strategy: Any = OffloadStrategy(place={"optimizer_state": "disk"}) if name == "ours" else "auto"
            trainer = make_trainer(SavesEach(), strategy=strategy, max_steps=3 if path is None else 5)
            trainer.fit(Typed(), ckpt_path=path)
        found[name] = [torch.load(f"{step}.ckpt", weights_only=True) for step in (1, 3, 5)]
    for step, (ours, plain) in enumerate(zip(found["ours"], found["plain"], strict=True)):
        assert_same_tree(ours["state_dict"], plain["state_dict"], "state_dict")
        if step < 2:  # in the resumed one torch has made floating-point numbers of the counts, and we have not
            assert_same_tree(ours["optimizer_states"], plain["optimizer_states"], "optimizer_states")


class WritesToStates(pl.Callback):
    """Changes what ``state_dict`` gives, which is not the optimizer's."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        states = trainer.optimizers[0].state_dict()["state"]
        for state in states.values():
            state["exp_avg"].fill_(batch_idx)
        assert all(bool((state["exp_avg"] == batch_idx).all()) for state in states.values())


@quiet
def test_who_changes_what_state_dict_gives_of_a_disk_changes_only_that_o3() -> None:
    weights = []
    for callbacks in ([WritesToStates()], []):
        strategy = OffloadStrategy(place={"optimizer_state": "disk"}, offload_dir="swap")
        module = Narrow()
        make_trainer(*callbacks, strategy=strategy, max_steps=5).fit(module)
        weights.append(dict(module.state_dict()))
    assert_same_tree(weights[0], weights[1], "weights")
