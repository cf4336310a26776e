"""Batches cut into parts: every sample once, nothing copied, nothing guessed."""

from __future__ import annotations

import collections
import random
import types
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from lightning_efficient.offload.batches.batch import count_samples, merge_outputs, split_batch


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    name: str
    derived: int = field(init=False, default=3)


class Encoding(collections.UserDict):
    """As tokenizers return: a mapping with more in it, and attributes that read the items."""

    def __init__(self, data: dict[str, Any], encodings: str = "") -> None:
        super().__init__(data)
        self.encodings = encodings

    def __getattr__(self, name: str) -> Any:
        if name == "data" or name not in self.data:
            raise AttributeError(name)
        return self.data[name]


def a_batch(samples: int) -> dict[str, Any]:
    return {
        "x": torch.arange(samples * 3.0).reshape(samples, 3),
        "list": [torch.arange(samples), None, 2.5],
        "tuple": (torch.arange(samples * 2).reshape(samples, 1, 2), "text"),
        "pair": Pair(torch.arange(samples), torch.tensor(7)),
        "frozen": Frozen(torch.arange(samples), "name"),
        "encoding": Encoding({"ids": torch.arange(samples * 4).reshape(samples, 4)}, "kept"),
        "ordered": collections.OrderedDict(b=torch.arange(samples), a=1),
        "view": types.MappingProxyType({"x": torch.arange(samples)}),
        "texts": [f"sample {i}" for i in range(samples)],
        "boxes": [{"box": torch.full((i + 2, 4), i)} for i in range(samples)],
        "array": np.arange(samples),
        "broadcast": torch.ones(1, 3),
        "strided": torch.arange(samples * 2).reshape(2, samples).t(),
        "empty": [],
    }


@pytest.mark.parametrize("seed", range(20))
def test_o7_every_sample_is_in_one_part(seed: int) -> None:
    rng = random.Random(seed)
    samples = rng.randrange(2, 40)
    parts = rng.randrange(1, samples + 1)
    batch = a_batch(samples)
    cut = split_batch(batch, parts)
    assert count_samples(batch) == samples
    assert len(cut) == parts
    assert sum(weight for _, weight in cut) == pytest.approx(1.0, abs=1e-12)
    sizes = [len(part["x"]) for part, _ in cut]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    assert [weight for _, weight in cut] == [size / samples for size in sizes]
    for read in (
        lambda b: b["x"],
        lambda b: b["list"][0],
        lambda b: b["tuple"][0],
        lambda b: b["pair"].first,
        lambda b: b["frozen"].x,
        lambda b: b["encoding"]["ids"],
        lambda b: b["ordered"]["b"],
        lambda b: b["view"]["x"],
        lambda b: b["strided"],
    ):
        assert torch.equal(torch.cat([read(part) for part, _ in cut]), read(batch))
        storage = read(batch).untyped_storage().data_ptr()
        assert all(read(part).untyped_storage().data_ptr() == storage for part, _ in cut)  # views
    assert [text for part, _ in cut for text in part["texts"]] == batch["texts"]
    assert [box for part, _ in cut for box in part["boxes"]] == batch["boxes"]
    assert np.array_equal(np.concatenate([part["array"] for part, _ in cut]), batch["array"])
    for part, _ in cut:
        assert part["list"][1:] == [None, 2.5]
        assert part["tuple"][1] == "text"
        assert part["pair"].second is batch["pair"].second
        assert (part["frozen"].name, part["frozen"].derived) == ("name", 3)
        assert part["encoding"].encodings == "kept"
        assert part["encoding"].ids is part["encoding"]["ids"]
        assert list(part["ordered"]) == ["b", "a"]
        assert part["broadcast"] is batch["broadcast"]
        assert {name: type(value) for name, value in part.items()} == {n: type(v) for n, v in batch.items()}


def test_o7_one_part_is_the_batch_itself() -> None:
    batch = a_batch(4)
    assert split_batch(batch, 1) == [(batch, 1.0)]
    assert split_batch(batch, 1)[0][0] is batch


