"""Runs on two ranks that divide optimizer state, and what they have saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_efficient import OffloadDDPStrategy
from tests.helpers.fitting import Run, assert_same_tree, fit

__all__ = ["DDP", "DISK", "STEPS", "assert_same_checkpoints", "ours", "run", "saved"]

DDP = {"devices": 2, "use_distributed_sampler": False}
DISK = {"optimizer_state": "disk"}
STEPS = 5


def ours(**arguments: Any) -> OffloadDDPStrategy:
    return OffloadDDPStrategy(**({"offload_dir": "swap", "place": DISK} | arguments))


def run(root: Path, strategy: Any, **arguments: Any) -> Run:
    return fit(None, strategy=strategy, root=root, **{"checkpoints": {}, "max_steps": STEPS, **DDP, **arguments})


def assert_same_checkpoints(one: Run, other: Run, where: str, *steps: int) -> None:
    """What both runs have saved at these steps, or at all, is the same; one rank reads it."""
    torch.distributed.barrier()  # rank zero writes
    if torch.distributed.get_rank() == 0:
        assert_same_tree(saved(one, *steps), saved(other, *steps), where)


def saved(finished: Run, *steps: int) -> dict[int, Any]:
    """What is in the checkpoints of these steps; without any: of all."""
    keys = ("state_dict", "optimizer_states", "lr_schedulers")
    paths = {step: path for step, path in finished.checkpoints.items() if not steps or step in steps}
    loaded = {step: torch.load(path, weights_only=True) for step, path in paths.items()}
    return {step: {key: checkpoint[key] for key in keys} for step, checkpoint in loaded.items()}
