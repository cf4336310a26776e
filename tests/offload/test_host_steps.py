"""Steps on the host for parameters of a device, which is played by other memory of the host; bit for bit (O3, O4)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient.offload.tiers.carriers import HostCarrier
from lightning_efficient.offload.tiers.host import HostTier
from lightning_efficient.offload.tiers.tier import TierError
from lightning_efficient.offload.updates import host_job
from lightning_efficient.offload.updates.engine import UpdateEngine
from lightning_efficient.offload.updates.gradients import GradientStore
from lightning_efficient.offload.updates.host_job import HostJob, fingerprint
from lightning_efficient.offload.updates.host_staging import HostStaging
from lightning_efficient.offload.updates.host_steps import HostSteps
from lightning_efficient.offload.updates.layout import MASTER, VALUE
from lightning_efficient.offload.updates.schedule import AfterBackward, InBackward
from lightning_efficient.offload.updates.subset_step import for_host_step
from lightning_efficient.offload.updates.under_forward import UnderForward
from tests.offload.dict_tier import DictTier
from tests.offload.late_crossing import LateCrossing
from tests.offload.test_updates import OPTIMIZERS, SCHEDULES, Job, Network, assert_same, full_state, plain_state

ADAMW = OPTIMIZERS["adamw"]


def fused(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=True)


class HostJobs(Job):
    """A job whose updates the host makes; its state is in memory of the host, or on what stands for a disk."""

    def on_host(
        self, schedule: str, kind: str, *, gradients: bool = False, in_flight_bytes: int = 3000, **arguments: Any
    ) -> None:
        def complete() -> bool:
            return not self.accumulating

        if kind == "memory":
            self.tier = HostTier(1 << 24)  # type: ignore[assignment]
        if gradients:
            tiers = {p: self.gradient_tier for p in self.network.parameters() if p.requires_grad}
            keep = schedule == "in_backward"
            self.store = GradientStore(tiers, [self.optimizer], complete, HostCarrier(), 2000, keep_complete=keep)
        self.crossing = LateCrossing()
        self.staging = HostStaging(1 << 20)
        full = arguments.get("master_weights", False)
        self.host = HostSteps(self.crossing, self.staging, master_weights=full, in_flight_bytes=in_flight_bytes)
        names = {id(p): name for name, p in self.network.named_parameters()}
        arguments = {"together_bytes": 600, "host": self.host} | arguments
        self.engine = UpdateEngine([self.optimizer], names, lambda name: self.tier, self.staging, **arguments)
        if schedule == "after_backward":
            self.updates = AfterBackward(self.engine, [self.optimizer], self.store)
        elif schedule == "in_backward":
            self.updates = InBackward(self.engine, [self.optimizer], complete, self.store)
        else:
            self.updates = UnderForward(self.engine, [self.optimizer], self.network, self.store)

    def close(self) -> None:
        super().close()
        if hasattr(self, "host"):
            self.host.close()


@pytest.fixture
def jobs() -> Iterator[Callable[..., HostJobs]]:
    made: list[HostJobs] = []

    def make(*arguments: Any, **named: Any) -> HostJobs:
        made.append(HostJobs(*arguments, **named))
        return made[-1]

    yield make
    for job in made:
        job.close()
    assert not any("host-step" in thread.name for thread in threading.enumerate())


KINDS = ["memory", "disk"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_and_state_are_those_of_the_optimizer_alone_o3(
    optimizer: str, schedule: str, kind: str, jobs: Callable[..., HostJobs]
) -> None:
    plain, job = jobs(OPTIMIZERS[optimizer]), jobs(OPTIMIZERS[optimizer])
    job.on_host(schedule, kind)
    assert job.train(6) == plain.train(6)
    assert_same(job.weights(), plain.weights())
    assert_same(full_state(job), plain_state(plain, job.engine))
    assert job.crossing.returned > 0
    assert job.host.busy_seconds > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("schedule", ["after_backward", "under_forward"])
@pytest.mark.parametrize("gradients", [False, True])
def test_clipped_and_accumulated_also_with_gradients_elsewhere(
    gradients: bool, schedule: str, accumulate: int, kind: str, jobs: Callable[..., HostJobs]
) -> None:
    plain, job = jobs(ADAMW), jobs(ADAMW)
    job.on_host(schedule, kind, gradients=gradients)
    assert job.train(6, clip=0.5, accumulate=accumulate) == plain.train(6, clip=0.5, accumulate=accumulate)
    assert_same(job.weights(), plain.weights())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", ["adamw", "adamw-fused", "sgd"])
def test_full_precision_masters_are_those_of_steps_on_the_device_o3(
    optimizer: str, schedule: str, kind: str, jobs: Callable[..., HostJobs]
) -> None:
    make = OPTIMIZERS[optimizer]
    device, job = jobs(make, dtype=torch.bfloat16), jobs(make, dtype=torch.bfloat16)
    for one in (device, job):
        one.train(1)  # without masters, with state of 16 bits
    device.offload(schedule, master_weights=True)
    job.on_host(schedule, kind, master_weights=True)
    assert job.train(3, start=1) == device.train(3, start=1)
    for one in (device, job):
        one.updates.finish()
        for parameter in one.network.parameters():
            parameter.data.clamp_(-0.05, 0.05)
    assert job.train(3, start=4) == device.train(3, start=4)
    assert_same(job.weights(), device.weights())
    assert_same(full_state(job), full_state(device))
    assert all(state[MASTER].dtype == torch.float32 for state in full_state(job) if MASTER in state)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_values_of_16_bits_without_masters(schedule: str, jobs: Callable[..., HostJobs]) -> None:
    plain, job = jobs(ADAMW, dtype=torch.bfloat16), jobs(ADAMW, dtype=torch.bfloat16)
    job.on_host(schedule, "memory")
    assert job.train(5) == plain.train(5)
    assert_same(job.weights(), plain.weights())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sparse_gradients_and_parameters_of_one_element(
    schedule: str, kind: str, jobs: Callable[..., HostJobs]
) -> None:
    def make(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for group in groups for p in group["params"]], lr=0.1, momentum=0.9)

    plain, job = jobs(make), jobs(make)
    for one in (plain, job):
        one.network.embedding = nn.Embedding(11, 16, sparse=True)
        one.network.scale = nn.Parameter(torch.ones(()))
        one.network.embedding.load_state_dict(Network().embedding.state_dict())
        one.optimizer = make([{"params": list(one.network.parameters())}])
        one.scheduler = torch.optim.lr_scheduler.ExponentialLR(one.optimizer, 0.9)
        network = one.network

        def forward(tokens: Tensor, network: Any = network) -> Tensor:
            hidden = network.norm(network.embedding(tokens)) * network.scale
            return torch.cat([network.narrow(network.layers[0](hidden)), hidden], -1)

        network.forward = forward
    job.on_host(schedule, kind)
    assert job.train(5) == plain.train(5)
    assert_same(job.weights(), plain.weights())
    for one, other in zip(full_state(job), plain_state(plain, job.engine), strict=True):
        assert_same({k: v.to_dense() for k, v in one.items()}, {k: v.to_dense() for k, v in other.items()})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_written_to_a_parameters_memory_is_noticed(
    schedule: str, kind: str, jobs: Callable[..., HostJobs]
) -> None:
    plain, job = jobs(ADAMW), jobs(ADAMW)
    job.on_host(schedule, kind)
    for step in range(6):
        for one in (plain, job):
            one.train(1, start=step)
            if one.updates is not None:
                one.updates.finish()
            if step == 1:
                for parameter in one.network.parameters():
                    parameter.data.clamp_(-0.05, 0.05)  # changes no version
            if step == 3:
                one.network.load_state_dict({k: v * 0.5 for k, v in one.network.state_dict().items()})
    assert_same(job.weights(), plain.weights())


def test_a_value_stays_on_the_host_where_its_state_is_memory(jobs: Callable[..., HostJobs]) -> None:
    brought = {}
    for kind in KINDS:
        job = jobs(ADAMW)
        job.on_host("after_backward", kind)
        job.train(2)
        before = job.crossing.brought
        job.train(1, start=2)
        brought[kind] = job.crossing.brought - before
        assert all(VALUE not in state for state in full_state(job)), "it is no part of a checkpoint"
        kept = {entry.key for unit in job.engine.units for entry in unit.layout.entries}
        assert (VALUE in kept) == (kind == "memory")
    trained = sum(p.nbytes for p in job.network.parameters() if p.grad is not None)
    assert brought["memory"] == pytest.approx(trained, rel=0.1)
    assert brought["disk"] == pytest.approx(2 * trained, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_engaged_after_some_steps_and_brought_back_again_g6(
    schedule: str, kind: str, jobs: Callable[..., HostJobs]
) -> None:
    plain, job = jobs(ADAMW), jobs(ADAMW)
    job.train(2)
    job.on_host(schedule, kind)
    job.train(3, start=2)
    job.updates.detach()
    job.engine.bring_back()
    job.train(2, start=5)
    plain.train(7)
    assert_same(job.weights(), plain.weights())
    assert_same(job.optimizer.state_dict(), plain.optimizer.state_dict())


def test_state_that_somebody_holds_stays_as_it_was(jobs: Callable[..., HostJobs]) -> None:
    plain, job = jobs(ADAMW), jobs(ADAMW)
    job.on_host("after_backward", "memory")
    job.train(3), plain.train(3)
    held = full_state(job)
    wanted = [{key: value.clone() for key, value in state.items()} for state in held]
    job.train(1, start=3), plain.train(1, start=3)
    assert_same(held, wanted)
    assert_same(full_state(job), plain_state(plain, job.engine))
    assert_same(job.weights(), plain.weights())


@pytest.mark.parametrize("error", [ValueError("no step"), SystemExit(3)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_a_step_ends_with_is_said_where_it_is_waited_for(
    schedule: str, error: BaseException, jobs: Callable[..., HostJobs], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs(ADAMW)
    job.on_host(schedule, "memory")
    job.train(2)
    job.updates.finish()

    def breaks(*_: Any) -> None:
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(host_job, "step_alone", breaks)
        with pytest.raises(type(error), match=str(error)):
            job.train(2, start=2)
    assert job.engine.updating, "weights may be half new"
    unit = job.engine.units[0]
    with pytest.raises(RuntimeError, match="An update on the host has failed"):
        job.engine.update(unit, unit.group, [torch.ones_like(p) for p in unit.parameters])
    job.updates.detach()
    job.engine.rest()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_cannot_be_copied_to_the_host_ends_the_run_and_is_not_waited_for(
    schedule: str, kind: str, jobs: Callable[..., HostJobs], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs(ADAMW)
    job.on_host(schedule, kind)
    job.train(2)
    job.updates.finish()

    def breaks(*_: Any) -> Any:
        monkeypatch.undo()  # once
        raise MemoryError("no pinned memory")

    monkeypatch.setattr(LateCrossing, "to_host", breaks)
    with pytest.raises(MemoryError, match="no pinned memory"):
        job.train(1, start=2)
    assert job.engine.updating, "weights may be half new"
    job.updates.detach()
    job.host.close()
    assert not job.host.under_way
    assert job.host._copying_bytes == 0


def test_a_thread_that_is_gone_is_not_waited_for(
    jobs: Callable[..., HostJobs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostSteps, "_run", lambda self: None)
    job = jobs(ADAMW)
    job.on_host("after_backward", "memory")
    with pytest.raises(RuntimeError, match="has ended before its work was done"):
        job.train(1)


def test_a_disk_that_fails_is_said(jobs: Callable[..., HostJobs], monkeypatch: pytest.MonkeyPatch) -> None:
    job = jobs(ADAMW)
    job.on_host("in_backward", "disk")
    job.train(2)

    def read(*_: Any) -> Any:
        raise TierError(5, "the disk is dying")

    monkeypatch.setattr(DictTier, "read", read)
    with pytest.raises(TierError, match="the disk is dying"):
        job.train(2, start=2)


@pytest.mark.parametrize("site", ["device", "host"])
def test_backward_cannot_use_a_weight_that_is_being_updated(site: str, jobs: Callable[..., HostJobs]) -> None:
    job = jobs(OPTIMIZERS["sgd"])
    if site == "device":
        job.offload("in_backward", together_bytes=1)
    else:
        job.on_host("in_backward", "memory", together_bytes=1)
    network, weight = job.network, job.network.layers[2].weight

    def forward(tokens: Tensor) -> Tensor:
        hidden = nn.functional.linear(network.embedding(tokens), weight.detach())  # which backward comes to last
        return network.layers[2](torch.tanh(network.layers[1](hidden))) @ network.embedding.weight.detach().T

    network.forward = forward  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        job.train(1)


class Scaled(torch.optim.AdamW):
    """Keeps tensors of the device for its step, as a gradient scaler gives them to fused optimizers."""

    def step(self, closure: Any = None) -> Any:
        assert self.found_inf is not self.of_the_device or threading.current_thread() is threading.main_thread()
        return torch.optim.AdamW.step.__wrapped__(self, closure)


def test_what_a_scaler_gives_to_the_optimizer_comes_along(jobs: Callable[..., HostJobs]) -> None:
    job, plain = jobs(lambda groups: Scaled(groups, fused=True)), jobs(fused)
    job.on_host("after_backward", "memory")
    for one in (job, plain):
        one.optimizer.found_inf = one.optimizer.of_the_device = torch.zeros(())
        one.optimizer.grad_scale = torch.full((), 4.0)
        one.train(3)
    assert_same(job.weights(), plain.weights())


def test_hyperparameters_are_those_of_the_optimizers_step(jobs: Callable[..., HostJobs]) -> None:
    plain, job = (jobs(OPTIMIZERS["adam-tensor-lr"]) for _ in range(2))
    job.on_host("under_forward", "memory")
    for step in range(4):
        for one in (plain, job):
            one.train(1, start=step)
            for group in one.optimizer.param_groups:
                group["lr"].mul_(0.5)  # before the update, where that comes late
    assert_same(job.weights(), plain.weights())


def test_steps_are_taken_beside_the_thread_that_computes(
    jobs: Callable[..., HostJobs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a step is begun before any is waited for, and never more is on its way than may be."""
    job, went, threads = jobs(ADAMW), threading.Event(), set()
    step = HostJob.step

    def late(self: HostJob) -> None:
        threads.add(threading.current_thread().name)
        assert went.wait(20)
        step(self)

    monkeypatch.setattr(HostJob, "step", late)
    job.on_host("under_forward", "memory", in_flight_bytes=1)
    loss = job.forward(0)
    loss.backward()
    job.optimizer.step()
    assert sum(one.arrived is not None for one in job.host._jobs.values()) == 1
    went.set()
    job.updates.finish()
    assert threads == {"offload-host-step"}


