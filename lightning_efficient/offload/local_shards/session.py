"""A training run whose parameters are sharded over ranks, with each rank's optimizer state spread over its tiers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_efficient.core.torch_internals import spread_of
from lightning_efficient.offload.local_shards.engine import ShardEngine
from lightning_efficient.offload.local_shards.modules import own_parameters, sharded_modules, show_shards
from lightning_efficient.offload.local_shards.updates import ShardsAfterBackward, ShardsInBackward
from lightning_efficient.offload.saved.activations import SavedTensorOffload
from lightning_efficient.offload.sharded.joint_session import JointSession
from lightning_efficient.offload.updates.engine import UpdateEngine
from lightning_efficient.offload.updates.schedule import Updates

__all__ = ["LocalShardSession"]


class LocalShardSession(JointSession):
    """A joint session over a module that ``fully_shard`` was called with parts of.

    Attributes:
        engine: Of this rank.
    """

    engine: ShardEngine
    _holds: Sequence[RemovableHandle] = ()  # hooks that tell ``saved`` what is gathered

    def bring_back_state(self) -> None:
        """All state is in the optimizers, for code that writes into it; what they then load goes to its places.

        Each rank must call it.
        """
        if self.updates is not None:
            with self._ranks.agreed():
                self.finish_updates()
                self.engine.bring_back()

    @contextlib.contextmanager
    def state_read(self, optimizer: Optimizer) -> Iterator[None]:
        """Within it ``optimizer.state_dict()`` gives what has been read before; each rank must enter it.

        Raises:
            OtherRankError: If another rank cannot read what it has; else that would wait in a collective for ever.
        """
        if self.updates is None or not optimizer.state:
            yield
            return
        read: dict[str, Any] = {}
        with self._ranks.agreed():
            read = optimizer.state_dict()
        optimizer.__dict__["state_dict"] = lambda: read
        try:
            yield
        finally:
            optimizer.__dict__.pop("state_dict", None)

    def _place(self) -> None:
        show_shards(self._module)
        super()._place()

    def _place_what_came(self) -> None:
        show_shards(self._module)
        super()._place_what_came()

    def _begin(self) -> None:
        show_shards(self._module)
        super()._begin()
        if self.saved is not None:
            hold = _holding(self.saved)
            self._holds = [part.register_forward_pre_hook(hold) for part in sharded_modules(self._module)]

    def _let_go(self) -> None:
        super()._let_go()
        for handle in self._holds:
            handle.remove()
        self._holds = ()

    def _new_engine(self, names: Mapping[int, str]) -> UpdateEngine:
        return ShardEngine(self._ranks, self._optimizers, names, self._tier_of, **self._engine_arguments())

    def _new_updates(self) -> Updates:
        if self._schedule == "in_backward":
            return ShardsInBackward(self.engine, self._optimizers, self._complete)
        return ShardsAfterBackward(self.engine, self._optimizers)


def _holding(saved: SavedTensorOffload) -> Callable[..., None]:
    """Before a forward: what the module has gathered, which FSDP2 frees behind it, and gathers again for backward."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def hold(part: nn.Module, *_: Any) -> None:
        saved.hold(p for p in own_parameters(part) if spread_of(p) is None)

    return hold
