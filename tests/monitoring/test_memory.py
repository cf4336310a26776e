"""Bytes counted by hand, and a peak that only the kernel's mark can see."""

from __future__ import annotations

import torch
from torch import nn

from lightning_efficient.monitoring.batches import MeanLoss, batch_amount
from lightning_efficient.monitoring.memory import nested_tensors, parameter_size, tensor_bytes
from lightning_efficient.monitoring.probe import Probe

_MIB = 1024**2


def test_parameters_count_once_however_often_they_are_used() -> None:
    embedding, head = nn.Embedding(10, 4), nn.Linear(4, 10)
    head.weight = embedding.weight
    model = nn.ModuleList([embedding, head, head])
    head.bias.requires_grad_(False)
    size = parameter_size(model)
    assert (size.count, size.trainable, size.bytes) == (50, 40, 200)


def test_two_parameters_on_one_storage_count_once() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = nn.Parameter(first.weight.data)
    assert parameter_size(nn.ModuleList([first, second])).count == 16


def test_parameters_without_memory_are_counted() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert parameter_size(model).bytes == 160
    assert tensor_bytes(model.parameters()) == 0
    offloaded = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    for parameter in offloaded.parameters():
        parameter.untyped_storage().resize_(0)
    assert parameter_size(offloaded).count == 32
    assert tensor_bytes(offloaded.parameters()) == 0


def test_a_storage_counts_once_and_whole() -> None:
    base = torch.zeros(100, dtype=torch.float32)
    assert tensor_bytes([base, base[:10], base.view(10, 10).t()]) == 400
    assert tensor_bytes([base[:10]]) == 400
    assert tensor_bytes([base, torch.zeros(5, dtype=torch.int64)]) == 440
    assert tensor_bytes([]) == 0


def test_optimizer_state_of_adamw_is_twice_the_parameters_and_the_step_counts() -> None:
    model = nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 8)).sum().backward()
    probe = Probe(torch.device("cpu"))
    probe.sample_gradients(model)
    before = probe.measure(model, [optimizer])
    optimizer.step()
    after = probe.measure(model, [optimizer])
    weights = (8 * 4 + 4) * 4
    assert before["optimizer_state_bytes"] == 0
    assert before["gradient_bytes"] == weights
    assert after["optimizer_state_bytes"] == 2 * weights + 2 * 4  # a float32 step count for each of two tensors
    assert "gradient_bytes" not in after  # nobody looked since
    assert probe.largest["gradient_bytes"] == weights


def test_tensors_are_found_in_nested_containers() -> None:
    tensors = [torch.zeros(1), torch.ones(2), torch.ones(3)]
    nested = {"a": tensors[0], "b": [tensors[1], {"c": (tensors[2], "text", None)}]}
    assert [id(tensor) for tensor in nested_tensors(nested)] == [id(tensor) for tensor in tensors]


def test_how_much_a_batch_holds() -> None:
    ids, images, labels = torch.zeros(4, 16, dtype=torch.int64), torch.zeros(4, 3, 8, 8), torch.zeros(4).long()
    assert batch_amount({"input_ids": ids, "attention_mask": ids.bool()}) == (64, "tokens")
    assert batch_amount(ids) == (64, "tokens")
    assert batch_amount((images, labels)) == (4, "samples")
    assert batch_amount([images.to(torch.uint8), labels]) == (4, "samples")
    assert batch_amount("text") == (0, "samples")


def test_the_mean_loss() -> None:
    loss = MeanLoss()
    assert loss.take() is None
    for outputs in (torch.tensor(1.0), {"loss": torch.tensor([3.0], requires_grad=True)}, None, {"other": 1}, 7):
        loss.add(outputs)
    assert loss.take() == 2.0
    assert loss.take() is None