def test_hooks_of_all_optimizers_are_called_in_the_thread_that_computes(jobs: Callable[..., HostJobs]) -> None:
    calls: list[tuple[str, bool, int]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(optimizer: Any, *_: Any) -> None:
            here = threading.current_thread() is threading.main_thread()
            calls.append((name, here, sum(len(group["params"]) for group in optimizer.param_groups)))

        return hook

    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    handles = [register_optimizer_step_pre_hook(note("before")), register_optimizer_step_post_hook(note("after"))]
    try:
        job = jobs(ADAMW)
        job.on_host("in_backward", "memory")
        job.train(1)
    finally:
        for handle in handles:
            handle.remove()
    assert all(here for _, here, _ in calls)
    assert sum(count for name, _, count in calls if name == "before") == sum(
        count for name, _, count in calls if name == "after"
    )


def test_the_sum_of_bits_notices_any_change_of_one_element() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.float8_e4m3fn):
        value = torch.randn(3, 5).to(dtype).t()
        before = fingerprint(value)
        assert before.dim() == 0
        value[2, 1] = 0
        assert before != fingerprint(value)
    assert fingerprint(nn.Parameter(torch.tensor(1.0))) != fingerprint(torch.tensor(-1.0))


def test_memory_of_a_versioned_record_is_not_lent() -> None:
    tier = HostTier(1 << 20)
    record = tier.reserve([64], versioned=True)[0]
    tier.write(record, torch.zeros(64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="cannot be changed where it is"):
        tier.memory(record)
    (plain,) = tier.reserve([64], versioned=False)
    with pytest.raises(TierError, match="Nothing was written"):
        tier.memory(plain)
    tier.close()


def test_mapped_bytes_outlast_changes_also_where_the_budget_is_used_up() -> None:
    tier = HostTier(4096)
    (record,) = tier.reserve([64], versioned=False)
    tier.write(record, torch.ones(64, dtype=torch.uint8))
    mapped: Tensor | None = tier.mapped(record)
    assert mapped is not None
    tier.memory(record).fill_(2)
    assert mapped.eq(1).all()
    assert tier.mapped(record).eq(2).all()
    mapped = None
    assert tier.memory(record).eq(2).all()
    tier.commit()
    tier.commit()
    tier.memory(record).fill_(3)
    assert tier.reserved_bytes <= 4096
    tier.close()


@pytest.mark.parametrize("there", [False, True])
def test_counters_go_back_to_where_a_step_on_the_device_has_them(there: bool, jobs: Callable[..., HostJobs]) -> None:
    job = jobs(ADAMW)
    job.on_host("after_backward", "memory")
    job.train(1)
    job.updates.finish()
    unit = job.engine.units[0]
    unit.group["fused"] = there
    far = nn.Parameter(torch.empty(2, device="meta"))  # stands for a GPU
    steps = job.engine.at_home(unit, far, "step", torch.tensor(3.0))
    assert steps.device.type == ("meta" if there else "cpu")
    assert job.engine.at_home(unit, far, "exp_avg", torch.tensor(3.0)).device.type == "meta"
    assert job.engine.at_home(unit, far, "exp_avg", torch.zeros(2)).device.type == "meta"
    assert job.engine.at_home(unit, far, "name", 5) == 5


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("kind", "said", "device", "fused"),
    [
        (torch.optim.AdamW, {}, CUDA, True),
        (torch.optim.SGD, {}, CUDA, True),
        (torch.optim.AdamW, {}, CPU, None),  # there its own steps are the same bit for bit
        (torch.optim.AdamW, {"fused": False}, CUDA, False),
        (torch.optim.AdamW, {"foreach": False}, CUDA, None),
        (torch.optim.AdamW, {"foreach": True}, CUDA, None),
        (torch.optim.NAdam, {}, CUDA, None),  # which has none
        (type("Own", (torch.optim.AdamW,), {}), {}, CUDA, None),
    ],
)
def test_fused_kernels_are_taken_for_other_devices_where_the_user_leaves_it_open(
    kind: Any, said: dict[str, Any], device: torch.device, fused: bool | None
) -> None:
    value = nn.Parameter(torch.ones(3))
    optimizer = kind([value], **{"lr": 0.1} | said)
    group = {key: one for key, one in optimizer.param_groups[0].items() if key != "params"}
    before = dict(group)
    assert for_host_step(optimizer, group, [value], device).get("fused") == fused
    assert group == before


