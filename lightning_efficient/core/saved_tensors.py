"""What hooks on autograd's saved tensors need to know of a tensor: its memory, and whether it was changed since."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.storage import UntypedStorage

from lightning_efficient.core.torch_internals import counting

__all__ = [
    "Witness",
    "changed_since",
    "check_version",
    "covers",
    "elements_of",
    "first_byte",
    "is_plain",
    "parameter_of",
    "without_memory",
]


def is_plain(tensor: Tensor) -> bool:
    """Whether it is a view of a storage and nothing more."""
    if type(tensor) is not Tensor and not (isinstance(tensor, nn.Parameter) and _is_parameter_class(type(tensor))):
        return False
    return not (tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)


def parameter_of(tensor: Tensor) -> nn.Parameter | None:
    """The parameter that it is, or is a view of."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    base = tensor._base
    return base if isinstance(base, nn.Parameter) else None


def covers(tensor: Tensor, nbytes: int) -> bool:
    """Whether all of a storage of ``nbytes`` is in it."""
    return tensor.nbytes == nbytes and 0 not in tensor.stride()


def first_byte(tensor: Tensor) -> int:
    """The one of its storage at which it begins."""
    return int(tensor.storage_offset()) * tensor.dtype.itemsize


def elements_of(storage: UntypedStorage, dtype: torch.dtype) -> Tensor:
    """All of a storage as ``[n]``."""
    empty = torch.empty(0, dtype=dtype, device=storage.device)
    return empty.set_(storage, 0, (storage.nbytes() // dtype.itemsize,), (1,))  # type: ignore[call-overload]


def without_memory(tensor: Tensor) -> Tensor:
    """One that shares its count of changes, and does not keep its memory."""
    witness = tensor.detach()
    witness.data = _nothing(tensor.dtype, tensor.device)
    return witness


class Witness:
    """Sees whether a tensor is changed, without keeping its memory.

    Autograd checks this itself only where there are no hooks.
    """

    __slots__ = ("shape", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.version = tensor._version
        self.shape = tensor.shape
        self.tensor = without_memory(tensor)

    def check(self) -> None:
        """Whether it is as it was.

        Raises:
            RuntimeError: If it was changed in place.
        """
        check_version(self.tensor, self.shape, self.version)


def check_version(tensor: Tensor, shape: torch.Size, version: int) -> None:
    """Whether a tensor, or what shares its count of changes, is at ``version``.

    Raises:
        RuntimeError: If not.
    """
    if tensor._version != version:
        with counting:
            changed = tensor._version != version
        if changed:
            raise changed_since(tensor, shape, version)


def changed_since(tensor: Tensor, shape: torch.Size, version: int) -> RuntimeError:
    """The error that autograd would raise."""
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: a "
        f"{tensor.dtype} tensor of shape {list(shape)} is at version {tensor._version}; "
        f"expected version {version} instead. Change it out of place, or a clone of it."
    )


@cache
def _is_parameter_class(kind: type[Tensor]) -> bool:
    """Whether a class of parameters has memory of its own, and is no wrapper that is dispatched on."""
    return kind.__torch_dispatch__ is nn.Parameter.__torch_dispatch__


@cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=dtype, device=device)
