"""Gradients that leave memory as soon as they are there, and come back for the update of their parameter.

(Rajbhandari et al. 2021, "ZeRO-Infinity", 5.2: gradients are moved out while the rest of backward runs.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_efficient.core.torch_internals import bytes_of
from lightning_efficient.offload.tiers.carriers import Carrier, Leaving
from lightning_efficient.offload.tiers.tier import Record, Tier, TierError

__all__ = ["GradientClaim", "GradientStore", "taken"]

Clip = Callable[[Tensor], Any]


@dataclass(frozen=True, eq=False)
class GradientClaim:
    """A gradient that somebody will want, whatever is cleared meanwhile; until the next backward, or the one after.

    Attributes:
        parameter: Whose it is.
        tier: Where it is.
        record: Its place there.
        carrier: Brings it to its parameter's device.
        dtype: Of its elements.
        clips: What is still to be done to it, in place.
    """

    parameter: nn.Parameter
    tier: Tier
    record: Record
    carrier: Carrier
    dtype: torch.dtype
    clips: tuple[Clip, ...]

    def take(self, *, on_host: bool = False) -> Tensor:
        """The gradient, where its parameter is; or in memory of the host, which any thread may ask for."""
        if on_host:
            gradient = torch.empty_like(self.parameter, dtype=self.dtype, device="cpu", requires_grad=False)
            self.tier.read(self.record, _bytes(gradient)).wait()
        else:
            gradient = _fetched(self.parameter, self.dtype, self.tier, self.record, self.carrier)
        for clip in self.clips:
            clip(gradient)
        return gradient


class GradientStore:
    """Keeps the gradients of some parameters in tiers.

    A gradient is written when backward has made it; one that more micro-batches add to is read again for each of them.
    In memory are at any time the gradients that are being written, up to a cap.

    Args:
        tiers: Where the gradient of each parameter goes.
        optimizers: Whose ``zero_grad`` clears them too.
        complete: Asked at each gradient whether it is complete, or more micro-batches will add to it.
        carrier: For the device that they are on.
        cap_bytes: Of gradients that are being written.
        keep_complete: Complete gradients stay in memory, where they are used at once.
        two_steps: A claimed gradient stays while that of the next step comes; each has two places then.
    """

    def __init__(
        self,
        tiers: Mapping[nn.Parameter, Tier],
        optimizers: Sequence[Optimizer],
        complete: Callable[[], bool],
        carrier: Carrier,
        cap_bytes: int,
        *,
        keep_complete: bool = False,
        two_steps: bool = False,
    ) -> None:
        self._keep_complete, self._two_steps = keep_complete, two_steps
        self._tiers = dict(tiers)
        self._optimizers = list(optimizers)
        self._complete = complete
        self._carrier, self._cap_bytes = carrier, cap_bytes
        self._records: dict[nn.Parameter, Record] = {}
        self._claimed: dict[nn.Parameter, Record] = {}  # where those of the last step are
        self._stored: dict[nn.Parameter, tuple[torch.dtype, Tensor | None]] = {}  # and the norm, once it is complete
        self._leaving: dict[Record, tuple[Tensor, Leaving]] = {}  # in the order in which they were sent
        self._leaving_bytes = 0
        self._clips: list[Clip] = []
        self._handles: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(self._came) for parameter in tiers if parameter.requires_grad
        ]
        for optimizer in self._optimizers:
            self._clear_with(optimizer)

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether there is a gradient of ``parameter`` here."""
        return parameter in self._stored

    @property
    def empty(self) -> bool:
        """Whether there is no gradient here."""
        return not self._stored

    def claim(self, parameter: nn.Parameter) -> GradientClaim | None:
        """The gradient of ``parameter``, which is not here any more; None if there is none."""
        stored = self._stored.pop(parameter, None)
        if stored is None:
            return None
        record = self._records[parameter]
        self._hand_over(record)
        if self._two_steps:
            if (other := self._claimed.get(parameter)) is not None:
                self._records[parameter] = other
            else:
                del self._records[parameter]
            self._claimed[parameter] = record
        return GradientClaim(parameter, self._tiers[parameter], record, self._carrier, stored[0], tuple(self._clips))

    def norm(self, parameter: nn.Parameter) -> Tensor:
        """The 2-norm of a gradient, a scalar, as ``torch.linalg.vector_norm`` gives it."""
        dtype, norm = self._stored[parameter]
        if norm is None:  # the last micro-batch did not use the parameter
            norm = torch.linalg.vector_norm(self._read(parameter, dtype))
            self._stored[parameter] = dtype, norm
        return norm

    def clip(self, clip: Clip) -> None:
        """Change each gradient that is here so, in place, when it is taken."""
        self._clips.append(clip)

    def clear(self) -> None:
        """There are no gradients."""
        self._stored.clear()
        self._clips.clear()

    def detach(self) -> None:
        """Gradients stay in memory from now on; those that are here come back."""
        while self._handles:
            self._handles.pop().remove()
        for optimizer in self._optimizers:
            optimizer.__dict__.pop("zero_grad", None)
        for parameter in list(self._stored):
            if (claim := self.claim(parameter)) is not None:
                parameter.grad = claim.take()
        self.clear()
        self._wait(0)
        self._carrier.flush()
        for records in (self._records, self._claimed):
            for parameter, record in records.items():
                self._tiers[parameter].release([record])
            records.clear()

    def _came(self, parameter: nn.Parameter) -> None:
        gradient = parameter.grad
        if gradient is None or not gradient.numel():
            return
        if gradient.layout != torch.strided and parameter not in self._stored:
            return  # a sparse one is small, and stays
        if parameter in self._stored:  # of earlier micro-batches
            gradient = self._read(parameter, gradient.dtype).add_(gradient)
        complete = self._complete()
        if complete and self._keep_complete:
            self._stored.pop(parameter, None)
            parameter.grad = gradient
            return
        place = torch.empty_like(parameter, dtype=gradient.dtype, requires_grad=False)
        if gradient.stride() != place.stride():
            gradient = place.copy_(gradient)
        nbytes = gradient.numel() * gradient.element_size()
        tier = self._tiers[parameter]
        record = self._records.get(parameter)
        if record in self._leaving:  # of an earlier micro-batch, or a step whose gradients were cleared
            self._let_go(record)
        if record is None or record.nbytes != nbytes:
            if record is not None:
                tier.release([record])
            record = self._records[parameter] = tier.reserve([nbytes], versioned=False)[0]
        self._wait(max(0, self._cap_bytes - nbytes))
        self._leaving[record] = gradient, self._carrier.send(tier, record, _bytes(gradient))
        self._leaving_bytes += nbytes
        self._stored[parameter] = gradient.dtype, torch.linalg.vector_norm(gradient) if complete else None
        parameter.grad = None

    def _wait(self, most_bytes: int) -> None:
        """Until so much is being written at most; what has been written is let go of."""
        self._carrier.advance()
        while self._leaving:
            record, (_, leaving) = next(iter(self._leaving.items()))
            try:
                if self._leaving_bytes <= most_bytes and not leaving.gone:
                    return
            except TierError:
                self._take_out(record)  # it is said once
                raise
            self._let_go(record)

    def _take_out(self, record: Record) -> Leaving:
        self._leaving_bytes -= record.nbytes
        return self._leaving.pop(record)[1]

    def _let_go(self, record: Record) -> None:
        leaving = self._take_out(record)
        leaving.hand_over()
        leaving.let_go()

    def _hand_over(self, record: Record) -> None:
        """Its tier has been asked for all that it was sent: what it is asked for from now on comes behind that."""
        if record in self._leaving:
            self._leaving[record][1].hand_over()

    def _read(self, parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
        """A gradient that is here, where its parameter is."""
        record = self._records[parameter]
        self._hand_over(record)
        return _fetched(parameter, dtype, self._tiers[parameter], record, self._carrier)

    def _clear_with(self, optimizer: Optimizer) -> None:
        """On the instance: torch has no hook for it."""
        own = optimizer.zero_grad

        def zero_grad(set_to_none: bool = True) -> None:
            own(set_to_none=set_to_none)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    self._stored.pop(parameter, None)
            self._clips.clear()

        optimizer.__dict__["zero_grad"] = zero_grad


def taken(gradients: Iterable[Tensor | GradientClaim | None]) -> list[Tensor | None]:
    """All in memory, where their parameters are."""
    return [gradient.take() if isinstance(gradient, GradientClaim) else gradient for gradient in gradients]


def _fetched(parameter: nn.Parameter, dtype: torch.dtype, tier: Tier, record: Record, carrier: Carrier) -> Tensor:
    """A record as the gradient of ``parameter``; for the thread that computes."""
    gradient = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    carrier.fetch(tier, record, gradient.device, into=_bytes(gradient)).wait()
    carrier.advance()  # it holds the memory no more
    return gradient


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor without gaps, in the order in which they lie."""
    whole = bytes_of(tensor.untyped_storage())
    start = tensor.storage_offset() * tensor.element_size()
    return whole[start : start + tensor.numel() * tensor.element_size()]
