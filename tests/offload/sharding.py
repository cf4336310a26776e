"""Runs on two ranks that shard their parameters (FSDP2), and what they have saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_efficient import OffloadFSDP2Strategy
from tests.helpers.fitting import Run, assert_same_tree, fit
from tests.helpers.models import ScheduledModel
from tests.technique_settings import demo_model

__all__ = [
    "AFTER",
    "DISK",
    "RANKS",
    "STEPS",
    "ShardedModel",
    "assert_same_checkpoints",
    "contents",
    "local",
    "ours",
    "plain",
    "run",
    "sharded",
]

RANKS = {"devices": 2, "use_distributed_sampler": False}
DISK = {"optimizer_state": "disk"}
STEPS = 5
AFTER = 2
"""Steps, at which runs are resumed."""


class ShardedModel(ScheduledModel):
    """Sharded by its user, in the way of FSDP2: each block, and what is left; see :func:`sharded`."""

    sharding: Mapping[str, Any] = {}
    make_optimizers: Callable[[nn.Module], Any] | None = None
    is_sharded = False

    def configure_model(self) -> None:
        if self.is_sharded:
            return
        self.is_sharded = True
        arguments = {"mesh": self.device_mesh["data_parallel"], **self.sharding}
        for block in dict.fromkeys(self.model.blocks):
            fully_shard(block, **arguments)
        fully_shard(self.model, **arguments)

    def configure_optimizers(self) -> Any:
        return self.make_optimizers(self) if self.make_optimizers else super().configure_optimizers()


def sharded(
    cls: type[ShardedModel] = ShardedModel,
    *,
    sharding: Mapping[str, Any] | None = None,
    make_optimizers: Callable[[nn.Module], Any] | None = None,
    **arguments: Any,
) -> Any:
    """A model with the same weights each time.

    Args:
        cls: Its class.
        sharding: Further arguments of ``fully_shard``.
        make_optimizers: Called with the module; None: one for all parameters.
        **arguments: See :class:`ScheduledModel`.
    """
    module: Any = demo_model(cls, **arguments)
    module.sharding, module.make_optimizers = sharding or {}, make_optimizers
    return module


def ours(**arguments: Any) -> OffloadFSDP2Strategy:
    return OffloadFSDP2Strategy(**({"offload_dir": "swap", "place": DISK} | arguments))


def plain(**arguments: Any) -> ModelParallelStrategy:
    return ModelParallelStrategy(**({"data_parallel_size": 2, "tensor_parallel_size": 1} | arguments))


def run(root: Path, strategy: Any, *, module: Any = None, **arguments: Any) -> Run:
    module = sharded() if module is None else module
    defaults = {"max_steps": STEPS, "checkpoints": (AFTER, STEPS), "root": root, **RANKS}
    return fit(None, module=module, strategy=strategy, **(defaults | arguments))


def local(tree: Any) -> Any:
    """A tree with this rank's parts in place of tensors that are spread over the ranks."""
    if isinstance(tree, dict):
        return {key: local(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [local(value) for value in tree]
    return tree.to_local().detach().clone() if isinstance(tree, DTensor) else tree


def assert_same_checkpoints(one: Run, other: Run, step: int, where: str) -> None:
    """What both runs have saved at this step, each a folder or a file, is the same; one rank reads it."""
    torch.distributed.barrier()  # rank zero writes last
    if torch.distributed.get_rank() == 0:
        assert_same_tree(contents(one.checkpoints[step]), contents(other.checkpoints[step]), where)


def contents(path: Path) -> dict[str, Any]:
    if path.is_file():
        loaded = torch.load(path, weights_only=True)
        return {key: loaded[key] for key in ("state_dict", "optimizer_states", "lr_schedulers")}
    reader = FileSystemReader(path)
    found: dict[str, Any] = {}
    for name, kind in reader.read_metadata().state_dict_metadata.items():
        found[name] = torch.empty(kind.size, dtype=kind.properties.dtype) if hasattr(kind, "size") else None
    load(found, storage_reader=reader, no_dist=True)
    found["lr_schedulers"] = torch.load(path / "meta.pt", weights_only=True)["lr_schedulers"]
    return found
