"""A DataLoader that resumes in the middle of an epoch, exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_efficient.core.batch_plan import BatchPlan, Position, Request
from lightning_efficient.core.seeded import seeded

__all__ = ["ResumableDataLoader"]

_VERSION = 1


class ResumableDataLoader:
    """Batches of a map-style dataset, with a state that says where the consumer stands.

    A loop that saves :meth:`state_dict` after any batch, and another that loads it, perhaps in another process, see
    together what one uninterrupted loop sees: the same batches in the same order, each item once an epoch (with
    ``drop_last``, at most once). It holds with any number of workers, shuffled or not, on any number of ranks.

    The order of an epoch is a pure function of ``(seed, epoch)``, the same on all ranks; each step deals
    ``world_size`` consecutive batches of it, one to each rank. Nothing is drawn from the global random generators.
    While a batch is fetched and collated, the global CPU generators of torch, ``random`` and NumPy are seeded by
    ``(seed, epoch, step, rank)``, and put back afterwards: random augmentation that uses them is reproduced too,
    whatever the point of resume and the number of workers. A generator that a dataset keeps to itself is not.

    The epoch advances by itself: when a new iterator is asked for its first batch, and the one before had delivered
    any. Leaving an epoch early ends it. :meth:`set_epoch` sets it from outside, as with torch's ``DistributedSampler``.
    An iterator does nothing until its first batch, and only the newest one counts. A batch counts as delivered when
    the iterator returns it, not when a worker has it ready; a consumer that fetches ahead is ahead in the state too.

    Args:
        dataset: Has ``__len__`` and ``__getitem__`` (or ``__getitems__``).
        batch_size: Items in a batch of each rank.
        shuffle: Whether each epoch has an order of its own; else it is that of the dataset.
        seed: Of the orders, and of what is random in fetching.
        num_workers: Processes that fetch ahead; 0 fetches in this one.
        drop_last: Whether to leave out what does not fill a batch on every rank. If not, the ranks share it as evenly
            as can be, and their last batch is smaller. The default is not torch's.
        collate_fn: Makes a batch of a list of items; torch's ``default_collate`` if None.
        pin_memory: Copy batches to pinned memory, where there is an accelerator.
        rank: Of this process. None: that of ``torch.distributed`` if it is initialized when iteration begins, else 0.
        world_size: Number of ranks that share an epoch. None: likewise, else 1.
        persistent_workers: Keep the workers from epoch to epoch.
        combined: Whether it is combined with a longer loader that walks it several times in an epoch; a resumed run
            that stands at the end of a pass then begins another pass over the epoch that :meth:`set_epoch` names.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        shuffle: bool = False,
        *,
        seed: int = 0,
        num_workers: int = 0,
        drop_last: bool = True,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        persistent_workers: bool = False,
        combined: bool = False,
    ) -> None:
        if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"dataset is a {type(dataset).__name__}; a ResumableDataLoader needs a map-style dataset, with "
                "__len__ and __getitem__, for it finds its place again by index."
            )
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; it is at least 1.")
        if (rank is None) != (world_size is None):
            raise ValueError(f"rank={rank} and world_size={world_size}: give both, or neither.")
        if rank is not None and world_size is not None and not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} with world_size={world_size}; the rank is at least 0 and below world_size.")
        self.dataset = dataset
        self.combined = combined
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self._rank = rank
        self._world_size = world_size
        self._position = Position()
        self._resuming = False  # the next iterator goes on at the position; else it begins a pass
        self._epoch_is_set = False  # set_epoch counts the epochs, not we
        self._loaded: tuple[Position, int] | None = None  # what was loaded, until the next batch
        self._shift = 0  # from the epoch that the caller of set_epoch names to the true one
        self._requests = _Requests()
        self._generator = torch.Generator()
        self._loader: DataLoader[Any] = DataLoader(
            _FetchedBatches(dataset, default_collate if collate_fn is None else collate_fn),
            batch_size=None,  # an item of _FetchedBatches is a whole batch
            sampler=self._requests,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            pin_memory=pin_memory and torch.accelerator.is_available(),
            persistent_workers=persistent_workers,
            generator=self._generator,  # else each iterator draws its workers' seed from the global generator
        )

    def __len__(self) -> int:
        """Batches of a whole epoch, of each rank; the same in the middle of one.

        Raises:
            ValueError: If there would be none, or the last items cannot be shared by the ranks.
        """
        return self._plan().steps

    def __iter__(self) -> Iterator[Any]:
        """The rest of the epoch after :meth:`load_state_dict`, else an epoch from its beginning."""
        # A generator: nothing happens before the first batch, so that an iterator made and dropped is no epoch.
        plan = self._plan()
        position = self._begin(plan)
        self._generator.manual_seed(plan.pass_seed(position))
        self._requests.pending = plan.requests(position, self._rank_and_world_size()[0])
        for batch in self._loader:
            position.batches += 1
            yield batch

    def set_epoch(self, epoch: int) -> None:
        """Make ``epoch`` the one that the next iterator walks.

        It walks it from the beginning; but from where the loaded state stands, if that is in this epoch. A second
        iterator without another call walks the epoch again, in another order (as happens to a loader that is combined
        with a longer one).

        A resumed run goes on in the epoch of the loaded state or, if that is at its end, begins the next. A caller that
        then names another has miscounted (Lightning 2.6 does, where a run is resumed from the end of an epoch for the
        second time): the state knows better, and the difference is made up for in this and all later calls.
        """
        self._epoch_is_set = True
        if self._loaded is not None:  # no batch since then: the last call counts
            self._position, self._shift = self._loaded
            self._resuming = True
        elif epoch + self._shift < self._position.epoch:
            self._shift = 0  # the caller counts from the beginning again
        epoch += self._shift
        ended = not self.combined and self._position.batches >= self._plan().steps
        following = self._position.epoch + 1
        if self._resuming and (epoch > following or (ended and epoch < following)):
            self._shift += following - epoch
            epoch = following
        if not (self._resuming and epoch == self._position.epoch):
            self._resuming = False
            self._position = Position(epoch)

    def state_dict(self) -> dict[str, int]:
        """Where the consumer stands, and what the order depends on; the same on all ranks.

        ``batches`` counts those delivered in this pass over the epoch, ``repeat`` the passes over it before this one.
        """
        position = {**asdict(self._position), "shift": self._shift}
        return {"version": _VERSION, **position, **self._plan().state_dict()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next iterator go on after the last batch that was delivered when the state was taken.

        At the end of an epoch that is the beginning of the next.

        Raises:
            ValueError: If the state is of another version, or of a loader that differs in what decides the order: the
                dataset's length, batch size, world size, seed, shuffle, or drop_last.
        """
        version = state_dict.get("version")
        if version != _VERSION:
            raise ValueError(f"The state has version {version}; this ResumableDataLoader reads version {_VERSION}.")
        different = [
            f"{name} was {state_dict.get(name)} and is {value}"
            for name, value in self._plan().state_dict().items()
            if state_dict.get(name) != value
        ]
        if different:
            raise ValueError(
                f"The state is of a loader with another order of batches: {', '.join(different)}. Resume with the "
                "values that it was saved with, or start without the loader's state."
            )
        self._position = Position(state_dict["epoch"], state_dict["repeat"], state_dict["batches"])
        self._shift = state_dict["shift"]
        self._loaded = self._position, self._shift
        self._resuming = True

    @property
    def batch_sampler(self) -> SimpleNamespace:
        """Holds ``sampler.set_epoch``, where a trainer looks for it in a torch DataLoader."""
        return SimpleNamespace(sampler=SimpleNamespace(set_epoch=self.set_epoch))

    @property
    def _iterator(self) -> Any:
        """The running workers, where a trainer that stops persistent ones looks for them in a torch DataLoader."""
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self._loader._iterator = iterator

    def _begin(self, plan: BatchPlan) -> Position:
        """Move to where a new iterator starts."""
        position = self._position
        begun = position.batches > 0 and not self._resuming
        if begun or position.batches >= plan.steps:
            epoch, repeat = position.epoch, position.repeat
            position = Position(epoch, repeat + 1) if self._epoch_is_set else Position(epoch + 1)
        self._resuming = False
        self._loaded = None
        self._position = position
        return position

    def _plan(self) -> BatchPlan:
        """Made when it is asked for: the number of ranks is not known before ``torch.distributed`` is initialized."""
        return BatchPlan(
            dataset_length=len(self.dataset),  # type: ignore[arg-type]  # checked in __init__
            batch_size=self.batch_size,
            world_size=self._rank_and_world_size()[1],
            seed=self.seed,
            shuffle=self.shuffle,
            drop_last=self.drop_last,
        )

    def _rank_and_world_size(self) -> tuple[int, int]:
        if self._rank is not None and self._world_size is not None:
            return self._rank, self._world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1


class _Requests:
    """A sampler for torch's DataLoader whose requests are exchanged for each pass: workers may outlive a pass."""

    pending: Iterator[Request] = iter(())

    def __iter__(self) -> Iterator[Request]:
        return self.pending


class _FetchedBatches(Dataset[Any]):
    """The dataset by whole batches: a request goes in, a collated batch comes out."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any]) -> None:
        self.dataset = dataset
        self.collate = collate

    def __getitem__(self, request: Request) -> Any:
        seed, indices = request
        with seeded(seed):
            if hasattr(self.dataset, "__getitems__"):
                return self.collate(self.dataset.__getitems__(indices))
            return self.collate([self.dataset[index] for index in indices])


def _as_it_is(batch: Any) -> Any:
    """In place of torch's conversion of what is already a batch; a function of the module, for workers pickle it."""
    return batch
