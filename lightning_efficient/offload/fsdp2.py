"""The adapter for parameters that are sharded over several devices (FSDP2)."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from lightning_efficient import compat
from lightning_efficient.core.torch_internals import spread_of
from lightning_efficient.offload.common import STATE_KEY, OffloadMixin
from lightning_efficient.offload.local_shards.engine import communicates
from lightning_efficient.offload.local_shards.session import LocalShardSession
from lightning_efficient.offload.placement import PlaceFunction
from lightning_efficient.offload.session import OffloadSession
from lightning_efficient.offload.settings import ScheduleChoice, Settings
from lightning_efficient.offload.sharded.ranks import Ranks
from lightning_efficient.offload.trainer import Schedule, allowed_settings

__all__ = ["OffloadFSDP2Strategy"]


class OffloadFSDP2Strategy(OffloadMixin, ModelParallelStrategy):
    """``ModelParallelStrategy`` whose optimizer state may be on each rank's host or disk.

    You shard the model in ``configure_model`` with ``fully_shard``, as for ``ModelParallelStrategy``, without an
    ``offload_policy``. Each rank then has the optimizer state of its shards where the plan or you put it, and results
    are bit for bit those of ``ModelParallelStrategy``. So are checkpoints, which can be resumed with or without this
    strategy. (Rajbhandari et al. 2021, "ZeRO-Infinity", 5.)

    ``strategy="offload_fsdp2"`` stands for it after ``import lightning_efficient``.

    Args:
        memory_budget: See :class:`~lightning_efficient.OffloadStrategy`; of each rank. ``auto`` divides what is free on
            a host among its ranks.
        offload_dir: Folder for what goes to a disk; each rank makes a file of its own there.
        place: See :class:`~lightning_efficient.OffloadStrategy`. Parameters and gradients stay on the device.
        schedule: ``auto``, ``after_backward`` and ``in_backward`` are possible.
        staging: Memory of each rank for records on their way to and from a disk; see ``OffloadStrategy``.
        master_weights: Not possible here; shards in float32 with a ``MixedPrecisionPolicy`` are just that.
        batch_feedback: Not possible here.
        enabled: False: plain ``ModelParallelStrategy`` until :meth:`enable_offload` is called, on all ranks.
        data_parallel_size: Ranks among which parameters are sharded; ``"auto"``: all, divided by
            ``tensor_parallel_size``.
        tensor_parallel_size: Ranks in a tensor-parallel group; ``"auto"``: one.
        save_distributed_checkpoint: See ``ModelParallelStrategy``, as all that follow.
        process_group_backend: Likewise.
        timeout: Of collectives; None: that of torch.

    Raises:
        ValueError: Naming the argument that is not allowed, and what is.
    """

    strategy_name = "offload_fsdp2"

    def __init__(
        self,
        *,
        memory_budget: int | str | dict[str, int | str] | None = None,
        offload_dir: str | Path | None = None,
        place: Mapping[str, str | PlaceFunction] | str | PlaceFunction | None = None,
        schedule: ScheduleChoice = "auto",
        staging: int | str | None = None,
        master_weights: bool = False,
        batch_feedback: bool = False,
        enabled: bool = True,
        data_parallel_size: int | str = "auto",
        tensor_parallel_size: int | str = "auto",
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        if master_weights:
            raise ValueError(
                "master_weights=True is not possible with OffloadFSDP2Strategy: torch loads optimizer state in the "
                "dtype of its parameter. Keep the parameters in float32, where they are the master weights, and give "
                "fully_shard mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)."
            )
        if batch_feedback:
            raise ValueError(
                "batch_feedback=True is not possible with OffloadFSDP2Strategy: the ranks gather parameters together, "
                "and one that runs out of memory leaves the others waiting in the midst of a forward. Give smaller "
                "batches and accumulate_grad_batches."
            )
        super().__init__(
            data_parallel_size=data_parallel_size,  # type: ignore[arg-type]
            tensor_parallel_size=1 if tensor_parallel_size == "auto" else tensor_parallel_size,  # type: ignore[arg-type]
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=default_pg_timeout if timeout is None else timeout,
        )
        self._configure(
            memory_budget=memory_budget,
            offload_dir=offload_dir,
            place=place,
            schedule=schedule,
            staging=staging,
            master_weights=False,
            enabled=enabled,
        )

    def setup_environment(self) -> None:
        compat.shard_over_all(self)
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        if not isinstance(self._session, LocalShardSession):
            return super().optimizer_state(optimizer)
        with self._session.state_read(optimizer):
            return super().optimizer_state(optimizer)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        self.finish_updates()
        if isinstance(self._session, LocalShardSession):
            self._session.bring_back_state()
        checkpoint = ModelParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)
        self._loaded = checkpoint.get(STATE_KEY)
        return checkpoint

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        ModelParallelStrategy.load_optimizer_state_dict(self, checkpoint)  # has been done with the weights

    def _open(self, trainer: pl.Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING:  # else there is nothing that could be elsewhere
            super()._open(trainer)

    def _choose_schedule(self, trainer: pl.Trainer) -> tuple[Schedule, str]:
        if self.settings.schedule == "under_forward":
            raise MisconfigurationException(
                "schedule='under_forward' cannot be with FSDP2: it gathers parameters from their shards ahead of the "
                "forward that uses them, in an order of its own. Use schedule='auto'."
            )
        if self.settings.schedule == "delayed":
            raise MisconfigurationException(
                "schedule='delayed' cannot be with several ranks: each would change its shards as its own backward "
                "goes on, and one that fails would leave the others with weights of another step. Use schedule='auto'."
            )
        schedule, why = super()._choose_schedule(trainer)
        if schedule == "under_forward":
            return "after_backward", why
        if schedule == "in_backward" and (never := self._never_in_backward()):
            if self.settings.schedule == "in_backward":
                raise MisconfigurationException(
                    f"schedule='in_backward' updates shards while backward goes on, which cannot be: {never}. Use "
                    "schedule='auto'."
                )
            return "after_backward", never
        return schedule, why

    def _never_in_backward(self) -> str:
        for optimizer in self.optimizers:
            if any(communicates(optimizer, group) for group in optimizer.param_groups):
                return f"{type(optimizer).__name__} needs more than its own shard, and waits for the other ranks"
        return ""

    def _allowed_settings(self, trainer: pl.Trainer) -> Settings:
        for name, parameter in trainer.lightning_module.named_parameters():
            if spread_of(parameter) is not None and parameter.device.type != self.root_device.type:
                raise MisconfigurationException(
                    f"{name} is in the memory of the {parameter.device.type}, as with CPUOffloadPolicy, and "
                    f"OffloadFSDP2Strategy updates it on the {self.root_device.type}. Leave offload_policy of "
                    "fully_shard out."
                )
        return allowed_settings(
            trainer,
            self.settings,
            self.root_device,
            {
                "parameter": "FSDP2 has a shard of each parameter on each device, and gathers it from there",
                "gradient": "FSDP2 reduces gradients to shards on the device",
            },
        )

    def _new_session(self, *args: Any, **kwargs: Any) -> OffloadSession:
        return LocalShardSession(Ranks(self.root_device, self.num_processes), *args, site="device", **kwargs)
