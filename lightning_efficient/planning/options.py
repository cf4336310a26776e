"""The settings of each technique that are worth a try, as what a user would write in YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_efficient.planning.facts import Profile

__all__ = ["Option", "as_mebibytes", "merged", "options_for"]

_STAGING = 8 << 20
_LEARNS = 10  # batches, in a short run; until then RollbackPrecision computes both ways
_MODES = {"32-true": "fp32", "bf16-mixed": "bf16"}  # precisions that RollbackPrecision can take over, as its ``high``


@dataclass(frozen=True)
class Option:
    """One technique at one setting.

    Attributes:
        key: A short name.
        slot: What it stands for in a Trainer; of options with the same slot a run has one.
        says: What it does, in words.
        trainer: What it adds to the configuration: ``callbacks``, ``plugins``, ``strategy``.
        instead: Others of that kind, one after another where the first is refused.
        frees: Kinds of memory that it keeps elsewhere, or does not have at once: ``parameters``, ``gradients``,
            ``optimizer_state``, ``saved``.
        lossy: What changes in the results; empty: no bit.
        warm_up: Batches until it does what it will do.
        saves: Whether it is about checkpoints.
        trial: In place of ``trainer`` in short runs, where what it will do comes later in a long one.
    """

    key: str
    slot: str
    says: str
    trainer: Mapping[str, Any]
    instead: tuple[Mapping[str, Any], ...] = ()
    frees: frozenset[str] = field(default_factory=frozenset)
    lossy: str = ""
    warm_up: int = 3
    saves: bool = False
    trial: Mapping[str, Any] | None = None


def options_for(profile: Profile) -> tuple[list[Option], dict[str, str]]:
    """What is worth a try for this training.

    Returns:
        The options, and why others are not, by slot.
    """
    left_out = {slot: f"the configuration has {name} already" for slot, name in profile.taken.items()}
    if profile.precision not in _MODES:
        left_out.setdefault("precision", f"RollbackPrecision does not take over precision {profile.precision!r}")
    if not profile.save_interval:
        left_out.setdefault("checkpoint", "the configuration saves no checkpoints")
    found = [*_activations(), *_offloads(profile), _low_bits(profile), _growth(), _checkpoints()]
    return [option for option in found if option.slot not in left_out], left_out


def merged(options: Sequence[Option], *, trial: bool = False) -> dict[str, Any]:
    """What goes below ``trainer`` for all of them; ``trial``: in a short run."""
    together: dict[str, Any] = {}
    for option in options:
        for key, value in (option.trial if trial and option.trial else option.trainer).items():
            together[key] = [*together.get(key, []), *value] if isinstance(value, list) else value
    return together


def _object(name: str, **arguments: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"class_path": f"lightning_efficient.{name}"}
    return found | ({"init_args": arguments} if arguments else {})


def _activations() -> list[Option]:
    def option(bits: int | str, key: str, says: str, lossy: str = "") -> Option:
        trainer = {"callbacks+": [_object("ActivationCompressionPlugin", bits=bits)]}
        return Option(key, "activation", says, trainer, frees=frozenset({"saved"}), lossy=lossy)

    return [
        option("lossless", "activations-lossless", "what backward needs is kept once, masks in one bit"),
        option(
            4, "activations-4bit", "what backward needs is kept in 4 bits",
            "gradients get an error that is zero on average",
        ),
    ]  # fmt: skip


def _offloads(profile: Profile) -> list[Option]:
    """On a CPU what is elsewhere is on the disk; for a GPU the host's memory comes first, which is not short."""
    record = profile.largest_parameter * max(1, round(profile.optimizer_state / max(1, profile.gradients)))
    staging = max(_STAGING, 2 * record)
    on_cpu = profile.device == "cpu"
    where = "on the disk" if on_cpu else "in the host's memory, or on the disk"
    least = as_mebibytes(4 * profile.largest_module + 6 * profile.largest_parameter + staging)
    for_state, for_all = {"staging": as_mebibytes(staging)}, {"memory_budget": {"host": least}}

    def ways(*kinds: str, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
        def strategy(tier: str, **more: Any) -> dict[str, Any]:
            return {"strategy": _object("OffloadStrategy", place=dict.fromkeys(kinds, tier), **more)}

        return [*([] if on_cpu else [strategy("host")]), strategy("disk", **arguments)]

    state = ways("optimizer_state", arguments=for_state)
    everything = ways("optimizer_state", "gradient", "parameter", arguments=for_all)
    everything += ways("optimizer_state", "parameter", arguments=for_all)  # where gradients are read
    saved = ways("optimizer_state", "activation", arguments=for_state)
    return [
        Option(
            "offload-state", "offload", f"the optimizer's state is {where}",
            state[0], tuple(state[1:]), frees=frozenset({"optimizer_state"}),
        ),
        Option(
            "offload-all", "offload", f"parameters, gradients and the optimizer's state are {where}",
            everything[0], tuple(everything[1:]), frees=frozenset({"optimizer_state", "gradients", "parameters"}),
        ),
        Option(
            "offload-activations", "offload", f"the optimizer's state and what backward needs are {where}",
            saved[0], tuple(saved[1:]), frees=frozenset({"optimizer_state", "saved"}),
        ),
    ]  # fmt: skip


def as_mebibytes(nbytes: int) -> str:
    """In whole MiB, upwards: as one writes it in a configuration."""
    return f"{-(-nbytes // 2**20)}MiB"


def _low_bits(profile: Profile) -> Option:
    high = _MODES.get(profile.precision, "fp32")
    precision = {} if profile.precision == "32-true" else {"precision": None}

    def trainer(**more: int) -> dict[str, Any]:
        return {"plugins": [_object("RollbackPrecision", low="int8", high=high, **more)], **precision}

    return Option(
        "int8", "precision", "products of matrices are computed in 8 bits where that is faster", trainer(),
        lossy="products are rounded to 8 bits", warm_up=_LEARNS + 4, trial=trainer(pre_learning_steps=_LEARNS),
    )  # fmt: skip


def _growth() -> Option:
    return Option(
        "growth", "growth", "a quarter of the layers for a quarter of the run, half of them for the next",
        {"callbacks+": [_object("GrowAndUnshareCallback")]},
        lossy="another way through training: the loss at the end differs",
    )  # fmt: skip


def _checkpoints() -> Option:
    return Option(
        "async-checkpoints", "checkpoint", "checkpoints are written while training goes on",
        {"callbacks+": [_object("AsyncCheckpointIO")]}, saves=True,
    )  # fmt: skip
