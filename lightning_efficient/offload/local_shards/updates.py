"""When the shards are updated: behind backward, or each as soon as its gradient has been reduced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_efficient.core.torch_internals import local_part
from lightning_efficient.offload.local_shards.engine import ShardEngine
from lightning_efficient.offload.sharded.ranks import FirstError
from lightning_efficient.offload.updates.schedule import AfterBackward, InBackward
from lightning_efficient.offload.updates.units import Unit

__all__ = ["ShardsAfterBackward", "ShardsInBackward"]


class ShardsAfterBackward(AfterBackward):
    """All units in ``Optimizer.step``; the ranks go on when each has done its part."""

    _engine: ShardEngine

    def _update_all(self, units: Iterable[Unit]) -> None:
        engine, units, first = self._engine, list(units), FirstError()
        with first:
            engine.commit()
            engine.expect(units)
        with self._torn_if_that_fails():
            for unit in units:
                if first.error is None:
                    with first:
                        engine.update(unit, unit.group, [parameter.grad for parameter in unit.parameters])
            engine.agree(first.error)


class ShardsInBackward(InBackward):
    """Each unit when the gradients of its shards have been reduced; for optimizers that do not communicate.

    An error waits for the optimizer's step, lest the other ranks wait in the midst of backward.

    Args:
        engine: Of all ``optimizers``.
        optimizers: Whose steps are taken over.
        complete: Asked at each gradient whether it is complete, or more micro-batches will add to it.
    """

    _engine: ShardEngine

    def __init__(self, engine: ShardEngine, optimizers: Sequence[Optimizer], complete: Callable[[], bool]) -> None:
        super().__init__(engine, optimizers, complete)
        self._first = FirstError()
        self._stream: torch.cuda.Stream | None = None

    @property
    def begun(self) -> bool:
        return super().begun or self._updating_all

    def before_forward(self) -> None:
        super().before_forward()
        self._stream = torch.cuda.current_stream() if torch.cuda.is_available() else None

    def _gradient_came(self, parameter: nn.Parameter) -> None:
        if self._first.error is None:
            with self._first, _on(self._stream, parameter.grad):
                super()._gradient_came(parameter)

    def _step(self, units: list[Unit]) -> None:
        first, self._first = self._first, FirstError()
        with self._torn_if_that_fails():
            if first.error is None:
                with first:
                    super()._step(units)
            self._engine.agree(first.error)


@contextlib.contextmanager
def _on(stream: torch.cuda.Stream | None, gradient: Tensor | None) -> Any:
    """On the stream of the computation: FSDP2 calls hooks on that on which it reduced the gradient."""
    if stream is None or gradient is None or gradient.device.type != "cuda":
        yield
        return
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        local_part(gradient).record_stream(stream)
        yield
