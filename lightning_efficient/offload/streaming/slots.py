"""Memory of the device that is given back and taken again, while the parameters in it stay the same objects."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_efficient.core.torch_internals import bytes_of, storage_use_count
from lightning_efficient.offload.streaming.guarded import User, guard
from lightning_efficient.offload.tiers.carriers import Arriving, Leaving
from lightning_efficient.offload.tiers.tier import Record, Tier

__all__ = ["Slot", "record_of"]


class Slot:
    """The memory of a parameter, or of several that share it.

    Attributes:
        names: Of its parameters, each once, as they are first met.
        parameters: Those that lie in it.
        storage: Empty while the bytes are only in the tier.
        tier: Where the bytes are otherwise.
        record: Their place there.
        resident: Whether there is memory for them on the device, filled or about to be.
        incoming: The transfer that fills it.
        outgoing: The transfer of a changed value to the tier.
        pins: How many say that they need it.
        ahead: Whether it was fetched before it was asked for, and has not been since.
        units: Numbers of the units that it belongs to.
    """

    def __init__(self, names: list[str], parameters: list[nn.Parameter], tier: Tier) -> None:
        self.names = names
        self.parameters = parameters
        self.storage = parameters[0].untyped_storage()
        self.nbytes = self.storage.nbytes()
        self._bytes: Tensor | None = bytes_of(self.storage)
        self.tier = tier
        self.record: Record | None = None
        self.resident = True
        self.incoming: Arriving | None = None
        self.outgoing: Leaving | None = None
        self.pins = 0
        self.ahead = False
        self.units: list[int] = []
        self.user: User | None = None
        self._views = [parameter.detach() for parameter in parameters]  # they share the version counters
        self._versions: list[int] | None = None
        self._exposed = False

    @property
    def bytes(self) -> Tensor:
        """``storage`` as uint8 ``[nbytes]``."""
        return bytes_of(self.storage) if self._bytes is None else self._bytes

    @property
    def trained(self) -> bool:
        """Whether its value is going to change."""
        return any(parameter.requires_grad for parameter in self.parameters)

    @property
    def changed(self) -> bool:
        """Whether the value on the device is newer than that in the tier, or may be."""
        return self.resident and self._versions != [view._version for view in self._views]

    @property
    def lent(self) -> bool:
        """Whether somebody else holds its memory: a view, or an operation that computes with one.

        For ever, where it was shared with numpy or other processes.
        """
        owners = len(self.parameters) + len(self._views) + 2  # and ``storage``, and ``bytes``
        return storage_use_count(self.storage) > owners or not self.storage.resizable()

    def version(self, index: int) -> int:
        """Counts the changes of one of the parameters."""
        return (self._views or self.parameters)[index]._version

    def index_at(self, offset: int) -> int:
        """The parameter that lies at this byte."""
        if len(self._views) == 1:
            return 0
        starts = [view.storage_offset() * view.element_size() for view in self._views]
        return max((start, index) for index, start in enumerate(starts) if start <= offset)[1]

    def mark_changed(self) -> None:
        """Somebody may write to it without its versions telling, as long as he has a view of it."""
        self._versions = None
        self._exposed = True

    def mark_kept(self) -> None:
        """The tier has the value of now, or soon will."""
        self._exposed = self._exposed and self.lent  # who has written without trace may do so again
        self._versions = None if self._exposed else [view._version for view in self._views]

    def pin(self) -> None:
        """Somebody needs it, and that is known: its parameters are ordinary ones."""
        self.pins += 1
        if self.pins == 1:
            self.unguard()

    def unpin(self) -> None:
        """One less needs it."""
        self.pins -= 1
        if not self.pins and self.record is not None:
            self.guard()

    def guard(self) -> None:
        """From now on whoever uses its parameters is seen."""
        for parameter in self.parameters:
            guard(parameter, self)

    def unguard(self) -> None:
        """Its parameters are ordinary ones."""
        for parameter in self.parameters:
            parameter.__class__ = nn.Parameter

    def views_of(self, data: Tensor) -> list[Tensor]:
        """The parameters' values if ``data``, uint8 ``[nbytes]``, were its bytes; they share memory with it."""
        return [
            data.view(view.dtype).as_strided(view.shape, view.stride(), view.storage_offset()) for view in self._views
        ]

    def view_named(self, parameter: Tensor, data: Tensor) -> Tensor:
        """That of one parameter of :meth:`views_of`."""
        place = next(i for i, one in enumerate(self.parameters) if one is parameter)
        return self.views_of(data)[place]

    def move_to(self, data: Tensor) -> None:
        """Lie in ``data`` instead, uint8 ``[nbytes]`` anywhere; no graph may know the old memory."""
        self.unguard()
        for parameter, view in zip(self.parameters, self.views_of(data), strict=True):
            parameter.data = view
        self.storage = data.untyped_storage()
        self._bytes = bytes_of(self.storage)
        self._views = [parameter.detach() for parameter in self.parameters]

    def leave(self) -> None:
        """Its parameters are ordinary ones, and the memory is theirs alone."""
        self.unguard()
        self.record = self._bytes = None
        self._views = []


def record_of(slot: Slot) -> Record:
    """Its place in its tier.

    Raises:
        RuntimeError: If it has none, or none any more.
    """
    if slot.record is None:
        raise RuntimeError(f"Parameter '{slot.names[0]}' is not streamed.")
    return slot.record
