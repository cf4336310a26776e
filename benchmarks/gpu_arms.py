"""A GPT on a GPU, trained in its memory, by us, and by others that keep optimizer state on the host.

Parameters are float32 and computing is in bfloat16 (autocast) in all arms but DeepSpeed's, which has its own form of
that. A rival that is not installed, or cannot run here, is skipped with a word.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_efficient.demos.model import ByteTransformer
from lightning_efficient.offload.session import OffloadSession
from lightning_efficient.offload.settings import parse_settings
from lightning_efficient.offload.site import Site
from lightning_efficient.offload.updates.schedule import Updates

__all__ = ["ARMS", "RIVALS", "Arm", "Job", "Size", "Skipped", "built", "elsewhere"]


class Skipped(Exception):
    """Why an arm cannot run here."""


@dataclass(frozen=True)
class Size:
    """A GPT and a batch."""

    layers: int
    width: int
    context: int
    sequences: int

    @property
    def tokens(self) -> int:
        return self.context * self.sequences

    def __str__(self) -> str:
        return f"{self.layers} layers of width {self.width}, {self.tokens:,} tokens a step"


class Job:
    """A model on a device, one batch, and how a step is done."""

    def __init__(self, size: Size, device: torch.device, clip: float | None) -> None:
        self.device, self.clip = device, clip
        torch.manual_seed(0)
        with device:
            heads = max(1, size.width // 128)
            self.model = ByteTransformer(layers=size.layers, width=size.width, heads=heads, context=size.context)
            self.tokens, self.targets = torch.randint(0, 256, (2, size.sequences, size.context))
        self.optimizer: Any = None
        self.before: Callable[[], None] = lambda: None
        self.after: Callable[[Tensor], None] = lambda loss: None
        self.updates = True  # False: forward and backward alone
        self.session: OffloadSession | None = None

    @property
    def elements(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def adamw(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def loss(self) -> Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False):
            logits = self.model(self.tokens)
        return F.cross_entropy(logits.flatten(0, 1).float(), self.targets.flatten())

    def step(self) -> None:
        def closure() -> Tensor:
            self.before()
            loss = self.loss()
            self.after(loss)
            self.optimizer.zero_grad()
            loss.backward()
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            return loss

        if self.updates:
            self.optimizer.step(closure)
        else:
            closure()

    def finish(self) -> None:
        """All that was asked of the device and of others has been done."""
        if self.session is not None:
            self.session.finish_updates()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


Arm = Callable[[Job, Path], contextlib.AbstractContextManager[None]]


def elsewhere(device: torch.device) -> str:
    """The tier beside the device's own memory; without a GPU that is a disk."""
    return "host" if device.type == "cuda" else "disk"


@contextlib.contextmanager
def in_memory(job: Job, folder: Path) -> Iterator[None]:
    job.optimizer = job.adamw()
    yield


def ours(site: Site | None, *kinds: str) -> Arm:
    """With the optimizer state, and other ``kinds`` of tensors, elsewhere; ``site`` None: as calibrated."""

    @contextlib.contextmanager
    def build(job: Job, folder: Path) -> Iterator[None]:
        job.optimizer = job.adamw()
        schedule = "in_backward" if job.clip is None else "under_forward"
        tier = elsewhere(job.device)
        settings = parse_settings(
            memory_budget=None,
            offload_dir=folder,
            place={"optimizer_state": tier, **dict.fromkeys(kinds, tier)},
            schedule=schedule,
            staging=None,
            master_weights=False,
        )
        job.session = OffloadSession(
            job.model,
            [job.optimizer],
            settings,
            device=job.device,
            directory=folder,
            schedule=schedule,  # type: ignore[arg-type]
            complete=lambda: True,
            site=site,
        )
        try:
            job.session.start()
            updates = job.session.updates
            assert updates is not None
            job.before = lambda: before(job, updates)
            job.after = lambda loss: updates.after_forward([loss])
            yield
        finally:
            job.session.close()

    def before(job: Job, updates: Updates) -> None:
        if job.session is not None:
            job.session.begin_batch(gradients=True)
        updates.before_forward()

    return build


@contextlib.contextmanager
def torchao(job: Job, folder: Path) -> Iterator[None]:
    """``torchao.optim.CPUOffloadOptimizer`` with gradients offloaded."""
    if job.device.type != "cuda":
        raise Skipped("it needs a GPU")
    if job.clip is not None:
        raise Skipped("it copies gradients before they are clipped")
    offloading = _installed("torchao.optim").CPUOffloadOptimizer
    job.optimizer = offloading(job.model.parameters(), torch.optim.AdamW, offload_gradients=True, lr=1e-4)
    yield


@contextlib.contextmanager
def fsdp2(job: Job, folder: Path) -> Iterator[None]:
    """``fully_shard`` with ``CPUOffloadPolicy``, in a process group of one."""
    from torch import distributed
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    if not distributed.is_available() or distributed.is_initialized():
        raise Skipped("no process group can be made")
    cuda = job.device.type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh(job.device.type, (1,))
        policy = CPUOffloadPolicy(pin_memory=cuda)
        for block in job.model.blocks:
            fully_shard(block, mesh=mesh, offload_policy=policy)
        fully_shard(job.model, mesh=mesh, offload_policy=policy)
        job.optimizer = job.adamw()
        yield
    finally:
        job.optimizer = None
        distributed.destroy_process_group()


@contextlib.contextmanager
def zero_offload(job: Job, folder: Path) -> Iterator[None]:
    """ZeRO-Offload: stage 2, the optimizer on the host."""
    if job.device.type != "cuda":
        raise Skipped("it needs a GPU")
    deepspeed = _installed("deepspeed")
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": job.tokens.shape[0],
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": True,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
        },
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "gradient_clipping": job.clip or 0.0,
    }
    engine, *_ = deepspeed.initialize(model=job.model, model_parameters=job.model.parameters(), config=config)

    def step() -> None:
        loss = F.cross_entropy(engine(job.tokens).flatten(0, 1).float(), job.targets.flatten())
        engine.backward(loss)
        engine.step()

    job.step = step  # type: ignore[method-assign]
    yield
    engine.destroy()


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Skipped("not installed") from error


BASE = "in the GPU's memory"
ARMS: dict[str, Arm] = {
    BASE: in_memory,
    "ours, updates on the device": ours("device"),
    "ours, updates on the host": ours("host"),
    "ours, as calibrated": ours(None),
}
RIVALS: dict[str, Arm] = {
    "torchao CPUOffloadOptimizer": torchao,
    "FSDP2 CPUOffloadPolicy": fsdp2,
    "DeepSpeed ZeRO-Offload": zero_offload,
}
ALL_ELSEWHERE = ours("device", "parameter", "gradient", "activation")


@contextlib.contextmanager
def built(arm: Arm, size: Size, device: torch.device, folder: Path, clip: float | None = None) -> Iterator[Job]:
    """A job with an arm around it; afterwards the device's memory is free again.

    Raises:
        Skipped: If it cannot run here, and why.
        torch.OutOfMemoryError: If it does not fit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rival = arm in RIVALS.values()
    job: Job | None = None
    try:
        job = Job(size, device, clip)
        with arm(job, folder):
            yield job
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if isinstance(error, Skipped) or not rival:
            raise
        first = (str(error).splitlines() or [""])[0]
        raise Skipped(f"it ended with {type(error).__name__}: {first[:80]}") from error
    finally:
        if job is not None:
            job.__dict__.clear()  # whoever still holds it holds no memory
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
