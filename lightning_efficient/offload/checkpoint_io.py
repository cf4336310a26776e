"""Lightning's own checkpoint IO, with files that memory need not hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy

from lightning_efficient.offload.checkpoint import save_streamed

__all__ = ["StreamedCheckpointIO", "streaming"]


class StreamedCheckpointIO(TorchCheckpointIO):
    """Writes local files straight to the disk; others as Lightning does, which makes the whole file in memory first."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        file_system, local = url_to_fs(str(path))
        if storage_options is None and isinstance(file_system, LocalFileSystem):
            save_streamed(checkpoint, Path(local))
        else:
            super().save_checkpoint(checkpoint, path, storage_options)


@contextlib.contextmanager
def streaming(strategy: Strategy) -> Iterator[None]:
    """Within it checkpoints are streamed, if the strategy's checkpoint IO is Lightning's default."""
    given = strategy.checkpoint_io
    if type(given) is not TorchCheckpointIO:
        yield
        return
    strategy.checkpoint_io = StreamedCheckpointIO()
    try:
        yield
    finally:
        strategy.checkpoint_io = given
