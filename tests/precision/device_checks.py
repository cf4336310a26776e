"""The kernels of ``precision/device`` against the eager code; run by ``test_device_kernels.py``.

As a program: all of them in the interpreter, and a line of JSON that says what went wrong in which.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_efficient.core.random import mix
from lightning_efficient.precision.device import eager, rows
from lightning_efficient.precision.device.forms import E4M3, E5M2, INT8, SLOT, Form, Noise, filled
from lightning_efficient.precision.device.verdict import Seen, decide
from lightning_efficient.precision.integers import largest_magnitude, to_integers
from lightning_efficient.precision.nodes import ROLES, Node
from lightning_efficient.precision.probes import SIDE
from lightning_efficient.precision.signs import Limits, one_run_in, shared_exponent
from lightning_efficient.precision.status import ReturnPolicy, Run
from tests.helpers.interpreter import look_once, say_what_went_wrong
from tests.precision.device_network import compare

Encodings = tuple[Tensor, Tensor, Tensor, Tensor]


def kernels() -> Any:
    return importlib.import_module("lightning_efficient.precision.device.kernels")


def encoded(with_: Any, values: Tensor, form: Form, noise: Noise | None = None) -> Encodings:
    """What is measured, codes, codes the other way round, the unit."""
    measured = torch.zeros(3, SLOT, dtype=torch.int64, device=values.device)
    high, wide = filled(values.shape[0]), filled(values.shape[1])
    codes = torch.empty(high, wide, dtype=form.dtype, device=values.device)
    columns = torch.empty(wide, high, dtype=form.dtype, device=values.device)
    scale = torch.empty(1, device=values.device)
    with_.measure(values, measured, 1)
    with_.encode(values, form, measured, 1, codes, columns, scale, noise)
    return measured.cpu(), codes.view(torch.int8).cpu(), columns.view(torch.int8).cpu(), scale.cpu()


def numbers(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def compare_codes(values: Tensor, form: Form, device: str, noise: int | None = None) -> Encodings:
    made = []
    for with_, where in ((eager, "cpu"), (kernels(), device)):
        seed = torch.tensor([-(1 << 61) + 12345], device=where)
        made.append(encoded(with_, values.to(where), form, Noise(seed, noise) if noise is not None else None))
    for what, one, other in zip(("measured", "codes", "columns", "scale"), *made, strict=True):
        assert torch.equal(one, other), f"{what}: {form.name} {tuple(values.shape)} {values.dtype} {one} {other}"
    return made[0]


def codes_are_those_of_the_eager_code(device: str) -> None:
    types = (torch.float32, torch.bfloat16, torch.float16)
    for form, dtype in [*zip((INT8, E4M3, E5M2), types, strict=True), *((INT8, dtype) for dtype in types[1:])]:
        compare_codes(numbers(70, 150, dtype=dtype), form, device)
    for form, shape in ((INT8, (1, 1)), (E5M2, (33, 16)), (INT8, (5, 300))):
        compare_codes(numbers(*shape), form, device)


def numbers_of_all_sizes_and_none(device: str) -> None:
    for form, size in itertools.product((INT8, E4M3, E5M2), (0.0, 1e-44, 1e-38, 1e-20, 1e20, 1e38)):
        compare_codes(numbers(20, 40) * size, form, device)
    wide = torch.exp2(torch.arange(-40.0, 24.0)).repeat(2, 1) * torch.tensor([[1.0], [-1.37]])
    ties = torch.arange(-255, 256).view(7, 73) / 2
    for form, values, bad in itertools.product(
        (INT8, E4M3, E5M2), (wide, ties), (None, float("nan"), float("inf"), -float("inf"))
    ):
        values = values.clone()
        if bad is not None:
            values[1, 2] = bad
        compare_codes(values, form, device)


def integers_are_those_of_a_cpu(device: str) -> None:
    """The same codes and the same signs as ``integers.py`` has; with noise, too, across pieces of its table."""
    for count, (shape, noise) in enumerate([((40, 70), None), ((260, 1010), 3), ((9, 17), 4)]):
        values = numbers(*shape, scale=10.0**-count)
        exponent = shared_exponent(largest_magnitude(values), 8)
        assert exponent is not None
        key = None
        if noise is not None:
            key = mix((-(1 << 61) + 12345) & ((1 << 64) - 1), noise)
        integers, there = to_integers(values, exponent, key=key)
        few = one_run_in(values.numel(), 2) == 1  # all of which a CPU looks at too
        measured, codes, columns, _ = compare_codes(values, INT8, device, noise)
        inside = codes[: shape[0], : shape[1]]
        assert torch.equal(inside, integers.codes)
        assert not codes[shape[0] :].any()
        assert not codes[:, shape[1] :].any()
        assert torch.equal(codes.t(), columns)
        over, under, some, before, after = measured[1, 1:6].tolist()
        assert math.isclose(over / values.numel(), there.overflow, abs_tol=1e-9 if few else 1e-3)
        assert math.isclose(under / some, there.underflow, rel_tol=1e-9 if few else 0.1)
        assert math.isclose(
            math.log2(abs(before - after) / before + 1), there.error or 0.0, abs_tol=1e-5 if few else 1e-2
        )


def floats_of_eight_bits_are_those_of_torch(device: str) -> None:
    for form in (E4M3, E5M2):
        values = numbers(64, 64) * torch.exp2(numbers(64, 64) * 6)
        _, codes, _, scale = compare_codes(values, form, device)
        assert torch.equal(codes.view(form.dtype).float(), (values / scale).to(form.dtype).float())


def sums_become_numbers(device: str) -> None:
    for dtype, exponents in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), ((1.0, 1.0), (1e-30, 1e-12), (1e30, 1e-30))
    ):
        sums = torch.randint(-(1 << 20), 1 << 20, (48, 320), dtype=torch.int32)
        bias = numbers(290)
        found = []
        for with_, where in ((eager, "cpu"), (kernels(), device)):
            measured = torch.zeros(2, SLOT, dtype=torch.int64, device=where)
            for slot, size in enumerate(exponents):
                with_.measure(torch.full((3,), size, device=where), measured, slot)
            out = torch.empty(41, 290, dtype=dtype, device=where)
            with_.finish(sums.to(where), out, bias.to(where), measured, 0, 1)
            found.append(out.cpu())
        assert torch.equal(*found), (dtype, exponents)


def blocks_and_samples_are_looked_at(device: str) -> None:
    for shape, dtype, at in itertools.product(
        ((5, 7, 9), (40, 700, 50), (17, 16, 300)), (torch.float32, torch.bfloat16), (0, 11)
    ):
        if at == 0 and shape != (40, 700, 50):
            continue
        rows_, columns, terms = shape
        a, b, bias = numbers(rows_, terms, dtype=dtype), numbers(terms, columns, dtype=dtype).t(), numbers(columns)
        out = (a.float() @ b.float().t() + bias).to(dtype) * 1.01
        result = numbers(rows_, columns)
        result.view(-1)[5] = 777.0
        found = []
        for with_, where in ((eager, "cpu"), (kernels(), device)):
            measured = torch.zeros(2, SLOT, dtype=torch.int64, device=where)
            probes = torch.zeros(SIDE, 2, device=where)
            out_, a_, b_, bias_, result_ = (t.to(where) for t in (out, a, b, bias, result))
            with_.look(out_, a_, b_, bias_, measured, 0, probes, at)
            with_.look(out_, a_, b_, None, measured, 1, probes.clone(), at, result_)
            found.append((measured.cpu(), probes.cpu()))
        assert torch.equal(found[0][0], found[1][0])
        torch.testing.assert_close(found[0][1], found[1][1], rtol=2e-3, atol=1e-4)


def high_bits_come_only_where_the_flag_is_set(device: str) -> None:
    for high, dtype, (flipped_a, flipped_b) in itertools.product(
        (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), ((False, False), (True, True), (False, True))
    ):
        a = numbers(70, 45, dtype=dtype) if not flipped_a else numbers(45, 70, dtype=dtype).t()
        b = numbers(50, 45) if not flipped_b else numbers(45, 50).t()
        bias = numbers(50)
        exact = a.to(high).double() @ b.to(high).double().t() + bias.to(high)
        state = torch.zeros(4, rows.WIDTH, dtype=torch.float64, device=device)
        state[3, rows.FLAG] = 1.0
        for row in (2, 3):
            out = torch.full((70, 50), 5.0, dtype=dtype, device=device)
            kernels().again(out, *(t.to(device) for t in (a, b, bias)), high, state, row)
            if row == 2:
                assert (out == 5).all()
            else:
                other = torch.zeros(70, 50, dtype=dtype)
                eager.again(other, a, b, bias, high, state.cpu(), row)
                near = 1e-5 if (high, dtype) == (torch.float32, torch.float32) else 2.0**-7
                torch.testing.assert_close(out.cpu().double(), exact, rtol=near, atol=near)
                torch.testing.assert_close(other.double(), exact, rtol=near, atol=near)


def bits(value: float) -> int:
    return int(torch.tensor(value).view(torch.int32)) & 0x7FFFFFFF


def measurements(draw: random.Random, step: int) -> Iterator[tuple[list[list[int]], list[list[float]]]]:
    """Slots of two operands and a result, and probes: mostly healthy, with faults of all kinds."""
    for role in draw.sample(ROLES, k=3):
        fault = draw.choice(["nan", "zero", "over", "under", "error", "jump", "probe", "result", "none", "swap"])
        fault = fault if draw.random() < (0.35 if step % 40 > 3 else 0.05) else "none"
        slots = []
        for at in range(2):
            numel, size = 4096, math.ldexp(draw.uniform(0.5, 1), draw.choice([-1, 0, 0, 0, 1]))
            some = draw.randint(3900, 4096)
            over, under = draw.randint(0, 30), draw.randint(0, 40)
            before = draw.randint(10**8, 10**9)
            after = before + draw.randint(-(10**6), 10**6)
            if at == draw.randint(0, 1):
                size = {"nan": draw.choice([math.nan, math.inf]), "zero": 0.0, "jump": size * 2.0**14}.get(fault, size)
                over, under = (900 if fault == "over" else over), (1800 if fault == "under" else under)
                after = int(before * 1.4) if fault == "error" else after
            if size == 0:
                over = under = some = before = after = 0
            slots.append([bits(size), over, under, some, before, after, 0, 0])
            assert numel == 4096
        size = math.ldexp(draw.uniform(0.5, 1), draw.choice([3, 4, 4, 5]) + (20 if fault == "result" else 0))
        size = draw.choice([math.nan, 0.0]) if fault == "swap" else size
        slots.append([bits(size), 0, 0, 0, 0, 0, 0, 0])
        off = draw.uniform(0, 0.02) if fault != "probe" else draw.choice([1.7, math.nan])
        yield role, slots, [[off * off, 1.0] if size else [0.0, 0.0] for _ in range(SIDE)]  # type: ignore[misc]


def decisions_are_those_of_the_rules(device: str) -> None:
    """Some hundred random products, with faults: the same decisions, reasons and state as the rules in Python give."""
    for seed, fixed, protect, steps in ((19, False, True, 24), (1, True, True, 6), (2, False, False, 6)):
        draw = random.Random(seed)
        policy = ReturnPolicy(return_after=2, retry_rate=0.05)
        limits = Limits(overflow=0.02, underflow=0.03) if fixed else None
        nodes = [Node(str(number), "linear", policy, limits) for number in range(2)]
        table = torch.cat([rows.run_row(policy, Run())[None], *map(rows.store_node, nodes)])
        states = {"eager": table.clone(), "kernel": table.to(device)}
        flags, reasons = set[float](), set[int]()
        for step in range(steps):
            for state in states.values():
                state[:, rows.DOUBT] = 0
            for number, (role, slots, probes) in itertools.product(range(2), [*measurements(draw, step)]):  # type: ignore[misc]
                learning = step < 3
                seen = Seen(1 + rows.ROWS * number, role, (0, 1, 2), (4096, 4096), SIDE, learning=learning,
                            fixed=fixed, protect=protect)  # fmt: skip
                decide(states["eager"], torch.tensor(slots), torch.tensor(probes), seen)
                kernels().decide(
                    states["kernel"], torch.tensor(slots, device=device), torch.tensor(probes, device=device), seen
                )
                one, other = states["eager"], states["kernel"].cpu()
                row = seen.rows[2]
                where = f"{seed=} {step=} {role=} {number=} {slots=}"
                names = [rows.reason_of(state[row].tolist(), role) for state in (one, other)]
                assert names[0] == names[1], f"{where}: {names}"
                known = torch.ones(rows.WIDTH, dtype=torch.bool)
                known[rows.REASON : rows.LIMIT + 1] = False
                torch.testing.assert_close(
                    torch.where(known, other, 0.0),
                    torch.where(known, one, 0.0),
                    rtol=1e-12,
                    atol=1e-12,
                    msg=lambda m, w=where: w + m,
                )
                flags.add(float(one[row, rows.FLAG]) + 10 * (not learning))
                if learning is False and one[row, rows.FLAG]:
                    reasons.add(int(one[row, rows.REASON]) % rows.OPERAND)
        if protect and not fixed:
            assert flags == {1.0, 10.0, 11.0}
            assert len(reasons) > 6, reasons


def networks_train_as_with_the_immediate_engine(device: str) -> None:
    """Forward and backward, in health and with faults: the same retries, counters and exponents."""
    assert compare(kernels(), device=device, faults=("gradient jump",), between=1, healthy=1, learning=2) > 8


CHECKS: dict[str, Callable[[str], None]] = {
    check.__name__: check
    for check in (
        codes_are_those_of_the_eager_code, numbers_of_all_sizes_and_none, integers_are_those_of_a_cpu,
        floats_of_eight_bits_are_those_of_torch, sums_become_numbers, blocks_and_samples_are_looked_at,
        high_bits_come_only_where_the_flag_is_set, decisions_are_those_of_the_rules,
        networks_train_as_with_the_immediate_engine,
    )
}  # fmt: skip

if __name__ == "__main__":
    look_once()
    say_what_went_wrong({name: functools.partial(check, "cpu") for name, check in CHECKS.items()})
