"""Runs with everything on: ``configs/base.yaml`` and ``configs/all.yaml``, as a user starts them, in a size of ours."""

from __future__ import annotations

import logging
import multiprocessing
import warnings
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_efficient.__main__ import main

__all__ = ["AT_WORK", "CONFIGS", "TINY", "context", "fit", "settings"]

CONFIGS = Path(__file__).parent.parent / "configs"
TINY: Mapping[str, Any] = {
    "ByteLanguageModel": {"layers": 8, "width": 32, "heads": 4, "context": 32, "warmup_steps": 8},
    "StdlibDataModule": {"context": 32, "batch_size": 4, "validation_bytes": 33 * 4},
}
"""A model whose steps take milliseconds, as changes of :func:`settings`."""

AT_WORK: Mapping[str, Any] = {
    "OffloadStrategy": {"place": {"optimizer_state": "disk"}},
    "ActivationCompressionPlugin": {"memory_budget": None, "bits": 4},
    "RollbackPrecision": {"only_if_faster": False},
}
"""Likewise: each technique does its work, though all of a small model fits and is quick."""


def settings(
    folder: Path,
    *,
    overlays: tuple[str, ...] = ("all",),
    trainer: Mapping[str, Any] | None = None,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """A configuration for the command line; all that a run writes is below ``folder``.

    Args:
        folder: See above.
        overlays: Names in ``configs/``, applied in this order to ``base.yaml``.
        trainer: Arguments of the Trainer to be replaced.
        changes: Arguments to be replaced by name of the class that has them.

    Raises:
        KeyError: If nothing in the configuration is of a class in ``changes``.
    """
    whole: dict[str, Any] = yaml.safe_load((CONFIGS / "base.yaml").read_text())
    for name in overlays:
        overlay = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["trainer"]
        whole["trainer"]["callbacks"] += overlay.pop("callbacks+", [])
        whole["trainer"] |= overlay
    whole["trainer"] |= {"default_root_dir": str(folder), "enable_progress_bar": False, **(trainer or {})}
    places = {"TensorBoardLogger": {"save_dir": str(folder / "logs")}}
    if "all" in overlays:
        places["ModelCheckpoint"] = {"dirpath": str(folder / "checkpoints")}
    found = _objects(whole)
    for change in (places, changes or {}):
        for name, arguments in change.items():
            found[name].setdefault("init_args", {}).update(arguments)
    return whole


def _objects(tree: Any) -> dict[str, dict[str, Any]]:
    """All mappings with a ``class_path``, by the name of the class."""
    found: dict[str, dict[str, Any]] = {}
    if isinstance(tree, dict):
        if "class_path" in tree:
            found[tree["class_path"].rpartition(".")[2]] = tree
        for value in tree.values():
            found |= _objects(value)
    elif isinstance(tree, list):
        for value in tree:
            found |= _objects(value)
    return found


def fit(folder: Path, whole: Mapping[str, Any], checkpoint: Path | None = None, *, threads: int = 1) -> None:
    """Train by the command line, in this process."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(dict(whole)))
    main(["fit", "--config", str(config), *([f"--ckpt_path={checkpoint}"] if checkpoint else [])])


def context() -> ForkServerContext:
    """Where processes come from: a fork server that has done the slow imports, and no thread."""
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["benchmarks.together_preload"])
    return fork
