"""Where updates are computed: what is chosen from which times, how they are measured, and whole runs on the host."""

from __future__ import annotations

import functools
import math
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_efficient import (
    AsyncCheckpointIO,
    GrowAndUnshareCallback,
    OffloadDDPStrategy,
    OffloadFSDP2Strategy,
    OffloadStrategy,
)
from lightning_efficient.offload import fsdp2, site, site_choice
from lightning_efficient.offload.placement import Attribute, Row
from lightning_efficient.offload.session import OffloadSession
from lightning_efficient.offload.settings import parse_settings
from lightning_efficient.offload.sharded.ranks import Ranks
from lightning_efficient.offload.sharded.session import ShardedSession
from lightning_efficient.offload.site import (
    SiteMeasurements,
    calibrate,
    choose_site,
    host_step_nanoseconds,
    link_bytes_per_second,
)
from lightning_efficient.offload.site_choice import ChosenSite
from lightning_efficient.offload.tiers.tier import TierError
from tests.helpers.fitting import Run, assert_same_tree, fit
from tests.helpers.ranks import run_on_two_ranks
from tests.offload.dividing import assert_same_checkpoints
from tests.offload.dividing import run as ranks_run

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")

GB = 1e9


def measured(dram: float, link: float, *, disk: float = math.inf, on_disk: float = 0.0) -> SiteMeasurements:
    """AdamW with values in full precision beside parameters of 16 bits, at these bandwidths (GB/s)."""
    return SiteMeasurements(
        host_step_ns=28 / dram,
        link_bytes_per_second=link * GB,
        disk_bytes_per_second=disk * GB,
        state_bytes=12,
        gradient_bytes=2,
        value_bytes=2,
        on_disk=on_disk,
    )


@pytest.mark.parametrize(
    ("machine", "site"),
    [
        (measured(dram=150, link=55), "host"),  # a server with PCIe 5
        (measured(dram=150, link=25), "host"),  # with PCIe 4
        (measured(dram=40, link=55), "device"),  # few memory channels
        (measured(dram=400, link=350), "device"),  # a coherent link: the state crosses it in half the time
        (measured(dram=150, link=62), "device"),  # hardly faster, and it rounds differently
        (measured(dram=150, link=25, disk=6, on_disk=1.0), "device"),  # the disk is what both wait for
    ],
)
def test_the_faster_site_is_chosen(machine: SiteMeasurements, site: str) -> None:
    assert choose_site(machine) == site


def test_what_a_step_takes_is_the_longest_of_what_overlaps() -> None:
    one = measured(dram=150, link=55)
    assert one.host_ns == pytest.approx(28 / 150)
    assert one.device_ns == pytest.approx(12 / 55)
    assert measured(dram=1e6, link=1).host_ns == pytest.approx(2)
    assert measured(dram=1e6, link=1, on_disk=1.0).host_ns == pytest.approx(4), "the value is not on the host"
    slow = measured(dram=150, link=55, disk=3, on_disk=0.5)
    assert slow.host_ns == slow.device_ns == slow.disk_ns == pytest.approx(0.5 * 24 / 3)


@pytest.mark.parametrize("shape", [(), (7,), (300, 20), (3, 4, 5)])
@pytest.mark.parametrize("in_full", [False, True])
def test_it_is_measured_with_the_users_optimizer_which_stays_as_it_is(
    shape: tuple[int, ...], in_full: bool, tmp_path: Path
) -> None:
    parameter = nn.Parameter(torch.ones(shape, dtype=torch.bfloat16 if in_full else torch.float32))
    optimizer = torch.optim.AdamW([parameter], lr=torch.tensor(0.1), fused=True)
    before, random = optimizer.state_dict(), torch.get_rng_state()
    found = calibrate(
        optimizer,
        optimizer.param_groups[0],
        parameter,
        device=torch.device("cpu"),
        master_weights=in_full,
        staging_bytes=8 << 20,
        on_disk=0.5,
        directory=tmp_path,
    )
    assert optimizer.state_dict() == before
    assert not optimizer.state
    assert torch.equal(torch.get_rng_state(), random)
    moments = 8 if shape else 0  # of a single number they stay with its counter
    assert found.state_bytes == pytest.approx(moments + 4 * in_full)
    assert 0 < found.host_step_ns < 1e9
    assert 0 < found.disk_bytes_per_second < math.inf
    assert not list(tmp_path.iterdir())
    assert not [one for one in threading.enumerate() if "calibration" in one.name]


