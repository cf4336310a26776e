"""What a short run is to do, as it passes to its process."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Job"]


@dataclass(frozen=True)
class Job:
    """What a short run is to do.

    Attributes:
        configs: The user's, and overlays.
        folder: For what it writes, and the Trainer's ``default_root_dir``.
        warm_up: Batches that are not timed.
        batches: That are timed, at least.
        seconds: How long to time, if that is more.
        profile: Whether to look at all of it, not only at peak and time.
        chosen: Whether it trains on chosen batches; else as the user would.
        saves: Whether to save checkpoints, and time that.
        limit: Bytes that the process may take; 0: what is available.
    """

    configs: list[str]
    folder: str
    warm_up: int = 3
    batches: int = 12
    seconds: float = 2.0
    profile: bool = False
    chosen: bool = True
    saves: bool = False
    limit: int = 0

    @property
    def result(self) -> Path:
        """The file that it leaves."""
        return Path(self.folder) / "result.json"

    @property
    def chosen_file(self) -> Path:
        """Where a profile leaves the batches that it chose."""
        return Path(self.folder).parent / "batches.pt"

    def to_json(self) -> str:
        """What :meth:`from_file` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_file(cls, path: str) -> Job:
        """The inverse of :meth:`to_json`."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
