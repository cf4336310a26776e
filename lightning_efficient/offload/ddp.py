"""The adapter for several devices with the whole model on each: state and updates are divided among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from lightning_efficient.offload.common import OffloadMixin
from lightning_efficient.offload.placement import PlaceFunction
from lightning_efficient.offload.session import OffloadSession
from lightning_efficient.offload.settings import LossReduction, ScheduleChoice, Settings, SiteChoice
from lightning_efficient.offload.sharded.ranks import Ranks
from lightning_efficient.offload.sharded.session import ShardedSession
from lightning_efficient.offload.trainer import Schedule, allowed_settings

__all__ = ["OffloadDDPStrategy"]


class OffloadDDPStrategy(OffloadMixin, DDPStrategy):
    """``DDPStrategy`` whose optimizer state is divided among the ranks, and may be on each one's host or disk.

    Gradients are reduced as always. Each rank then updates its share of the parameters, with the only copy of their
    optimizer state, and sends the new values to the others: what goes to and from a disk is divided by the number of
    ranks, and results are bit for bit those of ``DDPStrategy``. Checkpoints are plain and complete, and can be resumed
    with any number of ranks, or without this strategy. (Rajbhandari et al. 2020, "ZeRO", 5.1; Ren et al. 2021,
    "ZeRO-Offload", 4.2.)

    ``strategy="offload_ddp"`` stands for it after ``import lightning_efficient``.

    Args:
        memory_budget: See :class:`~lightning_efficient.OffloadStrategy`; of each rank. ``auto`` divides what is free on
            a host among its ranks.
        offload_dir: Folder for what goes to a disk; each rank makes a file of its own there.
        place: See :class:`~lightning_efficient.OffloadStrategy`. Parameters and gradients stay on the device.
        schedule: ``auto`` and ``after_backward`` are possible.
        step_on: See ``OffloadStrategy``; each rank measures for itself.
        staging: Memory of each rank for records on their way to and from a disk; see ``OffloadStrategy``.
        master_weights: Keep parameters of 16 bits in float32 beside them, on the rank that updates them.
        batch_feedback: See :class:`~lightning_efficient.OffloadStrategy`; the ranks go back together.
        loss_reduction: See :class:`~lightning_efficient.OffloadStrategy`.
        enabled: False: plain DDP until :meth:`enable_offload` is called, on all ranks.
        find_unused_parameters: See ``torch.nn.parallel.DistributedDataParallel``.
        static_graph: Likewise.
        gradient_as_bucket_view: Likewise.
        process_group_backend: See ``DDPStrategy``, as all that follow.
        timeout: Of collectives; None: that of torch.
        start_method: How processes are started.
        ddp_comm_state: For the communication hook.
        ddp_comm_hook: Communication hook of DDP.
        ddp_comm_wrapper: Around it.
        accelerator: Given by Lightning.
        cluster_environment: Given by Lightning.
        checkpoint_io: Given by Lightning.
        precision_plugin: Given by Lightning.
        **kwargs: Other arguments of ``DistributedDataParallel``.

    Raises:
        ValueError: Naming the argument that is not allowed, and what is.
    """

    strategy_name = "offload_ddp"

    def __init__(
        self,
        *,
        memory_budget: int | str | dict[str, int | str] | None = None,
        offload_dir: str | Path | None = None,
        place: Mapping[str, str | PlaceFunction] | str | PlaceFunction | None = None,
        schedule: ScheduleChoice = "auto",
        step_on: SiteChoice = "auto",
        staging: int | str | None = None,
        master_weights: bool = False,
        batch_feedback: bool = False,
        loss_reduction: LossReduction = "mean",
        enabled: bool = True,
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        gradient_as_bucket_view: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        ddp_comm_state: Any = None,
        ddp_comm_hook: Callable | None = None,
        ddp_comm_wrapper: Callable | None = None,
        accelerator: pl.accelerators.Accelerator | None = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            accelerator=accelerator,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            ddp_comm_state=ddp_comm_state,
            ddp_comm_hook=ddp_comm_hook,
            ddp_comm_wrapper=ddp_comm_wrapper,
            process_group_backend=process_group_backend,
            start_method=start_method,
            find_unused_parameters=find_unused_parameters,
            static_graph=static_graph,
            gradient_as_bucket_view=gradient_as_bucket_view,
            timeout=default_pg_timeout if timeout is None else timeout,
            **kwargs,
        )
        self._averages = kwargs.get("model_averaging_period") is not None
        self._configure(
            memory_budget=memory_budget,
            offload_dir=offload_dir,
            place=place,
            schedule=schedule,
            step_on=step_on,
            staging=staging,
            master_weights=master_weights,
            batch_feedback=batch_feedback,
            loss_reduction=loss_reduction,
            enabled=enabled,
        )

    def setup(self, trainer: pl.Trainer) -> None:
        if self._averages:
            raise MisconfigurationException(
                "OffloadDDPStrategy cannot work with model_averaging_period: the ranks' weights are to differ between "
                "averages, and here each parameter is updated by one rank for all. Use DDPStrategy, or leave it out."
            )
        super().setup(trainer)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        if isinstance(self._session, ShardedSession) and self._session.divided:
            return self._session.collected_state(optimizer)
        return super().optimizer_state(optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        with Ranks(self.root_device).agreed():
            super().load_optimizer_state_dict(checkpoint)

    def _choose_schedule(self, trainer: pl.Trainer) -> tuple[Schedule, str]:
        if self.settings.schedule == "in_backward":
            raise MisconfigurationException(
                "schedule='in_backward' cannot be with several ranks: a gradient is complete when "
                "DistributedDataParallel has reduced it, which is not known before backward ends. Use schedule='auto'."
            )
        if self.settings.schedule == "under_forward":
            raise MisconfigurationException(
                "schedule='under_forward' cannot be with several ranks: they would have to send each other parameters "
                "in the order in which each one's forward happens to use them, and wait for ever where these differ. "
                "Use schedule='auto'."
            )
        if self.settings.schedule == "delayed":
            raise MisconfigurationException(
                "schedule='delayed' cannot be with several ranks: they would have to send each other parameters in the "
                "order in which each one's backward happens to be done with them, and wait for ever where these "
                "differ. Use schedule='auto'."
            )
        asked = self.settings.schedule == "after_backward"
        return "after_backward", "as asked for" if asked else "the ranks send each other what they updated"

    def _allowed_settings(self, trainer: pl.Trainer) -> Settings:
        return allowed_settings(
            trainer,
            self.settings,
            self.root_device,
            {
                "parameter": "DistributedDataParallel needs all parameters on the device",
                "gradient": "DistributedDataParallel reduces gradients where they are, in buckets of its own",
            },
        )

    def _new_session(self, *args: Any, **kwargs: Any) -> OffloadSession:
        return ShardedSession(Ranks(self.root_device, self.num_processes), *args, **kwargs)
