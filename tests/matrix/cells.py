"""The cells: each technique alone, each pair, and all of them, on every way to train."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_efficient import RollbackPrecision
from lightning_efficient.demos import ByteLanguageModel
from tests.helpers.models import CompiledModel, ShardedModel
from tests.technique_settings import TechniqueSetting, demo_model, named

__all__ = ["ALL", "CELLS", "GROWTH", "OTHERS", "PLACES", "PRECISIONS", "STEPS", "Cell", "combinations", "together"]

STEPS = 10
"""Optimizer steps of a run, of a model with two layers."""
GROWTH = ("stack", "share")
OTHERS = ("checkpoint", "activations", "offload", "precision")
PLACES: Mapping[str, str | None] = {"one device": None, "DDP": "ddp", "FSDP2": "fsdp2"}
"""By name, the way to train on several ranks in the registry."""
PRECISIONS = ("fp32", "bf16-mixed")
_SLOTS = ("callbacks", "plugins", "strategy")


def combinations() -> list[tuple[str, ...]]:
    """Settings of the registry that are in one Trainer; the modes of growth are no pair."""
    alone = [(name,) for name in GROWTH + OTHERS]
    pairs = [pair for pair in itertools.combinations(GROWTH + OTHERS, 2) if pair != GROWTH]
    return [*alone, *pairs, OTHERS, *ALL]


ALL = [(mode, *OTHERS) for mode in GROWTH]
"""All five techniques."""


@dataclass(frozen=True)
class Cell:
    """One of the matrix.

    Attributes:
        techniques: Names of settings; none: plain Lightning.
        place: One of :data:`PLACES`.
        compiled: Whether the network is: as a whole, or block by block where blocks are sharded.
        precision: One of :data:`PRECISIONS`.
    """

    techniques: tuple[str, ...]
    place: str = "one device"
    compiled: bool = False
    precision: str = "fp32"

    @property
    def name(self) -> str:
        """What it is recorded under."""
        way = "compiled" if self.compiled else "eager"
        return f"{' + '.join(self.techniques) or 'plain'} | {self.place} | {way} | {self.precision}"

    @property
    def setting(self) -> TechniqueSetting:
        """All techniques as one."""
        return together(self.techniques)

    @property
    def reference(self) -> Cell:
        """The same with nothing but growth, if there is any: what the others may change little, or not at all."""
        return replace(self, techniques=tuple(name for name in self.techniques if name in GROWTH))

    def build(self) -> dict[str, Any]:
        """New objects for the Trainer's ``callbacks``, ``plugins`` and ``strategy``."""
        built = self.setting.build(ranks=PLACES[self.place])
        if self.precision == "fp32":
            return built
        inner = MixedPrecision("bf16-mixed", "cpu")
        if "precision" not in self.techniques:
            return built | {"plugins": [inner]}
        [spec] = self.setting.yaml["plugins"]
        return built | {"plugins": [RollbackPrecision(**spec["init_args"] | {"high": "bf16"}, inner=inner)]}

    def model(self, backend: str) -> pl.LightningModule:
        """The same weights each time.

        Args:
            backend: To compile with, if it is.
        """
        if self.place == "FSDP2":
            return demo_model(ShardedModel, layers=2, backend=backend if self.compiled else None)
        if self.compiled:
            return demo_model(CompiledModel, layers=2, backend=backend)
        return demo_model(ByteLanguageModel, layers=2)


CELLS = [
    Cell(techniques, place, compiled, precision)
    for place in PLACES
    for compiled in (False, True)
    for precision in PRECISIONS
    for techniques in combinations()
]


def together(techniques: tuple[str, ...]) -> TechniqueSetting:
    """Settings in one Trainer, as one; growth is for a model of two layers."""
    settings = [_GROWTH.get(name) or named(name) for name in techniques]
    yaml: dict[str, Any] = {}
    for setting in settings:
        for slot in _SLOTS[:2]:
            if slot in setting.yaml:
                yaml[slot] = [*yaml.get(slot, []), *setting.yaml[slot]]
        yaml |= {"strategy": setting.yaml["strategy"]} if "strategy" in setting.yaml else {}
    return TechniqueSetting(
        name=" + ".join(techniques),
        yaml=yaml,
        exact=all(setting.exact for setting in settings),
        lossy=any(setting.lossy for setting in settings),
        changes_parameters=any(setting.changes_parameters for setting in settings),
        switches=tuple(step for setting in settings for step in setting.switches),
        events=tuple(step for setting in settings for step in setting.events),
        volatile=tuple(prefix for setting in settings for prefix in setting.volatile),
        on_ranks={way: spec for setting in settings for way, spec in setting.on_ranks.items()},
    )


def _for_two_layers(setting: TechniqueSetting, switch: int, **arguments: Any) -> TechniqueSetting:
    [spec] = setting.yaml["callbacks"]
    return replace(setting, yaml={"callbacks": [spec | {"init_args": arguments}]}, switches=(switch,))


_GROWTH = {
    "stack": _for_two_layers(named("stack"), 4, mode="stack", stages=[{"depth": 1, "until": 4}, {"depth": 2}]),
    "share": _for_two_layers(named("share"), 4, mode="share", unit=1, until=4, lr_scale=0.5, rewarm_steps=2),
}
