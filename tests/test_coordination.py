"""Who takes part in a run, who is told of a change, and who is found."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import AsyncCheckpointIO, Precision, TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_efficient.coordination import (
    Offloader,
    ParameterChange,
    ParameterListener,
    announce,
    announce_before,
    find,
    members,
)


class Listening:
    """Remembers what it is told."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heard: list[ParameterChange] = []

    def on_parameters_changed(self, trainer: pl.Trainer, change: ParameterChange) -> None:
        self.heard.append(change)


class ListeningCallback(Listening, pl.Callback):
    pass


class ListeningPrecision(Listening, Precision):
    pass


class WrappingPrecision(Precision):
    def __init__(self, inner: Precision) -> None:
        self.inner = inner


class ListeningStrategy(Listening, SingleDeviceStrategy):
    pass


class ListeningCheckpointIO(Listening, TorchCheckpointIO):
    pass


class BothRoles(Listening, TorchCheckpointIO, pl.Callback):
    """One object that is the checkpoint IO and a callback."""

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        pass


class OffloadingCallback(pl.Callback):
    def enable_offload(self, trainer: pl.Trainer) -> None:
        pass


class Told(pl.Callback):
    def __init__(self, told: list[str]) -> None:
        self.told = told


class Holds(Told):
    def before_parameters_change(self, trainer: pl.Trainer) -> None:
        self.told.append("puts back")


class Copies(Told):
    def finish_copies(self, trainer: pl.Trainer) -> None:
        self.told.append("has copied")


def _trainer(tmp_path, callbacks: list[pl.Callback], **options: Any) -> pl.Trainer:
    defaults = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    defaults |= {"enable_model_summary": False, "default_root_dir": tmp_path}
    return pl.Trainer(callbacks=callbacks, **(defaults | options))


def test_members_come_in_the_order_in_which_they_are_told(tmp_path) -> None:
    inner = ListeningPrecision()
    precision, strategy = WrappingPrecision(inner), ListeningStrategy(device="cpu")
    innermost = ListeningCheckpointIO()
    checkpoint_io = AsyncCheckpointIO(innermost)
    first, second = ListeningCallback(), ListeningCallback()
    trainer = _trainer(tmp_path, [first, second], strategy=strategy, plugins=[precision, checkpoint_io])
    assert list(members(trainer)) == [precision, inner, strategy, checkpoint_io, innermost, first, second]

    change = ParameterChange(added=("a",), reason="test")
    announce(trainer, change)
    assert all(one.heard == [change] for one in (inner, strategy, innermost, first, second))


def test_who_copies_is_told_before_who_puts_state_back(tmp_path) -> None:
    """Whatever their order: what is put back lies where it may still be copied."""
    told: list[str] = []
    announce_before(_trainer(tmp_path, [Holds(told), Copies(told)]))
    assert told == ["has copied", "puts back"]


def test_an_object_with_two_roles_is_told_once(tmp_path) -> None:
    both = BothRoles()
    trainer = _trainer(tmp_path, [both], plugins=[both])
    assert list(members(trainer)).count(both) == 1
    announce(trainer, ParameterChange())
    assert len(both.heard) == 1


def test_a_ring_of_wrappers_ends(tmp_path) -> None:
    precision = WrappingPrecision(Precision())
    precision.inner = precision
    trainer = _trainer(tmp_path, [], plugins=[precision])
    assert list(members(trainer)).count(precision) == 1


def test_who_does_not_listen_is_left_alone(tmp_path) -> None:
    callback = pl.Callback()
    announce(_trainer(tmp_path, [callback]), ParameterChange())
    assert not isinstance(callback, ParameterListener)


def test_find_none_one_and_too_many(tmp_path) -> None:
    assert find(_trainer(tmp_path, [pl.Callback()]), Offloader) is None
    one = OffloadingCallback()
    assert find(_trainer(tmp_path, [pl.Callback(), one]), Offloader) is one
    with pytest.raises(MisconfigurationException, match=r"2 objects .* Offloader: OffloadingCallback, Offloading"):
        find(_trainer(tmp_path, [one, OffloadingCallback()]), Offloader)
