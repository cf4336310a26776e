"""AsyncCheckpointIO with ModelCheckpoint on remote storage: what is there at the end, and going on from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import lightning.pytorch as pl
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_efficient import AsyncCheckpointIO
from lightning_efficient.checkpointing import CheckpointDamagedError, CheckpointSaveError
from tests.checkpointing.clouds import Cloud, Network, everything, seen, until
from tests.helpers import quick
from tests.helpers.fitting import assert_same_tree
from tests.technique_settings import demo_data, demo_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


@pytest.fixture
def store() -> Iterator[str]:
    """URL of a remote directory that is there for one test."""
    Cloud.network = Network()
    for system in MemoryFileSystem, Cloud:
        system.store.clear()
        system.pseudo_dirs[:] = [""]
    yield "memory://run"
    Cloud.network.gate.set()
    for system in MemoryFileSystem, Cloud:
        system.store.clear()
        system.pseudo_dirs[:] = [""]


def train(root: Path, *callbacks: Callback, **arguments: Any) -> tuple[pl.Trainer, pl.LightningModule]:
    """Eight steps with dropout."""
    return quick.train(root, *callbacks, **({"module": demo_model(dropout=0.2), "max_steps": 8} | arguments))


def every(url: str, steps: int = 2, **arguments: Any) -> ModelCheckpoint:
    return ModelCheckpoint(url, "{step}", every_n_train_steps=steps, **({"save_top_k": -1} | arguments))


def remote_io(root: Path, **arguments: Any) -> AsyncCheckpointIO:
    """Impatient, for a test."""
    io = AsyncCheckpointIO(local_dir=str(root / "local"), **arguments)
    io._places._tier._retry_seconds = 0.001  # type: ignore[union-attr]
    return io


def names(url: str) -> list[str]:
    system, path = fsspec.url_to_fs(url)
    return sorted(name.rpartition("/")[2] for name in system.ls(path, detail=False)) if system.exists(path) else []


def load(url: str) -> Any:
    with fsspec.open(url) as file:
        return torch.load(file, weights_only=True)


def damage(url: str) -> None:
    system, path = fsspec.url_to_fs(url)
    spoilt = bytearray(system.cat_file(path))
    spoilt[5000] ^= 1
    system.pipe_file(path, bytes(spoilt))


# -- what is there -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"save_top_k": 1},
        {"save_top_k": 1, "monitor": "step", "mode": "max"},
        {"save_top_k": 2, "monitor": "train_loss", "save_last": True},
        {"save_top_k": -1},
        {"save_top_k": 0, "save_last": True},
        {"save_top_k": 1, "save_weights_only": True},
    ],
    ids=str,
)
def test_the_files_are_those_of_plain_lightning_c10(settings: dict[str, Any], store: str, tmp_path: Path) -> None:
    savers, modules = {}, {}
    for who, callbacks in {"plain": [], "ours": [remote_io(tmp_path)]}.items():
        pl.seed_everything(3, verbose=False)
        savers[who] = every(f"{store}/{who}", **settings)
        _, modules[who] = train(tmp_path, *callbacks, savers[who])
    assert names(f"{store}/ours") == names(f"{store}/plain") != []
    for name in names(f"{store}/ours"):
        loaded, expected = load(f"{store}/ours/{name}"), load(f"{store}/plain/{name}")
        for key in {"state_dict", "optimizer_states", "lr_schedulers", "global_step"} & set(expected):
            assert_same_tree(_plain(loaded[key]), _plain(expected[key]), f"{name}[{key!r}]")
    assert_same_tree(dict(modules["ours"].state_dict()), dict(modules["plain"].state_dict()), "weights")
    for which in ("best_model_path", "last_model_path"):
        path, expected = (getattr(savers[who], which) for who in ("ours", "plain"))
        assert path == expected.replace("/plain/", "/ours/")
        assert not path or fsspec.url_to_fs(path)[0].exists(path)


def _plain(tree: Any) -> Any:
    return dict(tree) if isinstance(tree, dict) else tree


def test_equal_names_get_versions_while_the_first_is_pending_c10(store: str, tmp_path: Path) -> None:
    for who, callbacks in {"plain": [], "ours": [remote_io(tmp_path)]}.items():
        save = ModelCheckpoint(f"{store}/{who}", "same", every_n_train_steps=1, save_top_k=-1, monitor="step")
        train(tmp_path, *callbacks, save)
    assert names(f"{store}/ours") == names(f"{store}/plain")


class Looks(Callback):
    """Loads all that can be seen under a checkpoint's name, while files come and go."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.seen: set[str] = set()

    def on_train_batch_start(self, *_: Any) -> None:
        for name in names(self.url):
            if name.endswith(".ckpt"):
                try:
                    load(f"{self.url}/{name}")
                except FileNotFoundError:  # removed meanwhile
                    continue
                self.seen.add(name)


