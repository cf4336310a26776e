"""Memory: the peak of a span of time, and the bytes that a set of tensors holds."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn

__all__ = ["MemoryMeter", "ParameterSize", "nested_tensors", "parameter_size", "tensor_bytes"]

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_ORDINARY = (torch.Tensor, nn.Parameter)


class MemoryMeter:
    """The peak memory since :meth:`start`, of one device or of the process.

    With a CUDA device it is what torch's allocator held for tensors (``torch.cuda.max_memory_allocated``, reset at the
    start). Without, it is the resident memory of the process. The kernel's high-water mark of that never goes down by
    itself; Linux lets a process set its own back to the present (``5`` into ``/proc/self/clear_refs``), which this
    does at the start, so that it sees peaks inside a step. Where that is not allowed, the peak is the largest
    :meth:`sample`. Setting the mark back also lowers what ``resource.getrusage`` reports afterwards as ``ru_maxrss``.

    Args:
        device: The device to watch; None, or any device that is not CUDA, watches the process.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        self._process = psutil.Process()
        self._kernel_mark = False
        self._largest_sample = 0
        self.start_bytes = 0

    @property
    def source(self) -> str:
        """Where the numbers come from, in words for a reader."""
        if self._device is not None:
            return f"memory that torch's allocator gave to tensors on {self._device}"
        if self._kernel_mark:
            return "resident memory of the process (the kernel's high-water mark, set back at the start)"
        return "resident memory of the process, sampled at the hooks of each step (peaks in between are missed)"

    @property
    def needs_samples(self) -> bool:
        """Whether the peak is only as good as the samples taken."""
        return self._device is None and not self._kernel_mark

    def start(self) -> None:
        """Forget all before now."""
        if self._device is not None:
            torch.cuda.init()  # the allocator has no statistics to reset before
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._kernel_mark = _reset_kernel_mark()
        self.start_bytes = self._largest_sample = self._now()

    def sample(self) -> int:
        """The bytes held now."""
        now = self._now()
        self._largest_sample = max(self._largest_sample, now)
        return now

    def peak_bytes(self) -> int:
        """The most bytes held at any moment since :meth:`start`."""
        self.sample()
        if self._device is not None:
            return torch.cuda.max_memory_allocated(self._device)
        if self._kernel_mark:
            return max(self._largest_sample, _read_kernel_mark())
        return self._largest_sample

    def _now(self) -> int:
        if self._device is not None:
            return torch.cuda.memory_allocated(self._device)
        return int(self._process.memory_info().rss)


@dataclass(frozen=True)
class ParameterSize:
    """How large a module's parameters are; one that is used in several places counts once.

    Attributes:
        count: Number of scalars.
        trainable: Those of them with ``requires_grad``.
        bytes: What they weigh in their dtypes, whether or not they are in memory at this moment.
    """

    count: int
    trainable: int
    bytes: int


def parameter_size(module: nn.Module) -> ParameterSize:
    """Count the parameters of ``module``, tied ones once."""
    seen: set[object] = set()
    count = trainable = size = 0
    for parameter in module.parameters():
        for part in _plain(parameter.detach()):
            key = _slice_of_storage(part) or id(parameter)
            if key in seen:
                continue
            seen.add(key)
            count += part.numel()
            trainable += part.numel() * parameter.requires_grad
            size += part.nbytes
    return ParameterSize(count, trainable, size)


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """The bytes of all storages that ``tensors`` keep alive, each storage once.

    A view counts its whole storage, since that is what it keeps in memory. A sharded or quantized tensor counts the
    plain tensors that it is made of on this rank. Tensors without memory (meta, freed storage) count nothing.
    """
    storages: dict[tuple[torch.device, int], int] = {}
    for tensor in tensors:
        for part in _plain(tensor):
            if part.layout is torch.strided:
                storage = part.untyped_storage()
                if address := storage.data_ptr():
                    storages[part.device, address] = storage.nbytes()
    return sum(storages.values())


def nested_tensors(value: object) -> Iterator[torch.Tensor]:
    """Every tensor inside mappings, lists and tuples, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from nested_tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from nested_tensors(item)


def _plain(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """The ordinary tensors that a wrapper subclass (DTensor, a quantized tensor) is made of; else the tensor."""
    if type(tensor) in _ORDINARY or not hasattr(tensor, "__tensor_flatten__"):
        return (tensor,)
    return [part for name in tensor.__tensor_flatten__()[0] for part in _plain(getattr(tensor, name))]


def _slice_of_storage(tensor: torch.Tensor) -> object | None:
    """What tells whether two tensors are the same memory; None for one that has none now."""
    if tensor.layout is not torch.strided:
        return None
    address = tensor.data_ptr()
    return (tensor.device, address, tensor.shape) if address else None


def _reset_kernel_mark() -> bool:
    if sys.platform != "linux":
        return False
    try:
        _CLEAR_REFS.write_text("5")
        return _read_kernel_mark() > 0
    except OSError:
        return False


def _read_kernel_mark() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