def test_large_parameters_are_measured_on_a_part() -> None:
    parameter = nn.Parameter(torch.empty(1 << 20, 64, device="meta"))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    stepped: list[int] = []
    real = torch.optim.SGD.step.__wrapped__

    class Noted(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            stepped.append(self.param_groups[0]["params"][0].numel())
            return real(self, closure)

    optimizer.__class__ = Noted
    assert host_step_nanoseconds(optimizer, optimizer.param_groups[0], parameter) > 0
    assert set(stepped) == {4 << 20}


def test_the_kernels_that_will_step_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool | None] = []
    monkeypatch.setattr(site, "step_alone", lambda of, group, shown: seen.append(group["fused"]))
    parameter = nn.Parameter(torch.empty(4, 4))
    optimizer = torch.optim.AdamW([parameter])
    for device in (torch.device("cuda"), None):
        host_step_nanoseconds(optimizer, optimizer.param_groups[0], parameter, device=device)
    assert seen == [True] * 4 + [None] * 4


def test_the_link_is_measured_by_copies() -> None:
    assert link_bytes_per_second(torch.device("cpu"), 8 << 20) > 1e6


class Chosen(ChosenSite):
    def run(self, *, tier: str = "host", streams: bool = False, folder: Path = Path()) -> str:
        module = nn.Linear(4, 4)
        rows = [Row(Attribute("optimizer_state", "weight", 128), tier, "")] if tier else []
        optimizers = [torch.optim.Adam(module.parameters())]
        options: dict[str, Any] = {"master_weights": False, "staging_bytes": 8 << 20, "directory": folder}
        self.choose(rows, module, optimizers, streams=streams, **options)
        return self.site


CPU = torch.device("cpu")


def test_it_is_measured_once_and_only_where_there_is_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []

    def pretend(*_: Any, on_disk: float, **__: Any) -> SiteMeasurements:
        calls.append(on_disk)
        return measured(dram=150, link=25)

    monkeypatch.setattr(site_choice, "calibrate", pretend)
    assert Chosen("auto", CPU).run(tier="") == "device"
    assert Chosen("host", CPU).run(tier="") == "device"
    assert Chosen("host", CPU).run() == "host"
    assert Chosen("device", CPU).run() == "device"
    assert Chosen("auto", CPU).run(streams=True) == "device"
    assert calls == []
    chosen = Chosen("auto", CPU)
    assert chosen.run() == chosen.run() == "host"
    assert calls == [0.0]
    assert chosen.summary() == "updates on the host (0.19 ns an element on the host, 0.48 on the device)"
    assert set(chosen.measurements()) == {
        "host_step_ns_per_element",
        "device_step_ns_per_element",
        "link_gigabytes_per_second",
    }


def test_shards_of_a_gpu_are_updated_there_and_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_choice, "calibrate", lambda *_, **__: pytest.fail("measured"))
    monkeypatch.setattr(fsdp2, "Ranks", lambda *_: None)
    monkeypatch.setattr(fsdp2, "LocalShardSession", lambda *_, site, **__: site)
    monkeypatch.setattr(OffloadFSDP2Strategy, "root_device", torch.device("cuda", 0))
    monkeypatch.setattr(OffloadFSDP2Strategy, "num_processes", 2)
    site = OffloadFSDP2Strategy()._new_session()
    assert Chosen(site, torch.device("cuda", 0)).run() == "device"  # type: ignore[arg-type]


def test_a_machine_that_cannot_be_measured_steps_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise TierError(12, "no pinned memory")

    monkeypatch.setattr(site_choice, "calibrate", fails)
    with pytest.warns(UserWarning, match="no pinned memory.*updates are on the device"):
        assert Chosen("auto", CPU).run() == "device"


def test_what_is_no_site_is_refused() -> None:
    with pytest.raises(ValueError, match=r"step_on='gpu' is not allowed. Use one of auto, device, host"):
        OffloadStrategy(step_on="gpu")  # type: ignore[arg-type]
    arguments: Any = dict.fromkeys(("memory_budget", "offload_dir", "place", "staging"))
    assert parse_settings(**arguments, schedule="auto", master_weights=False).step_on == "auto"


# -- whole runs, with the host's memory for the device's ---------------------------------------------------------------


