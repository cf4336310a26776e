"""ResumableDataLoader by itself: stopped after any batch, it goes on as if nothing had happened."""

from __future__ import annotations

import itertools
import multiprocessing
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from lightning_efficient.core.resumable import ResumableDataLoader

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # a machine with one core
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),  # Python >= 3.12, in torch's workers
]

ITEMS = 11


class Numbers(Dataset[int]):
    """Item ``i`` is ``i``."""

    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, index: int) -> int:
        return index


class Noise(Numbers):
    """Items that are random, from each of the global generators."""

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([index, torch.rand(()), random.random(), np.random.rand()], dtype=torch.float64)


def make(dataset: Any = None, **changes: Any) -> ResumableDataLoader:
    arguments: dict[str, Any] = {"batch_size": 2, "shuffle": True, "seed": 3}
    return ResumableDataLoader(dataset=Numbers() if dataset is None else dataset, **(arguments | changes))


def stream(loader: ResumableDataLoader) -> Iterator[Any]:
    """One epoch after the other, as lists."""
    while True:
        for batch in loader:
            yield batch.tolist()


def take(loader: ResumableDataLoader, batches: int) -> list[Any]:
    return list(itertools.islice(stream(loader), batches))


@pytest.mark.parametrize(
    ("workers", "drop_last", "shuffle", "world_size"),
    [*itertools.product([0], [False, True], [False, True], [1, 2]), (2, False, False, 2), (2, False, True, 1)],
)  # hundreds of workers are forked
def test_stopped_anywhere_goes_on_exactly(workers: int, drop_last: bool, shuffle: bool, world_size: int) -> None:
    arguments: dict[str, Any] = {"shuffle": shuffle, "drop_last": drop_last, "world_size": world_size}
    if not drop_last and world_size == 2:
        arguments["batch_size"] = 3  # leaves 5 items for the last step, of 3 and 2
    for rank in range(world_size):
        whole = make(**arguments, rank=rank)
        total = 2 * len(whole) + 1  # two epochs, and the first batch of the third
        expected = take(whole, total)
        for stop in range(total):
            before = make(**arguments, rank=rank, num_workers=workers)
            seen = take(before, stop)
            after = make(**arguments, rank=rank, num_workers=workers)
            after.load_state_dict(before.state_dict())
            assert seen + take(after, total - stop) == expected, stop


def test_stopped_twice_goes_on_exactly() -> None:
    total = 2 * len(make()) + 1
    expected = take(make(), total)
    for first, second in itertools.combinations_with_replacement(range(total), 2):
        seen: list[Any] = []
        state = make().state_dict()
        for stop in (first, second, total):
            loader = make()
            loader.load_state_dict(state)
            seen += take(loader, stop - len(seen))
            state = loader.state_dict()
        assert seen == expected


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 2), (1, 4), (2, 3), (3, 2)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_each_item_comes_once_an_epoch(shuffle: bool, world_size: int, batch_size: int) -> None:
    def epochs(drop_last: bool) -> list[list[list[int]]]:
        """The batches of each of two epochs, of all ranks."""
        arguments = {"shuffle": shuffle, "batch_size": batch_size, "world_size": world_size, "drop_last": drop_last}
        loaders = [make(**arguments, rank=rank) for rank in range(world_size)]
        return [[batch.tolist() for loader in loaders for batch in loader] for _ in range(2)]

    for batches in epochs(drop_last=False):
        assert sorted(itertools.chain(*batches)) == list(range(ITEMS))
        assert len(batches) % world_size == 0  # as many on each rank, or a collective would hang
    for batches in epochs(drop_last=True):
        items = list(itertools.chain(*batches))
        assert len(items) == len(set(items)) == ITEMS // (batch_size * world_size) * batch_size * world_size
        assert {len(batch) for batch in batches} == {batch_size}


def test_epochs_have_orders_of_their_own() -> None:
    loader = make()
    first, second = ([batch.tolist() for batch in loader] for _ in range(2))
    assert first != second
    assert [batch.tolist() for batch in make(seed=4)] != first
    ordered = make(shuffle=False)
    assert [batch.tolist() for batch in ordered] == [batch.tolist() for batch in ordered]


def test_randomness_in_fetching_depends_on_nothing_but_the_place() -> None:
    expected = take(make(Noise()), 12)
    for workers, persistent in ((0, False), (1, False), (2, False), (2, True)):
        before = make(Noise(), num_workers=workers, persistent_workers=persistent)
        seen = take(before, 7)
        after = make(Noise(), num_workers=workers, persistent_workers=persistent)
        after.load_state_dict(before.state_dict())
        assert seen + take(after, 5) == expected
    values = [value for batch in expected for _, *values in batch for value in values]
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_state_is_untouched(workers: int) -> None:
    def states() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())

    before = states()
    take(make(Noise(), num_workers=workers), 7)
    assert states() == before


