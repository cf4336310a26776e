"""What compressed activations save and cost, against none, recomputation, ``save_on_cpu`` and a plain quantizer.

Peak: bytes allocated above the step's start, counted by torch's profiler in a step of its own. Time: CPU time of the
process for forward and backward, all arms in turn in each round. Loss: whole runs with the Trainer.
"""

from __future__ import annotations

import contextlib
import math
import statistics
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

from benchmarks.harness import Options, Result, Table, spread
from lightning_efficient import ActivationCompressionPlugin
from lightning_efficient.activation_compression.bounds import gradient_deviation
from lightning_efficient.activation_compression.classify import EXACT, Classifier
from lightning_efficient.activation_compression.layers import follow_modules
from lightning_efficient.activation_compression.rates import LayerRates
from lightning_efficient.core.quantization import dequantize, quantize
from lightning_efficient.demos import ByteLanguageModel, StdlibDataModule
from lightning_efficient.demos.model import Attention, ByteTransformer

__all__ = ["run"]


# -- one step ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """A GPT and a batch."""

    width: int
    tokens: int
    dropout: float  # of the embeddings and the branches
    rounds: int

    def __str__(self) -> str:
        return f"width {self.width}, {self.tokens:,} tokens, dropout {self.dropout}"


SIZES = (Size(256, 1024, 0.1, 15), Size(256, 1024, 0.0, 9), Size(512, 4096, 0.1, 3))
QUICK = (Size(64, 128, 0.1, 2),)


class Job:
    """Forward and backward of a four-layer GPT."""

    def __init__(self, size: Size, device: str, mixed: bool) -> None:
        torch.manual_seed(0)
        context = min(256, size.tokens)
        heads = max(1, size.width // 64)
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


Step = Callable[[], None]


def plain(job: Job) -> Iterator[Step]:
    yield lambda: job.loss().backward()


def recomputed(job: Job) -> Iterator[Step]:
    yield lambda: job.loss(lambda layer, hidden: checkpoint(layer, hidden, use_reentrant=False)).backward()


def on_cpu(job: Job) -> Iterator[Step]:
    def step() -> None:
        with save_on_cpu():
            loss = job.loss()
        loss.backward()

    yield step


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

    def step() -> None:
        with saved_tensors_hooks(pack, unpack):
            loss = job.loss()
        loss.backward()

    yield step


def ours(bits: int) -> Callable[[Job], Iterator[Step]]:
    def build(job: Job) -> Iterator[Step]:
        chosen = Classifier(LayerRates(bits))
        keys = iter(range(10**9))

        def step() -> None:
            held = [*job.model.parameters(), *job.model.buffers(), job.tokens, job.targets]
            chosen.begin(held, next(keys))
            with saved_tensors_hooks(chosen.saved.pack, chosen.saved.unpack), chosen.operation:
                loss = job.loss()
            chosen.end()
            loss.backward()

        with follow_modules(job.model, chosen.layers):
            yield step

    return build


ARMS: dict[str, Callable[[Job], Iterator[Step]]] = {
    "none": plain,
    "activation checkpointing": recomputed,
    "save_on_cpu": on_cpu,
    "plain 4-bit quantizer": plain_quantizer,
    "ours, lossless": ours(EXACT),
    "ours, 8 bits": ours(8),
    "ours, 4 bits": ours(4),
    "ours, 2 bits where linear": ours(2),
}
HEADLINE = "ours, 4 bits"


def _steps(size: Size, options: Options, mixed: bool) -> tuple[Table, dict[str, dict[str, Any]]]:
    measured: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        steps = {}
        for name, build in ARMS.items():
            job = Job(size, options.device, mixed)
            steps[name] = job, stack.enter_context(contextlib.contextmanager(build)(job))
        for name, (job, step) in steps.items():
            torch.manual_seed(1)  # the same dropout
            step()  # warm-up
            measured[name] = {"gradients": job.gradients(), "peak_bytes": _peak(job, step), "seconds": []}
        for number in range(size.rounds):
            names = list(steps)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                job, step = steps[name]
                job.clear()
                measured[name]["seconds"].append(_seconds(step, options.device))
    exact = measured["none"]["gradients"]
    rows = []
    for name, values in measured.items():
        values["error"] = _relative(values.pop("gradients"), exact)
        values["peak_ratio"] = values["peak_bytes"] / measured["none"]["peak_bytes"]
        values["time_ratios"] = [a / b for a, b in zip(values["seconds"], measured["none"]["seconds"], strict=True)]
        rows.append(
            (
                name, f"{values['peak_bytes'] / 2**20:.1f}", f"{values['peak_ratio']:.3f}",
                spread(values["time_ratios"], 2), f"{values['error']:.4f}",
            )
        )  # fmt: skip
        print(f"{size}  {'bf16' if mixed else 'fp32'}  " + "  ".join(rows[-1]), flush=True)
    title = f"{size}, {'bf16-mixed' if mixed else 'fp32'}"
    header = ("", "peak (MiB)", "peak / none", "time / none", "error of the gradient")
    return Table(title, header, rows), measured


def _peak(job: Job, step: Step) -> int:
    """Most bytes above those before the step, as they are allocated and freed."""
    job.clear()
    if job.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def _seconds(step: Step, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device == "cuda" else time.process_time
    begin = clock()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - begin


def _relative(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, exact, strict=True))
    return math.sqrt(difference / sum(float(b.double().square().sum()) for b in exact))


# -- the loss ----------------------------------------------------------------------------------------------------------

LOSS_ARMS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "4 bits": {"bits": 4},
    "2 bits where linear": {"bits": 2},
    "adaptive, 4 bits": {"bits": 4, "adaptive": {"every": 50, "target": 0.1}},
    "8 to 2 bits where linear": {"schedule": {"initial_bits": 8, "final_bits": 2, "begin": 0.05, "end": 0.5}},
    "2 bits everywhere": {"bits": 2, "overrides": {"*": 2}},
}


