"""Memory that nothing keeps."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

__all__ = ["Scratch"]


class Scratch(threading.local):
    """Bytes that are written anew each time: new memory would have to be made zero by the system, page by page."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.int8)

    def memory(self, nbytes: int) -> Tensor:
        """int8 ``[nbytes]``, of this thread, until the next call."""
        if self._memory.numel() < nbytes:
            with torch.inference_mode(False):  # what is made within cannot be written to behind it
                self._memory = torch.empty(nbytes, dtype=torch.int8)
        return self._memory[:nbytes]
