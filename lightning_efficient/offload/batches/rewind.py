"""The gradients that a step adds to, put back when it fails, so that it can begin again as if nothing had happened."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_efficient.offload.batches.free_memory import free_bytes

__all__ = ["KeptGradients"]

_HOST_SHARE = 0.5  # of the host's free memory that copies of gradients may take


class KeptGradients:
    """The gradients of earlier batches, to which a step adds its own.

    Those that are not there are taken away again, which costs nothing; of the others there are copies in the host's
    memory, if it has room.

    Args:
        module: The gradients' parameters are its.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._copies: dict[nn.Parameter, Tensor] = {}
        self._kept: list[tuple[nn.Parameter, Tensor | None]] | None = None

    def keep(self) -> bool:
        """A backward pass begins; returns whether :meth:`back` will be possible."""
        self._kept = None
        there = {p: p.grad for p in self._parameters() if p.grad is not None}
        new = {p: g for p, g in there.items() if not self._fits(self._copies.get(p), g)}
        needed = sum(g.numel() * g.element_size() for g in new.values())
        if needed and needed > _HOST_SHARE * free_bytes(torch.device("cpu")):
            return False
        for parameter, gradient in new.items():
            if gradient.layout is not torch.strided:
                continue
            pinned = gradient.device.type == "cuda"
            self._copies[parameter] = torch.empty(gradient.shape, dtype=gradient.dtype, pin_memory=pinned)
        for parameter, gradient in there.items():
            if gradient.layout is torch.strided:
                self._copies[parameter].copy_(gradient, non_blocking=True)  # in the stream's order, as is the way back
            else:
                self._copies[parameter] = gradient.detach().clone()
        self._kept = [(p, self._copies[p] if p in there else None) for p in self._parameters()]
        return True

    def forget(self) -> None:
        """The step is done; the memory of the copies stays for the next ones."""
        self._kept = None

    def back(self) -> None:
        """As the backward pass began; nothing if none did."""
        for parameter, copy in self._kept or ():
            if copy is None:
                parameter.grad = None
            elif parameter.grad is None or copy.layout is not torch.strided:
                parameter.grad = copy.to(parameter.device, copy=True)
            else:
                parameter.grad.copy_(copy, non_blocking=True)

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self._module.parameters() if parameter.requires_grad)

    @staticmethod
    def _fits(copy: Tensor | None, gradient: Tensor) -> bool:
        return copy is not None and (copy.shape, copy.dtype, copy.layout) == (
            gradient.shape,
            gradient.dtype,
            gradient.layout,
        )
