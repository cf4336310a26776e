"""A step of the user's own optimizer for some of its parameters, and whether that is the same as one step for all."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_efficient.core.torch_internals import global_step_hooks, unhooked_step
from lightning_efficient.offload.updates.layout import is_bulk

__all__ = [
    "SubsetStepError",
    "check_parameter_by_parameter",
    "for_host_step",
    "on_host",
    "state_bytes",
    "state_bytes_per_element",
    "step_alone",
    "step_subset",
    "tell_after",
    "tell_before",
    "twin",
    "updates_by_element",
]


_FUSED_ON_HOST = (torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


class SubsetStepError(ValueError):
    """The optimizer cannot be stepped for some of its parameters alone."""


def step_subset(
    optimizer: Optimizer, group: Mapping[str, Any], shown: Sequence[Tensor], changed: Sequence[Tensor] = ()
) -> None:
    """Let ``optimizer`` update ``shown``, whose state and gradients it finds as always.

    Hooks that are registered for all optimizers are called, as before and after each update; those of this optimizer
    are not, for they expect one call a step.

    Args:
        optimizer: Of any class that updates parameter by parameter.
        group: The hyperparameters, as in ``param_groups``.
        shown: What it takes for the parameters of the group.
        changed: The model's parameters that will change, where they are not what is shown.

    Raises:
        SubsetStepError: If the step changed hyperparameters: the optimizer keeps a state in its groups.
    """
    tell_before(optimizer, group, changed or shown)
    step_alone(optimizer, group, shown)
    tell_after(optimizer, group, changed or shown)


def tell_before(optimizer: Optimizer, group: Mapping[str, Any], changed: Sequence[Tensor]) -> None:
    """Call the hooks of all optimizers that come before a step, for these parameters of ``group``."""
    for hook in global_step_hooks()[0]:
        _with_group(optimizer, {**group, "params": list(changed)}, hook, optimizer, (optimizer,), {})


def tell_after(optimizer: Optimizer, group: Mapping[str, Any], changed: Sequence[Tensor]) -> None:
    """Call the hooks of all optimizers that come behind a step."""
    for hook in global_step_hooks()[1]:
        _with_group(optimizer, {**group, "params": list(changed)}, hook, optimizer, (optimizer,), {})


def step_alone(optimizer: Optimizer, group: Mapping[str, Any], shown: Sequence[Tensor]) -> None:
    """:func:`step_subset` without hooks.

    Raises:
        SubsetStepError: Likewise.
    """
    alone = {**group, "params": list(shown)}
    _with_group(optimizer, alone, unhooked_step, optimizer)
    touched = [key for key, value in alone.items() if key != "params" and value is not group.get(key)]
    if touched:
        raise SubsetStepError(
            f"{type(optimizer).__name__} changes {touched} of its parameter groups in each step, and so cannot be "
            "stepped for a part of its parameters at a time, which offloading needs. Use an optimizer that keeps its "
            "state for each parameter, such as AdamW, SGD, Adafactor or Muon."
        )


def _with_group(optimizer: Optimizer, group: dict[str, Any], call: Callable[..., Any], *args: Any) -> None:
    """Call while ``group`` is all that the optimizer has."""
    groups = optimizer.param_groups
    optimizer.param_groups = [group]
    try:
        call(*args)
    finally:
        optimizer.param_groups = groups


def on_host(group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters for parameters of the host: the same step, outside of a CUDA graph, which it cannot be in."""
    there = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in group.items()}
    if there.get("capturable"):
        there["capturable"] = False
        if "foreach" in there:  # takes tensors for numbers only if it is capturable
            there["foreach"] = False
    return there


def for_host_step(
    optimizer: Optimizer, group: Mapping[str, Any], shown: Sequence[Tensor], device: torch.device
) -> dict[str, Any]:
    """The hyperparameters for a step on the host that is taken for another device.

    Where the user leaves open how it is computed, by torch's fused kernels: they read and write each tensor once, at
    the speed of memory. What is computed for the host's own memory is left as it is, bit for bit; for another device
    the host's kernels round in their own way anyway.

    Args:
        optimizer: Of the user.
        group: The hyperparameters of the parameters.
        shown: What is stepped, with its gradients.
        device: Of the parameters.
    """
    there = on_host(group)
    left_open = all(key in group and group[key] is None for key in ("fused", "foreach"))
    dense = all(t.is_floating_point() and (t.grad is None or t.grad.layout == torch.strided) for t in shown)
    if device.type != "cpu" and left_open and type(optimizer) in _FUSED_ON_HOST and dense:
        there["fused"] = not group.get("differentiable")
    return there


