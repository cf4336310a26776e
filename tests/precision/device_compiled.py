"""The real compiler takes the kernels, which the interpreter does not tell; run by ``test_device_kernels.py``.

What the host would launch is caught, for tensors that say that they are a GPU's, and compiled for one of 2022. As a
program: a line of JSON that says what went wrong in which.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from lightning_efficient.precision.device import kernels, rows
from lightning_efficient.precision.device.forms import E4M3, E5M2, INT8, SLOT, Form, Noise
from lightning_efficient.precision.device.kernels import codes as encoding
from lightning_efficient.precision.device.verdict import Seen
from lightning_efficient.precision.probes import SIDE
from tests.helpers.interpreter import say_what_went_wrong

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
KINDS = (torch.float32, torch.bfloat16, torch.float16)


def compiled(kernel: JITFunction, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    """As a launch with these arguments would compile it."""
    signature = dict[str, str]()
    constants, attributes = dict[tuple[int, ...], Any](), dict[tuple[int, ...], Any]()
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | named
    for place, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        special = not (parameter.is_constexpr or parameter.do_not_specialize)
        if special and (isinstance(value, torch.Tensor) or value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
        if parameter.is_constexpr or (special and isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
    source = ASTSource(kernel, signature, constants, attributes)
    triton.compile(source, target=TARGET, options={name: given[name] for name in OPTIONS if name in given})


@contextlib.contextmanager
def caught() -> Iterator[None]:
    """Launches compile instead."""
    seen = set[str]()

    def launch(kernel: JITFunction, grid: Any) -> Callable[..., None]:
        def take(*arguments: Any, **named: Any) -> None:
            shown = [f"{a.dtype}" if isinstance(a, torch.Tensor) else a == 1 for a in arguments]
            key = f"{kernel.__name__} {shown} {named}"
            if key not in seen:
                seen.add(key)
                compiled(kernel, arguments, named)

        return take

    names = ("codes", "products", "decisions")
    places = [f"lightning_efficient.precision.device.kernels.{name}.device_of" for name in names]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "__getitem__", launch))
        for place in places:
            stack.enter_context(mock.patch(place, return_value=contextlib.nullcontext()))
        stack.enter_context(
            mock.patch.object(encoding, "noise_table", lambda device: torch.empty(1 << 19, device=device))
        )
        stack.enter_context(FakeTensorMode())
        yield


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def slots() -> torch.Tensor:
    return empty(9, SLOT, dtype=torch.int64)


def codes() -> None:
    forms: tuple[Form, ...] = (INT8, E4M3, E5M2)
    for form, dtype in zip(forms, KINDS, strict=True):
        kernels.measure(empty(300, 200, dtype=dtype), slots(), 3)
        rows_, columns = empty(304, 208, dtype=form.dtype), empty(208, 304, dtype=form.dtype)
        noise = Noise(empty(1, dtype=torch.int64), 4) if dtype == torch.bfloat16 else None
        kernels.encode(empty(300, 200, dtype=dtype), form, slots(), 3, rows_, columns, empty(1), noise)


def sums_and_looks() -> None:
    for dtype in KINDS[:2]:
        out, bias = empty(300, 200, dtype=dtype), empty(200, dtype=dtype)
        kernels.finish(empty(304, 208, dtype=torch.int32), out, bias, slots(), 2, 3)
        kernels.finish(empty(304, 208, dtype=torch.int32), out, None, slots(), 2, 3)
        a, b = empty(300, 96, dtype=dtype), empty(96, 200).t()
        kernels.look(out, a, b, bias, slots(), 3, empty(SIDE, 2), 5)
        kernels.look(out, a, b, None, slots(), 3, empty(SIDE, 2), 5, empty(300, 200))


def high_bits() -> None:
    table, bias = empty(9, rows.WIDTH, dtype=torch.float64), empty(200)
    for high, dtype in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)):
        out = empty(300, 200, dtype=dtype)
        kernels.again(out, empty(300, 96, dtype=dtype), empty(200, 96), bias, high, table, 4)
        kernels.again(out, empty(96, 300, dtype=dtype).t(), empty(96, 200, dtype=dtype).t(), None, high, table, 4)


def decisions() -> None:
    for learning, fixed, protect in (
        (True, False, True),
        (True, True, True),
        (False, False, True),
        (False, False, False),
    ):
        role = "grad_input" if fixed else "forward"
        seen = Seen(1, role, (1, 2, 3), (60000, 50000), 16 if role == "forward" else 0, learning, fixed, protect)
        kernels.decide(empty(9, rows.WIDTH, dtype=torch.float64), slots(), empty(SIDE, 2), seen)


CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check for check in (codes, sums_and_looks, high_bits, decisions)
}

if __name__ == "__main__":
    say_what_went_wrong({name: caught()(check) for name, check in CHECKS.items()})
