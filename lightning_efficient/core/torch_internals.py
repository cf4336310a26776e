"""Private symbols of torch that the cores use, in one place; ``tests/core/test_torch_internals.py`` holds them.

(Those of Lightning are in ``compat.py``, which the cores do not import.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.storage import TypedStorage, UntypedStorage

__all__ = [
    "WeakStorage",
    "bytes_of",
    "innermost_pack_hook",
    "rebuild_tensor",
    "storage_key",
    "typed_storage_parts",
    "without_torch_function",
]

rebuild_tensor = torch._utils._rebuild_tensor_v2
"""What ``torch.load`` calls to make a tensor of a storage."""


def storage_key(storage: UntypedStorage) -> tuple[int, int]:
    """The same for two storages exactly if they are the same memory."""
    # Storages without memory have no address; those may begin at another's, so the size counts too.
    return storage.data_ptr() or storage._cdata, storage.nbytes()


without_torch_function = torch._C.DisableTorchFunction
"""Within it no mode hears of the operations that are called."""


def innermost_pack_hook() -> Any:
    """The hook that an operation called now would give its saved tensors to, or None."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks[0] if hooks is not None else None


class WeakStorage:
    """Does not keep a storage alive; as long as it lives, no other storage has its ``_cdata``."""

    __slots__ = ("_reference",)

    def __init__(self, storage: UntypedStorage) -> None:
        self._reference = storage._weak_ref()

    def get(self) -> UntypedStorage | None:
        """The storage, or None if it is gone."""
        return UntypedStorage._new_with_weak_ptr(self._reference)

    def __del__(self, free: Any = UntypedStorage._free_weak_ref) -> None:
        free(self._reference)


def bytes_of(storage: UntypedStorage) -> Tensor:
    """The bytes of a storage as a tensor ``[nbytes]`` that shares its memory."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]


def typed_storage_parts(storage: TypedStorage) -> tuple[UntypedStorage, torch.dtype, Any, int]:
    """Of the kind of storage that tensors are pickled with: memory, type, legacy class, number of elements."""
    kind = getattr(torch, storage._pickle_storage_type())
    return storage._untyped_storage, storage.dtype, kind, storage._size()
