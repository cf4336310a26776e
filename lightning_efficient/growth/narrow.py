"""The narrow twin of a module: built by the user's own constructor, and swapped in and out of the module in place."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_efficient.growth.operators import Transfer, hollow, like
from lightning_efficient.growth.width import Widened, WidthError, plan_width

__all__ = ["SCALED_ARGUMENTS", "NarrowTwin", "build_narrow", "narrow_arguments"]

SCALED_ARGUMENTS = frozenset({
    "width", "dim", "d_model", "model_dim", "embed_dim", "embedding_dim", "hidden_size", "hidden_dim", "n_embd",
    "n_embed", "channels", "base_channels", "hidden_channels", "heads", "n_heads", "num_heads", "n_head",
    "num_attention_heads", "kv_heads", "n_kv_heads", "num_kv_heads", "num_key_value_heads", "d_ff", "ff_dim", "ffn_dim",
    "mlp_dim", "intermediate_size", "dim_feedforward",
})  # fmt: skip
"""Constructor arguments that say how wide a network is, as the field calls them."""


def narrow_arguments(hyperparameters: Mapping[str, Any], factor: int) -> dict[str, int]:
    """The arguments of the narrow model, where the user gave none: every known one, divided by the factor.

    Raises:
        WidthError: If none is known, or one cannot be divided.
    """
    found = {
        name: value
        for name, value in hyperparameters.items()
        if name in SCALED_ARGUMENTS and isinstance(value, int) and not isinstance(value, bool)
    }
    if not found:
        numbers = {k: v // factor for k, v in hyperparameters.items() if type(v) is int and v >= factor}
        example = dict(list(numbers.items())[:1]) or {"d_model": 64}
        save = "" if hyperparameters else "Call save_hyperparameters() in __init__, or s"
        raise WidthError(
            "Width growth builds the narrow model with your module's own constructor, and none of its saved "
            f"hyperparameters {sorted(hyperparameters)} is known to be a width. {save or 'S'}ay what the narrow model "
            f"is built with, for example width={{'factor': {factor}, 'arguments': {example}}}."
        )
    odd = {name: value for name, value in found.items() if value % factor}
    if odd:
        raise WidthError(
            f"The hyperparameters {odd} cannot be divided by factor={factor}. Give the narrow values yourself with "
            "width={'arguments': {...}}, or choose another factor."
        )
    return {name: value // factor for name, value in found.items()}


def build_narrow(
    module: nn.Module,
    hyperparameters: Mapping[str, Any],
    factor: int,
    arguments: Mapping[str, Any] | None,
    build: str | Callable[[], nn.Module] | None,
) -> nn.Module:
    """A narrow model of the same class; the global random stream is left as it was.

    Args:
        module: The wide one.
        hyperparameters: What its constructor was called with.
        factor: ``k``.
        arguments: Constructor arguments that differ. None: found by :func:`narrow_arguments`.
        build: A function without arguments that makes the narrow model, or its import path; then nothing else is used.
    """
    with torch.random.fork_rng(devices=[]):
        if build is not None:
            if isinstance(build, str):
                owner, _, attribute = build.rpartition(".")
                build = getattr(importlib.import_module(owner), attribute)
            if not callable(build):
                raise WidthError(f"width.build={build!r} is not a function that makes the narrow model.")
            return build()
        changed = dict(arguments) if arguments else narrow_arguments(hyperparameters, factor)
        accepted = inspect.signature(type(module)).parameters
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
            unknown = sorted(set(changed) - set(accepted))
            if unknown:
                raise WidthError(
                    f"width.arguments names {unknown}, but {type(module).__name__} accepts {list(accepted)}."
                )
            hyperparameters = {k: v for k, v in hyperparameters.items() if k in accepted}
        return type(module)(**{**{k: v for k, v in hyperparameters.items() if not k.startswith("_")}, **changed})


class NarrowTwin:
    """Holds the parts of ``module`` that differ in width, narrow and wide; one set is in the module at a time.

    The set that is not in the module takes no memory for its parameters. The module object itself, its metrics and
    whatever has no width stay where they are.

    Args:
        module: The wide module; it becomes narrow.
        narrow: The narrow one; its children move into ``module``.
        factor: ``k``.
        options: ``readout`` and ``sections`` of :func:`~lightning_efficient.growth.width.plan_width`.
        after_layers: Paths of the modules behind the repeated layers.
    """

    def __init__(
        self, module: nn.Module, narrow: nn.Module, factor: int, *, after_layers: list[str], **options: Any
    ) -> None:
        self.module = module
        self.factor = factor
        self.plan: dict[str, Widened] = plan_width(narrow, module, factor, after_layers=after_layers, **options)
        changed = {id(narrow.get_parameter(name)) for name, operator in self.plan.items() if not operator.exact_copy}
        for name, parameter in module.named_parameters():
            narrow.get_parameter(name).requires_grad_(parameter.requires_grad)
        self.children = {
            name: {"narrow": child, "wide": module._modules[name]}
            for name, child in narrow._modules.items()
            if child is not None and any(id(parameter) in changed for parameter in child.parameters())
        }
        self.parameters = {
            name: {"narrow": parameter, "wide": module._parameters[name]}
            for name, parameter in narrow._parameters.items()
            if parameter is not None and id(parameter) in changed
        }
        self.attributes = {
            name: {"narrow": value, "wide": module.__dict__[name]}
            for name, value in narrow.__dict__.items()
            if not name.startswith("_")
            and isinstance(value, int | float | str | tuple)
            and name in module.__dict__
            and module.__dict__[name] != value
        }
        self.now = "wide"
        self.show("narrow")

    def show(self, which: str) -> dict[str, nn.Parameter]:
        """Put the narrow or the wide parts into the module, with parameters that hold no values yet if they were out.

        Returns:
            The parameters that were in the module, by name.
        """
        before = dict(self.module.named_parameters())
        if which == self.now:
            return before
        training = {path: sub.training for path, sub in self.module.named_modules()}
        buffers = dict(self.module.named_buffers())
        for name, pair in self.children.items():
            self.module._modules[name] = pair[which]
        for name, parameters in self.parameters.items():
            self.module._parameters[name] = parameters[which]
        for name, attributes in self.attributes.items():
            setattr(self.module, name, attributes[which])
        self.now = which
        for path, sub in self.module.named_modules():
            sub.training = training.get(path, sub.training)
        if which == "wide":
            self._carry_buffers(buffers)
        return before

    @torch.no_grad()
    def grow(self, before: Mapping[str, nn.Parameter]) -> list[Transfer]:
        """Fill the wide parameters from the narrow ones.

        Args:
            before: From :meth:`show`.
        """
        made: dict[int, nn.Parameter] = {}
        transfers: list[Transfer] = []
        for name, parameter in list(self.module.named_parameters()):
            source, operator = before[name], self.plan[name]
            if parameter is source:
                continue
            target = like(parameter, operator.weight(source.detach()))
            target.requires_grad_(source.requires_grad)
            made[id(parameter)] = target
            transfers.append(Transfer(source, target, operator))
        self._replace(self.module, made)
        return transfers

    @torch.no_grad()
    def empty(self) -> None:
        """Give the parts in the module zeros, to be loaded over."""
        made = {
            id(p): like(p, torch.zeros(p.shape, dtype=p.dtype, device=p.device))
            for p in self.module.parameters()
            if p.numel() > 1 and not any(p.stride())
        }
        self._replace(self.module, made)

    def release(self) -> None:
        """Let go of the memory of the parameters that are not in the module."""
        other = "wide" if self.now == "narrow" else "narrow"
        inside = {id(p) for p in self.module.parameters()}
        made: dict[int, nn.Parameter] = {}
        holder = nn.Module()
        for name, pair in self.children.items():
            holder._modules[name] = pair[other]
        for name, parameters in self.parameters.items():
            holder._parameters[name] = parameters[other]
        for parameter in holder.parameters():
            if id(parameter) not in inside:
                made[id(parameter)] = hollow(parameter)
        self._replace(holder, made)
        for name in self.parameters:
            self.parameters[name][other] = holder._parameters[name]

    @staticmethod
    def _replace(root: nn.Module, made: Mapping[int, nn.Parameter]) -> None:
        for sub in root.modules():
            for name, parameter in sub._parameters.items():
                if parameter is not None and id(parameter) in made:
                    sub._parameters[name] = made[id(parameter)]

    @torch.no_grad()
    def _carry_buffers(self, before: Mapping[str, Tensor]) -> None:
        for path, sub in self.module.named_modules():
            for name, buffer in sub._buffers.items():
                source = before.get(f"{path}.{name}" if path else name)
                if buffer is None or source is None or buffer is source:
                    continue
                if buffer.device != source.device or buffer.dtype != source.dtype:
                    buffer = sub._buffers[name] = buffer.to(source.device, source.dtype)
                if name in sub._non_persistent_buffers_set:
                    continue
                value = source
                for dim, (small, large) in enumerate(zip(source.shape, buffer.shape, strict=False)):
                    if large == small * self.factor != small:
                        value = torch.cat([value] * self.factor, dim)
                buffer.copy_(value)
