"""Width growth by an integer factor that leaves the function of the network unchanged.

The wide model's activations are ``k`` copies of the narrow one's, ``h' = [h; ...; h]`` ([Net2Net 2016], [bert2BERT
2022], [LEMON 2024]). A linear map that reads copies and writes copies becomes blocks ``a_rc W`` with rows of ``a`` that
sum to one; the reader of the copies that does not write copies (the head) takes the share ``p_c`` of each.

Equal shares would leave the copies equal for ever. Here ``a = (1 - t) 1 p' + t I`` with uneven ``p``: its rows sum to
one, and ``p`` is its stationary distribution, ``a' p = p``. Through linear maps and whatever acts channel by channel,
the gradient that reaches copy ``c`` is then ``p_c`` times the narrow one at every depth, and the optimizer's statistics
carry over exactly (up to rounding). A norm over channels shares part of its gradient out evenly instead: behind norms
the statistics of single copies are off by up to a quarter, while their sum over the copies stays exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Widened", "WidthError", "plan_width", "shares"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

MIXING = 0.3
"""``t`` above: how much of each block stays on its own copy. With ``k = 2``: a = [[.6, .4], [.3, .7]]."""


class WidthError(ValueError):
    """A parameter cannot be widened by the rules; the message names it and says what to do."""


def shares(factor: int) -> Tensor:
    """``p``: the share of each copy, uneven so that copies part ways; float64 ``[factor]``."""
    p = torch.arange(factor + 1, 2 * factor + 1, dtype=torch.float64)
    return p / p.sum()


def mixing(factor: int) -> Tensor:
    """``a``: rows sum to one, ``a' p = p``; float64 ``[factor, factor]``."""
    p = shares(factor)
    return (1 - MIXING) * p.expand(factor, factor) + MIXING * torch.eye(factor, dtype=torch.float64)


@dataclass(frozen=True)
class Axis:
    """One axis that grows: where each of its wide entries comes from.

    Attributes:
        dim: Which axis.
        sections: Sizes of the parts of the narrow axis that are copied one by one (query, key and value of a fused
            projection); one part where nothing is fused.
        factor: ``k``.
    """

    dim: int
    sections: tuple[int, ...]
    factor: int

    def source(self) -> Tensor:
        """Index into the narrow axis of each wide entry."""
        starts = [sum(self.sections[:n]) for n in range(len(self.sections))]
        return torch.cat(
            [
                torch.arange(start, start + size).repeat(self.factor)
                for start, size in zip(starts, self.sections, strict=True)
            ]
        )

    def copy_of(self) -> Tensor:
        """Which copy each wide entry belongs to."""
        return torch.cat([torch.arange(self.factor).repeat_interleave(size) for size in self.sections])

    def per_entry(self, values: Tensor, dims: int) -> Tensor:
        """Values given for each copy, laid out along this axis of a tensor of ``dims`` dimensions."""
        shape = [1] * dims
        shape[self.dim] = -1
        return values[self.copy_of()].view(shape)


@dataclass(frozen=True)
class Widened:
    """The operator of one parameter.

    Attributes:
        factor: ``k``.
        written: The axis along which the parameter writes copies, or is one of their entries.
        read: The axis along which it reads copies, if it is a linear map.
        readout: Whether it scales copies for a tied head, which adds them up.
    """

    factor: int
    written: Axis | None = None
    read: Axis | None = None
    readout: bool = False

    @property
    def exact_copy(self) -> bool:
        return self.written is None and self.read is None

    def weight(self, source: Tensor) -> Tensor:
        wide = self._spread(source)
        if self.readout:
            return self._times(wide, self.written, shares(self.factor))
        if self.read is None:
            return wide
        if self.written is None:
            return self._times(wide, self.read, shares(self.factor))
        rows, columns = self.written.copy_of(), self.read.copy_of()
        blocks = mixing(self.factor)[rows][:, columns]
        if self.written.dim > self.read.dim:
            blocks = blocks.t()
        return (wide * blocks.view(*blocks.shape, *[1] * (wide.dim() - 2)).to(wide)).contiguous()

    def moment(self, source: Tensor, order: int) -> Tensor:
        wide = self._spread(source)
        if self.written is None or self.readout or order == 0:
            return wide
        return self._times(wide, self.written, shares(self.factor) ** order)

    def _spread(self, source: Tensor) -> Tensor:
        wide = source.clone()
        for axis in (self.written, self.read):
            if axis is not None:
                wide = wide.index_select(axis.dim, axis.source().to(source.device))
        return wide

    @staticmethod
    def _times(wide: Tensor, axis: Axis | None, values: Tensor) -> Tensor:
        return wide if axis is None else wide * axis.per_entry(values, wide.dim()).to(wide)


