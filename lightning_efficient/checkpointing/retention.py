"""Which checkpoints of a directory are there to go on from."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import zipfile
from pathlib import Path
from typing import BinaryIO

from lightning_efficient.checkpointing.archive import NOTE
from lightning_efficient.checkpointing.verification import CheckpointDamagedError, top_level_keys, verify

__all__ = ["newest_intact", "only_weights", "step_of"]


def step_of(path: Path | BinaryIO) -> int | None:
    """The step that a file of this package was written at; None for other files."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = next((name for name in archive.namelist() if name.endswith(f"/{NOTE}")), None)
            return int(json.loads(archive.read(member))["global_step"]) if member else None
    except Exception:  # what is damaged can raise anything
        return None


def newest_intact(directory: Path, *, besides: Path | None = None, complete: bool = True) -> Path | None:
    """The checkpoint of ``directory`` with the most steps whose checksums are right; the newest of several.

    Args:
        directory: Where to look; not below it.
        besides: A file that is not wanted.
        complete: Whether training must be able to go on from it: not what Lightning saved with
            ``save_weights_only=True``.
    """
    unwanted = _status(besides) if besides else None
    candidates = []
    for path in directory.glob("*.ckpt"):
        status = _status(path)
        if status is None or path.is_symlink() or not stat.S_ISREG(status.st_mode):
            continue
        if not (unwanted and os.path.samestat(status, unwanted)) and (step := step_of(path)) is not None:
            candidates.append((step, status.st_mtime_ns, path))
    for _, _, path in sorted(candidates, reverse=True):
        with contextlib.suppress(CheckpointDamagedError, OSError):
            if complete and only_weights(path):
                continue
            verify(path)
            return path
    return None


def only_weights(path: Path) -> bool:
    """Whether Lightning saved it, and nothing of the optimizers, which it saves even where there are none."""
    keys = top_level_keys(path)
    return "pytorch-lightning_version" in keys and "optimizer_states" not in keys


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # a link to nothing, for one
        return None