class OnHost(OffloadStrategy):
    """Steps on the host though the device is a CPU."""

    def _new_session(self, *args: Any, **kwargs: Any) -> OffloadSession:
        return OffloadSession(*args, **kwargs, site="host")


def on_host(**arguments: Any) -> dict[str, Any]:
    return {"strategy": OnHost(**({"offload_dir": "swap", "place": {"optimizer_state": "disk"}} | arguments))}


PLACES = {
    "disk": {"optimizer_state": "disk"},
    "memory": {"optimizer_state": "numa:0"},
    "gradients too": {"optimizer_state": "numa:0", "gradient": "numa:0"},
    "parameters too": {"optimizer_state": "numa:0", "parameter": "numa:0"},
    "everything": dict.fromkeys(("parameter", "optimizer_state", "gradient", "activation"), "disk"),
}


def short(build: dict[str, Any] | None, **arguments: Any) -> Run:
    return fit(None, build=build, limit_val_batches=1, val_check_interval=3, max_steps=6, **arguments)


@functools.cache
def plain_run(*arguments: tuple[str, Any]) -> Run:
    return short(None, **dict(arguments))


@pytest.mark.parametrize("arguments", [{}, {"gradient_clip_val": 0.3}, {"accumulate_grad_batches": 2}])
@pytest.mark.parametrize("place", PLACES)
def test_a_run_is_the_same_bit_for_bit_o3(place: str, arguments: dict[str, Any]) -> None:
    ours, plain = short(on_host(place=PLACES[place]), **arguments), plain_run(*arguments.items())
    assert ours.losses == plain.losses
    assert_same_tree(ours.weights, plain.weights, "weights")
    assert_same_tree(ours.optimizers, plain.optimizers, "optimizers")
    assert not any("host-step" in thread.name for thread in threading.enumerate())


def test_batches_in_parts_and_done_again() -> None:
    build = on_host(place=PLACES["memory"], schedule="under_forward", batch_feedback=True)
    ours, plain = fit(None, build=build, max_steps=6), fit(None, max_steps=6)
    assert ours.losses == plain.losses
    assert_same_tree(ours.weights, plain.weights, "weights")


def test_full_precision_on_the_host_is_that_on_the_device() -> None:
    arguments: dict[str, Any] = {"precision": "bf16-true", "max_steps": 6}
    ours = fit(None, build=on_host(master_weights=True, place=PLACES["memory"]), **arguments)
    device = {"strategy": OffloadStrategy(master_weights=True, place=PLACES["memory"])}
    plain = fit(None, build=device, **arguments)
    assert ours.losses == plain.losses
    assert_same_tree(ours.weights, plain.weights, "weights")


@pytest.mark.parametrize("schedule", ["after_backward", "in_backward", "under_forward"])
@pytest.mark.parametrize("place", ["disk", "memory"])
def test_checkpoints_are_plain_both_ways(place: str, schedule: str, tmp_path: Path) -> None:
    build = {"place": PLACES[place], "schedule": schedule}
    ours = fit(None, build=on_host(**build), root=tmp_path / "ours", checkpoints={}, max_steps=6)
    plain = fit(None, root=tmp_path / "plain", checkpoints={}, max_steps=6)
    one, other = (torch.load(run.checkpoints[3], weights_only=True) for run in (ours, plain))
    assert_same_tree(one["state_dict"], other["state_dict"], "state_dict")
    assert_same_tree(one["optimizer_states"], other["optimizer_states"], "optimizer_states")
    resumed = fit(None, build=on_host(**build), ckpt_path=plain.checkpoints[3], max_steps=6)
    assert_same_tree(resumed.weights, plain.weights, "weights")
    assert_same_tree(resumed.optimizers, plain.optimizers, "optimizers")


def grow() -> GrowAndUnshareCallback:
    return GrowAndUnshareCallback(mode="stack", stages=[{"depth": 2, "until": 3}, {"depth": 4}])


BESIDE: dict[str, dict[str, Any]] = {
    "averaged weights": {"before": lambda: [EMAWeightAveraging(decay=0.8)], "limit_val_batches": 1},
    "asynchronous checkpoints": {"after": lambda: [AsyncCheckpointIO(in_memory=1)]},
    "growth": {"before": lambda: [grow()]},
    "clamped weights": {"before": lambda: [Clamps()]},
    "looked at": {"before": lambda: [Reads()]},
}


