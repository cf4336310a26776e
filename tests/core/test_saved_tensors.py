"""What hooks on saved tensors ask of a tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient.core.saved_tensors import (
    Witness,
    covers,
    elements_of,
    first_byte,
    is_plain,
    parameter_of,
    without_memory,
)
from lightning_efficient.core.torch_internals import WeakStorage


class Labelled(Tensor):
    pass


class Weight(nn.Parameter):
    pass


@pytest.mark.parametrize(
    ("tensor", "plain"),
    [
        (torch.ones(2, 3).t(), True), (nn.Parameter(torch.ones(2)), True), (Weight(torch.ones(2)), True),
        (torch.ones(2, dtype=torch.complex64), True), (torch.ones(2, dtype=torch.complex64).conj(), False),
        (torch.eye(2).to_sparse(), False), (torch.ones(2).as_subclass(Labelled), False),
    ],
)  # fmt: skip
def test_what_is_plain(tensor: Tensor, plain: bool) -> None:
    assert is_plain(tensor) == plain


def test_the_parameter_of_a_view() -> None:
    parameter = nn.Parameter(torch.ones(2, 3))
    assert parameter_of(parameter) is parameter
    assert parameter_of(parameter.t()[1]) is parameter
    assert parameter_of(parameter * 1) is None


def test_where_a_tensor_lies() -> None:
    tensor = torch.arange(6, dtype=torch.float64).view(2, 3)
    storage = tensor.untyped_storage()
    assert covers(tensor.t(), storage.nbytes())
    assert not covers(tensor[1], storage.nbytes())
    assert not covers(torch.ones(1).expand(4), 16)
    assert first_byte(tensor[1, 1]) == 32
    assert torch.equal(elements_of(storage, torch.float64), torch.arange(6, dtype=torch.float64))


def test_a_witness_sees_edits_and_keeps_no_memory() -> None:
    tensor = torch.ones(1000)
    witness, view = Witness(tensor), Witness(tensor[3:])
    weak = WeakStorage(tensor.untyped_storage())
    witness.check()
    tensor[5] = 2.0
    for one in (witness, view):
        with pytest.raises(RuntimeError, match=r"shape \[\d+\] is at version 1; expected version 0"):
            one.check()
    assert without_memory(tensor).untyped_storage().nbytes() == 0
    del tensor
    assert weak.get() is None
