"""New values of parameters on their way from the rank that has updated them to all others."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_efficient.offload.sharded.ranks import Ranks

__all__ = ["ParameterExchange"]

_ALIGNMENT = 16  # bytes, of each parameter in a message: views of any dtype are possible there


@dataclass(frozen=True, eq=False)
class _Message:
    """One broadcast.

    Attributes:
        work: That is under way.
        data: uint8 ``[n]``.
        targets: Parameters that get their bytes from ``data`` when it has come, with their places in it.
    """

    work: Any
    data: Tensor
    targets: Sequence[tuple[nn.Parameter, int]]

    def finish(self) -> None:
        self.work.wait()
        for parameter, offset in self.targets:
            parameter.detach().copy_(_view(self.data, parameter, offset))


class ParameterExchange:
    """Broadcasts that run while the next parameters are updated.

    All ranks must call :meth:`post` for the same parameters in the same order. A single large parameter is sent from
    where it is and arrives where it belongs; small ones share a message.

    Attributes:
        sent_bytes: Of parameters that this rank has sent to each of the others.
        received_bytes: Of parameters that came from others.
        waited_seconds: In which there was nothing to do but wait.

    Args:
        ranks: Among which.
        cap_bytes: Of messages that are under way.
    """

    def __init__(self, ranks: Ranks, cap_bytes: int = 32 << 20) -> None:
        self._ranks = ranks
        self._cap_bytes = cap_bytes
        self._messages: deque[_Message] = deque()
        self.sent_bytes, self.received_bytes, self.waited_seconds = 0, 0, 0.0

    def post(self, owner: int, parameters: Sequence[nn.Parameter]) -> None:
        """Begin to send ``parameters``, which have their new values on the rank ``owner``."""
        mine = owner == self._ranks.rank
        nbytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        if not nbytes or self._ranks.size == 1:
            return
        self._wait(max(0, self._cap_bytes - nbytes))
        places: list[tuple[nn.Parameter, int]] = []
        if len(parameters) == 1 and _is_dense(parameters[0]):
            data = torch.as_strided(parameters[0].detach(), (parameters[0].numel(),), (1,)).view(torch.uint8)
            if not mine:
                torch.autograd.graph.increment_version(parameters[0])  # c10d does not say that it changes something
        else:
            end = 0
            for parameter in parameters:
                places.append((parameter, end))
                end += -(-parameter.numel() * parameter.element_size() // _ALIGNMENT) * _ALIGNMENT
            data = torch.empty(end, dtype=torch.uint8, device=parameters[0].device)
            for parameter, offset in places if mine else ():
                _view(data, parameter, offset).copy_(parameter.detach())
        work = dist.broadcast(data, owner, async_op=True)
        self._messages.append(_Message(work, data, () if mine else places))
        if mine:
            self.sent_bytes += nbytes
        else:
            self.received_bytes += nbytes

    def finish(self) -> None:
        """Until all has arrived that was posted."""
        self._wait(0)

    def _wait(self, most_bytes: int) -> None:
        begin = time.perf_counter()
        while self._messages and sum(message.data.numel() for message in self._messages) > most_bytes:
            self._messages.popleft().finish()
        self.waited_seconds += time.perf_counter() - begin


def _is_dense(parameter: nn.Parameter) -> bool:
    """Whether its elements lie without gaps, in whatever order; DDP has seen to it that it is the same on all ranks."""
    return torch.empty_like(parameter, device="meta").stride() == parameter.stride()


def _view(data: Tensor, parameter: nn.Parameter, offset: int) -> Tensor:
    """The place of ``parameter`` in a message, in its shape and dtype."""
    nbytes = parameter.numel() * parameter.element_size()
    return data[offset : offset + nbytes].view(parameter.dtype).view(parameter.shape)
