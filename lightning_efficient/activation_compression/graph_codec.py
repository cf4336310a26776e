"""Encoding and decoding as graphs: operations that a compiler can take in and put next to those of the model.

The same groups, bounds and kinds of rounding as in :mod:`lightning_efficient.core.quantization`, without anything that
depends on the numbers; the noise is a hash rather than a table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_efficient.core.torch_internals import likely_size

__all__ = ["CODES", "RAW", "RECTIFIED", "SIGNS", "decode", "encode", "group_of", "noise_key", "seed_noise"]

RAW, CODES, SIGNS, RECTIFIED = range(4)
"""Ways to keep a tensor: as it is, in codes, which numbers are positive, and in codes with which are positive."""

_GROUPS = (128, 64, 32)  # neighbours that share a scale, where not all are of a whole number of the first
_UP = 1 + 2.0**-8 * 1.02  # what is rounded to bfloat16 after this is not less than before
_MARGIN = 1 + 2.0**-12  # by which codes stay within their range, whatever float32 rounds
_LEAST_SCALE = 2.0**-100
_STEP = -7046029254386353131  # 2^64 over the golden ratio, as a signed number


def encode(x: Tensor, way: int, bits: int, group: int, stream: int) -> tuple[Any, ...]:
    """What passes instead of ``x``: its way, its bits, its group, its stream of noise, sizes, tensors."""
    order = _memory_order(x)
    numbers = x.permute(order)
    sizes = tuple(numbers.shape)
    head = way, bits, group, stream, *sizes
    groups = _grouped(numbers.reshape(-1), group)
    if way == SIGNS:
        return *head, _pack_bits(groups if x.dtype == torch.bool else groups > 0)
    numbers = groups.float()
    low, high = numbers.amin(1), numbers.amax(1)
    minimum = _to_bfloat16(low - low.abs() * (_UP - 1))
    spread = high - minimum
    levels = (1 << bits) - 1
    scale = _to_bfloat16((spread * (_UP * _MARGIN / levels)).clamp_min(_LEAST_SCALE))
    scale = torch.where(spread < torch.inf, scale, torch.inf)  # then all that is decoded is infinite or not a number
    key = noise_key(x.device)
    noise = _noise(key, stream, groups.shape[0], group, x.device)
    codes = torch.floor((numbers - minimum[:, None]) * scale.reciprocal()[:, None] + noise).to(torch.int32)
    if bits == 4:
        codes = codes.view(-1, 2, group // 2)
        codes = codes[:, 0] | codes[:, 1] << 4
    kept = codes.to(torch.uint8), scale.to(torch.bfloat16), minimum.to(torch.bfloat16), key
    return (*head, *kept, _pack_bits(groups > 0)) if way == RECTIFIED else (*head, *kept)


def decode(packed: tuple[Any, ...], like: Tensor) -> Tensor:
    """A tensor with the type and the strides of ``like``."""
    way, bits, group, stream, *rest = packed
    sizes, tensors = rest[: like.dim()], rest[like.dim() :]
    if way == SIGNS:
        numbers = _unpack_bits(tensors[0], group)
    else:
        codes, scale, minimum, key = tensors[:4]
        codes = codes.to(torch.int32)
        if bits == 4:
            shifts = torch.arange(0, 8, 4, dtype=torch.int32, device=codes.device)
            codes = (codes[:, None] >> shifts[:, None] & 15).view(-1, group)
        noise = _noise(key, stream, codes.shape[0], group, codes.device)
        numbers = (codes.float() - noise + 0.5) * scale.float()[:, None] + minimum.float()[:, None]
        if way == RECTIFIED:  # zeros stay zeros, and what is positive stays so
            numbers = torch.where(_unpack_bits(tensors[4], group), numbers.clamp_min(2.0**-14), 0)
    numel = 1
    for size in sizes:
        numel = numel * size
    flat = numbers.reshape(-1)
    if isinstance(numel, int) and numel != flat.shape[0]:
        flat = flat[:numel]
    order = _memory_order(like)
    back = [order.index(dim) for dim in range(len(order))]
    return flat.to(like.dtype).view(sizes).permute(back)


def _memory_order(x: Tensor) -> list[int]:
    """Its dimensions, the one with the largest stride first."""
    if x.is_contiguous():
        return list(range(x.dim()))
    return sorted(range(x.dim()), key=lambda dim: (-likely_size(x.stride()[dim]), dim))


def group_of(numel: Any, group: int) -> int:
    """The group that numbers can be put in; zero if there is none."""
    if isinstance(numel, int):
        return group  # the last one is filled up
    return next((size for size in (group, *_GROUPS) if _divides(size, numel)), 0)


def _divides(size: int, numel: Any) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(numel % size == 0)


def _grouped(flat: Tensor, group: int) -> Tensor:
    """``[n]`` as ``[groups, group]``; the last one filled up with its last number."""
    if isinstance(flat.shape[0], int) and (missing := -flat.shape[0] % group):
        flat = torch.cat([flat, flat[-1:].expand(missing)])
    return flat.view(-1, group)


def _to_bfloat16(x: Tensor) -> Tensor:
    """Float32 numbers that bfloat16 has too: a compiler may drop a conversion there and back, but not this."""
    return (x.view(torch.int32) + 0x8000 & -0x10000).view(torch.float32)


def _pack_bits(bits: Tensor) -> Tensor:
    """``[groups, group]`` as uint8 ``[groups, group / 8]``."""
    parts = bits.to(torch.int32).view(bits.shape[0], 8, -1)
    packed = parts[:, 0]
    for place in range(1, 8):
        packed = packed | parts[:, place] << place
    return packed.to(torch.uint8)


def _unpack_bits(packed: Tensor, group: int) -> Tensor:
    shifts = torch.arange(8, dtype=torch.int32, device=packed.device)
    return (packed.to(torch.int32)[:, None] >> shifts[:, None] & 1).view(-1, group) != 0


# -- noise -------------------------------------------------------------------------------------------------------------


_states: dict[torch.device, Tensor] = {}
_first_key = [0]


def seed_noise(key: int) -> None:
    """The noise of all that is encoded from now on, in its order, is that of ``key`` (0 to 2^63 - 1)."""
    _first_key[0] = key
    for state in _states.values():
        state.fill_(key)


@torch.library.custom_op("lightning_efficient::noise_key", mutates_args=(), schema="(Device device) -> Tensor")
def noise_key(device: torch.device) -> Tensor:
    """Another int64 ``[]`` in each call, of what :func:`seed_noise` was given.

    An operation of its own, so that a compiled graph calls it in each step; its memory on the device stays in place, so
    that a CUDA graph does too.
    """
    if device not in _states:
        _states[device] = torch.full((), _first_key[0], dtype=torch.int64, device=device)
    key = _states[device].clone()
    _states[device].add_(_STEP)
    return key


@noise_key.register_fake
def _(device: torch.device) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


def _noise(key: Tensor, stream: int, groups: int, group: int, device: torch.device) -> Tensor:
    """Of (0, 1), float32 ``[groups, group]``: a hash of the place, the stream and the key, with the shifts and factors
    of Wellons 2018, "Prospecting for hash functions" (lowbias32).
    """
    first = torch.arange(groups, dtype=torch.int32, device=device) * group
    place = first[:, None] + torch.arange(group, dtype=torch.int32, device=device)
    low, high = key.to(torch.int32), (key >> 32).to(torch.int32)
    h = place ^ low ^ stream
    h = (h ^ h >> 16 & 0xFFFF) * 0x7FEB352D
    h = (h ^ high ^ h >> 15 & 0x1FFFF) * -2073254261
    h = h ^ h >> 16 & 0xFFFF
    return ((h & 0xFFFF).float() + 0.5) * 2.0**-16
