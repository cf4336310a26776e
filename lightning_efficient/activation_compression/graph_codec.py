"""Encoding and decoding as graphs: operations that a compiler can take in and put next to those of the model.

The same groups, bounds and kinds of rounding as in :mod:`lightning_efficient.core.quantization`, without anything that
depends on the numbers.
"""

from __future__ import annotations

import hashlib
import pkgutil
from typing import Any

import torch
from torch import Tensor

from lightning_efficient.core.quantization import Quantized, dequantize, payload_bytes, quantize
from lightning_efficient.core.torch_internals import likely_size

__all__ = [
    "CODES",
    "LOGARITHMS",
    "RAW",
    "RECTIFIED",
    "SIGNS",
    "VERSION",
    "decode",
    "encode",
    "group_of",
    "noise_key",
    "seed_noise",
]

RAW, CODES, SIGNS, RECTIFIED, LOGARITHMS = range(5)
"""Ways to keep a tensor: as it is, in codes, which numbers are positive, and in codes with which are positive or with
which are minus infinity."""

_GROUPS = (128, 64, 32)  # neighbours that share a scale, where not all are of a whole number of the first
_UP = 1 + 2.0**-8 * 1.02  # what is rounded to bfloat16 after this is not less than before
_MARGIN = 1 + 2.0**-12  # by which codes stay within their range, whatever float32 rounds
_LEAST_SCALE = 2.0**-100
_NAN = 0x7FC00000  # its bits; others have more
_KEYS = 1 << 62
_STEP = 0x278DDE6E5FD29E85  # odd, and about 2^62 over the golden ratio
_SOURCES = (
    (__package__, "compiled.py"),
    (__package__, "graph_codec.py"),
    (__package__, "graph_uses.py"),
    ("lightning_efficient.core", "quantization.py"),
)
VERSION = hashlib.sha256(b"".join(pkgutil.get_data(*source) or b"" for source in _SOURCES)).hexdigest()[:12]
"""Of the code that torch does not look into: what it keeps on disk shall not outlive it."""
_AT_ONCE = frozenset(("cpu",))
"""Devices for which compilers write so much code for the codec that it takes them longer than the rest."""


def encode(x: Tensor, way: int, bits: int, group: int) -> tuple[Any, ...]:
    """What passes instead of ``x``: its way, its bits, its group, sizes, tensors."""
    order = _memory_order(x)
    numbers = x.permute(order)
    head = way, bits, group, *numbers.shape
    groups = _grouped(numbers.reshape(-1), group)
    if way == SIGNS:
        return *head, _pack_bits(groups if x.dtype == torch.bool else groups > 0)
    key = noise_key(x.device)
    code = _encode_at_once if x.device.type in _AT_ONCE else _encode_groups
    if way == LOGARITHMS:
        nothing = groups == -torch.inf
        most = groups.amax(1, keepdim=True)  # of a number of the group, so that its scale is that of the others
        kept = *code(torch.where(nothing, torch.where(most == -torch.inf, 0, most), groups), key, bits), key
        return *head, *kept, _pack_bits(nothing)
    kept = *code(groups, key, bits), key
    return (*head, *kept, _pack_bits(groups > 0)) if way == RECTIFIED else (*head, *kept)


def decode(packed: tuple[Any, ...], like: Tensor) -> Tensor:
    """A tensor with the type and the strides of ``like``."""
    way, bits, group, *rest = packed
    sizes, tensors = rest[: like.dim()], rest[like.dim() :]
    if way == SIGNS:
        numbers = _unpack_bits(tensors[0], group)
    else:
        make = _decode_at_once if like.device.type in _AT_ONCE else _decode_groups
        codes, scale, minimum, key = tensors[:4]
        numbers = make(codes, scale, minimum, key, bits, group, like.dtype)
        if way == RECTIFIED:  # zeros stay zeros, and what is positive stays so
            numbers = torch.where(_unpack_bits(tensors[4], group), numbers.clamp_min(2.0**-14), 0)
        elif way == LOGARITHMS:
            numbers = torch.where(_unpack_bits(tensors[4], group), -torch.inf, numbers)
    numel = 1
    for size in sizes:
        numel = numel * size
    flat = numbers.reshape(-1)
    if isinstance(numel, int) and numel != flat.shape[0]:
        flat = flat[:numel]
    order = _memory_order(like)
    back = [order.index(dim) for dim in range(len(order))]
    return flat.to(like.dtype).view(sizes).permute(back)


