"""The modules of a model that FSDP2 shards, and the parameters that each of them gathers for its forward."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_efficient.core.torch_internals import compiled_entry, forward_is_compiled

__all__ = ["any_is_compiled", "own_parameters", "parameters_by_module", "show_shards"]


def parameters_by_module(module: nn.Module) -> dict[nn.Module, list[nn.Parameter]]:
    """For each module that ``fully_shard`` was called with, its parameters without those of others below it."""
    return {part: own_parameters(part) for part in module.modules() if isinstance(part, FSDPModule)}


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module without those of others below it that are sharded; gathered, where they are now."""
    return list(dict.fromkeys(_own(module)))


def show_shards(module: nn.Module) -> None:
    """Modules have their shards for parameters, as optimizers know them, also where a forward left them gathered."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def any_is_compiled(module: nn.Module) -> bool:
    """Whether any part of a module is compiled."""
    return any(compiled_entry(part) is not None or forward_is_compiled(part) for part in module.modules())


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    yield from module.parameters(recurse=False)
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from _own(child)