FUSED = {"qkv": 3, "c_attn": 3, "in_proj": 3, "query_key_value": 3, "wqkv": 3, "kv": 2, "gate_up_proj": 2, "w12": 2}
"""Projections that usually compute several things at once, each a section of the output axis."""


def plan_width(
    narrow: nn.Module,
    wide: nn.Module,
    factor: int,
    *,
    after_layers: Iterable[str] = (),
    readout: str | None = None,
    sections: Mapping[str, Sequence[int] | int] | None = None,
) -> dict[str, Widened]:
    """Find the operator of each parameter by comparing two models that the same code built.

    Args:
        narrow: The model of the first phase.
        wide: The model of the second, with the same names.
        factor: ``k``; every axis that differs must be this many times as long.
        after_layers: Paths of modules behind the repeated layers, in order; where a tied head's norm is looked for.
        readout: Path of the norm before a head that is tied to the embedding, if it is not the last one behind the
            layers, or the tie is made in ``forward`` and cannot be seen.
        sections: For fused projections, by the last part of their path: the number of equal sections of the output
            axis, or their relative sizes (grouped-query attention: ``[heads, kv_heads, kv_heads]``). Overrides what is
            assumed of names such as ``qkv``.

    Returns:
        The operator of each parameter, by its first name.

    Raises:
        WidthError: Naming the parameter that fits no rule.
    """
    fused = {**FUSED, **(sections or {})}
    narrow_parameters = dict(narrow.named_parameters())
    wide_parameters = dict(wide.named_parameters())
    if list(narrow_parameters) != list(wide_parameters):
        difference = sorted(set(narrow_parameters) ^ set(wide_parameters))[:3]
        hint = (
            " Compile the network inside __init__, so that both are compiled." if "_orig_mod" in str(difference) else ""
        )
        raise WidthError(f"The narrow model has other parameters than the wide one, e.g. {difference}.{hint}")
    uses = _uses(narrow)
    plan: dict[str, Widened] = {}
    tied_head = False
    for name, small in narrow_parameters.items():
        grown = _grown_axes(name, tuple(small.shape), tuple(wide_parameters[name].shape), factor)
        modules = uses[id(small)]
        table = any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for module, _ in modules)
        tied_head |= table and bool(grown) and any(isinstance(module, nn.Linear) for module, _ in modules)
        _check_groups(name, narrow, wide)
        plan[name] = _operator(name, small, grown, modules, factor, fused, table)
    if not any(not operator.exact_copy for operator in plan.values()):
        raise WidthError(
            "The narrow model is as wide as the wide one: none of the changed arguments changes a shape. Name those of "
            "your module that do, with their values in the narrow one, as width={..., 'arguments': {'d_model': 128}}."
        )
    if tied_head or readout is not None:
        norm = readout or _last_norm(narrow, after_layers, plan)
        found = [name for name in plan if name.rpartition(".")[0] == norm]
        if not found or any(narrow_parameters[name].dim() != 1 or plan[name].written is None for name in found):
            raise WidthError(
                f"readout='{norm}' has no scale along the width; name the norm whose output goes to the tied head."
            )
        for name in found:
            plan[name] = Widened(factor, written=plan[name].written, readout=True)
    return plan


def _check_groups(name: str, narrow: nn.Module, wide: nn.Module) -> None:
    """Copies of channels are appended, so that groups of channels stay groups only if they are appended too."""
    path = name.rpartition(".")[0]
    small, large = narrow.get_submodule(path), wide.get_submodule(path)
    for attribute in ("groups", "num_groups"):
        before, after = getattr(small, attribute, 1), getattr(large, attribute, 1)
        channels = (
            getattr(small, "out_channels", getattr(small, "num_channels", 1)),
            getattr(large, "out_channels", getattr(large, "num_channels", 1)),
        )
        if before > 1 and channels[0] != channels[1] and before * channels[1] != after * channels[0]:
            raise WidthError(
                f"'{name}': its {type(small).__name__} has {before} groups in the narrow model and {after} in the wide "
                f"one; its channels grow from {channels[0]} to {channels[1]}, and the groups must grow alike."
            )


