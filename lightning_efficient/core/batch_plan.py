"""Which items make which batch: pure functions of a few numbers, without data, workers or state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from lightning_efficient.core.seeded import derive_seed

__all__ = ["BatchPlan", "Position", "Request"]

Request = tuple[int, list[int]]  # a seed for fetching the batch, and the indices of its items


@dataclass
class Position:
    """A place in the endless stream of batches.

    Attributes:
        epoch: Number of the epoch.
        repeat: How often this epoch was walked before.
        batches: Delivered in this pass over the dataset.
    """

    epoch: int = 0
    repeat: int = 0
    batches: int = 0


@dataclass(frozen=True)
class BatchPlan:
    """The order of every epoch, and its cut into steps of one batch on each rank.

    Attributes:
        dataset_length: Items.
        batch_size: Items in a batch of each rank.
        world_size: Ranks that share an epoch.
        seed: Of the orders, and of the seeds for fetching.
        shuffle: Whether each pass has an order of its own; else it is that of the dataset.
        drop_last: Whether to leave out what does not fill a batch on every rank; if not, the ranks share it as evenly
            as can be.
    """

    dataset_length: int
    batch_size: int
    world_size: int
    seed: int
    shuffle: bool
    drop_last: bool

    @property
    def steps(self) -> int:
        """Batches of an epoch, the same number on each rank.

        Raises:
            ValueError: If there would be none, or the last items cannot be shared.
        """
        full, rest = divmod(self.dataset_length, self.batch_size * self.world_size)
        if not self.drop_last and 0 < rest < self.world_size:
            raise ValueError(
                f"Of {self.dataset_length} items the last {rest} cannot be shared by {self.world_size} ranks: each "
                "needs one. Use drop_last=True, or a batch_size that leaves more of them or none."
            )
        steps = full if self.drop_last or not rest else full + 1
        if not steps:
            raise ValueError(
                f"{self.dataset_length} items do not make one batch of {self.batch_size} on each of "
                f"{self.world_size} ranks. Use a smaller batch_size, or drop_last=False."
            )
        return steps

    def requests(self, position: Position, rank: int) -> Iterator[Request]:
        """What ``rank`` has to fetch from ``position`` to the end of the epoch.

        All ranks cut the same order; a step takes its next ``world_size`` batches, one for each rank.
        """
        items_per_step = self.batch_size * self.world_size
        order = self._order(position)
        for step in range(position.batches, self.steps):
            items = order[step * items_per_step : (step + 1) * items_per_step]
            seed = derive_seed(self.seed, position.epoch, position.repeat, step, rank)
            yield seed, items.tensor_split(self.world_size)[rank].tolist()

    def pass_seed(self, position: Position) -> int:
        """A seed that is the same at each point of a pass, and on each rank."""
        return derive_seed(self.seed, position.epoch, position.repeat)

    def state_dict(self) -> dict[str, int]:
        """What makes two plans the same, as integers."""
        return {name: int(value) for name, value in asdict(self).items()}

    def _order(self, position: Position) -> Tensor:
        """int64 ``[dataset_length]``: all indices, in the order of a pass."""
        if not self.shuffle:
            return torch.arange(self.dataset_length)
        return torch.randperm(self.dataset_length, generator=torch.Generator().manual_seed(self.pass_seed(position)))
