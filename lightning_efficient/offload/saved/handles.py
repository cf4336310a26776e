"""What autograd holds instead of a saved tensor, and how the tensor is made of that again."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.storage import UntypedStorage

from lightning_efficient.core.saved_tensors import Witness, check_version, first_byte
from lightning_efficient.core.torch_internals import without_torch_function
from lightning_efficient.offload.saved.stash import Stash
from lightning_efficient.offload.saved.stashed import Stashed

__all__ = ["Handle", "Held", "Moved", "Part", "Same"]


class Handle(Protocol):
    """Stands for a saved tensor."""

    def tensor(self) -> Tensor:
        """It, or one like it: type, shape, strides, numbers.

        Raises:
            RuntimeError: If it was changed in place since it was saved, or its bytes are not there any more.
            TierError: If its bytes could not be read.
        """


class Same:
    """It stays as it is."""

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = (
            tensor.detach()
        )  # the result of an operation itself would keep its operation alive, and so itself
        self._version = tensor._version

    def tensor(self) -> Tensor:
        check_version(self._tensor, self._tensor.shape, self._version)
        return self._tensor


class _Elsewhere:
    """Its place in memory that is found when it is needed."""

    __slots__ = ("_begin", "_stride", "_witness")

    def __init__(self, tensor: Tensor, begin: int) -> None:
        """``begin``: the byte of its storage at which the memory begins that will be found."""
        self._witness = Witness(tensor)
        self._stride = tensor.stride()
        self._begin = first_byte(tensor) - begin

    def _in(self, storage: UntypedStorage, begin: int) -> Tensor:
        """It, where that memory begins at a byte of ``storage``."""
        witness = self._witness
        kind, offset = witness.tensor.dtype, self._begin + begin
        with without_torch_function():
            empty = torch.empty(0, dtype=kind, device=storage.device)
            return empty.set_(storage, offset // kind.itemsize, witness.shape, self._stride)  # type: ignore[call-overload]


class Held(_Elsewhere):
    """A view of a tensor that somebody holds, and may move meanwhile."""

    __slots__ = ("_reference",)

    def __init__(self, reference: Tensor, tensor: Tensor) -> None:
        super().__init__(tensor, first_byte(reference))
        self._reference = reference

    def tensor(self) -> Tensor:
        self._witness.check()
        reference = self._reference.detach()  # an operation: one that is streamed is fetched by it
        storage = reference.untyped_storage()
        if storage.nbytes() == 0 and reference.numel():
            raise RuntimeError(
                f"A {type(self._reference).__name__} of shape {list(reference.shape)} is needed in a backward pass, "
                "and its memory has been given up. Whoever frees it has to bring it back before the backward pass of "
                "the operations that use it."
            )
        return self._in(storage, first_byte(reference))


class Part(_Elsewhere):
    """It lies in a copy of a part of its storage."""

    __slots__ = ("_bytes",)

    def __init__(self, part: Tensor, begin: int, tensor: Tensor) -> None:
        super().__init__(tensor, begin)
        self._bytes = part

    def tensor(self) -> Tensor:
        self._witness.check()
        return self._in(self._bytes.untyped_storage(), 0)


class Moved(_Elsewhere):
    """It was put away, from byte ``begin`` of its storage on."""

    __slots__ = ("_stash", "_stashed")

    def __init__(self, stash: Stash, stashed: Stashed, begin: int, tensor: Tensor) -> None:
        super().__init__(tensor, begin)
        self._stash = stash
        self._stashed = stashed
        stashed.uses += 1

    def tensor(self) -> Tensor:
        self._witness.check()
        data = self._stash.take(self._stashed)
        return self._in(data.untyped_storage(), first_byte(data))
