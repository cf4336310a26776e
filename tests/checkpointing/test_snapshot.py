"""Copies that go on while others work: complete, unmixed, and waited for no longer than needed (C1-C4)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from lightning_efficient.checkpointing import snapshot as module
from lightning_efficient.checkpointing.barrier import UpdateBarrier, owned_tensors
from lightning_efficient.checkpointing.copy_plan import storage_checksum
from lightning_efficient.checkpointing.skeleton import take_skeleton
from lightning_efficient.checkpointing.snapshot import Snapshot, TornSnapshotError
from tests.checkpointing.states import checkpoint_of, layout_of, same, snapshot_of, step, trained


def finished(snapshot: Snapshot) -> Any:
    for _ in snapshot.seal():
        pass
    return snapshot.load()


def slowly(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Copies in pieces of 4 KiB, with a rest after each."""
    real = Snapshot._copy_piece

    def copy(self: Snapshot, number: int, piece: int) -> None:
        real(self, number, piece)
        if threading.current_thread().name == "slow":
            time.sleep(seconds)

    monkeypatch.setattr(module, "PIECE_BYTES", 1 << 12)
    monkeypatch.setattr(Snapshot, "_copy_piece", copy)


@contextmanager
def copying(snapshot: Snapshot) -> Iterator[None]:
    """In the background."""
    thread = threading.Thread(target=snapshot.copy, name="slow")
    thread.start()
    yield
    thread.join()


def test_a_snapshot_is_the_state_c2() -> None:
    state = checkpoint_of(*trained())
    assert same(finished(snapshot_of(state)), state)


def test_what_is_left_is_copied_by_who_waits_c4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 1 << 10)
    state = {"a": torch.randn(5000), "b": torch.randn(3), "c": torch.empty(0)}
    snapshot = snapshot_of(state)
    assert not snapshot.complete
    assert snapshot.wait([1]) > 0
    assert snapshot.copied(1)
    assert not snapshot.copied(0)
    snapshot.wait()
    assert snapshot.complete
    assert snapshot.wait() == 0
    assert same(finished(snapshot), state)


def test_two_threads_share_the_pieces_c4(monkeypatch: pytest.MonkeyPatch) -> None:
    slowly(monkeypatch, 0.002)
    state = {"a": torch.randn(400_000)}
    snapshot = snapshot_of(state)
    with copying(snapshot):
        time.sleep(0.05)
        waited = snapshot.wait()
    assert waited < 0.4, "391 pieces of 2 ms would take 0.8 s"
    assert same(finished(snapshot), state)


def test_a_buffer_that_is_too_small_is_refused() -> None:
    skeleton = take_skeleton({"a": torch.randn(5000)})
    from lightning_efficient.core.buffers import HostBuffer

    with pytest.raises(ValueError, match="The buffer has 4096 bytes and the storages need 2"):
        Snapshot(layout_of(skeleton), HostBuffer(1), 1)


def test_a_buffer_that_the_rest_does_not_fit_grows() -> None:
    from lightning_efficient.core.buffers import HostBuffer

    state = {"a": torch.randn(1000), "text": "x" * 100_000}
    skeleton = take_skeleton(state)
    snapshot = Snapshot(layout_of(skeleton), HostBuffer(layout_of(skeleton).end), 1)
    snapshot.describe = lambda: skeleton.pickled
    snapshot.offer(dict(enumerate(skeleton.storages)))
    assert same(finished(snapshot), state)


def test_a_change_that_torch_counts_is_noticed_c4() -> None:
    tensor = torch.randn(100)
    snapshot = snapshot_of({"a": tensor}, watched={0: tensor})
    tensor.add_(1)
    with pytest.raises(TornSnapshotError, match="'a' changed after the save and before the copy"):
        finished(snapshot)


def test_a_change_that_torch_does_not_count_is_noticed_by_checksum_c4() -> None:
    tensor = torch.randn(100)
    state = {"a": tensor}
    snapshot = snapshot_of(state, watched={0: tensor}, expected={0: storage_checksum(tensor.untyped_storage())})
    tensor.data.numpy()[3] = 5.0
    with pytest.raises(TornSnapshotError):
        finished(snapshot)


