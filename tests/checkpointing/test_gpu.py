"""Tensors on a GPU: copied beside the training, on a stream of their own, and never torn (C1-C5)."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_efficient.checkpointing import snapshot as snapshot_module
from lightning_efficient.checkpointing.archive import StorageLayout
from lightning_efficient.checkpointing.device_copies import DeviceCopies, cloned_on_device, fingerprint
from lightning_efficient.checkpointing.engine import CheckpointEngine
from lightning_efficient.checkpointing.snapshot import Snapshot
from lightning_efficient.checkpointing.staging import DeviceStaging, stages_on_device
from lightning_efficient.checkpointing.verification import verify
from lightning_efficient.core.buffers import HostBuffer, _register
from tests.checkpointing import states
from tests.checkpointing.states import same

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
gpu = [pytest.mark.gpu, on_gpu]


def trained(width: int, **adam: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width)) for _ in range(4))).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **adam)
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    width = model[0][0].in_features
    model(torch.randn(64, width, device="cuda")).square().mean().backward()
    optimizer.step()


def checkpoint_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()], "global_step": 7}


def on_host(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.detach().cpu().clone()
    if isinstance(state, dict):
        return type(state)((key, on_host(value)) for key, value in state.items())
    return type(state)(map(on_host, state)) if isinstance(state, list | tuple) else state


# -- the choice, which needs no GPU ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "device_seconds", "stall", "expected"),
    [(200, 0.01, 0.1, True), (120, 0.01, 0.1, False), (200, 0.1, 0.01, False), (200, 0.01, 0.0, False)],
    ids=["pays", "no room", "slower", "nobody waits"],
)
def test_where_a_copy_goes_first_c5(free: int, device_seconds: float, stall: float, expected: bool) -> None:
    """Algorithm 1: the device if there is room, and if it holds the training up for less time."""
    assert stages_on_device(100, free, device_seconds, stall) is expected


def test_on_a_cpu_nothing_is_staged_c5() -> None:
    assert DeviceStaging("device").stage({0: torch.ones(3).untyped_storage()}) == {}


def test_a_fingerprint_tells_bytes_and_places_apart() -> None:
    data = torch.randint(0, 255, (10_007,), dtype=torch.uint8)
    swapped, changed = data.clone(), data.clone()
    swapped[[8, 5000]] = swapped[[5000, 8]]
    changed[10_006] ^= 1
    assert torch.equal(fingerprint(data), fingerprint(data.clone()))
    assert not torch.equal(fingerprint(data), fingerprint(changed))
    negated = -data.view(torch.int8).to(torch.int32)
    assert not torch.equal(fingerprint(negated.view(torch.uint8)), fingerprint((-negated).view(torch.uint8)))
    assert torch.equal(data, swapped) or not torch.equal(fingerprint(data), fingerprint(swapped))


# -- a device as slow as it may be -----------------------------------------------------------------------------------


class LaziestDevice(DeviceCopies):
    """What a device promises, and no more: a copy happens when something that waits for it is to happen.

    The side stream runs only up to what is waited for; the current stream is the CPU.
    """

    def __init__(self, obedient: bool = True) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.queue: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.done = 0
        self.obedient = obedient

    def takes(self, source: Any) -> bool:
        return True

    def begin(self, device: Any) -> Any:
        pass

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with self.lock:
            self.queue.append((target, source))

    def mark(self, device: Any) -> Any:
        with self.lock:
            return Mark(self, len(self.queue))

    def let_current_wait(self, events: Any) -> None:
        for _, mark in events if self.obedient else ():
            mark.synchronize()

    def run(self, until: int) -> None:
        with self.lock:
            for target, source in self.queue[self.done : until]:
                target.copy_(source)
            self.done = max(self.done, until)


class Mark:
    def __init__(self, device: LaziestDevice, position: int) -> None:
        self.device, self.position = device, position

    def query(self) -> bool:
        return self.device.done >= self.position

    def synchronize(self) -> None:
        self.device.run(self.position)


@pytest.mark.parametrize("obedient", [True, False])
def test_what_may_change_waits_for_the_device_c2_c4(
    obedient: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Untorn though the device copies as late as it can; torn where the current stream is not told to wait."""
    device = LaziestDevice(obedient)
    monkeypatch.setattr(CheckpointEngine, "_new_snapshot", lambda _, plan, *rest: Snapshot(plan.layout, *rest, device))
    engine = CheckpointEngine(memory_cap=None)
    engine.barrier.attach()
    engine._writer.prepare(
        lambda: time.sleep(0.2)
    )  # what is written waits for the device too: let the updates be first
    model, optimizer = states.trained(width=32)
    torn = 0
    try:
        for number in range(12):
            states.step(model, optimizer)
            state = states.checkpoint_of(model, optimizer)
            truth = on_host(state)
            engine._writer.prepare(lambda: time.sleep(0.02))
            engine.save(state, tmp_path / "a.ckpt", number, owners=[optimizer], place="here")
            model(torch.randn(4, 32))  # moves BatchNorm's buffers
            states.step(model, optimizer)
            engine.drain()
            assert engine.take_failures() == []
            torn += not same(on_host(torch.load(tmp_path / "a.ckpt")), truth)
    finally:
        engine.close()
    assert bool(torn) is not obedient


