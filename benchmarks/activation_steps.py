"""One step of a GPT: what it keeps, takes and costs, for each way to keep what backward needs."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from benchmarks.harness import Options, Table, spread
from lightning_efficient import ActivationCompressionPlugin
from lightning_efficient.demos.model import Attention, ByteTransformer

__all__ = ["ARMS", "GPU_SIZES", "HEADLINE", "QUICK", "SIZES", "Arm", "Job", "Size", "measured_steps"]


@dataclass(frozen=True)
class Size:
    """A GPT and a batch."""

    width: int
    tokens: int
    dropout: float  # of the embeddings and the branches
    rounds: int
    context: int = 256  # tokens of a sequence

    def __str__(self) -> str:
        return f"width {self.width}, {self.tokens:,} tokens, dropout {self.dropout}"


SIZES = (Size(256, 1024, 0.1, 21), Size(256, 1024, 0.0, 9), Size(512, 4096, 0.1, 3))
GPU_SIZES = tuple(Size(width, 8192, 0.1, 9) for width in (1024, 2048, 4096))
QUICK = (Size(64, 128, 0.1, 2, context=128),)


class Job:
    """Forward and backward of a four-layer GPT."""

    def __init__(self, size: Size, device: str, mixed: bool) -> None:
        torch.manual_seed(0)
        context, heads = size.context, max(1, size.width // 64)
        self.model = ByteTransformer(layers=4, width=size.width, heads=heads, context=context, dropout=size.dropout)
        for module in self.model.modules():
            if isinstance(module, Attention):
                module.dropout = 0.0  # with it torch's attention on a CPU keeps three matrices of scores
        self.model.to(device)
        shape = 2, size.tokens // context, context
        self.tokens, self.targets = torch.randint(0, 256, shape, device=device)
        self.device, self.mixed = device, mixed

    def loss(self, block: Callable[[nn.Module, Tensor], Tensor] | None = None) -> Tensor:
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.mixed):
            if block is None:
                logits = self.model(self.tokens)
            else:
                positions = torch.arange(self.tokens.shape[1], device=self.device)
                hidden = self.model.token_embedding(self.tokens) + self.model.position_embedding(positions)
                hidden = self.model.embedding_dropout(hidden)
                for layer in self.model.blocks:
                    hidden = block(layer, hidden)
                logits = self.model.head(self.model.final_norm(hidden))
            return F.cross_entropy(logits.flatten(0, 1), self.targets.flatten())

    def clear(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None

    def gradients(self) -> list[Tensor]:
        return [p.grad.clone() for p in self.model.parameters() if p.grad is not None]


Step = Callable[[], Tensor]
"""Forward; returns the loss. Its context is that of forward and backward."""
Arm = Callable[[Job], contextlib.AbstractContextManager[Step]]


@contextlib.contextmanager
def plain(job: Job) -> Iterator[Step]:
    yield job.loss


@contextlib.contextmanager
def recomputed(job: Job) -> Iterator[Step]:
    yield lambda: job.loss(lambda layer, hidden: checkpoint(layer, hidden, use_reentrant=False))


@contextlib.contextmanager
def on_cpu(job: Job) -> Iterator[Step]:
    def step() -> Tensor:
        with save_on_cpu():
            return job.loss()

    yield step


@contextlib.contextmanager
def plain_quantizer(job: Job) -> Iterator[Step]:
    """What one writes first: every floating-point tensor in 4 bits, by groups of 128, to the nearest."""
    own = {parameter.data_ptr() for parameter in job.model.parameters()}

    def pack(tensor: Tensor) -> Any:
        if not tensor.is_floating_point() or tensor.numel() % 256 or tensor.data_ptr() in own:
            return tensor
        groups = tensor.detach().float().reshape(-1, 128)
        low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
        scale = ((high - low) / 15).clamp_min(1e-12)
        codes = ((groups - low) / scale).round().to(torch.uint8).view(-1)
        return codes[::2] | (codes[1::2] << 4), scale, low, tensor.shape, tensor.dtype

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        codes, scale, low, shape, dtype = packed
        numbers = torch.stack([codes & 15, codes >> 4], 1).view(-1, 128)
        return (numbers * scale + low).to(dtype).view(shape)

    def step() -> Tensor:
        with saved_tensors_hooks(pack, unpack):
            return job.loss()

    yield step


class _Whole(pl.LightningModule):
    """What the callback is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def ours(**arguments: Any) -> Arm:
    """The callback, called as the Trainer calls it: all that it does in a step counts, and no more of Lightning."""

    @contextlib.contextmanager
    def build(job: Job) -> Iterator[Step]:
        plugin, module = ActivationCompressionPlugin(**arguments), _Whole(job.model)
        trainer = pl.Trainer(
            accelerator="gpu" if job.device == "cuda" else "cpu", devices=1, max_steps=1, callbacks=[plugin],
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.strategy.connect(module)
        plugin.setup(trainer, module, "fit")
        plugin.on_train_start(trainer, module)
        batch, places = (job.tokens, job.targets), iter(range(10**9))

        def step() -> Tensor:
            place = next(places)
            if place:  # the step before
                plugin.on_train_batch_end(trainer, module, None, batch, place - 1)
            plugin.on_train_batch_start(trainer, module, batch, place)
            with trainer.precision_plugin.train_step_context():
                return job.loss()

        try:
            yield step
        finally:
            plugin.on_train_end(trainer, module)

    return build


ARMS: dict[str, Arm] = {
    "none": plain,
    "activation checkpointing": recomputed,
    "save_on_cpu": on_cpu,
    "plain 4-bit quantizer": plain_quantizer,
    "ours, lossless": ours(bits="lossless"),
    "ours, 8 bits": ours(bits=8),
    "ours, 4 bits": ours(bits=4),
    "ours, 2 bits where linear": ours(bits=2),
}
HEADLINE = "ours, 4 bits"


def measured_steps(size: Size, options: Options, mixed: bool) -> tuple[Table, dict[str, dict[str, Any]]]:
    """A table of all arms, and what was measured of each."""
    measured: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        steps = {}
        for name, build in ARMS.items():
            job = Job(size, options.device, mixed)
            steps[name] = job, stack.enter_context(build(job))
        largest, exact = _largest_saved(*steps["none"]), list[Tensor]()
        for name, (job, step) in steps.items():
            torch.manual_seed(1)  # the same dropout
            step().backward()  # warm-up
            gradients = job.gradients()
            exact = gradients if name == "none" else exact
            kept, peak = _kept_and_peak(job, step)
            own = sum(gradient.nbytes for gradient in gradients)
            bytes_say = kept + own + 3 * largest
            measured[name] = {
                "error": _relative(gradients, exact), "kept_bytes": kept, "peak_bytes": peak, "bytes_say": bytes_say,
                "seconds": [], "time_ratios": [],
            }  # fmt: skip
        others = [name for name in steps if name != "none"]
        for number in range(size.rounds):
            for name in others[number % len(others) :] + others[: number % len(others)]:
                seconds = {}
                # each beside one without anything, first or second by turns: the machine's speed changes by the second
                for which in ("none", name) if number % 2 else (name, "none"):
                    job, step = steps[which]
                    seconds[which] = _seconds(step, options.device)
                    measured[which]["seconds"].append(seconds[which])
                    job.clear()
                measured[name]["time_ratios"].append(seconds[name] / seconds["none"])
        measured["none"]["time_ratios"] = [1.0]
    rows = []
    for name, values in measured.items():
        values["peak_ratio"] = values["peak_bytes"] / measured["none"]["peak_bytes"]
        sizes = (f"{values[key] / 2**20:.1f}" for key in ("peak_bytes", "kept_bytes", "bytes_say"))
        ratios = f"{values['peak_ratio']:.3f}", spread(values["time_ratios"], 2), f"{values['error']:.4f}"
        rows.append((name, *sizes, *ratios))
        print(f"{size}  {'bf16' if mixed else 'fp32'}  " + "  ".join(rows[-1]), flush=True)
    title = f"{size}, {'bf16-mixed' if mixed else 'fp32'}"
    header = (
        "", "peak (MiB)", "kept after forward (MiB)", "kept, gradients and the widest operation (MiB)", "peak / none",
        "time / none", "error of the gradient",
    )  # fmt: skip
    return Table(title, header, rows), measured


def _largest_saved(job: Job, step: Step) -> int:
    """Bytes of the largest tensor that an operation saves."""
    sizes = [0]

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return max(sizes)


def _kept_and_peak(job: Job, step: Step) -> tuple[int, int]:
    """Bytes above those before the step: when forward is over, and the most at any time."""
    job.clear()
    gc.collect()
    if job.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = step()
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        job.clear()
        return kept, torch.cuda.max_memory_allocated() - before
    forward = _allocations(step)
    job.clear()
    whole = _allocations(lambda: step().backward())
    job.clear()
    return forward[0], whole[1]


def _allocations(run: Callable[[], Any]) -> tuple[int, int]:
    """Bytes that are left at the end, while its result is held, and the most at any time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = run()
    del result
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return now, most


def _seconds(step: Step, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device == "cuda" else time.process_time
    begin = clock()
    step().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - begin


def _relative(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, exact, strict=True))
    return math.sqrt(difference / sum(float(b.double().square().sum()) for b in exact))