def test_o7_a_tensor_and_a_list_of_columns_are_batches() -> None:
    assert [len(part) for part, _ in split_batch(torch.ones(5, 2), 2)] == [3, 2]
    columns = [torch.arange(2), torch.arange(2) + 10]  # as many columns as samples
    assert [[int(c) for c in part] for part, _ in split_batch(columns, 2)] == [[0, 10], [1, 11]]
    images = ([torch.ones(3, 5, 5), torch.ones(3, 7, 7)], torch.arange(2))
    first, second = (part for part, _ in split_batch(images, 2))
    assert first[0][0] is images[0][0]
    assert second[0][0] is images[0][1]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": torch.ones(4, 2), "y": torch.ones(3)}, r"batch\['x'\] has size 4 along dim 0 and batch\['y'\] has 3"),
        ([torch.ones(4, 2), torch.ones(3)], r"batch\[0\] has size 4 along dim 0 and batch\[1\] has 3"),
        ({"x": torch.ones(4), "l": [torch.ones(5)]}, r"batch\['l'\]\[0\] has size 5 along dim 0 in a batch of 4"),
        ((torch.ones(4), torch.ones(4).to_sparse()), r"batch\[1\] is a tensor of layout torch.sparse_coo"),
        (
            Pair(torch.ones(2), torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged)),
            r"batch\.second is a nested",
        ),
        ({"p": pack_sequence([torch.ones(3), torch.ones(2)])}, r"batch\['p'\] is a PackedSequence"),
        ({"x": torch.ones(4), "o": object()}, r"batch\['o'\] is a object, of which it is not known"),
        ({"x": torch.ones(4), "f": {"g": iter(())}}, r"batch\['f'\]\['g'\] is a tuple_iterator"),
        ({"x": torch.tensor(1.0), "n": 3}, "no tensor with a dim 0"),
        (None, "no tensor with a dim 0"),
    ],
)
def test_o7_what_cannot_be_split_is_refused_by_path(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count_samples(batch)
    with pytest.raises(ValueError, match=message):
        split_batch(batch, 2)


def test_o7_the_number_of_parts_is_that_of_samples_at_most() -> None:
    for parts in (0, 5):
        with pytest.raises(ValueError, match=f"parts={parts}; a batch of 4 samples"):
            split_batch(torch.ones(4), parts)
    assert len(split_batch(torch.ones(4), 4)) == 4


def test_o7_outputs_are_merged_as_the_whole_batch_would_give_them() -> None:
    whole = {
        "logits": torch.arange(10.0).reshape(5, 2),
        "mean": torch.tensor(2.0),
        "number": 4.0,
        "nested": (Pair(torch.arange(5), None), [torch.arange(5.0)]),
        "texts": ["a", "b", "c", "d", "e"],
        "same": torch.eye(3),
        "name": "step",
        "flag": True,
        "none": None,
    }
    parts = [
        {**whole, "logits": whole["logits"][:3], "mean": torch.tensor(1.0), "number": 2.0, "texts": ["a", "b", "c"],
         "nested": (Pair(torch.arange(3), None), [torch.arange(3.0)])},
        {**whole, "logits": whole["logits"][3:], "mean": torch.tensor(3.5), "number": 7.0, "texts": ["d", "e"],
         "nested": (Pair(torch.arange(3, 5), None), [torch.arange(3.0, 5.0)])},
    ]  # fmt: skip
    merged = merge_outputs(parts, [3, 2])
    assert merged.pop("texts") == whole.pop("texts")
    assert (merged.pop("name"), merged.pop("flag"), merged.pop("none")) == ("step", True, None)
    nested, expected = merged.pop("nested"), whole.pop("nested")
    assert isinstance(nested[0], Pair)
    assert torch.equal(nested[0].first, expected[0].first)
    assert torch.equal(nested[1][0], expected[1][0])
    for part in ("name", "flag", "none", "nested"):
        whole.pop(part, None)
    torch.testing.assert_close(merged, whole)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([{"a": torch.ones(2, 2)}, {"a": torch.zeros(2, 2)}], r"the output\['a'\] has the shapes"),
        ([{"a": 1}, {"b": 1}], "the output has the keys"),
        ([{"a": 1}, {"a": 2}], r"the output\['a'\] is 1 and 2"),
        ([{"a": torch.tensor(1)}, {"a": torch.tensor(2)}], r"the output\['a'\] has the shapes"),
        ([{"a": [torch.ones(1)]}, {"a": []}], r"the output\['a'\] has the lengths \[1, 0\]"),
        ([{"a": 1.0}, {"a": None}], r"the output\['a'\] is of types NoneType, float"),
    ],
)
def test_o7_outputs_that_cannot_be_merged_are_refused_by_path(outputs: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_outputs(outputs, [3, 1])
