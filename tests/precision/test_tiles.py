"""Products on a processor's tiles against exact ones, of all shapes and layouts (P5)."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lightning_efficient.precision import tiles
from lightning_efficient.precision.integers import LARGEST, multiply

pytestmark = pytest.mark.skipif(
    tiles._library() is None, reason="needs a processor with AMX, and a C compiler that knows it"
)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def codes(rows: int, columns: int, *, across: bool, seed: int = 0) -> Tensor:
    """``[rows, columns]``, of which the elements of a column are neighbours if ``across``."""
    shape = (columns, rows) if across else (rows, columns)
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(-LARGEST, LARGEST + 1, shape, dtype=torch.int8, generator=generator)
    return found.t() if across else found


def exact(one: Tensor, other: Tensor) -> Tensor:
    """Rounded once."""
    return (one.double() @ other.double()).float()


SIZES = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 130)


@pytest.mark.parametrize("left_across", [False, True])
@pytest.mark.parametrize("right_across", [False, True])
def test_products_of_all_shapes_are_exact_p5(left_across: bool, right_across: bool) -> None:
    for number, size in enumerate(SIZES):
        for terms in (1, 3, 4, 5, 63, 64, 65, 200):
            rows, columns = size, SIZES[number * 5 % len(SIZES)]
            one = codes(rows, terms, across=left_across, seed=terms)
            other = codes(terms, columns, across=right_across, seed=size)
            assert torch.equal(multiply(one, other, 0), exact(one, other)), (rows, terms, columns)


@pytest.mark.parametrize("terms", [4095, 4096, 4097, 10_000])
def test_sums_of_many_terms_are_exact_p5(terms: int) -> None:
    """In more than one go, of which each adds to the one before; over several groups of columns."""
    one, other = codes(40, terms, across=False), codes(terms, 300, across=True)
    assert torch.equal(multiply(one, other, 0), exact(one, other))


def test_extreme_codes_are_exact_p5() -> None:
    for a in (LARGEST, -LARGEST):
        one, other = torch.full((33, 5000), a, dtype=torch.int8), torch.full((5000, 47), LARGEST, dtype=torch.int8)
        assert torch.equal(multiply(one, other, 0), exact(one, other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [-3, 0, 11, 140, 200])
def test_results_are_torchs_to_the_bit_p5(dtype: torch.dtype, exponent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other, bias = codes(70, 129, across=True), codes(129, 90, across=False), torch.randn(90)
    bias[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    found = [multiply(one, other, exponent, added, dtype) for added in (None, bias)]
    monkeypatch.setattr(tiles, "_library", lambda: None)
    for result, added in zip(found, (None, bias), strict=True):
        expected = multiply(one, other, exponent, added, dtype)
        assert result.dtype == expected.dtype == dtype
        assert torch.equal(result.isnan(), expected.isnan())
        assert torch.equal(result.nan_to_num(), expected.nan_to_num())


def test_parts_of_a_matrix_are_read_where_they_lie_p5() -> None:
    whole, other = codes(100, 200, across=False), codes(150, 64, across=False)
    for one in (whole[3:70, 11:161], whole[::2, 50:], whole[:, ::2][:, :90], whole[5:6, :150], whole[:, 7:8]):
        right = other[: one.shape[1], 5:44]
        assert torch.equal(multiply(one, right, 0), exact(one, right))
        assert torch.equal(multiply(right.t(), one.t(), 0), exact(right.t(), one.t()))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize(("rows", "columns"), [(600, 500), (1500, 200), (40, 5000)])
def test_threads_share_the_work_p5(count: int, rows: int, columns: int) -> None:
    torch.set_num_threads(count)
    one, other = codes(rows, 700, across=False), codes(700, columns, across=True)
    assert rows * columns * 700 > tiles._SMALL
    for _ in range(5):
        assert torch.equal(multiply(one, other, 0), exact(one, other))


def test_threads_of_the_user_do_not_meet() -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        for size in (40, 300, 90):
            one, other = codes(size, 400, across=False, seed=seed), codes(400, 200, across=True, seed=seed)
            if not torch.equal(multiply(one, other, 0), exact(one, other)):
                wrong.append(seed)

    users = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert not wrong


def test_nothing_beyond_the_result_is_written() -> None:
    one, other = codes(33, 65, across=False), codes(65, 17, across=True)
    around = torch.full((3 * 33 * 17,), 7.0)
    inside = around[33 * 17 : 2 * 33 * 17].view(33, 17)
    left, right = tiles._described(one, 0), tiles._described(other.t(), 0)
    bytes_of = [tiles._packed_bytes(matrix) for matrix in (one, other.t())]
    packed = torch.full((sum(bytes_of) + 64,), 99, dtype=torch.int8)
    left.packed, right.packed = packed.data_ptr(), packed.data_ptr() + bytes_of[0]
    job = tiles._Job(left, right, inside.data_ptr(), 0, 65, 1.0, 1.0, None, 1)
    tiles._library().tiles_multiply(job)  # type: ignore[union-attr]
    assert torch.equal(inside, exact(one, other))
    assert torch.all(around[: 33 * 17] == 7)
    assert torch.all(around[2 * 33 * 17 :] == 7)
    assert torch.all(packed[sum(bytes_of) :] == 99)