class Digits(pl.LightningModule):
    """A small ResNet on scikit-learn's digits (8 by 8 pixels)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(*[_ResidualBlock(width) for _ in range(3)])
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.1)  # or a few images are all of the loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.1))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.branch(x))


def _digits(seed: int) -> tuple[Any, Any] | None:
    """Loaders for training and validation; None where scikit-learn is not installed."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        return None
    images, labels = load_digits(return_X_y=True)
    data = torch.utils.data.TensorDataset(
        torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    )
    train, validation = torch.utils.data.random_split(data, [1297, 500], torch.Generator().manual_seed(0))
    order = torch.Generator().manual_seed(seed)
    return (
        torch.utils.data.DataLoader(train, batch_size=64, shuffle=True, generator=order),
        torch.utils.data.DataLoader(validation, batch_size=500),
    )


def _language(seed: int) -> tuple[pl.LightningModule, dict[str, Any]]:
    model = ByteLanguageModel(layers=2, width=64, heads=4, context=64, learning_rate=1e-3, warmup_steps=20)
    return model, {"datamodule": StdlibDataModule(context=64, batch_size=16, seed=seed, validation_bytes=65536)}


def _final_loss(task: str, arguments: dict[str, Any] | None, seed: int, options: Options) -> float:
    pl.seed_everything(seed, verbose=False)
    steps = 8 if options.quick else 300
    if task == "byte language model":
        model, data = _language(seed)
    else:
        loaders = _digits(seed)
        assert loaders is not None
        model, data = Digits(), {"train_dataloaders": loaders[0], "val_dataloaders": loaders[1]}
    trainer = pl.Trainer(
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=1.0 if not options.quick else 1,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=steps,
        callbacks=[ActivationCompressionPlugin(**arguments)] if arguments is not None else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, **data)
    return float(trainer.callback_metrics["val_loss"])


def _losses(options: Options) -> tuple[list[Table], dict[str, dict[str, list[float]]]]:
    tasks = ["byte language model"] + (["ResNet on digits"] if _digits(0) is not None else [])
    found: dict[str, dict[str, list[float]]] = {}
    tables = []
    for task in tasks:
        found[task] = {}
        rows = []
        for name, arguments in LOSS_ARMS.items():
            found[task][name] = [_final_loss(task, arguments, seed, options) for seed in options.seeds]
            gap = _gap(found[task][name], found[task]["none"])
            mean = statistics.fmean(found[task][name]) - statistics.fmean(found[task]["none"])
            shown = ("-", "-") if name == "none" else (f"{mean:+.4f}", f"{gap:+.1f}")
            rows.append((name, spread(found[task][name], 4), *shown))
            print(f"{task}  " + "  ".join(rows[-1]), flush=True)
        tables.append(
            Table(f"{task}, {len(options.seeds)} seeds", ("", "final validation loss", "difference", "gap (SE)"), rows)
        )
    return tables, found


def _gap(losses: Sequence[float], plain_losses: Sequence[float]) -> float:
    """Mean difference from the run of the same seed, in standard errors of it."""
    differences = [loss - plain for loss, plain in zip(losses, plain_losses, strict=True)]
    if len(differences) < 2:
        return 0.0
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences) / error if error else 0.0


