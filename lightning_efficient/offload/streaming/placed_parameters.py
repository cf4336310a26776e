"""Which memory is streamed: that of the parameters which are placed, if nobody else lies in it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_efficient.core.torch_internals import storage_key
from lightning_efficient.offload.streaming.guarded import Guarded
from lightning_efficient.offload.streaming.slots import Slot
from lightning_efficient.offload.tiers.mapped_memory import is_of_a_record
from lightning_efficient.offload.tiers.tier import Tier

__all__ = ["find_slots"]


def find_slots(module: nn.Module, placed: Mapping[str, Tier]) -> list[Slot]:
    """The memory of the parameters named in ``placed``, in the order in which ``module`` names them.

    Parameters without numbers have no memory, and are passed over.

    Raises:
        ValueError: If a name is not one of a parameter, or what has it cannot be streamed.
    """
    named = list(module.named_parameters(remove_duplicate=False))
    _check_names(placed, {name for name, _ in named}, {name for name, _ in module.named_buffers()})
    names: dict[int, list[str]] = {}
    for name, parameter in named:
        names.setdefault(id(parameter), []).append(name)
    groups: dict[tuple[int, int], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if any(other in placed for other in names[id(parameter)]):
            _check_kind(name, parameter)
            if parameter.numel():
                groups.setdefault(storage_key(parameter.untyped_storage()), []).append(parameter)
    _check_sharers(module, {key: names[id(group[0])][0] for key, group in groups.items()}, groups)
    slots = []
    for group in groups.values():
        tiers = [(name, placed[name]) for one in group for name in names[id(one)] if name in placed]
        first, tier = tiers[0]
        if other := next((name for name, place in tiers if place is not tier), None):
            raise ValueError(f"placed: '{first}' and '{other}' share memory, so they need the same tier.")
        slots.append(Slot([names[id(one)][0] for one in group], group, tier))
    return slots


def _check_names(placed: Mapping[str, Tier], parameters: set[str], buffers: set[str]) -> None:
    for name in placed:
        if name in buffers:
            raise ValueError(
                f"placed: '{name}' is a buffer. Only parameters are streamed: a buffer may be changed by an operation "
                "that leaves no trace (batch norm's statistics), and that change would be lost. Leave it out."
            )
        if name not in parameters:
            raise ValueError(f"placed: '{name}' is not a parameter of the module. Names are those of named_parameters.")


def _check_kind(name: str, parameter: nn.Parameter) -> None:
    if type(parameter) is Guarded:
        raise ValueError(f"placed: '{name}' is streamed already. Detach the other ParameterStream first.")
    if type(parameter) is not nn.Parameter:
        raise ValueError(
            f"placed: '{name}' is a {type(parameter).__name__}; only plain torch.nn.Parameter can be streamed. "
            "Leave it on the device."
        )
    if parameter.layout is not torch.strided or parameter.is_meta:
        kind = "on the meta device" if parameter.is_meta else f"of layout {parameter.layout}"
        raise ValueError(f"placed: '{name}' is {kind}; only strided tensors with memory can be streamed.")
    if parameter.is_shared() and parameter.device.type == "cpu":
        raise ValueError(
            f"placed: '{name}' is in memory shared between processes (share_memory_), which cannot be given back. "
            "Leave it on the device."
        )
    if not parameter.untyped_storage().resizable() and not is_of_a_record(parameter):
        raise ValueError(
            f"placed: '{name}' lies in memory that torch did not allocate (of numpy, or a mapped file), which cannot "
            "be given back. Replace it by a clone of itself."
        )


def _check_sharers(
    module: nn.Module, first: Mapping[tuple[int, int], str], groups: Mapping[tuple[int, int], list[nn.Parameter]]
) -> None:
    """Nobody else may lie in memory that is given back."""
    ours = {id(one) for group in groups.values() for one in group}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if id(tensor) in ours or type(tensor) not in (nn.Parameter, Tensor):
            continue
        if tensor.layout is torch.strided and (key := storage_key(tensor.untyped_storage())) in groups:
            raise ValueError(
                f"placed: '{first[key]}' shares its memory with '{name}', which is not placed. Place both, or neither."
            )
    for key, group in groups.items():
        covered = sum(one.nbytes for one in group)
        if covered != (held := group[0].untyped_storage().nbytes()):
            raise ValueError(
                f"placed: '{first[key]}' is a view into {held} bytes of memory, and the parameters placed there have "
                f"{covered}; somebody else may use that memory too. Replace it by a clone of itself."
            )
