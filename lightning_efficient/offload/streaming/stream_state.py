"""What modules do with all of their parameters at once, where most of these are not in memory.

``state_dict`` gets tensors that are mapped from the tiers, ``load_state_dict`` writes to the tiers, one parameter after
the other, and a change of device or dtype is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_efficient.offload.streaming.instance_methods import InstanceMethod
from lightning_efficient.offload.streaming.residency import Residency
from lightning_efficient.offload.streaming.slots import Slot, record_of

__all__ = ["StreamState"]


class StreamState:
    """Methods of the modules that have streamed parameters.

    Args:
        module: The model.
        slots: By the ``id`` of each streamed parameter.
        residency: Of the slots.
        lock: Held while they are moved.
    """

    def __init__(
        self, module: nn.Module, slots: Mapping[int, Slot], residency: Residency, lock: threading.RLock
    ) -> None:
        self._module = module
        self._slots = slots
        self._residency = residency
        self._lock = lock

    def methods(self) -> list[InstanceMethod]:
        """Those that are put in the place of the modules' own."""
        found = []
        for module in self._module.modules():
            owns = any(id(parameter) in self._slots for parameter in module.parameters(recurse=False))
            if owns:
                found.append(InstanceMethod(module, "_save_to_state_dict", self._save))
                found.append(InstanceMethod(module, "_load_from_state_dict", self._loader(module)))
            if owns or module is self._module:
                found.append(InstanceMethod(module, "_apply", self._applier(module)))
        return found

    def _save(self, original: Callable[..., None], destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if keep_vars:
            raise RuntimeError(
                f"state_dict(keep_vars=True) asks for the parameters of '{prefix[:-1]}' themselves, which are streamed "
                "and not in memory. Use keep_vars=False."
            )
        original(destination, prefix, True)  # so that nobody uses the parameters
        for key, value in destination.items():
            if key.startswith(prefix) and isinstance(value, Tensor):
                slot = self._slots.get(id(value))
                destination[key] = value.detach() if slot is None else self._mapped(slot, value)

    def _mapped(self, slot: Slot, parameter: Tensor) -> Tensor:
        with self._lock:
            if slot.changed and slot.incoming is None:
                self._residency.write(slot)
            self._residency.settle(slot)
            return slot.view_named(parameter, slot.tier.mapped(record_of(slot)))

    def _loader(self, module: nn.Module) -> Callable[..., None]:
        def load(
            original: Callable[..., None], state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any
        ) -> None:
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                if id(parameter) in self._slots and isinstance(state_dict.get(prefix + name), Tensor):
                    self._load(parameter, prefix + name, state_dict, metadata)
            original(state_dict, prefix, metadata, *rest)

        return load

    def _load(self, parameter: nn.Parameter, key: str, state_dict: dict[str, Any], metadata: Mapping[str, Any]) -> None:
        if metadata.get("assign_to_params_buffers") or torch.__future__.get_swap_module_params_on_conversion():
            raise RuntimeError(
                f"Parameter '{key}' is streamed: load_state_dict(assign=True) would put another tensor in its place. "
                "Load with assign=False, and without torch.__future__'s swapping of parameters."
            )
        value = state_dict[key]
        if parameter.dim() == 0 and value.shape == (1,):
            value = value[0]
        if value.shape == parameter.shape:  # else torch reports it, and copies nothing
            with self._lock:
                self._set(parameter, self._slots[id(parameter)], value)
            state_dict[key] = parameter  # which is then copied to itself, that is not at all

    def _set(self, parameter: nn.Parameter, slot: Slot, value: Tensor) -> None:
        if slot.resident or len(slot.parameters) > 1:
            with torch.no_grad():
                parameter.copy_(value)  # fetches it
            self._residency.write(slot)
            return
        data = torch.empty(slot.nbytes, dtype=torch.uint8)
        slot.view_named(parameter, data).copy_(value)
        self._residency.replace(slot, data)

    def _applier(self, module: nn.Module) -> Callable[..., nn.Module]:
        def apply(
            original: Callable[..., nn.Module], function: Callable[[Tensor], Tensor], recurse: bool = True
        ) -> nn.Module:
            below = module.named_parameters() if recurse else module.named_parameters(recurse=False)
            for name, parameter in below:
                if id(parameter) in self._slots and not _leaves_alone(function, parameter):
                    raise RuntimeError(
                        f"Parameter '{name}' is streamed: modules with such parameters cannot be moved to another "
                        "device, dtype or layout. Detach the stream first, or do it before the stream is made."
                    )

            def others(tensor: Tensor) -> Tensor:
                return tensor if id(tensor) in self._slots else function(tensor)

            return original(others, recurse)

        return apply


def _leaves_alone(function: Callable[[Tensor], Tensor], parameter: nn.Parameter) -> bool:
    """Whether ``function`` returns a tensor of this kind as it is; tried with a small one."""
    order = sorted(range(parameter.dim()), key=lambda dim: (parameter.stride(dim), -dim), reverse=True)
    like = torch.empty([min(parameter.shape[dim], 2) for dim in order], dtype=parameter.dtype, device=parameter.device)
    like = like.permute([order.index(dim) for dim in range(parameter.dim())])
    with torch.no_grad():
        return function(like) is like and not (like.is_shared() and like.device.type == "cpu")