def _uses(module: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every place where each parameter is registered."""
    uses: dict[int, list[tuple[nn.Module, str]]] = {}
    for sub in module.modules():
        for name, parameter in sub._parameters.items():
            if parameter is not None:
                uses.setdefault(id(parameter), []).append((sub, name))
    return uses


def _grown_axes(name: str, small: tuple[int, ...], large: tuple[int, ...], factor: int) -> list[int]:
    ok = len(small) == len(large) and all(b in (a, a * factor) for a, b in zip(small, large, strict=True))
    if not ok:
        raise WidthError(
            f"'{name}' has shape {small} in the narrow model and {large} in the wide one; every axis must stay or grow "
            f"by the factor {factor}. Check that the arguments scale together (e.g. heads with width)."
        )
    return [dim for dim, (a, b) in enumerate(zip(small, large, strict=True)) if a != b]


def _operator(
    name: str,
    small: nn.Parameter,
    grown: list[int],
    modules: list[tuple[nn.Module, str]],
    factor: int,
    fused: Mapping[str, Sequence[int] | int],
    table: bool,
) -> Widened:
    if not grown:
        return Widened(factor)
    module, leaf = modules[0]
    if isinstance(module, nn.RNNBase):
        raise WidthError(f"'{name}' belongs to a recurrent layer ({type(module).__name__}); it cannot be widened.")

    def axis(dim: int) -> Axis:
        parts = _sections(name, small.shape[dim], fused) if dim == write_dim else (small.shape[dim],)
        return Axis(dim, parts, factor)

    write_dim, read_dim = _roles(module, leaf, small.dim(), table)
    unexpected = [dim for dim in grown if dim not in (write_dim, read_dim)]
    if unexpected:
        raise WidthError(
            f"'{name}' ({type(module).__name__}, shape {tuple(small.shape)}) grows along axis {unexpected[0]}, and "
            "what that axis means is not known. Widening knows linear, convolution, embedding, norm and attention "
            "modules of torch.nn, and parameters whose last axis is the width."
        )
    return Widened(
        factor,
        written=axis(write_dim) if write_dim in grown else None,
        read=axis(read_dim) if read_dim is not None and read_dim in grown else None,
    )


def _roles(module: nn.Module, leaf: str, dims: int, table: bool) -> tuple[int, int | None]:
    """The axis that writes the width and, for a linear map, the one that reads it."""
    if table or dims == 1:
        return dims - 1, None
    if isinstance(module, TRANSPOSED) or type(module).__name__ == "Conv1D":
        return 1, 0  # stored as [in, out]
    if isinstance(module, (nn.Linear, *CONVOLUTIONS)) or (
        isinstance(module, nn.MultiheadAttention) and leaf.endswith("weight")
    ):
        return 0, 1
    return dims - 1, None


def _sections(name: str, size: int, fused: Mapping[str, Sequence[int] | int]) -> tuple[int, ...]:
    owner, _, leaf = name.rpartition(".")
    part = owner.rpartition(".")[2]
    relative = fused.get(part, fused.get(leaf.removesuffix("_weight").removesuffix("_bias"), 1))
    weights = [1] * relative if isinstance(relative, int) else list(relative)
    unit, rest = divmod(size, sum(weights))
    if rest:
        raise WidthError(f"'{name}' has {size} outputs, which the sections {weights} do not divide.")
    return tuple(unit * weight for weight in weights)


def _last_norm(module: nn.Module, after_layers: Iterable[str], plan: Mapping[str, Widened]) -> str:
    norms = [
        path
        for path in after_layers
        if any(name.rpartition(".")[0] == path and plan[name].written is not None for name in plan)
        and all(p.dim() == 1 for p in module.get_submodule(path).parameters(recurse=False))
        and "norm" in type(module.get_submodule(path)).__name__.lower()
    ]
    if not norms:
        raise WidthError(
            "The head is tied to the embedding, and no norm stands before it to share the copies out. "
            "Name the module whose output goes to the head with `readout`, or untie the head."
        )
    return norms[-1]
