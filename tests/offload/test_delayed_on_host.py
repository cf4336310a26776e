"""Late updates that the host makes meanwhile: who looks at weights or goes on must find them whole."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from lightning_efficient import AsyncCheckpointIO, GrowAndUnshareCallback, OffloadStrategy
from lightning_efficient.demos.language_model import ByteLanguageModel
from lightning_efficient.offload import session as sessions
from lightning_efficient.offload.session import OffloadSession
from lightning_efficient.offload.updates.host_job import HostJob
from tests.helpers.fitting import assert_same_tree, fit
from tests.offload.late import AFTER, CLIPS, by_hand, same
from tests.offload.late_crossing import LateCrossing
from tests.technique_settings import demo_model

PLACES = {
    "disk": {"optimizer_state": "disk"},
    "memory": {"optimizer_state": "numa:0"},
    "gradients": {"optimizer_state": "numa:0", "gradient": "disk"},
    "parameters": {"optimizer_state": "numa:0", "parameter": "disk"},
    "everything": dict.fromkeys(("parameter", "optimizer_state", "gradient", "activation"), "disk"),
}


class OnHost(OffloadStrategy):
    """Steps on the host though the device is a CPU."""

    def _new_session(self, *args: Any, **kwargs: Any) -> OffloadSession:
        return OffloadSession(*args, **kwargs, site="host")


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host takes its time, and copies come as late as they may."""
    step = HostJob.step

    def later(job: HostJob) -> None:
        time.sleep(0.003)
        step(job)

    monkeypatch.setattr(HostJob, "step", later)
    monkeypatch.setattr(sessions, "crossing_for", lambda _: LateCrossing())


def late(place: str = "memory", kind: type = OnHost, **arguments: Any) -> dict[str, Any]:
    arguments = {"schedule": "delayed", "delay_after": AFTER, "offload_dir": "swap"} | arguments
    return {"strategy": kind(place=PLACES[place], **arguments)}


@pytest.mark.parametrize(("clip", "accumulate"), [("none", 1), ("norm", 2)])
@pytest.mark.parametrize("place", PLACES)
def test_the_weights_are_those_of_the_loop_by_hand_o10(place: str, clip: str, accumulate: int) -> None:
    arguments = {**CLIPS[clip], "accumulate_grad_batches": accumulate, "max_steps": 8}
    ours = fit(None, build=late(place), **arguments)
    same(ours, by_hand(fit(None, **arguments), clip=clip, accumulate=accumulate))


class Skips(ByteLanguageModel):
    """Leaves out some of its optimizer's steps."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 3 == 2:
            optimizer_closure()
        else:
            optimizer.step(optimizer_closure)


def test_a_step_that_is_left_out_o10() -> None:
    ours, device = (
        fit(None, build=late(kind=kind), module=demo_model(Skips), max_steps=8) for kind in (OnHost, OffloadStrategy)
    )
    same(ours, device)


class Looks(pl.Callback):
    """Reads weights, or changes them, behind backward."""

    def __init__(self, hook: str, *, change: bool) -> None:
        self.change, self.seen = change, []
        setattr(self, hook, self.look)

    def on_after_backward(self, *_: Any) -> None: ...

    def on_before_optimizer_step(self, *_: Any) -> None: ...

    @torch.no_grad()
    def look(self, trainer: Any, module: Any, *_: Any) -> None:
        self.seen.append([float(p.sum()) for p in module.parameters()])
        if self.change:
            for parameter in module.parameters():
                parameter.data.mul_(0.99)


@pytest.mark.parametrize("change", [False, True])
@pytest.mark.parametrize("hook", ["on_after_backward", "on_before_optimizer_step"])
def test_weights_are_whole_behind_backward_o10(hook: str, change: bool) -> None:
    looks = [Looks(hook, change=change) for _ in range(2)]
    ours, device = (
        fit(None, build=late(kind=kind), before=[look], max_steps=8)
        for kind, look in zip((OnHost, OffloadStrategy), looks, strict=True)
    )
    assert looks[0].seen == looks[1].seen
    same(ours, device)


class Forgets(pl.Callback):
    """Has the optimizer begin anew."""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4:
            trainer.optimizers[0].state.clear()


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("schedule", ["after_backward", "in_backward", "under_forward", "delayed"])
def test_state_that_somebody_takes_out_does_not_come_back(schedule: str, place: str) -> None:
    ours, device = (
        fit(None, build=late(place, kind, schedule=schedule), before=[Forgets()], max_steps=8)
        for kind in (OnHost, OffloadStrategy)
    )
    same(ours, device)


def grow() -> GrowAndUnshareCallback:
    return GrowAndUnshareCallback(mode="stack", stages=[{"depth": 2, "until": 3}, {"depth": 4}])


BESIDE: dict[str, dict[str, Any]] = {
    "averages": {"before": lambda: [EMAWeightAveraging(decay=0.8)], "limit_val_batches": 1, "val_check_interval": 3},
    "asynchronous checkpoints": {"after": lambda: [AsyncCheckpointIO(in_memory=1)]},
    "growth": {"before": lambda: [grow()]},
}


@pytest.mark.parametrize("place", ["memory", "parameters"])
@pytest.mark.parametrize("beside", BESIDE)
def test_beside_others_o10(beside: str, place: str, tmp_path: Path) -> None:
    runs = []
    for kind in (OnHost, OffloadStrategy):
        case = {key: value() if callable(value) else value for key, value in BESIDE[beside].items()}
        root = tmp_path / kind.__name__
        runs.append(fit(None, build=late(place, kind), root=root, checkpoints={}, max_steps=8, **case))
    same(*runs)
    for step in (2, 5, 8):
        one, other = (torch.load(run.checkpoints[step], weights_only=True) for run in runs)
        assert_same_tree(one["state_dict"], other["state_dict"], "state_dict")
        assert_same_tree(one["optimizer_states"], other["optimizer_states"], "optimizer_states")