@pytest.mark.parametrize("protocol", ["memory", "cloud", "cloudtx"])
def test_nothing_is_seen_before_it_is_complete_c10(protocol: str, store: str, tmp_path: Path) -> None:
    url = f"{protocol}://run"
    looks = Looks(url)
    train(tmp_path, remote_io(tmp_path), looks, every(url, 1, save_top_k=1, save_last=True), max_steps=30)
    assert looks.seen
    assert names(url) == ["last.ckpt", "step=30.ckpt"]


def test_it_saves_by_itself_and_keeps_the_newest_c6_c11(store: str, tmp_path: Path) -> None:
    arguments = {"frequency": "drive", "dirpath": store, "keep": 2}
    pl.seed_everything(3, verbose=False)
    _, whole = train(tmp_path, remote_io(tmp_path, **arguments), max_steps=40)
    steps = sorted(int(name.removeprefix("step=").removesuffix(".ckpt")) for name in names(store))
    assert len(steps) == 2
    resume = f"{store}/step={steps[0]}.ckpt"
    _, resumed = train(tmp_path, remote_io(tmp_path / "elsewhere", **arguments), max_steps=40, resume=resume)
    assert_same_tree(dict(resumed.state_dict()), dict(whole.state_dict()), "weights")
    assert len(names(store)) <= 3, "and what the run that was not gone on with had saved after that"


# -- going on from it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["here", "elsewhere"])
def test_a_run_goes_on_from_a_url_c6(place: str, store: str, tmp_path: Path) -> None:
    pl.seed_everything(3, verbose=False)
    _, whole = train(tmp_path, remote_io(tmp_path / "here"), every(store))
    for step in (2, 6):
        pl.seed_everything(99, verbose=False)
        trainer, resumed = train(tmp_path, remote_io(tmp_path / place), resume=f"{store}/step={step}.ckpt")
        assert trainer.global_step == 8
        assert_same_tree(dict(resumed.state_dict()), dict(whole.state_dict()), f"resumed at {step}")


def test_auto_takes_the_newest_intact_one_beside_it_c6_c10(store: str, tmp_path: Path) -> None:
    pl.seed_everything(3, verbose=False)
    _, whole = train(tmp_path, remote_io(tmp_path), every(store))
    for step in (6, 8):
        damage(f"{store}/step={step}.ckpt")
    resume = f"{store}/step=8.ckpt"
    with pytest.raises(CheckpointDamagedError, match=r"step=8\.ckpt' is damaged"):
        train(tmp_path, remote_io(tmp_path / "elsewhere"), resume=resume)
    with pytest.warns(UserWarning, match=r"Loading '.*step=4\.ckpt' instead"):
        trainer, resumed = train(tmp_path, remote_io(tmp_path / "elsewhere", resume="auto"), resume=resume)
    assert trainer.global_step == 8
    assert_same_tree(dict(resumed.state_dict()), dict(whole.state_dict()), "weights")


def test_the_local_copy_of_a_damaged_file_is_gone_on_from_c6(store: str, tmp_path: Path) -> None:
    pl.seed_everything(3, verbose=False)
    _, whole = train(tmp_path, remote_io(tmp_path), every(store))
    damage(f"{store}/step=6.ckpt")
    _, resumed = train(tmp_path, remote_io(tmp_path), resume=f"{store}/step=6.ckpt")
    assert_same_tree(dict(resumed.state_dict()), dict(whole.state_dict()), "weights")


