"""Imported once by the fork server: what takes long, and starts no thread."""

import lightning.pytorch.cli
import lightning.pytorch.loggers  # noqa: F401

from lightning_efficient.demos import load_corpus

load_corpus()
