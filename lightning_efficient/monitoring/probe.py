"""The slower measurements of one model in training, taken at the logging interval."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lightning_efficient.core.memory_meter import MemoryMeter
from lightning_efficient.monitoring.memory import nested_tensors, parameter_size, tensor_bytes

__all__ = ["Probe"]


class Probe:
    """Peak memory, and how much of it is parameters, gradients and optimizer state.

    Args:
        device: Where the model trains. Next to a CUDA device the memory of the host process is watched too.

    Attributes:
        needs_samples: Whether :meth:`sample` must be called in every step, or peaks are missed.
        largest: The largest of what :meth:`measure` has seen, of each quantity whose largest value matters.
    """

    def __init__(self, device: torch.device) -> None:
        self._meters = {"memory": MemoryMeter(device)}
        if device.type == "cuda":
            self._meters["host_memory"] = MemoryMeter()
        for meter in self._meters.values():
            meter.start()
        self._sampled: dict[str, float] = {}
        self.largest: dict[str, float] = {}
        self.needs_samples = any(meter.needs_samples for meter in self._meters.values())

    @property
    def notes(self) -> list[str]:
        """How memory is measured, one sentence each."""
        return [f"Memory is the {meter.source}." for meter in self._meters.values()]

    def sample(self) -> None:
        """Look at memory at a moment when much of it is in use."""
        for name, meter in self._meters.items():
            now = meter.sample()
            self._keep_largest(self._sampled, f"used_{name}_bytes", now)
            self._keep_largest(self._sampled, f"used_{name}_growth_bytes", now - meter.start_bytes)

    @property
    def has_gradients(self) -> bool:
        """Whether :meth:`sample_gradients` was called since the last :meth:`measure`."""
        return "gradient_bytes" in self._sampled

    def sample_gradients(self, module: nn.Module) -> None:
        """Look at the gradients of ``module`` while they are alive."""
        held = tensor_bytes(parameter.grad for parameter in module.parameters() if parameter.grad is not None)
        self._keep_largest(self._sampled, "gradient_bytes", held)

    def measure(self, module: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, float]:
        """The values of this moment; gradients and used memory are the largest samples since the last call, if any."""
        size = parameter_size(module)
        state = (tensor for optimizer in optimizers for tensor in nested_tensors(optimizer.state))
        values, self._sampled = self._sampled, {}
        for name, meter in self._meters.items():
            peak = meter.peak_bytes()
            values[f"peak_{name}_bytes"], values[f"peak_{name}_growth_bytes"] = peak, peak - meter.start_bytes
        values["optimizer_state_bytes"] = tensor_bytes(state)
        for name, value in values.items():
            if not name.startswith("used_"):
                self._keep_largest(self.largest, name, value)
        values["parameters"] = size.count
        values["trainable_parameters"] = size.trainable
        values["parameter_bytes"] = size.bytes
        return values

    @staticmethod
    def _keep_largest(values: dict[str, float], name: str, value: float) -> None:
        values[name] = max(value, values.get(name, value))