class Clamps(pl.Callback):
    """Writes to weights as people did before there was ``no_grad``."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        for parameter in pl_module.parameters():
            parameter.data.clamp_(-0.1, 0.1)


class Reads(pl.Callback):
    """Looks at gradients before the step, and at weights behind it."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        assert any(parameter.grad is not None for parameter in pl_module.parameters())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        assert all(parameter.isfinite().all() for parameter in pl_module.parameters())


@pytest.mark.parametrize("schedule", ["auto", "under_forward"])
@pytest.mark.parametrize("beside", BESIDE)
def test_beside_others_that_read_and_write_weights(beside: str, schedule: str, tmp_path: Path) -> None:
    def run(build: dict[str, Any] | None, root: Path) -> Any:
        case = {key: value() if callable(value) else value for key, value in BESIDE[beside].items()}
        return fit(None, build=build, root=root, checkpoints={}, each_step=True, max_steps=6, **case)

    ours = run(on_host(place=PLACES["memory"], schedule=schedule), tmp_path / "ours")
    plain = run(None, tmp_path / "plain")
    assert ours.losses == plain.losses
    assert_same_tree(ours.weights_at, plain.weights_at, "weights at each step")
    for step in (2, 6):
        one, other = (torch.load(run.checkpoints[step], weights_only=True) for run in (ours, plain))
        assert_same_tree(one["state_dict"], other["state_dict"], "state_dict")
        assert_same_tree(one["optimizer_states"], other["optimizer_states"], "optimizer_states")


class OnHostDDP(OffloadDDPStrategy):
    """Likewise, on each rank."""

    def _new_session(self, *args: Any, **kwargs: Any) -> OffloadSession:
        return ShardedSession(Ranks(self.root_device, self.num_processes), *args, **kwargs, site="host")


def of_two_ranks(rank: int, root: Path) -> None:
    for name, arguments in {"plain": {}, "clipped": {"gradient_clip_val": 0.3}}.items():
        for place in ("disk", "memory"):
            where = root / f"{name}-{place}"
            plain = ranks_run(where / "plain", DDPStrategy(), **arguments)
            ours = ranks_run(where / "ours", OnHostDDP(offload_dir="swap", place=PLACES[place]), **arguments)
            assert ours.losses == plain.losses
            assert_same_checkpoints(ours, plain, f"{name}: checkpoint")


def test_two_ranks_step_their_shares_on_the_host(tmp_path: Path) -> None:
    run_on_two_ranks(of_two_ranks, tmp_path, tmp_path)


def test_room_for_values_is_planned_in_memory_and_said(caplog: pytest.LogCaptureFixture) -> None:
    sizes = {}
    for place in ("disk", "memory"):
        with caplog.at_level("INFO"):
            run = fit(None, build=on_host(place=PLACES[place]), max_steps=1)
        rows = run.trainer.strategy._session.placement.rows
        sizes[place] = sum(row.attribute.nbytes for row in rows if row.attribute.kind == "optimizer_state")
        assert "updates on the host" in caplog.text
    assert sizes["memory"] == pytest.approx(1.5 * sizes["disk"], rel=0.01)


def test_a_cpu_has_one_place_only() -> None:
    run = fit(None, build={"strategy": OffloadStrategy(step_on="host", place=PLACES["disk"])}, max_steps=2)
    assert run.trainer.strategy._session._chosen.site == "device"


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_steps_on_the_host_for_a_gpu_are_those_of_the_gpu_but_for_rounding(place: str, clip: float | None) -> None:
    arguments: dict[str, Any] = {"accelerator": "gpu", "devices": 1, "gradient_clip_val": clip}
    strategy = OffloadStrategy(step_on="host", offload_dir="swap", place={"optimizer_state": place})
    ours, plain = fit(None, build={"strategy": strategy}, **arguments), fit(None, **arguments)
    assert ours.losses == pytest.approx(plain.losses, rel=1e-4)
    for name, weight in plain.weights.items():
        torch.testing.assert_close(ours.weights[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_a_gpu_is_measured_when_training_begins(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(
            None,
            build={"strategy": OffloadStrategy(place={"optimizer_state": "host"})},
            accelerator="gpu",
            devices=1,
            max_steps=2,
        )
    assert "ns an element on the host" in caplog.text
