"""What the kernels do, by torch's operations: for a device without them, and to hold them to."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_efficient.core.random import TABLE, mix, noise_at, noise_table
from lightning_efficient.precision.device.forms import INT8, Form, Noise
from lightning_efficient.precision.device.probes import sampled
from lightning_efficient.precision.device.rows import FLAG
from lightning_efficient.precision.device.verdict import decide
from lightning_efficient.precision.probes import places

__all__ = ["again", "decide", "encode", "finish", "look", "measure"]


def measure(values: Tensor, measured: Tensor, slot: int) -> None:
    """See ``kernels/codes.py``."""
    measured[slot, 0] = torch.maximum(measured[slot, 0], _largest(values))


def encode(
    values: Tensor, form: Form, measured: Tensor, slot: int, rows: Tensor, columns: Tensor, scale: Tensor,
    noise: Noise | None,
) -> None:  # fmt: skip
    """See ``kernels/codes.py``."""
    largest = measured[slot, 0]
    exponent = _shared(largest, form.least)
    if form is not INT8:
        exponent = exponent.clamp(max=126)
    x = torch.where(largest < 0x7F800000, values.float(), 0.0)
    scaled = _times_power(x, exponent)
    if form is INT8:
        rounded = scaled.round() if noise is None else (scaled + _noise(noise, x)).floor()
        after = rounded.clamp(-127, 127)
        beyond = (after != rounded).sum()
    else:
        after, beyond = scaled.to(form.dtype).float(), scaled.new_zeros((), dtype=torch.int64)
    rows.view(torch.int8).zero_()
    rows[: x.shape[0], : x.shape[1]] = after.to(form.dtype)
    columns.view(torch.int8).copy_(rows.view(torch.int8).t())
    one = float(1 << form.fraction)
    measured[slot, 1:6] = torch.stack([
        beyond, ((after == 0) & (x != 0)).sum(), (x != 0).sum(), (scaled.abs() * one).long().sum(),
        (after.abs() * one).long().sum(),
    ])  # fmt: skip
    scale.copy_(_times_power(torch.ones_like(scale), -exponent))


def finish(sums: Tensor, out: Tensor, bias: Tensor | None, measured: Tensor, one: int, other: int) -> None:
    """See ``kernels/products.py``."""
    exponent = _shared(measured[one, 0], INT8.least) + _shared(measured[other, 0], INT8.least)
    found = _times_power(sums[: out.shape[0], : out.shape[1]].float(), -exponent)
    out.copy_(found if bias is None else found + bias.float())


def look(
    out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, measured: Tensor, slot: int, probes: Tensor, at: int,
    result: Tensor | None = None,
) -> None:  # fmt: skip
    """See ``kernels/products.py``."""
    flat = (out if result is None else result).view(-1)
    count, every = sampled(flat.numel())
    place = torch.arange(count, device=flat.device)
    measure(flat[place // 64 * (64 * every) + place % 64], measured, slot)
    rows, columns = (torch.tensor(places(size, at), dtype=torch.long, device=out.device) for size in out.shape)
    exact = a[rows].float() @ b[columns].float().t()
    if bias is not None:
        exact += bias[columns].float()
    off = out[rows][:, columns].float() - exact
    probes[: rows.numel()] = torch.stack([off.square().sum(1), exact.square().sum(1)], 1)


def again(
    out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, high: torch.dtype, state: Tensor, row: int,
    column: int = FLAG,
) -> None:  # fmt: skip
    """See ``kernels/products.py``."""
    if state[row, column] == 0:
        return
    found = a.to(high).float() @ b.to(high).float().t()
    if bias is not None:
        found += bias.to(high).float()
    out.copy_(found.to(high))


def _largest(values: Tensor) -> Tensor:
    return (values.reshape(-1).float().view(torch.int32) & 0x7FFFFFFF).amax().long()


def _shared(largest: Tensor, least: int) -> Tensor:
    """Q, see ``kernels/numbers.py``."""
    exponent = torch.frexp(largest.int().view(torch.float32)).exponent
    return torch.where((largest > 0) & (largest < 0x7F800000), least - exponent, 0)


def _times_power(x: Tensor, exponent: Tensor) -> Tensor:
    near = (exponent >= -126) & (exponent <= 126)
    half = torch.where(near, exponent, exponent >> 1)
    return x * _power(half) * _power(torch.where(near, 0, exponent - half))


def _power(exponent: Tensor) -> Tensor:
    return ((exponent.clamp(-126, 127).int() + 127) << 23).view(torch.float32)


def _noise(noise: Noise, like: Tensor) -> Tensor:
    table, numel = noise_table(like.device), like.numel()
    key = mix(int(noise.seed) & ((1 << 64) - 1), noise.count)
    parts = [table[noise_at(key, part) :][: min(TABLE, numel - part * TABLE)] for part in range(-(-numel // TABLE))]
    return torch.cat(parts).view(like.shape)
