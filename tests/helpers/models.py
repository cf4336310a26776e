"""The demo model as users vary it: other loops, other schedules, checkpointed and compiled networks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from lightning_efficient.demos import ByteLanguageModel

__all__ = [
    "CheckpointedModel",
    "CompiledModel",
    "ManualModel",
    "ScheduledModel",
    "ShardedModel",
    "ShiftedLossModel",
    "SilentModel",
]


class ManualModel(ByteLanguageModel):
    """Manual optimization, with one or two optimizers, that may add up the gradients of several batches.

    Args:
        optimizers: Two: one for matrices, one for the rest.
        accumulate: Batches for each update.
        **arguments: Of the demo model.
    """

    def __init__(self, *, optimizers: int = 1, accumulate: int = 1, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.number = optimizers
        self.accumulate = accumulate
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        optimizers = self.optimizers(use_pl_optimizer=True)
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        inputs, targets = self.task(batch, seed=0)
        loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        self.manual_backward(loss / self.accumulate)
        if (batch_idx + 1) % self.accumulate == 0:
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
        self.log("train_loss", loss.detach())
        return {"loss": loss.detach()}

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.ndim >= 2]
        rest = [p for p in self.parameters() if p.ndim < 2]
        if self.number == 1:
            return torch.optim.AdamW([{"params": matrices}, {"params": rest, "weight_decay": 0.0}], lr=4e-3)
        return torch.optim.AdamW(matrices, lr=4e-3), torch.optim.SGD(rest, lr=1e-2, momentum=0.9)


class ScheduledModel(ByteLanguageModel):
    """Another schedule: ``constant``, ``onecycle`` (rates and betas), ``exponential``, or ``plateau``.

    The plateau is of a metric that does not depend on the model, so that two models have the same schedule.

    Args:
        schedule: Which.
        optimizer: Of ``torch.optim``.
        backwards: Whether the optimizer gets the parameters in reverse order.
        **arguments: Of the demo model.
    """

    def __init__(
        self, *, schedule: str = "constant", optimizer: str = "AdamW", backwards: bool = False, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self.schedule = schedule
        self.optimizer = optimizer
        self.backwards = backwards

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("clock", float(self.global_step < 4))
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())[:: -1 if self.backwards else 1]
        optimizer = getattr(torch.optim, self.optimizer)(parameters, lr=4e-3)
        schedulers = torch.optim.lr_scheduler
        every_step = {"interval": "step"}
        if self.schedule == "onecycle":
            scheduler: Any = schedulers.OneCycleLR(optimizer, 4e-3, total_steps=64)
        elif self.schedule == "exponential":
            scheduler = schedulers.ExponentialLR(optimizer, 0.97)
        elif self.schedule == "plateau":
            scheduler = schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=2)
            every_step |= {"monitor": "clock", "reduce_on_plateau": True}
        else:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **every_step}}


class CheckpointedModel(ByteLanguageModel):
    """Each block forgets its activations, and computes them again in backward."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.model.blocks = nn.ModuleList(_Checkpointed(block) for block in self.model.blocks)


class _Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


class CompiledModel(ByteLanguageModel):
    """The network inside is compiled."""

    def __init__(self, *, backend: str = "eager", **arguments: Any) -> None:
        super().__init__(**arguments)
        self.model = torch.compile(self.model, backend=backend)


class ShardedModel(ByteLanguageModel):
    """Sharded by its user, in the way of FSDP2.

    Args:
        backend: Each block is compiled with it, before it is sharded; None: none is.
        **arguments: Of the demo model.
    """

    def __init__(self, *, backend: str | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.backend = backend

    def configure_model(self) -> None:
        if getattr(self, "sharded", False):
            return
        self.sharded = True
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.blocks:
            if self.backend is not None:
                block.compile(backend=self.backend)
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


class SilentModel(ByteLanguageModel):
    """Logs nothing: torch 2.13 does not compile ``self.log`` of Lightning 2.6."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        inputs, targets = self.task(batch, seed=0)
        return F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)


class ShiftedLossModel(ByteLanguageModel):
    """Its loss is higher on higher ranks; the gradients know nothing of it."""

    def __init__(self, *, shift: float = 4.0, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.shift = shift

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx) + self.shift * self.global_rank
        self.log("shifted", loss.detach())
        return loss
