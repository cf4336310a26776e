"""Each private symbol of torch that the cores use still exists and means what we take it for."""

from __future__ import annotations

import torch

from lightning_efficient.core.torch_internals import bytes_of, rebuild_tensor, storage_key, typed_storage_parts


def test_tensors_are_rebuilt_by_the_function_that_files_name() -> None:
    tensor = torch.arange(6.0).view(2, 3).t()
    function, arguments = tensor.__reduce_ex__(2)
    assert function is rebuild_tensor
    assert torch.equal(rebuild_tensor(*arguments), tensor)


def test_storages_are_told_apart_by_their_memory() -> None:
    one, other = torch.ones(4), torch.ones(4)
    assert storage_key(one.untyped_storage()) == storage_key(one[1:].untyped_storage())
    assert storage_key(one.untyped_storage()) != storage_key(other.untyped_storage())
    empty, too = torch.empty(0), torch.empty(0)
    assert storage_key(empty.untyped_storage()) != storage_key(too.untyped_storage())


def test_the_parts_of_a_typed_storage() -> None:
    tensor = torch.ones(3, dtype=torch.bfloat16)
    storage, dtype, kind, numel = typed_storage_parts(tensor.__reduce_ex__(2)[1][0])
    assert storage.data_ptr() == tensor.data_ptr()
    assert (dtype, kind, numel) == (torch.bfloat16, torch.BFloat16Storage, 3)


def test_bytes_share_memory() -> None:
    tensor = torch.zeros(2, dtype=torch.int32)
    bytes_of(tensor.untyped_storage())[0] = 5
    assert tensor[0] == 5