def test_an_epoch_left_early_is_over() -> None:
    loader = make()
    first = next(iter(loader)).tolist()
    rest = take(loader, len(loader))
    other = make()
    epochs = [[batch.tolist() for batch in other] for _ in range(2)]
    assert first == epochs[0][0]
    assert rest == epochs[1]


def test_an_iterator_without_a_batch_is_no_epoch() -> None:
    loader = make()
    iter(loader)
    unused = iter(loader)
    assert take(loader, 3) == take(make(), 3)
    del unused
    loader.load_state_dict(loader.state_dict())
    iter(loader)
    assert take(loader, 4) == take(make(), 7)[3:]


def test_prefetched_batches_do_not_count() -> None:
    loader = make(num_workers=2)
    iterator = iter(loader)
    assert loader.state_dict()["batches"] == 0
    next(iterator)
    assert loader.state_dict()["batches"] == 1
    assert len(loader) == 5  # of the whole epoch, in the middle of it too


def test_set_epoch() -> None:
    other = make()
    epochs = [[batch.tolist() for batch in other] for _ in range(3)]
    loader = make()
    for epoch in (2, 0, 0, 1):
        loader.set_epoch(epoch)
        assert [batch.tolist() for batch in loader] == epochs[epoch]
    # Walked once more without a call, the epoch is walked in another order, which resumes as well.
    loader.set_epoch(1)
    expected = take(loader, 10)
    assert expected[:5] == epochs[1]
    assert expected[5:] not in epochs
    loader.set_epoch(1)
    take(loader, 7)
    resumed = make()
    resumed.load_state_dict(loader.state_dict())
    resumed.set_epoch(1)  # as trainers do before each epoch: the loaded place is in it
    assert take(resumed, 3) == expected[7:]
    resumed.load_state_dict(loader.state_dict())
    resumed.set_epoch(2)
    assert take(resumed, 5) == epochs[2]


def test_rank_and_world_size_come_from_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make()
    assert len(loader) == 5
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert len(loader) == 2
    assert take(loader, 4) == take(make(rank=1, world_size=2), 4)


def test_collate_fn_and_getitems() -> None:
    class Fast(Numbers):
        def __getitems__(self, indices: list[int]) -> list[int]:
            return [100 + index for index in indices]

    def collate(items: list[int]) -> Tensor:
        return torch.tensor(items) * 2

    assert next(iter(make(Fast(), shuffle=False, collate_fn=collate))).tolist() == [200, 202]


def test_persistent_workers_stay_and_stop() -> None:
    loader = make(num_workers=2, persistent_workers=True)
    take(loader, 1)  # leave the epoch early
    workers = {process.pid for process in multiprocessing.active_children()}
    assert take(loader, 5) == take(make(), 10)[5:]
    assert {process.pid for process in multiprocessing.active_children()} == workers
    loader._iterator._shutdown_workers()  # what trainers do with a torch DataLoader
    loader._iterator = None
    assert not multiprocessing.active_children()
    assert take(loader, 5) == take(make(), 15)[10:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 3}, "batch_size was 2 and is 3"),
        ({"seed": 4}, "seed was 3 and is 4"),
        ({"shuffle": False}, "shuffle was 1 and is 0"),
        ({"drop_last": False}, "drop_last was 1 and is 0"),
        ({"rank": 0, "world_size": 2}, "world_size was 1 and is 2"),
        ({"dataset": list(range(12))}, "dataset_length was 11 and is 12"),
    ],
)
def test_a_state_of_another_loader_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes).load_state_dict(make().state_dict())


def test_the_state_is_plain_and_versioned() -> None:
    state = make().state_dict()
    assert all(type(value) is int for value in state.values())
    with pytest.raises(ValueError, match=r"version 99.* reads version 1"):
        make().load_state_dict(state | {"version": 99})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"rank": 1}, "give both, or neither"),
        ({"rank": 2, "world_size": 2}, "rank=2 with world_size=2"),
    ],
)
def test_errors_of_the_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_errors_of_the_dataset() -> None:
    class Endless(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return itertools.count()

    with pytest.raises(TypeError, match=r"Endless.*map-style"):
        make(Endless())
    with pytest.raises(ValueError, match="11 items do not make one batch of 12 on each of 1 ranks"):
        len(make(batch_size=12))
    with pytest.raises(ValueError, match="Of 11 items the last 1 cannot be shared by 2 ranks"):
        next(iter(make(batch_size=5, rank=0, world_size=2, drop_last=False)))
