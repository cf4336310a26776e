"""Peak memory and step time of techniques together, from what each of them did alone.

Memory. A step of plain training has its peak where forward ends and backward begins: there are parameters P,
optimizer state S, the gradients G of the batch before (Lightning clears them behind forward), what is saved for
backward A, and the rest: temporary tensors and libraries. Where parameters are updated there are P, S, G and temporary
tensors. The peak is the largest of these moments; a technique takes its kinds out of all of them, or makes them
smaller. What the sum for one technique alone is off by (its own buffers, mostly) is measured, and added wherever it is
part of a combination. When the model is made there is P alone, with every technique.

Time. What each technique adds to a step is measured alone, and adds up, but for pairs that were tried together. A disk
works behind the computing: what of its work was hidden is hidden in proportion where the computing takes longer or
shorter, the rest is waited for. While a model grows, the shallower steps take their measured part of all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lightning_efficient.planning.facts import Seconds

__all__ = ["Alone", "Interplay", "Parts", "Prediction", "predict"]


@dataclass(frozen=True)
class Parts:
    """Bytes of plain training, by kind.

    Attributes:
        base: Of the process before the model is made.
        parameters: With buffers.
        gradients: Of one step.
        optimizer_state: All of it.
        saved: For backward, by the largest batch.
        peak: The most that the process had in a step.
        update_peak: The most while parameters were updated.
        checkpoint_peak: The most while a checkpoint was written by the training; 0 for none.
    """

    base: int
    parameters: int
    gradients: int
    optimizer_state: int
    saved: int
    peak: int
    update_peak: int
    checkpoint_peak: int = 0

    @property
    def step_rest(self) -> int:
        """Temporary tensors and libraries where forward ends."""
        return self.peak - self.base - self.parameters - self.gradients - self.optimizer_state - self.saved

    @property
    def update_rest(self) -> int:
        """Likewise where parameters are updated."""
        return self.update_peak - self.base - self.parameters - self.gradients - self.optimizer_state

    @property
    def checkpoint_rest(self) -> int:
        """Likewise where a checkpoint is written."""
        return self.checkpoint_peak - self.base - self.parameters - self.gradients - self.optimizer_state


@dataclass(frozen=True)
class Alone:
    """What one technique did when it was tried alone.

    Attributes:
        key: Of its option.
        slot: See :class:`~.options.Option`.
        seconds: A batch, on average.
        peak: The most that the process had.
        keeps: Of each kind of memory that it frees, the part that stays.
        writes_checkpoints: Whether the training's own way of writing them is gone.
        busy: Seconds of a batch that a disk worked.
        waited: Of these, that training waited for.
        save_seconds: What a checkpoint costs the training; None: what it costs without.
        shares: Parts of the run that are spent in shallower forms, with their time over the full model's.
    """

    key: str
    slot: str
    seconds: Seconds
    peak: int
    keeps: Mapping[str, float] = field(default_factory=dict)
    writes_checkpoints: bool = False
    busy: float = 0.0
    waited: float = 0.0
    save_seconds: float | None = None
    shares: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Interplay:
    """What two techniques do together beyond the sum of what each does alone.

    Attributes:
        keys: Of either, the options that it holds for; it was measured with the first ones.
        seconds: Of a batch, more or less.
        peak: Bytes, likewise.
    """

    keys: tuple[tuple[str, ...], tuple[str, ...]]
    seconds: Seconds
    peak: int

    def holds(self, techniques: Sequence[Alone]) -> bool:
        """Whether both are there."""
        return all(any(one.key in side for one in techniques) for side in self.keys)


@dataclass(frozen=True)
class Prediction:
    """Of one combination.

    Attributes:
        peak: Bytes.
        seconds: A batch, on average over the run, with its part of checkpoints and of waiting for data.
        step: A batch of the full model alone.
    """

    peak: int
    seconds: Seconds
    step: Seconds


def predict(
    parts: Parts,
    plain: Seconds,
    techniques: Sequence[Alone],
    *,
    interplay: Sequence[Interplay] = (),
    waits: Callable[[float], float] = lambda seconds: 0.0,
    save_seconds: float = 0.0,
    save_interval: int = 0,
) -> Prediction:
    """What ``techniques`` together come to.

    Args:
        parts: Memory of plain training.
        plain: Its time of a batch.
        techniques: None: plain training.
        interplay: What is known of pairs.
        waits: Seconds that a step of so many seconds waits for its batch.
        save_seconds: What a checkpoint of plain training costs.
        save_interval: Batches between checkpoints; 0 for none.
    """
    step = replace(parts, checkpoint_peak=0)  # what techniques did alone was without checkpoints of the training's own
    peak = _summed(parts, techniques) + sum(one.peak - _summed(step, [one]) for one in techniques)
    made = parts.base + parts.parameters  # the model is made in memory, whatever becomes of it
    more = [each for each in interplay if each.holds(techniques)]
    peak = max(max(peak, made) + sum(each.peak for each in more), made)
    seconds = sum((each.seconds for each in more), _step(plain, techniques))
    seconds = Seconds(max(seconds.wall, 0.0), max(seconds.cpu, 0.0))
    average = seconds
    for one in techniques:
        if one.shares:
            full = 1.0 - sum(share for share, _ in one.shares)
            average = seconds * (full + sum(share * ratio for share, ratio in one.shares))
    own = [one.save_seconds for one in techniques if one.save_seconds is not None]
    beside = waits(average.wall) + ((own[0] if own else save_seconds) / save_interval if save_interval else 0.0)
    return Prediction(peak, average + Seconds(beside, beside), seconds)


def _summed(parts: Parts, techniques: Sequence[Alone]) -> int:
    """The largest of the moments, by kinds alone."""
    keeps: dict[str, float] = {}
    for one in techniques:
        for kind, part in one.keeps.items():
            keeps[kind] = min(part, keeps.get(kind, 1.0))

    def left(kind: str) -> float:
        return getattr(parts, kind) * keeps.get(kind, 1.0)

    always = parts.base + left("parameters") + left("gradients") + left("optimizer_state")
    moments = [always + left("saved") + parts.step_rest, always + parts.update_rest]
    if parts.checkpoint_peak and not any(one.writes_checkpoints for one in techniques):
        moments.append(always + parts.checkpoint_rest)
    return round(max(moments))


def _step(plain: Seconds, techniques: Sequence[Alone]) -> Seconds:
    others = [one for one in techniques if not one.shares and one.slot != "offload"]
    total = plain
    for one in others:
        total = total + (one.seconds - plain)
    for one in techniques:
        if one.slot == "offload":
            computing = total + (one.seconds - Seconds(one.waited, 0.0) - plain)
            alone = one.seconds.wall - one.waited
            hidden = max(0.0, one.busy - one.waited) * (computing.wall / alone if alone > 0 else 1.0)
            total = computing + Seconds(max(0.0, max(one.busy, one.waited) - hidden), 0.0)
    return total
