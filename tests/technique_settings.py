"""The registry: each technique with a model, data and arguments, once. Every general test runs over all of them.

A technique joins by adding a :class:`TechniqueSetting` to :data:`SETTINGS`; ``tests/test_every_technique.py``,
``tests/test_two_ranks.py`` and ``tests/test_crash.py`` then hold it to what all of them promise.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_efficient.demos import ByteLanguageModel, StdlibDataModule

__all__ = [
    "CONTEXT",
    "EPOCH",
    "RELATED",
    "SETTINGS",
    "SHARDS",
    "STEPS",
    "TechniqueSetting",
    "demo_data",
    "demo_model",
    "every",
    "every_with",
    "named",
]

STEPS = 16
"""Optimizer steps of a run."""
EPOCH = 10
"""Batches of an epoch."""
BATCH = 4
CONTEXT = 32


def demo_model(cls: type[pl.LightningModule] = ByteLanguageModel, **arguments: Any) -> pl.LightningModule:
    """The same weights each time; all that a seed draws is drawn here."""
    torch.manual_seed(0)
    size = {"layers": 4, "width": 32, "heads": 4, "context": CONTEXT, "learning_rate": 4e-3, "warmup_steps": 2}
    return cls(**(size | arguments))


def demo_data(*, batch_size: int = BATCH, batches: int = EPOCH) -> StdlibDataModule:
    """``batches`` batches an epoch, of single-process runs."""
    return StdlibDataModule(
        context=CONTEXT,
        batch_size=batch_size,
        train_bytes=(CONTEXT + 1) * batch_size * batches,
        validation_bytes=(CONTEXT + 1) * batch_size * 2,
    )


@dataclass(frozen=True)
class TechniqueSetting:
    """One technique, ready to run.

    Attributes:
        name: For the tests' names.
        yaml: What a user writes into the Trainer's part of a config: ``callbacks``, ``plugins`` and ``strategy``, each
            a list of ``{class_path, init_args}`` (``strategy``: one). The objects of :meth:`build` are made of it.
        model: Makes the model; takes another class and other arguments.
        data: Makes the data module; takes ``batch_size`` and ``batches``.
        exact: Whether results are bit-identical to those of plain Lightning.
        lossy: Whether gradients depend on what is saved for backward: close to those of another way to the same model.
        changes_parameters: Whether parameters come and go while it trains.
        switches: The steps at which they do, in a run of :data:`STEPS` steps.
        events: Other steps at which something happens that it says.
        volatile: Prefixes of logged tags that measure time or memory, and so differ from run to run.
        refuses: What it cannot do, and a pattern of the error that says so: ``averaging``, ``compiling``, ``sharding``,
            ``deferring`` (updates that wait for the next forward, in runs that cannot wait).
        frees_gradients: Whether gradients are gone behind the step.
        on_ranks: For several ranks, ``{class_path, init_args}`` of the strategy in place of its own, by the way to
            train there: ``ddp``, ``fsdp2``. By default those of Lightning, if it has no strategy.
    """

    name: str
    yaml: Mapping[str, Any]
    model: Callable[..., pl.LightningModule] = demo_model
    data: Callable[..., pl.LightningDataModule] = demo_data
    exact: bool = False
    lossy: bool = False
    changes_parameters: bool = False
    switches: tuple[int, ...] = ()
    events: tuple[int, ...] = ()
    volatile: tuple[str, ...] = ()
    refuses: Mapping[str, str] = field(default_factory=dict)
    frees_gradients: bool = False
    on_ranks: Mapping[str, Any] = field(default_factory=dict)

    def works_on(self, ranks: str) -> bool:
        """Whether there is a strategy with which it runs on several ranks in this way."""
        refused = ranks == "fsdp2" and "sharding" in self.refuses
        return ranks in self.on_ranks or not ("strategy" in self.yaml or refused)

    def build(self, *, ranks: str | None = None) -> dict[str, Any]:
        """New objects for the Trainer's ``callbacks``, ``plugins`` and ``strategy``, as far as there are any.

        Args:
            ranks: With a strategy for several ranks: ``ddp`` or ``fsdp2``.
        """
        built: dict[str, Any] = {}
        strategy = {"strategy": self.on_ranks.get(ranks, _PLAIN[ranks])} if ranks else {}
        for slot, entry in {**self.yaml, **strategy}.items():
            built[slot] = [_make(spec) for spec in entry] if isinstance(entry, list) else _make(entry)
        return built

    @property
    def technique(self) -> str:
        """The class of its first object."""
        [first, *_] = self.yaml.values()
        return str((first[0] if isinstance(first, list) else first)["class_path"])

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The arguments of its first callback."""
        return self.yaml["callbacks"][0]["init_args"]


