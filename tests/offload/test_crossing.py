"""What is asked of a GPU's streams for steps on the host, with streams that only note it; and the real ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_efficient.core.torch_internals import without_torch_function
from lightning_efficient.offload.updates import crossing
from lightning_efficient.offload.updates.crossing import CudaCrossing, crossing_for


class Noted:
    """Writes down what streams are asked for, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Any] = []
        self.active = ["computing"]
        self.pinned: set[int] = set()
        streams = iter(("out", "back"))
        noted = self

        class Stream:
            def __init__(self, device: Any, name: str | None = None) -> None:
                self.name = name or next(streams)

            def record_event(self) -> str:
                noted.asked.append(("record", self.name))
                return f"event {len(noted.asked)} of {self.name}"

            def wait_event(self, event: str) -> None:
                noted.asked.append(("wait", self.name, event))

            def synchronize(self) -> None:
                noted.asked.append(("synchronize", self.name))

        computing = Stream(None, "computing")

        @contextlib.contextmanager
        def stream(one: Stream) -> Iterator[None]:
            self.active.append(one.name)
            yield
            self.active.pop()

        def empty_like(tensor: Tensor, *, pin_memory: bool, **options: Any) -> Tensor:
            made = torch.empty_like(tensor, **options)
            assert pin_memory
            self.pinned.add(made.data_ptr())
            return made

        cuda = SimpleNamespace(Stream=Stream, current_stream=lambda device: computing, stream=stream)
        fake = SimpleNamespace(cuda=cuda, empty_like=empty_like, strided=torch.strided, device=torch.device)
        monkeypatch.setattr(crossing, "torch", fake)
        copy = Tensor.copy_

        def copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
            assert non_blocking
            self.asked.append(("copy", self.active[-1]))
            with without_torch_function():
                return copy(target, source)

        monkeypatch.setattr(Tensor, "copy_", copy_)
        kept = lambda tensor, stream: self.asked.append(("keeps memory", stream.name))  # noqa: E731
        monkeypatch.setattr(Tensor, "record_stream", kept, raising=False)


class OfTheGpu(Tensor):
    """Says that it is."""

    @property
    def device(self) -> Any:
        return SimpleNamespace(type="cuda")


def test_gradients_leave_behind_the_work_that_made_them(monkeypatch: pytest.MonkeyPatch) -> None:
    noted = Noted(monkeypatch)
    ways = CudaCrossing(torch.device("cuda", 0))
    after = ways.mark()
    (there, beside), there_at = ways.to_host([torch.arange(3.0).as_subclass(OfTheGpu), torch.ones(2)], after)
    assert torch.equal(there.as_subclass(Tensor), torch.arange(3.0))
    assert there.data_ptr() in noted.pinned
    assert beside.data_ptr() not in noted.pinned, "what is on the host already takes no pinned memory"
    assert noted.asked == [
        ("record", "computing"),
        ("wait", "out", after),
        ("copy", "out"),
        ("keeps memory", "out"),
        ("record", "out"),
    ]
    assert there_at == "event 5 of out"


def test_new_values_come_back_and_what_is_computed_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    noted = Noted(monkeypatch)
    ways = CudaCrossing(torch.device("cuda", 0))
    after = ways.mark()
    target = torch.zeros(3)
    sent = ways.to_device([(target, torch.ones(3))], after)
    ways.follow(sent)
    assert torch.equal(target, torch.ones(3))
    assert noted.asked == [
        ("record", "computing"),
        ("wait", "back", after),
        ("copy", "back"),
        ("record", "back"),
        ("wait", "computing", sent),
    ]
    assert not any(what == "synchronize" for what, *_ in noted.asked), "the host is not held up"
    ways.settle()
    assert noted.asked[-2:] == [("synchronize", "out"), ("synchronize", "back")]


def test_devices_that_have_no_way_are_named() -> None:
    with pytest.raises(ValueError, match="Parameters on meta cannot be stepped on the host"):
        crossing_for(torch.device("meta"))


@pytest.mark.gpu
def test_tensors_cross_and_come_back_on_a_gpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    ways = crossing_for(device)
    value = torch.randn(1 << 20, device=device)
    torch.cuda._sleep(10_000_000)
    doubled = value * 2
    (there,), arrived = ways.to_host([doubled], ways.mark())
    arrived.synchronize()
    assert there.is_pinned()
    assert torch.equal(there, doubled.cpu())
    ways.follow(ways.to_device([(value, there)], ways.mark()))
    assert torch.equal(value.cpu(), there)
    ways.settle()
