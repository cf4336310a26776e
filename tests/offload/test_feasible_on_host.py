"""Plans where the host steps: values of parameters lie beside their state in its memory, and take room."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_efficient import OffloadStrategy
from lightning_efficient.offload.session import OffloadSession
from lightning_efficient.offload.tier_set import TierSet
from tests.helpers.fitting import assert_same_tree, make_trainer
from tests.offload.test_feasible import LARGE, REST, Uneven, fitted

pytestmark = pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")


class OnHost(OffloadStrategy):
    """Steps on the host though the device is a CPU."""

    def _new_session(self, *args: Any, **kwargs: Any) -> OffloadSession:
        return OffloadSession(*args, **kwargs, site="host")


def on_host(**arguments: Any) -> tuple[OffloadSession, dict[str, Any]]:
    callbacks = arguments.pop("callbacks", [])
    trainer = make_trainer(*callbacks, max_steps=3, strategy=OnHost(offload_dir="swap", **arguments))
    module = Uneven()
    trainer.fit(module)
    return trainer.strategy._session, {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("spare", [0, 300_000, LARGE - 20_000])
def test_the_largest_module_has_room_too_o6(spare: int) -> None:
    budget = 7 * LARGE + REST + spare  # also for what is on its way
    session, weights = on_host(memory_budget={"host": budget})
    moving = session._way().total(session.placement, session.staging_bytes)
    assert session.placement.used("host") + session._window_bytes + moving <= budget
    assert_same_tree(weights, fitted()[1], "weights")


def test_staging_has_room_for_values_or_it_is_said_in_setup_o4() -> None:
    memory, disk = ({"optimizer_state": tier} for tier in ("numa:0", "disk"))
    with pytest.raises(ValueError, match=rf"staging=.* of 'large.weight' .*{3 * LARGE:,} bytes"):
        on_host(place=memory, staging=3 * LARGE - 1)
    on_host(place=memory, staging=3 * LARGE)
    on_host(place=disk, staging=2 * LARGE)


class Frees(pl.Callback):
    """Memory of the device becomes free: state that was in other memory comes there, and that of the disk follows."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.moved = nbytes, False

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            session = trainer.strategy._session
            first, *others = session.placement.rooms
            session.tiers.rooms = lambda *_: [replace(first, nbytes=first.nbytes + self.nbytes), *others]
            self.moved = session.adapt()


def test_what_leaves_the_disk_has_room_for_its_value_o5(monkeypatch: pytest.MonkeyPatch) -> None:
    fastest = 2 * (2 * LARGE + REST)  # parameters and gradients
    monkeypatch.setattr(TierSet, "_room", lambda *_: fastest)
    frees, budget = Frees(3 * LARGE), 3 * LARGE - 1
    session, weights = on_host(memory_budget={"numa:0": budget}, schedule="after_backward", callbacks=[frees])
    assert frees.moved
    assert session.placement.used("numa:0") <= budget
    assert_same_tree(weights, fitted()[1], "weights")
