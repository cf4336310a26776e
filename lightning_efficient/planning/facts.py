"""What short runs of the user's own configuration measured: plain numbers that pass between processes as JSON."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_efficient.planning.curves import Curve

__all__ = ["Layer", "Profile", "Sample", "Seconds", "ShortRun"]


@dataclass(frozen=True)
class Seconds:
    """Time of one batch.

    Attributes:
        wall: As a clock on the wall shows it.
        cpu: Of all threads of the process.
    """

    wall: float
    cpu: float

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall - other.wall, self.cpu - other.cpu)

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(self.wall * factor, self.cpu * factor)


@dataclass(frozen=True)
class Sample:
    """One training batch, from its start to that of the next.

    Attributes:
        size: Elements of all tensors in the batch.
        wall: Seconds.
        cpu: Seconds of the process.
        forward: Seconds of it until backward begins.
        backward: Seconds of backward.
        update: Seconds from then to the end of the batch: clipping and the optimizer.
    """

    size: int
    wall: float
    cpu: float
    forward: float = 0.0
    backward: float = 0.0
    update: float = 0.0


@dataclass(frozen=True)
class ShortRun:
    """Some batches of training in a process of its own.

    Attributes:
        base_bytes: What the process had before the model was made (on a GPU: nothing).
        peak_bytes: The most that it had from then on.
        samples: The batches that were timed.
        yardstick: Seconds that a fixed piece of work took before and after them, by the clock and of the processors:
            how fast the machine was.
        values: What the techniques measured of themselves, by tag.
        save_seconds: What a checkpoint costs the training, 0 where none was saved.
        accumulate: Batches of an optimizer step.
    """

    base_bytes: int
    peak_bytes: int
    samples: tuple[Sample, ...]
    yardstick: tuple[float, float] = (0.0, 0.0)
    values: Mapping[str, float] = field(default_factory=dict)
    save_seconds: float = 0.0
    accumulate: int = 1

    def seconds(self, sizes: Sequence[int], yardstick: tuple[float, float] = (0.0, 0.0)) -> Seconds:
        """The mean time of a batch, over batches of these sizes.

        Args:
            sizes: Of the batches that the training will have.
            yardstick: That of another run: the time is what it would have been when the machine was as fast as then.
        """
        means = [self._typical(kind).mean_over(sizes) for kind in ("wall", "cpu")]
        factors = [then / now if then and now else 1.0 for then, now in zip(yardstick, self.yardstick, strict=True)]
        return Seconds(*(mean * factor for mean, factor in zip(means, factors, strict=True)))

    def part(self, name: str, sizes: Sequence[int]) -> float:
        """The mean seconds of ``forward``, ``backward`` or ``update``."""
        return self._typical(name).mean_over(sizes)

    def _typical(self, kind: str) -> Curve:
        by_size: dict[int, list[float]] = defaultdict(list)
        for sample in self.samples:
            by_size[sample.size].append(getattr(sample, kind))
        # With accumulation only some batches end in an update, and a median would leave that out.
        middle = statistics.median if self.accumulate == 1 else statistics.fmean
        return Curve.through({size: middle(values) for size, values in by_size.items()})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ShortRun:
        """The inverse of :meth:`to_json`."""
        samples = tuple(Sample(**sample) for sample in data["samples"])
        return cls(**(dict(data) | {"samples": samples, "yardstick": tuple(data["yardstick"])}))

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return asdict(self)


@dataclass(frozen=True)
class Layer:
    """What one module saves for backward, and its own part of forward.

    Attributes:
        name: Its path; numbers are ``*``, so that equal layers are one line.
        kind: Its class.
        count: Modules of this line.
        saved_bytes: Of the largest batch.
        forward_seconds: Without the modules in it.
    """

    name: str
    kind: str
    count: int
    saved_bytes: int
    forward_seconds: float


@dataclass(frozen=True)
class Profile:
    """Where memory and time go in the user's own training.

    Attributes:
        run: Its steps.
        module: Name of the LightningModule's class.
        device: Type of the device.
        hardware: In a line.
        threads: Of the processor, that compute one operation.
        memory: What memory is here, in words.
        parameters: Bytes, like all that follow.
        gradients: Of all parameters that are trained.
        optimizer_state: Wherever it is.
        saved: For backward, by size of batch.
        update_peak: The most that the process had while parameters were updated.
        checkpoint: Size of the file; 0 where the configuration saves none.
        checkpoint_peak: The most that the process had while it was written.
        largest_parameter: Bytes.
        largest_module: Of the parameters that one module has itself.
        layers: The modules that save most, or take most time.
        sizes: Of the batches that were looked at.
        all_batches: Whether these are all of an epoch.
        data_seconds: To get a batch, when nothing else is done.
        save_interval: Batches between checkpoints, 0 for none.
        batches: Planned batches of the run, 0 if nobody knows.
        precision: As the Trainer calls it.
        taken: What the configuration has that a technique would replace, by the technique's slot.
        offloaded: Whether this was measured with everything on a disk, since plain training did not fit.
        prefetches: Whether workers get a batch while the one before is trained on.
    """

    run: ShortRun
    module: str
    device: str
    hardware: str
    threads: int
    memory: str
    parameters: int
    gradients: int
    optimizer_state: int
    saved: Mapping[int, int]
    update_peak: int
    checkpoint: int
    checkpoint_peak: int
    largest_parameter: int
    largest_module: int
    layers: tuple[Layer, ...]
    sizes: tuple[int, ...]
    all_batches: bool
    data_seconds: float
    save_interval: int
    batches: int
    precision: str
    taken: Mapping[str, str]
    offloaded: bool = False
    prefetches: bool = False

    def waits(self, seconds: float) -> float:
        """Seconds that a step of so many waits for its batch."""
        return max(0.0, self.data_seconds - seconds) if self.prefetches else self.data_seconds

    @property
    def largest_size(self) -> int:
        """Of the batches that were looked at."""
        return max(self.sizes)

    @property
    def largest_saved(self) -> int:
        """Bytes that the largest batch saves for backward."""
        size = self.largest_size
        return self.saved[size] if size in self.saved else round(Curve.through(self.saved).at(size))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Profile:
        """The inverse of :meth:`to_json`."""
        return cls(
            **(
                dict(data)
                | {
                    "run": ShortRun.from_json(data["run"]),
                    "layers": tuple(Layer(**layer) for layer in data["layers"]),
                    "sizes": tuple(data["sizes"]),
                    "saved": {int(size): nbytes for size, nbytes in data["saved"].items()},
                }
            )
        )

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return asdict(self)
