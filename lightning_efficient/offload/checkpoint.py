"""Checkpoints larger than memory: written straight to the disk, and read from the file where they are needed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_efficient.core.durable_file import sweep_temporaries
from lightning_efficient.core.durable_stream import DurableStream, durable_stream
from lightning_efficient.offload.tiers.mapped_memory import drop_pages_at
from lightning_efficient.offload.updates.full_precision import in_16_bits
from lightning_efficient.offload.updates.layout import is_bulk

__all__ = ["load_mapped", "own_memory", "save_streamed", "settle_state"]


def save_streamed(checkpoint: Any, path: Path) -> None:
    """Write what ``torch.save`` writes, through a buffer of 8 MiB; the file appears when it is whole and on the disk.

    Of what is on a disk, or on a GPU, one piece is in memory at a time.

    Args:
        checkpoint: Anything that can be saved.
        path: Of the file; its folder is made. What killed processes have left there unfinished is removed.

    Raises:
        OSError: If there is no room, or the disk fails; what had the name before still has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(path.parent)
    with durable_stream(path) as stream:
        writer = _Writer(stream)
        try:
            torch.save(checkpoint, writer)  # type: ignore[arg-type]  # all that it asks of a file
        except Exception:
            if writer.error is None:
                raise
        if writer.error is not None:
            error, free = writer.error, shutil.disk_usage(path.parent).free
            raise OSError(
                error.errno,
                f"the checkpoint could not be written ({error.strerror}): {path.parent} has {free:,} bytes free, and "
                f"{stream.nbytes:,} had been written. Free space there, or name a folder on a larger disk. A "
                "checkpoint of this name is as it was",
                str(path),
            ) from error


class _Writer:
    """Writes to a stream, and gives back the memory that reading a tensor from a disk has filled.

    Attributes:
        error: That ended the writing: torch, which writes from C++, may make another one of it.
    """

    def __init__(self, stream: DurableStream) -> None:
        self.error: OSError | None = None
        self._stream = stream

    def write(self, data: memoryview) -> int:
        if self.error is None:
            try:
                self._stream.write(data)
            except OSError as error:
                self.error = error
                raise
            drop_pages_at(np.frombuffer(data, np.uint8).ctypes.data)
        return data.nbytes

    def flush(self) -> None:
        self._stream.flush()


def load_mapped(path: Any, weights_only: bool | None) -> dict[str, Any] | None:
    """A checkpoint whose tensors lie in the file, and take memory only while they are read; None if that cannot be."""
    try:
        local = Path(path)
        if not local.is_file():
            return None
        return torch.load(local, map_location="cpu", mmap=True, weights_only=weights_only)
    except (RuntimeError, TypeError):  # an older format, or no path
        return None


def own_memory(optimizers: Sequence[Optimizer]) -> None:
    """Whatever state is in the optimizers lies in memory of its own beside its parameter, and in no file."""
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items() if isinstance(parameter, Tensor) else ():
                if is_bulk(value):
                    state[key] = value.to(parameter.device, copy=True)


def settle_state(optimizer: Optimizer, state_dict: Mapping[str, Any], *, full_precision: bool) -> None:
    """``Optimizer.load_state_dict`` without taking memory for what will be offloaded.

    Tensors stay where they are in ``state_dict``: on the host, or in a file.

    Args:
        optimizer: To load into.
        state_dict: As ``Optimizer.state_dict`` gave it.
        full_precision: Keep state of more bits than a parameter of 16 bits has, which torch would round.
    """
    bulk: dict[int, dict[str, Tensor]] = {}
    light: dict[Any, Any] = {}
    for position, state in state_dict["state"].items():
        if isinstance(position, int) and isinstance(state, Mapping):
            bulk[position] = {key: value for key, value in state.items() if is_bulk(value)}
            light[position] = {key: value for key, value in state.items() if not is_bulk(value)}
        else:
            light[position] = state
    optimizer.load_state_dict({**state_dict, "state": light})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for position, tensors in bulk.items():
        parameter = parameters[position]
        for key, value in tensors.items():
            keep = not value.is_floating_point() or (full_precision and in_16_bits(parameter))
            optimizer.state[parameter][key] = value if keep else value.to(parameter.dtype)
