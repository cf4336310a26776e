"""Where the tests' processes come from: a fork server that has done the slow imports, and no thread."""

from __future__ import annotations

import gc
import multiprocessing
from multiprocessing.context import ForkServerContext

__all__ = ["context", "look_only_at_what_comes"]


def context() -> ForkServerContext:
    """Each process is a fork of one that has imported torch, Lightning and the corpus, and has run nothing."""
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["lightning.pytorch", "tests.helpers.preload"])
    return fork


def look_only_at_what_comes() -> None:
    """Spare the garbage collector what has been imported: to look through all of it takes it half a second."""
    gc.collect()
    gc.freeze()
