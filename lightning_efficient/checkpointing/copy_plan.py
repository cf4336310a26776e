"""Which storages of a state can be copied later, and where each lies in the file.

What an optimizer owns can, for it changes at the optimizer's steps only, unless other code changes it too. This is
found out by looking: what is saved from a place in the program for the first time is copied at once, and the live
tensors are compared before the next update.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.storage import UntypedStorage

from lightning_efficient.checkpointing.archive import StorageLayout
from lightning_efficient.checkpointing.barrier import owned_tensors
from lightning_efficient.checkpointing.device_copies import fingerprint
from lightning_efficient.checkpointing.skeleton import Skeleton
from lightning_efficient.core.checksum import crc32
from lightning_efficient.core.torch_internals import bytes_of, storage_key

__all__ = ["CopyPlan", "Planner", "storage_checksum"]

Key = tuple[int, int]


@dataclass(frozen=True)
class CopyPlan:
    """For states of the same sizes, with the same tensors as far as an optimizer owns them.

    Attributes:
        sizes: Bytes of the storages, by number.
        layout: Where they go.
        on_gpu: Whether any of them is on a CUDA device.
        keys: Of the storages that an optimizer owns, by number.
        numbers: The number of each of these keys.
        shared: Those of these keys that are several tensors' memory.
    """

    sizes: tuple[int, ...]
    layout: StorageLayout
    on_gpu: bool
    keys: Mapping[int, Key]
    numbers: Mapping[Key, int]
    shared: frozenset[Key]

    def is_for(self, keys: Sequence[Key]) -> bool:
        """Whether it is for a state with these storages."""
        return self.sizes == tuple([size for _, size in keys]) and self.keys == {n: keys[n] for n in self.keys}


class Planner:
    """Makes plans, and keeps the last one while the tensors are the same.

    Attributes:
        last: The last plan, or None.
        volatile: Keys of what changed without an optimizer.
    """

    def __init__(self) -> None:
        self.last: CopyPlan | None = None
        self.volatile: set[Key] = set()
        self._owners: tuple[tuple[int, int], ...] = ()
        self._calibrated: dict[str, set[Key]] = {}

    def plan(self, skeleton: Skeleton, owners: Sequence[Optimizer], first: Callable[[], Iterable[Tensor]]) -> CopyPlan:
        """For the storages of ``skeleton``.

        Args:
            skeleton: Of the state.
            owners: Optimizers whose every update passes the barrier.
            first: Asked for a new plan: tensors to be copied before the others, in this order.
        """
        keys = tuple(skeleton.numbers)
        owned_by = tuple((id(owner), sum(len(group["params"]) for group in owner.param_groups)) for owner in owners)
        if self.last is not None and self._owners == owned_by and self.last.is_for(keys):
            return self.last
        rank = {storage_key(tensor.untyped_storage()): place for place, tensor in enumerate(first())}
        order = sorted(range(len(keys)), key=lambda number: rank.get(keys[number], len(rank)))
        layout = StorageLayout([(number, skeleton.storages[number].nbytes()) for number in order])
        counts: Counter[Key] = Counter()
        for owner in owners:
            for tensor in owned_tensors(owner):
                if tensor.is_cpu or tensor.is_cuda:
                    counts[storage_key(tensor.untyped_storage())] += 1
        owned = {key: skeleton.numbers[key] for key in counts if key in skeleton.numbers}
        shared = frozenset(key for key in owned if counts[key] > 1)
        for place in self._calibrated.values():  # an address may have become another tensor's
            place &= owned.keys()
        sizes, by_number = tuple(size for _, size in keys), {number: key for key, number in owned.items()}
        self.last = CopyPlan(sizes, layout, skeleton.on_gpu, by_number, owned, shared)
        self._owners = owned_by
        return self.last

    def later(self, plan: CopyPlan, place: str) -> set[int]:
        """What can be copied after a save from ``place``."""
        known = self._calibrated.get(place, set()) - self.volatile
        return {number for number, key in plan.keys.items() if key in known}

    def to_calibrate(self, plan: CopyPlan, place: str) -> set[int]:
        """What an optimizer owns of which it is not known whether other code changes it after ``place``."""
        known = self._calibrated.get(place, set()) | self.volatile
        return {number for number, key in plan.keys.items() if key not in known}

    def calibrate(
        self, storages: Mapping[Key, UntypedStorage], tensors: Iterable[Tensor | None], place: str
    ) -> Callable[[Optimizer], bool]:
        """Look at ``storages`` now.

        Args:
            storages: By key.
            tensors: One of each, whose changes torch counts: it may be another one's bytes only for a while.
            place: Where this is.

        Returns:
            What looks again at those of an optimizer, to be called before its next update; it returns whether it has
            seen all.
        """
        before = {key: _look(storage) for key, storage in storages.items()}
        counts = {key: (t, t._version) for key, t in zip(storages, tensors, strict=True) if t is not None}

        def compare(optimizer: Optimizer) -> bool:
            own = {storage_key(tensor.untyped_storage()) for tensor in owned_tensors(optimizer)}
            for key in own & before.keys():
                seen, now = before.pop(key), _look(storages[key])
                tensor, version = counts.get(key, (None, 0))
                counted = tensor is not None and tensor._version != version
                if counted or seen is None or now is None or not torch.equal(seen, now):
                    self.volatile.add(key)
                self.note_calibrated([key], place)
            return not before

        return compare

    def note_calibrated(self, keys: Iterable[Key], place: str) -> None:
        """These have been compared otherwise."""
        self._calibrated.setdefault(place, set()).update(keys)

    def calibrated(self, keys: Iterable[Key], place: str) -> bool:
        """Whether all of these have been compared at ``place``."""
        return self._calibrated.get(place, set()).issuperset(keys)

    def forget(self) -> None:
        """The tensors are others now."""
        self.last = None
        self.volatile.clear()
        self._calibrated.clear()


def storage_checksum(storage: UntypedStorage) -> int:
    """CRC-32 of a storage as it is now."""
    return crc32(bytes_of(storage).cpu().numpy())


def _look(storage: UntypedStorage) -> Tensor | None:
    """A checksum, made where the storage is; None if there is no memory for that."""
    if storage.device.type == "cuda":
        try:
            return fingerprint(bytes_of(storage))
        except torch.cuda.OutOfMemoryError:
            return None
    return torch.tensor([storage_checksum(storage)])
