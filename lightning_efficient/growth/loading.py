"""Build the growth of a module, and load a checkpoint of any phase, with or without a Trainer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_efficient.growth.arrangement import LayerArrangement
from lightning_efficient.growth.checks import check_depth_can_change
from lightning_efficient.growth.engine import GrowingModule
from lightning_efficient.growth.form import FORM_KEY
from lightning_efficient.growth.layers import LayerStack, find_stacks
from lightning_efficient.growth.narrow import NarrowTwin, build_narrow
from lightning_efficient.growth.operators import DEPTH_OPERATORS
from lightning_efficient.growth.schedule import Until
from lightning_efficient.growth.settings import WidthSettings

__all__ = ["build_growing", "load_grown"]

M = TypeVar("M", bound=nn.Module)


def build_growing(
    module: nn.Module,
    layers: str | Sequence[str] | None,
    mode: str | None,
    width: WidthSettings | None,
    stacks: Sequence[LayerStack] | None = None,
) -> GrowingModule:
    """Find the layers of ``module`` and, where its width shall grow, put its narrow twin in.

    Args:
        module: The full model.
        layers: See :func:`~lightning_efficient.growth.layers.find_stacks`.
        mode: How layers are arranged; None where only the width grows.
        width: The narrow first phase, if there is one.
        stacks: The layers, where they are known already.
    """
    if stacks is None:
        try:
            stacks = find_stacks(module, layers)
        except ValueError:
            if mode is not None:
                raise
            stacks = []
    for path, sub in module.named_modules():
        if isinstance(sub, AveragedModel) and not any(f"{s.parent}.".startswith(f"{path}.") for s in stacks):
            raise ValueError(
                f"'{path}' is an averaged copy of the model, which growth does not change with it. Use Lightning's "
                "WeightAveraging callback instead, or a pattern for `layers` that matches the copy's layers too."
            )
    wide = LayerArrangement(module, stacks) if stacks and mode is not None else None
    if wide and mode != "share":
        check_depth_can_change(wide)
    elif wide and not any(wide.slots):
        raise ValueError(
            f"The layers {'; '.join(map(str, stacks))} have no parameters of their own: they share them already. If an "
            "earlier fit left the module so, go on with the callback of that fit, or build the module anew."
        )
    if width is None:
        return GrowingModule(module, wide)
    inside = {id(sub) for s in stacks for i in range(len(s)) for sub in module.get_submodule(s.path(i)).modules()}
    order = list(module.named_modules())
    last = max((n for n, (_, sub) in enumerate(order) if id(sub) in inside), default=-1)
    after_layers = [path for path, _ in order[last + 1 :]]
    hyperparameters = dict(getattr(module, "hparams", {}))
    twin = NarrowTwin(
        module,
        build_narrow(module, hyperparameters, width.factor, width.arguments, width.build),
        width.factor,
        after_layers=after_layers,
        readout=width.readout,
        sections=width.sections,
    )
    twin.release()
    return GrowingModule(module, LayerArrangement(module, stacks) if wide else None, twin, wide)


def load_grown(
    module: M | type[M],
    checkpoint: str | Path | Mapping[str, Any],
    *,
    grown: bool = False,
    prefix: str = "",
    build_narrow: Any = None,
    map_location: Any = "cpu",
    weights_only: bool = True,
    **arguments: Any,
) -> M:
    """Load a checkpoint of any phase of a run with ``GrowAndUnshareCallback``, for inference or to go on elsewhere.

    ``load_from_checkpoint`` and ``load_state_dict`` cannot do this for a phase before the last: the full model has
    other parameters than the checkpoint.

    Args:
        module: The full model as you build it, a LightningModule or a plain ``nn.Module``; or its class, which is then
            called with the checkpoint's ``hyper_parameters``.
        checkpoint: Its path, or the loaded dict.
        grown: Grow to the full model at once, as the run would have done at its next switches.
        prefix: What the names in the checkpoint begin with and the module's do not: ``"model."`` for the network that
            the LightningModule holds as ``self.model``.
        build_narrow: A function that builds the narrow model, where ``module`` is a plain one and the checkpoint is
            from before a width growth.
        map_location: See ``torch.load``.
        weights_only: See ``torch.load``.
        **arguments: Override hyperparameters where ``module`` is a class.

    Returns:
        The module, in the form of the checkpoint's phase, or full where ``grown``.

    Raises:
        RuntimeError: From ``load_state_dict``, if names or shapes still differ.
        ValueError: If the checkpoint has nothing below ``prefix``, or the module not the layers of the run.
    """
    if not (isinstance(module, nn.Module) or (isinstance(module, type) and issubclass(module, nn.Module))):
        raise TypeError(f"load_grown takes the module (or its class) first, then the checkpoint; got {module!r} first.")
    saved: Mapping[str, Any] = (
        checkpoint
        if isinstance(checkpoint, Mapping)
        else torch.load(checkpoint, map_location=map_location, weights_only=weights_only)
    )
    full = module if isinstance(module, nn.Module) else _construct(module, saved, arguments)
    weights = {
        name.removeprefix(prefix): value for name, value in saved["state_dict"].items() if name.startswith(prefix)
    }
    if not weights:
        first = next(iter(saved["state_dict"]), "nothing")
        raise ValueError(
            f"No name in the checkpoint begins with prefix={prefix!r}; the first is '{first}'. A LightningModule needs "
            "no prefix, a network that is a part of it the name that it has there, as prefix='model.'."
        )
    state = saved.get(FORM_KEY)
    if not state:
        full.load_state_dict(weights)
        return full

    def path(name: str) -> str:
        return f"{name}.".removeprefix(prefix).removesuffix(".")

    stacks = [LayerStack(path(parent), tuple(keys)) for parent, keys in state["stacks"]]
    _check_fits(full, stacks, prefix)
    width = None
    if state["width"] == "narrow":
        settings = {**state["width_settings"], "build": build_narrow}
        if build_narrow is None and not getattr(full, "hparams", None):
            raise ValueError(
                f"The checkpoint is from before the width grew, and {type(full).__name__} has no saved hyperparameters "
                "to build the narrow model from. Give a function that builds it: build_narrow=lambda: MyNetwork(...)."
            )
        if settings.get("readout"):
            settings["readout"] = path(settings["readout"])
        width = WidthSettings(until=Until(), **settings)
    growing = build_growing(full, None, state["mode"], width, stacks)
    growing.restore(state["leaders"], state["width"])
    full.load_state_dict(weights)
    if grown:
        operator = DEPTH_OPERATORS.get(state["mode"])
        for leaders in state["phases"][state["phase"] + 1 :]:
            source = operator(len(growing.leaders), len(leaders)) if operator else range(len(leaders))
            growing.grow_layers(leaders, source, state="copy")
        if growing.width == "narrow":
            growing.grow_width(state="copy")
    return full


def _check_fits(module: nn.Module, stacks: Sequence[LayerStack], prefix: str) -> None:
    """Whether the module has the layers that the checkpoint's run had.

    Raises:
        ValueError: Naming those that it lacks.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    missing = [stack.path(i) for stack in stacks for i in range(len(stack)) if stack.path(i) not in modules]
    if missing:
        raise ValueError(
            f"The checkpoint is of a model with the repeated layers {'; '.join(map(str, stacks))}, and "
            f"{type(module).__name__} has no '{missing[0]}'. Build the full model of that run; where it is a part of "
            f"the LightningModule, say under which name: prefix='model.' (given: {prefix!r})."
        )


def _construct(cls: type[M], checkpoint: Mapping[str, Any], arguments: Mapping[str, Any]) -> M:
    saved = {k: v for k, v in checkpoint.get("hyper_parameters", {}).items() if not k.startswith("_")}
    accepted = inspect.signature(cls).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
        saved = {k: v for k, v in saved.items() if k in accepted}
    return cls(**{**saved, **arguments})
