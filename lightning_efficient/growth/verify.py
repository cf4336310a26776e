"""Before the first weight update: does the wide model compute what the narrow one does, on the user's own batch?"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_efficient.growth.engine import GrowingModule
from lightning_efficient.growth.width import WidthError

__all__ = ["WidthCheck"]

UNVERIFIED = (
    "Width growth could not be verified before the first step: the first batch {}. The loss at the switch will show "
    "whether it went well."
)
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Largest relative difference of the outputs by dtype; a wrong rule gives differences near one."""


class WidthCheck:
    """Records the inputs of the first forward, and repeats it with the narrow and with a widened model.

    Args:
        growing: A module that is narrow now.
    """

    def __init__(self, growing: GrowingModule) -> None:
        self._growing = growing
        self._calls: dict[str, tuple[Any, Any]] = {}
        self._handles: list[RemovableHandle] = []

    def listen(self) -> None:
        """From the start of the first batch on."""
        if self._handles or self._growing.twin is None:
            return
        targets = {"": self._growing.module}
        if len(self._growing.twin.children) == 1:
            name = next(iter(self._growing.twin.children))
            targets[name] = self._growing.module.get_submodule(name)
        for path, target in targets.items():
            self._handles.append(target.register_forward_pre_hook(self._recorder(path), with_kwargs=True))

    def _recorder(self, path: str) -> Any:
        def record(module: nn.Module, args: Any, kwargs: Any) -> None:
            # Under DDP, Lightning redirects the root's `forward` to `training_step` for one call.
            redirected = not path and getattr(module.forward, "__func__", None) is not type(module).forward
            if not redirected:
                self._calls.setdefault(path, (_detached(args), _detached(kwargs)))

        return record

    def close(self) -> None:
        """Leave nothing behind."""
        while self._handles:
            self._handles.pop().remove()
        self._calls.clear()

    def verify(self) -> None:
        """Compare; the module is afterwards as it was.

        Raises:
            WidthError: If the outputs differ.
        """
        calls = dict(self._calls)
        self.close()
        if not calls:
            warnings.warn(
                UNVERIFIED.format("called neither the module nor its one network through `forward`"), stacklevel=2
            )
            return
        path = min(calls)  # the root, where it was called
        args, kwargs = calls[path]
        narrow = self._run(path, args, kwargs)
        with self._growing.preview_width():
            wide = self._run(path, args, kwargs)
        if not narrow:
            warnings.warn(UNVERIFIED.format("gave no tensor in a form that can be read"), stacklevel=2)
            return
        worst = max((_difference(a, b) for a, b in zip(narrow, wide, strict=True)), default=0.0)
        dtype = next(p.dtype for p in self._growing.module.parameters() if p.is_floating_point())
        if not worst <= TOLERANCE.get(dtype, 0.1):
            raise WidthError(
                f"The widened model does not compute what the narrow one does: outputs differ by {worst:.1e} of their "
                "size on the first batch. The likely causes: a fused projection whose parts were not recognised (name "
                "it in width.sections, e.g. {'qkv': 3}), a number of heads that does not grow with the width, or a "
                "norm over groups of channels."
            )

    def _run(self, path: str, args: Any, kwargs: Any) -> list[Tensor]:
        module = self._growing.module.get_submodule(path)
        training = [(sub, sub.training) for sub in module.modules()]
        devices = [p.device.index for p in module.parameters() if p.is_cuda][:1]
        try:
            module.eval()
            with torch.no_grad(), torch.random.fork_rng(devices=devices):
                return [tensor.detach().double() for tensor in _tensors(module(*args, **kwargs))]
        finally:
            for sub, mode in training:
                sub.training = mode


def _difference(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    return ((one - other).norm() / one.norm().clamp_min(1e-30)).item()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, tuple | list):
        for entry in value:
            yield from _tensors(entry)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if type(value) in (tuple, list):
        return type(value)(_detached(entry) for entry in value)
    if type(value) is dict:
        return {key: _detached(entry) for key, entry in value.items()}
    return value