def _make(spec: Mapping[str, Any]) -> Any:
    module, _, name = spec["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name)(**spec.get("init_args", {}))


def _growth(name: str, *switches: int, refuses: Mapping[str, str] | None = None, **arguments: Any) -> TechniqueSetting:
    path = "lightning_efficient.growth.GrowAndUnshareCallback"
    return TechniqueSetting(
        name=name,
        yaml={"callbacks": [{"class_path": path, "init_args": arguments}]},
        changes_parameters=True,
        switches=switches,
        refuses={"sharding": "cannot change parameters that ModelParallelStrategy shards", **(refuses or {})},
    )


_WIDTH_REFUSES = {"averaging": "Width growth cannot widen the averaged model of {callback}"}

_ACTIVATIONS = "lightning_efficient.ActivationCompressionPlugin"

SHARDS: dict[str, Any] = {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False}

_PLAIN = {
    "ddp": {"class_path": "lightning.pytorch.strategies.DDPStrategy"},
    "fsdp2": {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy", "init_args": SHARDS},
}

_OFFLOAD = "lightning_efficient.OffloadStrategy"

_OFFLOAD_RANKS = {
    "ddp": ("lightning_efficient.OffloadDDPStrategy", {}),
    "fsdp2": ("lightning_efficient.OffloadFSDP2Strategy", SHARDS),
}


def _offload(
    name: str, *, refuses: Mapping[str, str] | None = None, ranks: tuple[str, ...] = (), **arguments: Any
) -> TechniqueSetting:
    arguments = {"offload_dir": "swap", **arguments}
    on_ranks = {way: _OFFLOAD_RANKS[way] for way in ranks}
    return TechniqueSetting(
        name=name,
        yaml={"strategy": {"class_path": _OFFLOAD, "init_args": arguments}},
        exact=True,
        volatile=("offload/",),
        refuses=refuses or {},
        frees_gradients="schedule" not in arguments,
        on_ranks={w: {"class_path": path, "init_args": arguments | more} for w, (path, more) in on_ranks.items()},
    )


SETTINGS = [
    _growth("stack", 3, 7, mode="stack", stages=[{"depth": 1, "until": 3}, {"depth": 2, "until": 7}, {"depth": 4}]),
    _growth("share", 5, mode="share", unit=2, until=5, lr_scale=0.5, rewarm_steps=2),
    _growth(  # at step 3 the first layer's gradient agrees with the second's to 0.91 and all others' to 0.98 or more
        "share-by-correlation",
        4,
        9,
        mode="share",
        unit=1,
        unshare="by_correlation",
        until={"step": 9, "correlation_below": 0.96},
        correlation_every_n_steps=3,
    ),
    _growth("width", 5, width={"factor": 2, "until": 5}, refuses=_WIDTH_REFUSES),
    _growth(
        "stack-and-width",
        4,
        8,
        mode="stack",
        stages=[{"depth": 2, "until": 4}, {"depth": 4}],
        width={"factor": 2, "until": 8},
        refuses=_WIDTH_REFUSES,
    ),
    _growth(
        "interleave-reset",
        6,
        mode="interleave",
        stages=[{"depth": 3, "until": 6}, {"depth": 4}],
        optimizer_state="reset",
    ),
    TechniqueSetting(
        name="monitor",
        yaml={
            "callbacks": [  # drawing a report takes longer than training
                {"class_path": "lightning_efficient.monitoring.EfficiencyMonitor", "init_args": {"report": False}}
            ]
        },
        exact=True,
        volatile=("efficiency/",),
    ),
    TechniqueSetting(
        name="checkpoint",
        yaml={"callbacks": [{"class_path": "lightning_efficient.AsyncCheckpointIO", "init_args": {"in_memory": 1}}]},
        exact=True,
        volatile=("checkpoint/",),
    ),
    TechniqueSetting(
        name="activations-lossless",
        yaml={"callbacks": [{"class_path": _ACTIVATIONS, "init_args": {"bits": "lossless"}}]},
        exact=True,
        volatile=("activations/",),
    ),
    TechniqueSetting(
        name="activations",
        yaml={
            "callbacks": [
                {
                    "class_path": _ACTIVATIONS,
                    "init_args": {
                        "schedule": {"initial_bits": 8, "final_bits": 3, "begin": 2, "end": 0.75},
                        "overrides": {"head": "raw"},
                    },
                }
            ]
        },
        lossy=True,
        volatile=("activations/encode_ms", "activations/decode_ms"),
    ),
    TechniqueSetting(
        name="activations-adaptive",
        yaml={
            "callbacks": [
                {
                    "class_path": _ACTIVATIONS,
                    "init_args": {
                        "bits": 4,
                        "schedule": {"initial_bits": 8, "final_bits": 3, "begin": 0.05, "end": 0.5},
                        "adaptive": {"every": 4, "target": 0.1},
                        "overrides": {"head": "raw"},
                    },
                }
            ]
        },
        lossy=True,
        refuses={"compiling": "adaptive needs to know which layer saves what"},
        volatile=("activations/encode_ms", "activations/decode_ms"),
    ),
    TechniqueSetting(
        name="activations-budget",
        yaml={
            "callbacks": [
                {
                    "class_path": _ACTIVATIONS,
                    "init_args": {"memory_budget": 0.3, "adaptive": {"every": 5, "target": 0.1}},
                }
            ]
        },
        lossy=True,
        events=(1,),
        refuses={"compiling": "adaptive needs to know which layer saves what"},
        volatile=("activations/encode_ms", "activations/decode_ms"),
    ),
    TechniqueSetting(
        name="precision",
        yaml={
            "plugins": [
                {
                    "class_path": "lightning_efficient.RollbackPrecision",
                    "init_args": {
                        "low": "int8",
                        "high": "fp32",
                        "pre_learning_steps": 4,
                        "return_after": 3,
                        "only_if_faster": False,
                    },
                }
            ]
        },
        lossy=True,
        events=(4,),
    ),
    _offload("offload", place={"optimizer_state": "disk"}, ranks=("ddp", "fsdp2")),
    _offload(
        "offload-everything",
        place=dict.fromkeys(("parameter", "optimizer_state", "activation"), "disk"),
        refuses={
            "compiling the step": "parameters that are elsewhere cannot be fetched within a compiled training step"
        },
    ),
    _offload(
        "offload-under-forward",
        place={"optimizer_state": "disk"},
        schedule="under_forward",
        refuses=dict.fromkeys(
            ("deferring", "compiling the step"),
            "schedule='under_forward' updates parameters in the next forward, which cannot be",
        ),
    ),
]


def named(name: str) -> TechniqueSetting:
    """The setting of this name."""
    return next(setting for setting in SETTINGS if setting.name == name)


RELATED = [
    ["stack", "interleave-reset"],
    ["share", "share-by-correlation"],
    ["width", "stack-and-width"],
    ["activations-lossless", "activations"],
    ["activations-adaptive", "activations-budget"],
    ["offload", "offload-everything", "offload-under-forward"],
]
"""Settings that do nearly the same."""


def every(
    condition: Callable[[TechniqueSetting], Any] = lambda setting: True, *, turn: int | None = None
) -> pytest.MarkDecorator:
    """Run a test with each ``setting`` for which ``condition`` holds.

    Args:
        condition: By default all.
        turn: Of those that do nearly the same, only one: of which it is the turn. For promises that are near to
            others, to which all are held; the tests take turns, so that each setting is in some of them.
    """
    chosen = [setting for setting in SETTINGS if condition(setting)]
    if turn is not None:
        names = {setting.name for setting in chosen}
        for related in RELATED:
            among = [name for name in related if name in names]
            names -= {name for place, name in enumerate(among) if place != turn % len(among)}
        chosen = [setting for setting in chosen if setting.name in names]
    return pytest.mark.parametrize("setting", chosen, ids=lambda setting: setting.name)


def every_with(
    ways: Mapping[str, Mapping[str, Any]], condition: Callable[[TechniqueSetting], Any] = lambda setting: True
) -> pytest.MarkDecorator:
    """Run a test with each ``setting`` for which ``condition`` holds, in some of several ways.

    Not in all of them, which takes half an hour: neighbours in the registry, which are of a kind, share the ways out
    among them, and each has one or, of four and more, two if there are fewer settings of its technique than ways.

    Args:
        ways: Arguments of the test by a name.
        condition: See :func:`every`.
    """
    chosen = [setting for setting in SETTINGS if condition(setting)]
    names = list(ways)
    of_technique = Counter(setting.technique for setting in chosen)
    return pytest.mark.parametrize(
        ("setting", *next(iter(ways.values()))),
        [
            pytest.param(setting, *ways[way].values(), id=f"{way}-{setting.name}")
            for number, setting in enumerate(chosen)
            for place in ((0, len(names) // 2) if len(names) > max(3, of_technique[setting.technique]) else (0,))
            for way in (names[(number + place) % len(names)],)
        ],
    )
