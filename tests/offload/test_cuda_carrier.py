"""The logic of copies between a GPU and tiers, with streams that only note what is asked of them; no GPU is needed."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_efficient.offload.saved import stash
from lightning_efficient.offload.saved.activations import SavedTensorOffload
from lightning_efficient.offload.saved.stash import Stash
from lightning_efficient.offload.tiers import cuda_carrier
from lightning_efficient.offload.tiers.cuda_carrier import CudaCarrier
from lightning_efficient.offload.tiers.tier import Pending, Record
from lightning_efficient.offload.updates import device_staging
from lightning_efficient.offload.updates.device_staging import DeviceStaging
from lightning_efficient.offload.updates.staging import Placed
from tests.offload.dict_tier import DictTier
from tests.offload.file_tier import FileTier
from tests.offload.memory_tier import MemoryTier
from tests.offload.saving import CASES, gradients
from tests.offload.test_updates import OPTIMIZERS, SCHEDULES, Job, assert_same, full_state, plain_state


class Event:
    """Has happened when it is asked for the third time."""

    def __init__(self) -> None:
        self.asked = 0

    def query(self) -> bool:
        self.asked += 1
        return self.asked > 2

    def synchronize(self) -> None:
        self.asked = 3


class Scripted(Event):
    """Answers so, one after another, and then that it has happened."""

    def __init__(self, *answers: bool) -> None:
        super().__init__()
        self._answers = list(answers)

    def query(self) -> bool:
        return self._answers.pop(0) if self._answers else True

    def synchronize(self) -> None:
        self._answers.clear()


class NotYet(Event):
    """Has happened only when it was waited for."""

    def query(self) -> bool:
        return self.asked == 3


class Stream:
    def __init__(self, device: Any = None) -> None:
        self.waits: list[Any] = []

    def wait_stream(self, other: Stream) -> None:
        self.waits.append(other)

    def wait_event(self, event: Event) -> None:
        self.waits.append(event)

    def record_event(self) -> Event:
        return Event()

    def synchronize(self) -> None:
        pass


pinned: set[int] = set()


def see_that_it_is_pinned(memory: Tensor) -> None:
    if memory.data_ptr() not in pinned:
        raise ValueError("not memory of the host")


class OfTheHost(FileTier):
    """Takes nothing but pinned memory."""

    def write(self, record: Record, data: Tensor) -> Pending:
        see_that_it_is_pinned(data)
        return super().write(record, data)

    def read(self, record: Record, into: Tensor) -> Pending:
        see_that_it_is_pinned(into)
        return super().read(record, into)


class OptimizerDisk(DictTier):
    """Takes nothing but pinned memory, at once."""

    def write(self, record: Record, data: Tensor) -> Pending:
        see_that_it_is_pinned(data)
        return super().write(record, data)

    def read(self, record: Record, into: Tensor) -> Pending:
        see_that_it_is_pinned(into)
        return super().read(record, into)


@pytest.fixture
def computing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stream]:
    """The stream that computes; tensors of the CPU are moved as if they were a GPU's."""
    current = Stream()

    def empty(*size: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        made = torch.empty(*size, **kwargs)
        if pin_memory:
            pinned.add(made.data_ptr())
        return made

    cuda = SimpleNamespace(
        Stream=Stream, Event=Event, current_stream=lambda device: current, stream=lambda one: contextlib.nullcontext()
    )
    fake = SimpleNamespace(cuda=cuda, empty=empty, uint8=torch.uint8, device=torch.device)
    monkeypatch.setattr(cuda_carrier, "torch", fake)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None, raising=False)
    for module in (stash, device_staging):
        monkeypatch.setattr(module, "carrier_for", lambda device, staging_bytes: CudaCarrier(staging_bytes))
    yield current
    pinned.clear()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("staging_bytes", [20_000, 1 << 20])
@pytest.mark.parametrize("name", ["mlp", "gpt with dropout", "checkpoint"])
def test_what_goes_through_streams_comes_back(computing: Stream, name: str, staging_bytes: int, direct: bool) -> None:
    model, loss, batch = CASES[name]()
    exact = gradients(model, loss, None)
    tier: Any = MemoryTier(early=True) if direct else OfTheHost()
    held = list(model.parameters())
    chosen = SavedTensorOffload(tier, staging_bytes=staging_bytes, minimum_bytes=1024, held=lambda: held)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(gradients(model, loss, chosen, *batch), exact, strict=True))
    assert any(isinstance(one, Event) for one in computing.waits), "what is computed waits for what comes"
    gc.collect()
    assert chosen.statistics().stash.tier_bytes == 0
    chosen.close()
    tier.close()


