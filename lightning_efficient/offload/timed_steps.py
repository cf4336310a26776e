"""When a step computes, and when something else takes place; for the limit that its time is held against."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import Strategy

from lightning_efficient.offload.session import OffloadSession

__all__ = ["TimedStepsMixin"]

if TYPE_CHECKING:
    _Base = Strategy
else:
    _Base = object


class TimedStepsMixin(_Base):
    """To be put before a strategy, and before what splits its steps: all of a step's parts are computing."""

    _session: OffloadSession | None = None

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._computing():
            return super().training_step(*args, **kwargs)

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        with self._computing():
            return super().backward(*args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._computing():  # with the two above, which its closure calls
            return super().optimizer_step(*args, **kwargs)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self._session is not None:
            self._session.limit.interrupt()
        super().save_checkpoint(*args, **kwargs)

    def _computing(self) -> contextlib.AbstractContextManager[None]:
        return self._session.limit.computing() if self._session is not None else contextlib.nullcontext()
