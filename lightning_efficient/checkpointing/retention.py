"""Which checkpoints of a directory are there to go on from."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from lightning_efficient.checkpointing.archive import NOTE
from lightning_efficient.checkpointing.verification import CheckpointDamagedError, verify

__all__ = ["newest_intact", "step_of"]


def step_of(path: Path) -> int | None:
    """The step that a file of this package was written at; None for other files."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = next((name for name in archive.namelist() if name.endswith(f"/{NOTE}")), None)
            return int(json.loads(archive.read(member))["global_step"]) if member else None
    except (OSError, zipfile.BadZipFile, ValueError, KeyError):
        return None


def newest_intact(directory: Path, *, besides: Path | None = None) -> Path | None:
    """The checkpoint of ``directory`` with the most steps whose checksums are right; the newest of several.

    Args:
        directory: Where to look; not below it.
        besides: A file that is not wanted.
    """
    candidates = []
    for path in directory.glob("*.ckpt"):
        same = besides is not None and besides.exists() and path.samefile(besides)
        if not same and not path.is_symlink() and (step := step_of(path)) is not None:
            candidates.append((step, path.stat().st_mtime_ns, path))
    for _, _, path in sorted(candidates, reverse=True):
        try:
            verify(path)
        except (CheckpointDamagedError, OSError):
            continue
        return path
    return None
