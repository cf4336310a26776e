"""What the threads of a disk tier do for one record."""

from __future__ import annotations

from torch import Tensor

from lightning_efficient.offload.tiers.direct_file import DirectFile
from lightning_efficient.offload.tiers.extents import Extent
from lightning_efficient.offload.tiers.record_slots import Slot
from lightning_efficient.offload.tiers.tier import TierError

__all__ = ["ReadRecord", "WriteRecord", "check_whole"]


class WriteRecord:
    """Write ``data`` to a slot, which is whole afterwards."""

    def __init__(self, file: DirectFile, slot: Slot[Extent], data: Tensor) -> None:
        self._file, self._slot, self._data = file, slot, data

    def __call__(self) -> None:
        self._slot.whole = False
        self._slot.crc = self._file.write(self._slot.extent.offset, self._data.data_ptr(), self._data.numel())
        self._slot.whole = True


class ReadRecord:
    """Fill ``into`` from a slot, and see that the bytes are those that were written."""

    def __init__(self, file: DirectFile, slot: Slot[Extent], into: Tensor) -> None:
        self._file, self._slot, self._into = file, slot, into

    def __call__(self) -> None:
        check_whole(self._file, self._slot)
        offset = self._slot.extent.offset
        crc = self._file.read(offset, self._into.data_ptr(), self._into.numel())
        if crc != self._slot.crc:
            raise TierError(
                f"The record of {self._into.numel():,} bytes at offset {offset:,} of {self._file.path} is damaged: "
                f"its CRC-32 is {crc:08x}, and {self._slot.crc:08x} was written. Go on from a checkpoint, and look at "
                "the disk's health."
            )


def check_whole(file: DirectFile, slot: Slot[Extent]) -> None:
    """Whether the last write to a slot has ended well.

    Raises:
        TierError: If it has not.
    """
    if not slot.whole:
        raise TierError(
            f"The record at offset {slot.extent.offset:,} of {file.path} is not whole, because its last write failed. "
            "Go on from a checkpoint."
        )