class Watched(CudaCarrier):
    """Notes how much pinned memory was in use."""

    peak = 0

    def send(self, tier: Any, record: Record, data: Tensor) -> Any:
        leaving = super().send(tier, record, data)
        self.peak = max(self.peak, self._staged)
        return leaving


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("schedule", [*SCHEDULES, "delayed"])
def test_gradients_go_and_come_through_streams(computing: Stream, schedule: str, direct: bool) -> None:
    carrier = Watched(2000)
    ours, kept = Job(OPTIMIZERS["adamw"]), Job(OPTIMIZERS["adamw"])
    ours.carrier = carrier
    ours.gradient_tier = MemoryTier(early=True) if direct else OfTheHost()  # type: ignore[assignment]
    clip = None if schedule == "in_backward" else 0.05
    ours.offload(schedule, gradients=True)
    kept.offload(schedule)
    for job in (ours, kept):
        job.train(4, accumulate=3, clip=clip)
    assert_same(ours.weights(), kept.weights())
    assert ours.norms == kept.norms
    assert carrier.peak == 0 if direct else 0 < carrier.peak <= 2000
    ours.close(), kept.close()
    assert not carrier._settling, "all that was sent has been written"
    assert not carrier._arriving, "no memory of what came is held"
    ours.gradient_tier.close()


def test_saving_does_not_make_the_host_wait_where_the_tier_takes_device_memory(computing: Stream) -> None:
    class Busy(Event):
        def synchronize(self) -> None:
            raise AssertionError("the host must not wait")

    Stream.record_event, before = lambda self: Busy(), Stream.record_event  # type: ignore[method-assign,assignment]
    try:
        tier = MemoryTier(early=True)
        x = torch.randn(1000, requires_grad=True)
        chosen = SavedTensorOffload(tier, staging_bytes=4000, minimum_bytes=1024)
        with chosen.saving(x):
            value = x.sin().sin().sin().sin().sum()
        value.backward()
    finally:
        Stream.record_event = before  # type: ignore[method-assign]
    assert x.grad is not None


def bytes_of(value: int, count: int = 64) -> Tensor:
    return torch.full((count,), value, dtype=torch.uint8)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_record_is_read_behind_the_write_that_the_disk_has_not_been_asked_for(
    computing: Stream, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stream, "record_event", lambda self: NotYet())
    tier = OptimizerDisk()
    staging = DeviceStaging(1 << 12, torch.device("cpu"))
    places = [Placed(tier, record) for record in tier.reserve([64, 64, 64], versioned=True)]
    for step in (1, 2):
        for number, placed in enumerate(places):
            lease = staging.room(64)
            lease.data.copy_(bytes_of(10 * step + number))
            staging.write(lease, placed)
        if step == 1:
            staging.flush()
    if ahead:
        staging.expect(places[1:])
    lease = staging.read(places[1])
    assert lease.data.eq(21).all()
    assert tier.writes[3:5] == [placed.record for placed in places[:2]], "in the order in which they were sent"
    staging.drop(lease)
    staging.close()


@pytest.mark.parametrize("schedule", [*SCHEDULES, "delayed"])
def test_state_on_a_disk_is_that_of_the_last_step(
    computing: Stream, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stream, "record_event", lambda self: NotYet())
    ours, kept = Job(OPTIMIZERS["adamw"]), Job(OPTIMIZERS["adamw"])
    ours.tier = OptimizerDisk()
    ours.offload(schedule, on_device=True)
    kept.offload(schedule)
    for job in (ours, kept):
        job.train(4)
    assert_same(ours.weights(), kept.weights())
    ours.close(), kept.close()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_state_that_is_saved_is_that_of_the_last_step(
    computing: Stream, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stream, "record_event", lambda self: NotYet())
    ours, plain = Job(OPTIMIZERS["adamw"]), Job(OPTIMIZERS["adamw"])
    ours.tier = OptimizerDisk()
    ours.offload(schedule, on_device=True, staging_bytes=5000)  # too little to read all of it ahead
    for job in (ours, plain):
        job.train(4)
    assert_same(ours.weights(), plain.weights())
    assert_same(full_state(ours), plain_state(plain, ours.engine))
    ours.close()


def test_what_died_on_its_way_is_not_written_to_a_record_that_was_given_back(
    computing: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another size, so that its room is used for something else."""
    monkeypatch.setattr(Stream, "record_event", lambda self: NotYet())
    tier = OfTheHost()
    kept = Stash(tier, staging_bytes=1 << 12)
    first = kept.put(bytes_of(1))
    del first
    second = kept.put(bytes_of(2, 128))
    second.uses = 1
    assert kept.take(second).eq(2).all()
    kept.close()
    tier.close()


def test_what_died_on_its_way_does_not_overwrite_the_next_owner_of_its_record(
    computing: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of the first: not yet when the carrier looks, but a moment later when the stash does, and not yet once more.
    events = [Scripted(False, True, False), Scripted()]
    monkeypatch.setattr(Stream, "record_event", lambda self: events.pop(0) if events else Event())
    tier = OfTheHost()
    kept = Stash(tier, staging_bytes=1 << 12)
    first = kept.put(bytes_of(1))
    record = first.record
    del first
    second = kept.put(bytes_of(2))
    assert second.record is record
    for _ in range(2):
        second.uses = 1  # after which the memory is given up, so that it is fetched again
        assert kept.take(second).eq(2).all()
    assert tier.reads == [record, record]
    kept.close()
    tier.close()