def test_what_is_not_there_is_said(store: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint 'memory://run/no\.ckpt'"):
        train(tmp_path, remote_io(tmp_path, resume="auto"), resume=f"{store}/no.ckpt")


@pytest.mark.parametrize("which", ["best", "url"])
def test_the_best_is_tested_after_the_fit(which: str, store: str, tmp_path: Path) -> None:
    trainer, module = train(tmp_path, remote_io(tmp_path), every(store, save_top_k=1, monitor="step", mode="min"))
    expected = load(f"{store}/step=2.ckpt")["state_dict"]
    trainer.test(module, demo_data(), ckpt_path=f"{store}/step=2.ckpt" if which == "url" else "best", verbose=False)
    assert_same_tree(dict(module.state_dict()), dict(expected), "weights")


# -- what cannot be is said before the first step ----------------------------------------------------------------------


class CountsSteps(Callback):
    steps = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.steps += 1


def test_urls_without_a_local_directory_are_refused_before_the_first_step(store: str, tmp_path: Path) -> None:
    counts = CountsSteps()
    for callbacks in ([AsyncCheckpointIO(), every(store)], [AsyncCheckpointIO(frequency="drive", dirpath=store)]):
        with pytest.raises(ValueError, match=r"'memory://run.* is on remote storage.*local_dir='"):
            train(tmp_path, counts, *callbacks)
    with pytest.raises(ValueError, match=r"'memory://run/a\.ckpt' is on remote storage.*local_dir='"):
        train(tmp_path, counts, AsyncCheckpointIO(), resume=f"{store}/a.ckpt")
    assert counts.steps == 0
    assert names(store) == []


def test_an_unknown_protocol_is_refused_before_the_first_step(tmp_path: Path) -> None:
    counts = CountsSteps()
    io = remote_io(tmp_path, frequency="drive", dirpath="nonsense://bucket/run")
    with pytest.raises(ValueError, match="protocol 'nonsense', which fsspec does not know"):
        train(tmp_path, counts, io)
    with pytest.raises(ValueError, match="protocol 'nonsense', which fsspec does not know"):
        train(tmp_path, counts, remote_io(tmp_path), resume="nonsense://bucket/run/a.ckpt")
    assert counts.steps == 0


def test_a_remote_root_where_nothing_is_saved_is_nobodys_business(store: str, tmp_path: Path) -> None:
    """The Trainer's, of a run whose checkpoints are local."""
    local = every(str(tmp_path / "ck"), 4)
    train(store, AsyncCheckpointIO(), local)  # type: ignore[arg-type]
    assert sorted(path.name for path in (tmp_path / "ck").iterdir()) == ["step=4.ckpt", "step=8.ckpt"]


# -- a network that fails ----------------------------------------------------------------------------------------------


class Breaks(Callback):
    """The network, from a step on, for some tries; what was asked for before is there."""

    def __init__(self, io: AsyncCheckpointIO, step: int, tries: int = 1000) -> None:
        self.io = io
        self.step = step
        self.tries = tries

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            until(lambda: not self.io._places.pending())
            Cloud.network.fails = [ConnectionError("the network is down")] * self.tries


@pytest.mark.parametrize("protocol", ["cloud", "cloudtx"])
@pytest.mark.filterwarnings("ignore:AsyncCheckpointIO. .*network is down")  # one more, asked for before the error came
def test_a_failed_upload_ends_the_run_and_costs_no_file_c10(protocol: str, store: str, tmp_path: Path) -> None:
    url, io = f"{protocol}://run", remote_io(tmp_path)
    with pytest.raises(CheckpointSaveError, match=r"step=6\.ckpt' of step 6 could not be uploaded: ConnectionError"):
        train(tmp_path, io, Breaks(io, 5), every(url, save_top_k=1), max_steps=200)
    assert everything(url) == ["step=4.ckpt"]
    assert load(f"{url}/step=4.ckpt")["global_step"] == 4


def test_a_failed_upload_at_the_very_end_is_not_lost_c10(store: str, tmp_path: Path) -> None:
    io = remote_io(tmp_path)
    with pytest.raises(CheckpointSaveError, match=r"step=8\.ckpt' of step 8 could not be uploaded: ConnectionError"):
        train(tmp_path, io, Breaks(io, 7), every("cloud://run", save_top_k=1))
    assert everything("cloud://run") == ["step=6.ckpt"]


@pytest.mark.parametrize("monitor", [None, "step"])
def test_warn_goes_on_and_names_only_files_that_are_there_c10(monitor: str | None, store: str, tmp_path: Path) -> None:
    url, io = "cloud://run", remote_io(tmp_path, on_error="warn")
    save = every(url, save_top_k=1, monitor=monitor, mode="max")
    with pytest.warns(UserWarning, match="the network is down"):
        trainer, _ = train(tmp_path, io, Breaks(io, 5), save)
    assert trainer.global_step == 8
    assert everything(url) == ["step=4.ckpt"]
    assert any("the network is down" in event.text for event in io.events())
    assert save.best_model_path == f"{url}/step=4.ckpt"


def test_a_short_trouble_is_outlasted_c10(store: str, tmp_path: Path) -> None:
    io = remote_io(tmp_path)
    train(tmp_path, io, Breaks(io, 5, tries=2), every("cloud://run", save_top_k=1))
    assert everything("cloud://run") == ["step=8.ckpt"]


def test_what_may_not_be_listed_can_be_written_to(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError("no ListBucket")

    monkeypatch.setattr(Cloud, "ls", refuse)
    with pytest.warns(UserWarning, match=r"What killed runs left in 'cloud://run' could not be looked for: no List"):
        train(tmp_path, remote_io(tmp_path), every("cloud://run", 4))
    assert everything("cloud://run") == ["step=4.ckpt", "step=8.ckpt"]


def test_training_does_not_wait_for_the_network(store: str, tmp_path: Path) -> None:
    """And what is not wanted any more when it is back is not uploaded."""

    class Opens(Callback):
        def on_train_end(self, *_: Any) -> None:
            io.engine.drain()
            assert seen("cloud://run") == []
            Cloud.network.gate.set()

    io = remote_io(tmp_path)
    Cloud.network.gate.clear()
    train(tmp_path, io, every("cloud://run", 1, save_top_k=1), Opens(), max_steps=12)
    assert everything("cloud://run") == ["step=12.ckpt"]
    assert len([path for path in Cloud.network.writes if not path.startswith("-")]) == 2, "of steps 1 and 12"
