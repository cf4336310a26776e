"""The tensors of a step as codes that a GPU multiplies, each made once, both ways round."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_efficient.core.torch_internals import tensor_version
from lightning_efficient.precision.device.forms import E4M3, E5M2, INT8, SLOT, Form, Noise, filled
from lightning_efficient.precision.formats import AtRandom, Format, is_at_random

__all__ = ["Codes", "Encoder", "dying", "forms_of", "in_a_graph"]

_SLOTS = 1024
_NEXT = 0x9E3779B97F4A7C15 - (1 << 64)
_FORMS = {"int8": (INT8, INT8), "fp8": (E4M3, E5M2)}


def forms_of(low: Format) -> tuple[Form, Form] | None:
    """Codes of a format, and of gradients in it; None if a GPU multiplies none of that format."""
    return _FORMS.get(low.name)


@dataclass(frozen=True)
class Codes:
    """A tensor ``[R, C]``, filled up with zeros.

    Attributes:
        form: Of its codes.
        slot: Where what was measured of it lies.
        step: In which that is so.
        numel: Of the tensor.
        rows: The codes.
        columns: Likewise the other way round: kernels sum over what lies next to one another.
        scale: float32 ``[1]``, what a code's unit is.
    """

    form: Form
    slot: int
    step: int
    numel: int
    rows: Tensor
    columns: Tensor
    scale: Tensor


class Encoder:
    """Makes them, and has room for what is measured.

    Attributes:
        measured: int64 ``[slots, SLOT]``; the first one is nobody's.
        step: How many have begun.

    Args:
        device: Where all is.
        forms: Of codes, and of gradients'.
        operations: The kernels, or the eager code.
        stochastic: What is rounded up or down at random.
        seed: Of that.
    """

    def __init__(
        self, device: torch.device, forms: tuple[Form, Form], operations: Any, *, stochastic: AtRandom, seed: int
    ) -> None:
        self.measured = torch.zeros(_SLOTS, SLOT, dtype=torch.int64, device=device)
        self.step = 0
        self._scales = torch.zeros(_SLOTS, device=device)
        self._seed = torch.full((1,), _signed(seed), dtype=torch.int64, device=device)
        self._forms, self._operations, self._stochastic = forms, operations, stochastic
        self._used, self._count = 1, 0
        self._weights: dict[int, tuple[weakref.ref[Tensor], int, Codes]] = {}
        self._last: tuple[weakref.ref[Tensor], int, Codes] | None = None

    def begin(self, seed: int) -> None:
        """A step begins; of the last one nothing is measured any more."""
        if in_a_graph(self._seed.device):
            self._seed.add_(_NEXT)  # each time that it is replayed
        else:
            self._seed.fill_(_signed(seed))
        self.measured.zero_()
        self.step += 1
        self._used, self._count, self._last = 1, 0, None
        self._weights.clear()

    def weights_changed(self) -> None:
        """Within a step, maybe without a trace."""
        self._weights.clear()

    def next(self) -> int:
        """A number that is new in this step."""
        self._count += 1
        return self._count

    def slot(self) -> int:
        """For what will be measured."""
        if self._used == self.measured.shape[0]:
            self.measured = torch.cat([self.measured, torch.zeros_like(self.measured)])
            self._scales = torch.cat([self._scales, torch.zeros_like(self._scales)])
        self._used += 1
        return self._used - 1

    def of(self, tensor: Tensor, which: str) -> Codes:
        """``tensor`` in few bits; made once for all products of a step that it is in, unless it is a gradient."""
        known = {"weight": self._weights.get(id(tensor)), "input": self._last}.get(which)
        if known is not None and known[0]() is tensor and known[1] == tensor_version(tensor):
            return known[2]
        codes = self.again(tensor.detach(), which)
        if tensor.is_inference():  # whether it was changed in place cannot be told
            return codes
        if which == "weight":
            self._weights[id(tensor)] = dying(tensor, self._weights), tensor_version(tensor), codes
        elif which == "input":
            self._last = weakref.ref(tensor), tensor_version(tensor), codes
        return codes

    def again(self, tensor: Tensor, which: str) -> Codes:
        """``tensor`` in few bits, whether or not that is known."""
        return self._encode(tensor, self._forms[which == "gradient"], at_random=is_at_random(self._stochastic, which))

    def is_there(self, codes: Codes | None) -> bool:
        """Whether what was measured of them still is."""
        return codes is not None and codes.step == self.step

    def _encode(self, tensor: Tensor, form: Form, *, at_random: bool) -> Codes:
        values = tensor.reshape(-1, tensor.shape[-1]).contiguous()
        high, wide = filled(values.shape[0]), filled(values.shape[1])
        rows = torch.empty(high, wide, dtype=form.dtype, device=values.device)
        columns = torch.empty(wide, high, dtype=form.dtype, device=values.device)
        slot, count = self.slot(), self.next()
        scale = self._scales[slot : slot + 1]
        noise = Noise(self._seed, count) if at_random else None
        self._operations.measure(values, self.measured, slot)
        self._operations.encode(values, form, self.measured, slot, rows, columns, scale, noise)
        return Codes(form, slot, self.step, values.numel(), rows, columns, scale)


def dying(tensor: Tensor, known: dict[int, Any]) -> weakref.ref[Tensor]:
    """A reference to a tensor, with which goes what is known of it: not all that is multiplied by lives on."""
    number = id(tensor)
    return weakref.ref(tensor, lambda gone: known.pop(number, None))


def in_a_graph(device: torch.device) -> bool:
    """Whether launches are recorded, to be repeated without the host."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _signed(seed: int) -> int:
    return (seed & (1 << 64) - 1) - (seed >> 63 & 1) * (1 << 64)