def check_parameter_by_parameter(optimizer: Optimizer) -> None:
    """Try on small stand-ins whether steps for single parameters are, bit for bit, one step for all.

    Raises:
        SubsetStepError: If they are not, or if it wants a closure.
    """
    for group in map(on_host, optimizer.param_groups):
        for dimensions in sorted({parameter.dim() for parameter in group["params"]}):
            together, apart = (_stand_ins(group, dimensions) for _ in range(2))
            probe, single = twin(optimizer, together), twin(optimizer, apart)
            for turn in range(2):
                for index, parameter in enumerate((*together, *apart)):
                    generator = torch.Generator().manual_seed(100 * turn + index % len(together))
                    gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                    parameter.grad = _of_its_kind(optimizer, gradient)
                try:
                    step_alone(probe, group, together)
                    for parameter in apart:
                        step_alone(single, group, [parameter])
                except TypeError as error:
                    raise SubsetStepError(
                        f"{type(optimizer).__name__} cannot be stepped without a closure ({error}), which offloading "
                        "needs. Use an optimizer such as AdamW, SGD, Adafactor or Muon."
                    ) from error
            if not _moves(optimizer, group, dimensions):
                raise SubsetStepError(
                    f"{type(optimizer).__name__} did not change the parameters of a group that it was given for a "
                    "step; it may be a wrapper that steps another optimizer, which has groups of its own. Use the "
                    "optimizer inside, or another one such as AdamW, SGD, Adafactor or Muon."
                )
            if not all(torch.equal(one, other) for one, other in zip(together, apart, strict=True)):
                raise SubsetStepError(
                    f"{type(optimizer).__name__} does not update parameter by parameter: the update of one depends on "
                    "others, so that it cannot be offloaded. Use an optimizer such as AdamW, SGD, Adafactor or Muon."
                )


def _moves(optimizer: Optimizer, group: Mapping[str, Any], dimensions: int) -> bool:
    """Whether a step changes what it is given; with a rate that can be seen, for a warm-up may begin with none."""
    changed, before = (_stand_ins(group, dimensions)[0] for _ in range(2))
    changed.grad = _of_its_kind(optimizer, torch.ones_like(changed))
    step_alone(twin(optimizer, [changed]), {**group, "lr": 0.1}, [changed])
    return not torch.equal(changed, before)


def updates_by_element(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether what a step does to an element depends on that element alone; tried on small stand-ins.

    Then whoever has a part of a parameter can step that, without the rest of it.
    """
    for dimensions in sorted({parameter.dim() for parameter in group["params"]} - {0}):
        whole = _stand_ins(group, dimensions, size={1: 512, 2: 32, 3: 16}.get(dimensions, 8))[0]
        parts: list[Tensor] = [nn.Parameter(part.detach().clone()) for part in whole.chunk(2)]
        generator = torch.Generator().manual_seed(1)
        gradient = torch.randn(whole.shape, generator=generator).to(whole.dtype)
        for parameter, own in zip((whole, *parts), (gradient, *gradient.chunk(2)), strict=True):
            parameter.grad = _of_its_kind(optimizer, own.clone())
        for stepped in ([whole], parts):
            step_alone(twin(optimizer, stepped), {**on_host(group), "lr": 0.1}, stepped)
        if not torch.equal(whole, torch.cat(parts)):
            return False
    return True


def state_bytes_per_element(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor) -> float:
    """About how many bytes of state the optimizer keeps for each element of ``parameter``, its counters left out."""
    elements, nbytes = _measured(optimizer, group, parameter, size=16)
    return nbytes / elements


def state_bytes(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor) -> int:
    """How many bytes of state the optimizer keeps for ``parameter``, its counters left out.

    Found with small stand-ins of two sizes: most states grow with the elements of a parameter, factored ones with the
    sides of a matrix (of which this is the least, as if it were square).
    """
    (few, less), (many, more) = (_measured(optimizer, group, parameter, size) for size in (4, 16))
    if not less or many == few:
        return more
    exponent = math.log(more / less) / math.log(many / few)
    return int(more * (parameter.numel() / many) ** exponent)


def _measured(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor, size: int) -> tuple[int, int]:
    """The elements of a stand-in whose sides are ``size``, and the bytes of its state."""
    stand_in = _stand_ins({"params": [parameter]}, parameter.dim(), size)[0]
    stand_in.grad = _of_its_kind(optimizer, torch.ones_like(stand_in))
    probe = twin(optimizer, [stand_in])
    step_alone(probe, on_host(group), [stand_in])
    return stand_in.numel(), sum(v.numel() * v.element_size() for v in probe.state[stand_in].values() if is_bulk(v))


def _of_its_kind(optimizer: Optimizer, gradient: Tensor) -> Tensor:
    """A gradient in the layout that the optimizer takes."""
    return gradient.to_sparse(1) if isinstance(optimizer, torch.optim.SparseAdam) and gradient.dim() else gradient


def twin(optimizer: Optimizer, stand_ins: Sequence[Tensor] = ()) -> Optimizer:
    """The same optimizer with another state, which may be stepped while somebody else uses the first.

    Args:
        optimizer: Which is not changed.
        stand_ins: What the twin will step, for the first time. They have the state that such an optimizer gives its
            parameters when it is made, as torch's Adagrad does; most make it in their first step.
    """
    probe = object.__new__(type(optimizer))  # copying would leave out what it does not pickle
    probe.__dict__.update(optimizer.__dict__)
    probe.state = defaultdict(dict)
    if stand_ins and optimizer.state:
        with contextlib.suppress(Exception):  # made with other arguments: its step says what it misses
            probe.state.update(type(optimizer)([*stand_ins], **optimizer.defaults).state)
    return probe


def _stand_ins(group: Mapping[str, Any], dimensions: int, size: int = 4) -> list[nn.Parameter]:
    """Three small parameters of different values, of the dtype that those of the group with these dimensions have."""
    dtype = next(parameter.dtype for parameter in group["params"] if parameter.dim() == dimensions)
    generator = torch.Generator().manual_seed(1)
    shape = (size,) * dimensions
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for _ in range(3)]
