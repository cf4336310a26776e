"""Results that are made again in backward, of what is kept for another operation, rather than kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_efficient.activation_compression.records import Raw
from lightning_efficient.activation_compression.store import Kept, SavedTensors
from lightning_efficient.core.saved_tensors import Witness

__all__ = ["Recomputation", "recomputation"]

_ELEMENTWISE: Mapping[str, Callable[..., Tensor]] = {
    "gelu": F.gelu, "silu": F.silu, "softplus": F.softplus, "mish": F.mish, "hardswish": F.hardswish,
}  # fmt: skip
_FUNCTIONS: Mapping[str, Callable[..., Tensor]] = {**_ELEMENTWISE, "layer_norm": F.layer_norm, "rms_norm": F.rms_norm}
"""Operations that save their input and cost little."""
_LITTLE = 8  # times smaller than its result is what may be copied of its arguments


@dataclass(frozen=True)
class Recomputation:
    """An operation, to be done again.

    Attributes:
        name: Of the operation.
        shape: Of its input, with the stride and the offset in what is kept of that.
        args: Its other arguments; tensors are copies, for weights may have changed, or be sharded, when it is done.
        nbytes: Of the copies.
        witness: Of its input, where what is kept of that is its very memory.
    """

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    in_order: bool
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    nbytes: int
    witness: Witness | None

    def __call__(self, kept: Kept) -> Tensor:
        """The numbers of its result, ``[n]``, of what is kept of its input.

        Raises:
            RuntimeError: If that was changed in place.
        """
        if self.witness is not None:
            self.witness.check()
        function = _FUNCTIONS[self.name]
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            if self.name not in _ELEMENTWISE or not self.in_order or kept.in_use:
                source = kept.numbers().as_strided(self.shape, self.stride, self.offset)
                return function(source, *self.args, **self.kwargs).view(-1)
            result = torch.empty(self.shape, dtype=self.dtype, device=self.device).view(-1)
            for which, numbers in kept.record.pieces():  # so that not all of the input is in memory too
                result[which] = function(numbers, *self.args, **self.kwargs)
            return result


def recomputation(
    saved: SavedTensors, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
) -> tuple[Kept, Recomputation] | None:
    """How to make ``result`` again, and of what, if that is possible and worth it."""
    if name not in _FUNCTIONS or type(result) is not Tensor or not result.requires_grad or kwargs.get("inplace"):
        return None
    source = args[0] if args else kwargs.get("input")
    if type(source) is not Tensor or result.dtype != source.dtype or not result.is_contiguous():
        return None
    kept = saved.find(source)
    if kept is None:
        return None
    in_order = source.is_contiguous() and source.nbytes == source.untyped_storage().nbytes()
    others = {key: value for key, value in kwargs.items() if key not in ("input", "inplace")}
    tensors = [value for value in (*args[1:], *others.values()) if isinstance(value, Tensor)]
    nbytes = sum(tensor.nbytes for tensor in tensors)
    if nbytes * _LITTLE > result.nbytes:
        return None
    return kept, Recomputation(
        name,
        shape=source.shape,
        stride=source.stride(),
        offset=int(source.storage_offset()),
        dtype=source.dtype,
        device=source.device,
        in_order=in_order,
        args=tuple(_copy(value) for value in args[1:]),
        kwargs={key: _copy(value) for key, value in others.items()},
        nbytes=nbytes,
        witness=Witness(source) if isinstance(kept.record, Raw) else None,
    )


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