# -- predictions -------------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (F.linear, (512, 96), (64, 96)),
    "conv": (lambda x, w: F.conv2d(x, w, padding=1), (16, 16, 24, 24), (24, 16, 3, 3)),
    "conv, strided": (lambda x, w: F.conv2d(x, w, stride=2), (16, 16, 25, 25), (24, 16, 3, 3)),
}


def _predictions(draws: int) -> tuple[Table, dict[str, float], dict[str, float], dict[str, float]]:
    """How far predicted deviations of gradients are from measured ones, and means of 64 draws from the exact ones."""
    rows, sigma, bias, beyond = [], {}, {}, {}
    for name, (layer, shape, weight_shape) in LAYERS.items():
        torch.manual_seed(0)
        x, weight = torch.randn(shape), torch.randn(weight_shape).requires_grad_()
        out = layer(x, weight)
        loss = torch.randn_like(out)
        exact = torch.autograd.grad(out, weight, loss)[0].double()
        squares = float(loss.double().square().sum() / weight_shape[0])
        errors, scales = [], []
        for key in range(draws):
            encoded = quantize(x.view(-1), 4, key=key)
            assert encoded is not None
            scales.append(float(encoded.scale.double().square().mean()))
            noisy = dequantize(encoded).view(shape)
            found = torch.autograd.grad(layer(noisy, weight), weight, loss)[0].double()
            errors.append(found - exact)
        stacked = torch.stack(errors)
        bound = math.sqrt(statistics.fmean(scales)) / 2
        predicted, measured = gradient_deviation(bound, squares, 1.0), float(stacked.square().mean().sqrt())
        sigma[name] = predicted / measured - 1
        score = stacked.mean(0) / (stacked.std(0) / math.sqrt(draws))
        bias[name] = float(score.square().mean().sqrt())
        beyond[name] = float((score.abs() > 4).double().mean())
        shown = f"{sigma[name]:+.1%}", f"{bias[name]:.2f}", f"{beyond[name]:.3%}"
        rows.append((name, f"{predicted:.4g}", f"{measured:.4g}", *shown))
    header = (
        "", "predicted deviation", "measured", "off by", "mean error over its standard error (RMS)",
        "elements beyond 4 standard errors (by chance: 0.017 %)",
    )  # fmt: skip
    return Table(f"Error of the weight's gradient, 4 bits, {draws} draws", header, rows), sigma, bias, beyond


def run(options: Options) -> Result:
    """All of it; about half an hour on one core."""
    torch.set_num_threads(options.threads)
    tables, raw = [], {}
    for size in QUICK if options.quick else SIZES:
        for mixed in (False, True):
            table, measured = _steps(size, options, mixed)
            tables.append(table)
            raw[table.title] = measured
    first = list(raw)[:2]
    headline, mixed_headline = (raw[title][HEADLINE] for title in first)
    prediction, sigma, bias, beyond = _predictions(8 if options.quick else 64)
    loss_tables, losses = _losses(options)
    claimed = ("4 bits", "2 bits where linear", "adaptive, 4 bits")
    gaps = [_gap(found[name], found["none"]) for found in losses.values() for name in claimed]
    blanket = [_gap(found["2 bits everywhere"], found["none"]) for found in losses.values()]
    return Result(
        "activation",
        {
            "peak_ratio": headline["peak_ratio"],
            "time_ratio": statistics.median(headline["time_ratios"]),
            "checkpointing_peak_ratio": raw[first[0]]["activation checkpointing"]["peak_ratio"],
            "checkpointing_time_ratio": statistics.median(raw[first[0]]["activation checkpointing"]["time_ratios"]),
            "bf16_peak_ratio": mixed_headline["peak_ratio"],
            "bf16_time_ratio": statistics.median(mixed_headline["time_ratios"]),
            "loss_gap": max(gaps),
            "loss_gap_2_bits_everywhere": max(blanket),
            "sigma_error": max(abs(value) for value in sigma.values()),
            "bias": max(bias.values()),
            "beyond_4_se": max(beyond.values()),
        },
        [*tables, prediction, *loss_tables],
        raw={"steps": raw, "losses": losses, "sigma": sigma, "bias": bias},
        notes=[
            "Four-layer GPT (byte-level), forward and backward. Peak: bytes allocated above those before the step, in "
            "a step of its own. Time: CPU time of the process (on a GPU: wall time), over that of the arm without "
            "anything in the same round; median and range over the rounds.",
            "Error of the gradient: the norm of the difference from the exact one over its norm, one draw.",
            "Gap: difference from the run without compression of the same seed (same weights, batches and dropout), "
            "the mean over its standard error.",
        ],
    )