def test_a_cancelled_copy_writes_nothing_any_more_c4(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pieces of a storage that is not complete have no event of their own."""
    monkeypatch.setattr(snapshot_module, "PIECE_BYTES", 1 << 10)
    device, source = LaziestDevice(), torch.ones(1 << 10)
    layout = StorageLayout([(0, 1 << 12)])
    snapshot = Snapshot(layout, HostBuffer(layout.end), 1, device)
    snapshot.offer({0: source.untyped_storage()})
    [piece] = snapshot._claim(0)
    snapshot._copy_piece(*piece)
    snapshot._note_copied([piece])
    snapshot.cancel()
    snapshot.buffer.tensor.zero_()  # it is another one's now
    device.run(len(device.queue))
    assert not snapshot.buffer.tensor.any()


def test_a_stall_of_a_save_at_once_does_not_count_c5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first save is copied at once, to be looked at again: the next ones will not wait like this."""
    engine = CheckpointEngine(memory_cap=None)
    noted: list[float] = []
    monkeypatch.setattr(engine.staging, "note_stall", noted.append)
    engine.barrier.attach()
    model, optimizer = states.trained()
    try:
        for number in range(4):
            saved = states.checkpoint_of(model, optimizer)
            engine.save(saved, tmp_path / "a.ckpt", number, owners=[optimizer], place="here")
            states.step(model, optimizer)
    finally:
        engine.close()
    assert len(noted) == 2, "of the second and third, when the next one is asked for"


# -- on the device ---------------------------------------------------------------------------------------------------


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "pageable"])
    @pytest.mark.parametrize("staging", ["host", "device"])
    @pytest.mark.parametrize("adam", [{"fused": True}, {"foreach": True}, {"capturable": True}], ids=str)
    def test_no_snapshot_is_torn_c2_c4_c5(
        self, pinned: bool, staging: Any, adam: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The host goes on at once; BatchNorm's buffers change in the next forward, the rest in the next update."""
        if not pinned:
            monkeypatch.setattr("lightning_efficient.core.buffers._cudart", _no_cudart)
        model, optimizer = trained(512, **adam)
        engine = CheckpointEngine(memory_cap=None, staging=staging)
        engine.barrier.attach()
        try:
            for number in range(20):
                state = checkpoint_of(model, optimizer)
                truth = on_host(state)
                path = tmp_path / f"{number}.ckpt"
                with _quiet(pinned):
                    engine.save(state, path, number, owners=[optimizer], place="here")
                step(model, optimizer)
                step(model, optimizer)
                if number % 5 == 4:
                    engine.drain()
                    verify(path)
                    assert same(on_host(torch.load(path)), truth)
            assert engine.take_failures() == []
            assert engine.staging.chosen == staging
            assert engine.pool.may_pin == pinned
        finally:
            engine.close()

    def test_without_the_wait_on_the_device_it_tears_c4(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The mutation that shows that the test above can fail."""
        monkeypatch.setattr(DeviceCopies, "let_current_wait", lambda *_: None)
        model, optimizer = trained(4096, fused=True)
        engine = CheckpointEngine(memory_cap=None, staging="host")
        engine.barrier.attach()
        torn = 0
        try:
            for number in range(8):
                state = checkpoint_of(model, optimizer)
                truth = on_host(state)
                engine.save(state, tmp_path / "a.ckpt", number, owners=[optimizer], place="here")
                for _ in range(3):
                    step(model, optimizer)
                engine.drain()
                torn += not same(on_host(torch.load(tmp_path / "a.ckpt")), truth)
        finally:
            engine.close()
        assert torn

    def test_the_host_does_not_wait_c5(self, tmp_path: Path) -> None:
        model, optimizer = trained(4096)
        engine = CheckpointEngine(memory_cap=None, staging="host")
        engine.barrier.attach()
        try:
            for number in range(3):
                engine.save(checkpoint_of(model, optimizer), tmp_path / "a.ckpt", number, owners=[optimizer], place="x")
                step(model, optimizer)
                engine.drain()
            torch.cuda.synchronize()
            torch.cuda._sleep(2_000_000_000)  # the device is busy for about a second
            marker = torch.cuda.Event()
            marker.record()
            engine.save(checkpoint_of(model, optimizer), tmp_path / "b.ckpt", 4, owners=[optimizer], place="x")
            step(model, optimizer)
            assert not marker.query(), "a host that had waited for the device would have come here later"
            engine.drain()
            verify(tmp_path / "b.ckpt")
        finally:
            engine.close()

    def test_a_weight_that_user_code_changes_is_copied_at_once_c2(self, tmp_path: Path) -> None:
        model, optimizer = trained(256, fused=True)
        engine = CheckpointEngine(memory_cap=None)
        engine.barrier.attach()
        try:
            for number in range(4):
                step(model, optimizer)
                state = checkpoint_of(model, optimizer)
                truth = on_host(state)
                engine.save(state, tmp_path / "a.ckpt", number, owners=[optimizer], place="here")
                model[0][0].weight.data.clamp_(-0.01, 0.01)
                engine.drain()
                assert same(on_host(torch.load(tmp_path / "a.ckpt")), truth)
            assert len(engine.planner.volatile) == 1
        finally:
            engine.close()

    def test_clones_are_the_bytes(self) -> None:
        memory = torch.randint(0, 255, (100_000,), dtype=torch.uint8, device="cuda")
        parts = {
            n: memory[start : start + size] for n, (start, size) in enumerate([(0, 8), (9, 64), (128, 4096), (1, 7)])
        }
        for number, clone in cloned_on_device(parts).items():
            assert torch.equal(clone, parts[number])

    def test_memory_that_cannot_be_pinned_troubles_nobody_else(self) -> None:
        buffer = HostBuffer(1 << 20, pinned=True)
        assert _register(buffer.address, buffer.nbytes) != 0, "it is pinned already"
        assert torch.ones(3, device="cuda").sum().item() == 3

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_another_device_is_left_alone_c5(self, tmp_path: Path) -> None:
        torch.cuda.set_device(1)
        engine = CheckpointEngine(memory_cap=None)
        try:
            engine.save({"w": torch.ones(1000, device="cuda:1")}, tmp_path / "a.ckpt", 1)
            engine.drain()
        finally:
            engine.close()
            torch.cuda.set_device(0)
        verify(tmp_path / "a.ckpt")

    def test_a_pinned_buffer_is_pinned(self) -> None:
        buffer = HostBuffer(1 << 20, pinned=True)
        assert buffer.pinned
        assert buffer.tensor.is_pinned()

    def test_no_room_on_the_device_means_the_host_c5(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 1))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 0)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 0)
        staging = DeviceStaging("device")
        assert staging.stage({0: torch.ones(1000, device="cuda").untyped_storage()}) == {}
        assert staging.chosen == "host"


def _no_cudart() -> Any:
    class Refuses:
        def cudaHostRegister(self, *_: Any) -> int:
            return 2

    return Refuses()


class _quiet:
    """Expects the warning that memory cannot be pinned, where it cannot."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned

    def __enter__(self) -> None:
        import warnings

        self._catcher = warnings.catch_warnings()
        self._catcher.__enter__()
        if not self._pinned:
            warnings.filterwarnings("ignore", message=".*could not be pinned.*")

    def __exit__(self, *_: Any) -> None:
        self._catcher.__exit__(None, None, None)