def test_an_interrupted_copy_holds_nobody_up_and_becomes_no_file_c4(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while an update helps to copy: before the bytes moved, as the case may be."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    snapshot = snapshot_of({"a": torch.randn(100), "b": torch.randn(5)})
    with monkeypatch.context() as patch:
        patch.setattr(module.ctypes, "memmove", interrupt)
        with pytest.raises(KeyboardInterrupt):
            snapshot.wait([0])
    snapshot.wait()
    with pytest.raises(TornSnapshotError, match="or the copy was interrupted"):
        finished(snapshot)


def test_an_interrupt_between_two_steps_of_a_copy_holds_nobody_up_c4(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for name in ("_copy_piece", "_note_copied"):
        snapshot = snapshot_of({"a": torch.randn(100), "b": torch.randn(5)})
        with monkeypatch.context() as patch:
            patch.setattr(Snapshot, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                snapshot.wait([0])
        snapshot.wait()
        snapshot.cancel()
        with pytest.raises(TornSnapshotError):
            finished(snapshot)


# -- the barrier -----------------------------------------------------------------------------------------------------


def many_snapshots(barrier: UpdateBarrier | None, rounds: int, how: dict[str, Any]) -> int:
    """Steps of training with a slow copy behind each; how many snapshots are not the state that they were taken of."""
    torch.manual_seed(0)
    model, optimizer = trained(width=48, **how)
    if barrier is not None:
        barrier.attach()
    torn = 0
    for _ in range(rounds):
        skeleton = take_skeleton(checkpoint_of(model, optimizer))
        truth = {n: bytes(storage) for n, storage in enumerate(skeleton.storages)}
        snapshot = snapshot_of(checkpoint_of(model, optimizer))
        owned = {t.untyped_storage().data_ptr() for t in owned_tensors(optimizer)}
        snapshot.copy([n for n, s in enumerate(skeleton.storages) if s.data_ptr() not in owned])
        if barrier is not None:
            barrier.protect(snapshot, skeleton.numbers)
        with copying(snapshot):
            step(model, optimizer)
        records = snapshot.layout.records
        torn += any(bytes(snapshot.buffer.view[records[n].start : records[n].end]) != truth[n] for n in truth)
    if barrier is not None:
        barrier.detach()
    return torn


@pytest.mark.parametrize(
    "how", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=["fused", "foreach", "loop"]
)
def test_no_snapshot_is_torn_c3_c4(monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]) -> None:
    slowly(monkeypatch, 0.0005)
    stalls: list[float] = []
    assert many_snapshots(UpdateBarrier(stalls.append), 30, how) == 0
    assert sum(stall > 0 for stall in stalls) > 10, "the copy was meant to be slower than the step"


def test_without_the_barrier_they_are_torn_c3(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation that shows that the test above can fail."""
    slowly(monkeypatch, 0.0005)
    assert many_snapshots(None, 20, {"fused": True}) > 0


def test_an_update_waits_for_its_own_tensors_only_c4(monkeypatch: pytest.MonkeyPatch) -> None:
    slowly(monkeypatch, 0.05)
    large, small = torch.nn.Parameter(torch.randn(50_000)), torch.nn.Parameter(torch.randn(3))
    optimizers = [torch.optim.SGD([small], lr=0.1), torch.optim.SGD([large], lr=0.1)]
    large.grad, small.grad = torch.ones_like(large), torch.ones_like(small)
    state = {"small": small.detach(), "large": large.detach()}
    skeleton = take_skeleton(state)
    truth = large.detach().clone()
    snapshot = snapshot_of(state)
    barrier = UpdateBarrier()
    barrier.attach()
    barrier.protect(snapshot, skeleton.numbers)
    with copying(snapshot):
        optimizers[0].step()
        assert not snapshot.complete, "the small tensor's update did not wait for the large one"
        optimizers[1].step()
        assert snapshot.complete
    barrier.detach()
    assert torch.equal(finished(snapshot)["large"], truth)


def test_the_barrier_stands_behind_the_closure_c3() -> None:
    """Where forward and backward run inside the step, they are not kept waiting."""
    parameter = torch.nn.Parameter(torch.ones(10))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    state = {"p": parameter.detach()}
    snapshot = snapshot_of(state)
    barrier = UpdateBarrier()
    barrier.attach()
    barrier.protect(snapshot, take_skeleton(state).numbers)
    seen: list[bool] = []

    def closure() -> torch.Tensor:
        seen.append(snapshot.complete)
        parameter.grad = torch.ones_like(parameter)
        return parameter.sum()

    optimizer.step(closure)
    barrier.detach()
    assert seen == [False]
    assert finished(snapshot)["p"].tolist() == [1.0] * 10
    optimizer.step()  # no hook is left
    assert not barrier.attached


def test_something_can_be_looked_at_once_before_an_update() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    barrier = UpdateBarrier()
    barrier.attach()
    seen: list[float] = []

    def look(_: torch.optim.Optimizer) -> bool:
        seen.append(parameter.item())
        return True

    barrier.before_updates = look
    optimizer.step()
    optimizer.step()
    barrier.detach()
    assert seen == [1.0]


def test_a_forgotten_barrier_is_no_hook() -> None:
    barrier = UpdateBarrier()
    barrier.attach()
    handle = barrier._handle
    del barrier
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    torch.optim.SGD([parameter], lr=0.5).step()
    assert handle is not None
    handle.remove()