def test_sparse_gradients_have_no_fused_kernel() -> None:
    value = nn.Parameter(torch.ones(3, 2))
    value.grad = torch.ones(3, 2).to_sparse(1)
    optimizer = torch.optim.SGD([value], lr=0.1)
    assert for_host_step(optimizer, optimizer.param_groups[0], [value], CUDA)["fused"] is None


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-amsgrad", "adam-tensor-lr", "sgd-momentum", "adagrad"])
def test_steps_for_another_device_are_fused_inside_and_the_users_groups_stay(
    optimizer: str, jobs: Callable[..., HostJobs], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, step = [], host_job.step_alone

    def spied(of: Any, group: Any, shown: Any) -> None:
        seen.append(group["fused"])
        step(of, group, shown)

    monkeypatch.setattr(host_job, "step_alone", spied)
    monkeypatch.setattr(host_job, "for_host_step", lambda *arguments: for_host_step(*arguments[:3], CUDA))
    plain, job = jobs(OPTIMIZERS[optimizer]), jobs(OPTIMIZERS[optimizer])
    job.on_host("after_backward", "memory")
    job.train(6)
    plain.train(6)
    assert set(seen) == {True}
    assert all(group["fused"] is None for group in job.optimizer.param_groups)
    torch.testing.assert_close(job.weights(), plain.weights())
