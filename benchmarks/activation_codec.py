"""The codec by itself: how far its errors are from what is predicted of them, and how fast it is."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Table
from lightning_efficient.activation_compression.bounds import gradient_deviation
from lightning_efficient.core.quantization import dequantize, quantize

__all__ = ["COPY", "OURS", "predictions", "speeds"]

GROUP = 128

LAYERS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (F.linear, (512, 96), (64, 96)),
    "conv": (lambda x, w: F.conv2d(x, w, padding=1), (16, 16, 24, 24), (24, 16, 3, 3)),
    "conv, strided": (lambda x, w: F.conv2d(x, w, stride=2), (16, 16, 25, 25), (24, 16, 3, 3)),
}


def predictions(draws: int) -> tuple[Table, dict[str, float], dict[str, float], dict[str, float]]:
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


# -- speed -------------------------------------------------------------------------------------------------------------

Codec = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]
COPY, OURS = "copy_", "ours, 4 bits"


def _ours(bits: int) -> Codec:
    return lambda x: quantize(x, bits, group_size=GROUP), dequantize


def _scales(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = x.view(-1, GROUP)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    return groups, ((high - low) / 255).clamp_min(1e-12), low


def _per_channel(x: Tensor) -> Tensor:
    groups, scale, low = _scales(x.float())  # it takes no others
    zeros = (-low / scale).round().clamp(0, 255)
    return torch.quantize_per_channel(groups, scale.view(-1), zeros.view(-1).int(), 0, torch.quint8)


def _divided(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups, scale, low = _scales(x)
    return ((groups - low) / scale).add_(0.5).floor_().to(torch.uint8), scale, low


CODECS: Mapping[str, Codec] = {
    COPY: (lambda x: torch.empty_like(x).copy_(x), lambda x: torch.empty_like(x).copy_(x)),
    "ours, 8 bits": _ours(8),
    OURS: _ours(4),
    "quantize_per_channel, 8 bits": (_per_channel, lambda kept: kept.dequantize()),
    "subtract, divide, floor, to uint8": (_divided, lambda kept: kept[0] * kept[1] + kept[2]),
}


def speeds(numel: int, rounds: int, device: str) -> tuple[Table, dict[str, dict[str, float]]]:
    """Gigabytes of numbers a second that are encoded and decoded, all codecs in turn in each round; medians."""
    rows: list[tuple[str, ...]] = []
    found: dict[str, dict[str, float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        seconds: dict[str, tuple[list[float], list[float]]] = {}
        skipped: dict[str, str] = {}
        for place in range(rounds + 1):
            for name, (encode, decode) in CODECS.items():
                if name in skipped:
                    continue
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # torch means to drop its quantized tensors
                        kept, encoding = _timed(encode, x)
                        _, decoding = _timed(decode, kept)
                except (AttributeError, NotImplementedError, RuntimeError) as error:
                    skipped[name] = str(error).partition("\n")[0]
                    continue
                if place:  # the first is a warm-up
                    both = seconds.setdefault(name, ([], []))
                    both[0].append(encoding)
                    both[1].append(decoding)
        short = "bf16" if dtype == torch.bfloat16 else "fp32"
        for name in CODECS:
            if name in skipped:
                rows.append((f"{name}, {short}", f"skipped: {skipped[name]}", "", "", ""))
                continue
            rates = [x.nbytes / 1e9 / statistics.median(values) for values in seconds[name]]
            parts = [rate / found[f"{COPY}, {short}"]["encode"] if name != COPY else 1.0 for rate in rates]
            found[f"{name}, {short}"] = {"encode": rates[0], "decode": rates[1], "encode_part": parts[0]}
            rows.append((f"{name}, {short}", *(f"{rate:.2f}" for rate in rates), *(f"{part:.2f}" for part in parts)))
    header = "", "encode (GB/s)", "decode (GB/s)", "encode / copy_", "decode / copy_"
    return Table(f"Codec, {numel:,} numbers", header, rows), found


def _timed(function: Callable[[Any], Any], value: Any) -> tuple[Any, float]:
    """What it returns, and the wall time that it took."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    result = function(value)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - begin
