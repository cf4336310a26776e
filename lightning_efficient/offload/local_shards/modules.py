"""The modules of a model that FSDP2 shards, which gather their parameters for a forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["own_parameters", "sharded_modules", "show_shards"]


def sharded_modules(module: nn.Module) -> Iterator[Any]:
    """Those that ``fully_shard`` was called with: modules of a class that is an ``FSDPModule`` too."""
    return (part for part in module.modules() if _is_sharded(part))


def show_shards(module: nn.Module) -> None:
    """Modules have their shards for parameters, as optimizers know them, also where a forward left them gathered."""
    for part in sharded_modules(module):
        part.reshard()


def own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Its parameters, gathered or not, without those of others below it that are sharded by themselves."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if not _is_sharded(child):
            yield from own_parameters(child)


def _is_sharded(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule  # takes long to import, and who shards has done so

    return isinstance(module, FSDPModule)
