"""When the shards are updated: behind backward, or each as soon as its gradient has been reduced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_efficient.core.torch_internals import in_backward, local_part
from lightning_efficient.offload.local_shards.engine import ShardEngine
from lightning_efficient.offload.local_shards.modules import parameters_by_module
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
        self._updating_all = True
        for unit in units:
            if first.error is None:
                with first:
                    engine.update(unit, unit.group, [parameter.grad for parameter in unit.parameters])
        engine.agree(first.error)
        self._updating_all = False


class ShardsInBackward(InBackward):
    """Each unit when the gradients of its shards have been reduced; for optimizers that do not communicate.

    FSDP2 calls the hooks of a shard for each forward of its module, and gathers the parameter again for the backward of
    the one before. What ran several times so waits for the optimizer's step. So do errors, lest the other ranks wait in
    the midst of backward.

    Args:
        engine: Of all ``optimizers``.
        optimizers: Whose steps are taken over.
        complete: Asked at each gradient whether it is complete, or more micro-batches will add to it.
        module: That ``fully_shard`` was called with parts of.
    """

    _engine: ShardEngine

    def __init__(
        self, engine: ShardEngine, optimizers: Sequence[Optimizer], complete: Callable[[], bool], module: nn.Module
    ) -> None:
        super().__init__(engine, optimizers, complete)
        self._first = FirstError()
        self._ran: set[nn.Parameter] = set()
        self._ran_again: set[nn.Parameter] = set()
        self._stream: torch.cuda.Stream | None = None
        for part, parameters in parameters_by_module(module).items():
            self._handles.append(part.register_forward_pre_hook(self._noting(parameters)))

    @property
    def begun(self) -> bool:
        return super().begun or self._updating_all

    def before_forward(self) -> None:
        super().before_forward()
        self._ran.clear()
        self._ran_again.clear()
        self._stream = torch.cuda.current_stream() if torch.cuda.is_available() else None

    def _noting(self, parameters: list[nn.Parameter]) -> Callable[..., None]:
        def ran(*_: Any) -> None:
            if in_backward():  # activations are computed again
                return
            self._ran_again.update(self._ran.intersection(parameters))
            self._ran.update(parameters)

        return ran

    def _gradient_came(self, parameter: nn.Parameter) -> None:
        if self._first.error is None and parameter not in self._ran_again:
            with self._first, _on(self._stream, parameter.grad):
                super()._gradient_came(parameter)

    def _step(self, units: list[Unit]) -> None:
        first, self._first = self._first, FirstError()
        self._updating_all = True
        if first.error is None:
            with first:
                super()._step(units)
        self._engine.agree(first.error)
        self._updating_all = False


@contextlib.contextmanager
def _on(stream: torch.cuda.Stream | None, gradient: Tensor | None) -> Any:
    """On the stream of the computation: FSDP2 calls hooks on that on which it reduced the gradient."""
    if stream is None or gradient is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        local_part(gradient).record_stream(stream)
        yield