def _encode_groups(groups: Tensor, key: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and minima of ``[groups, group]``: the codec of :func:`quantize`, for a compiler to write out."""
    numbers = groups.float()
    low, high = numbers.amin(1), numbers.amax(1)
    minimum = _to_bfloat16(low - low.abs() * (_UP - 1))
    spread = high - minimum
    scale = _to_bfloat16((spread * (_UP * _MARGIN / ((1 << bits) - 1))).clamp_min(_LEAST_SCALE))
    scale = torch.where(spread < torch.inf, scale, torch.inf)  # then all that is decoded is infinite or not a number
    noise = _noise(key, groups.shape[0], groups.shape[1], groups.device)
    codes = ((numbers - minimum[:, None]) * scale.reciprocal()[:, None] + noise).to(torch.int32)  # none is negative
    if bits == 4:
        codes = codes.view(-1, 2, groups.shape[1] // 2)
        codes = codes[:, 0] | codes[:, 1] << 4
    return codes.to(torch.uint8), scale.to(torch.bfloat16), minimum.to(torch.bfloat16)


def _decode_groups(
    codes: Tensor,
    scale: Tensor,
    minimum: Tensor,
    key: Tensor,
    bits: int,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    """The inverse."""
    codes = codes.to(torch.int32)
    if bits == 4:
        shifts = torch.arange(0, 8, 4, dtype=torch.int32, device=codes.device)
        codes = (codes[:, None] >> shifts[:, None] & 15).view(-1, group)
    noise = _noise(key, codes.shape[0], group, codes.device)
    return ((codes.float() - noise + 0.5) * scale.float()[:, None] + minimum.float()[:, None]).to(dtype)


@torch.library.custom_op(
    f"lightning_efficient::encode_{VERSION}",
    mutates_args=(),
    schema="(Tensor groups, Tensor key, int bits) -> (Tensor, Tensor, Tensor)",
)
def _encode_at_once(groups: Tensor, key: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Likewise with :func:`quantize`, in one operation that no compiler looks into."""
    encoded = quantize(groups.reshape(-1), bits, group_size=groups.shape[1], key=int(key), nonfinite="propagate")
    if encoded is None or encoded.minimum is None:
        raise RuntimeError(f"Nothing was encoded in {bits} bits.")
    return encoded.payload, encoded.scale, encoded.minimum


@_encode_at_once.register_fake
def _(groups: Tensor, key: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    count = groups.shape[0]
    scale, minimum = (groups.new_empty(count, dtype=torch.bfloat16) for _ in range(2))
    return groups.new_empty(payload_bytes(groups.numel(), bits), dtype=torch.uint8), scale, minimum


@torch.library.custom_op(
    f"lightning_efficient::decode_{VERSION}",
    mutates_args=(),
    schema="(Tensor codes, Tensor scale, Tensor minimum, Tensor key, int bits, int group, ScalarType dtype) -> Tensor",
)
def _decode_at_once(
    codes: Tensor, scale: Tensor, minimum: Tensor, key: Tensor, bits: int, group: int, dtype: torch.dtype
) -> Tensor:
    """The inverse."""
    numel = scale.shape[0] * group
    encoded = Quantized(codes, scale, minimum, None, numel, dtype, bits, group, "dither", int(key))
    return dequantize(encoded).view(-1, group)


@_decode_at_once.register_fake
def _(codes: Tensor, scale: Tensor, minimum: Tensor, key: Tensor, bits: int, group: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(scale.shape[0], group, dtype=dtype)


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
    return (x.view(torch.int32).clamp_max(_NAN) + 0x8000 & -0x10000).view(torch.float32)


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
    """The noise of all that is encoded from now on, in its order, is that of ``key``."""
    _first_key[0] = key % _KEYS
    for state in _states.values():
        state.fill_(_first_key[0])


@torch.library.custom_op("lightning_efficient::noise_key", mutates_args=(), schema="(Device device) -> Tensor")
def noise_key(device: torch.device) -> Tensor:
    """Another int64 ``[]`` in each call, of what :func:`seed_noise` was given.

    An operation of its own, so that a compiled graph calls it in each step; its memory on the device stays in place, so
    that a CUDA graph does too.
    """
    if device not in _states:
        _states[device] = torch.full((), _first_key[0], dtype=torch.int64, device=device)
    key = _states[device].clone()
    _states[device].add_(_STEP).bitwise_and_(_KEYS - 1)
    return key


@noise_key.register_fake
def _(device: torch.device) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


def _noise(key: Tensor, groups: int, group: int, device: torch.device) -> Tensor:
    """Of (0, 1), float32 ``[groups, group]``, as even as 65536 values are.

    Each group has a start and an odd factor of its own, from a hash (Mueller's, of two multiplications) of its place
    and the key. No integer overflows on the way: what that gives is not defined in compiled C++.
    """
    h = torch.arange(groups, device=device) ^ (key & 0x7FFFFFFF)
    h = (h ^ (h >> 16)) * 0x45D9F3B & 0xFFFFFFFF
    h = h ^ (key >> 31 & 0x7FFFFFFF)
    h = (h ^ (h >> 16)) * 0x45D9F3B & 0xFFFFFFFF
    start, factor = ((h ^ (h >> 16)) & 0xFFFF).to(torch.int32), ((h >> 17) | 1).to(torch.int32)
    place = torch.arange(group, dtype=torch.int32, device=device) * 31161 & 0xFFFF
    mixed = (start[:, None] ^ place) * factor[:, None] & 0xFFFF  # factors are below 2^15
    return (mixed.float() + 0.5) * 2.0**-16
