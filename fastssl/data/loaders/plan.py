"""Which samples make up which step: the one contract that every loader keeps.

An epoch is a permutation of the chosen samples, cut into global batches; each rank takes its contiguous part of each,
so the union over ranks is the same batch for any number of ranks.

B batch of one rank, M chosen samples.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import torch
from torch import Tensor

from fastssl.errors import UserError

Order = Callable[[int], Tensor]


class PlanOptions(TypedDict):
    """What decides a plan, as keyword arguments of every loader.

    batch_size: images of one global batch; each rank gets its contiguous part.
    order: epoch -> permutation of range(len(indices)), int64; a pure function.
    indices: positions in the file to use; None or absent for all.
    drop_last: leave out the last short batch of an epoch; so it is when absent.
    rank, world: this process and how many there are; absent for one alone.
    """

    batch_size: int
    order: Order
    indices: NotRequired[Tensor | None]
    drop_last: NotRequired[bool]
    rank: NotRequired[int]
    world: NotRequired[int]


def check_batch_size(batch_size: int, world: int) -> None:
    """UserError when a global batch does not divide over the ranks."""
    if batch_size < 1 or batch_size % world:
        near = max(world, batch_size // world * world)
        raise UserError(
            f"batch_size {batch_size} does not divide over {world} ranks.",
            f"Set data.batch_size to {near} or {near + world}.",
        )


@dataclass(frozen=True)
class Plan:
    """Steps of an epoch; build it with `Plan.make`, which checks the numbers.

    Attributes:
        indices_M: int64 positions in the file of the chosen samples, on the CPU.
        batch_size: images of one global batch.
        order: epoch -> permutation of range(M), int64; a pure function.
        drop_last: leave out the last short batch.
        rank, world: this process and how many there are.
    """

    indices_M: Tensor
    batch_size: int
    order: Order
    drop_last: bool = True
    rank: int = 0
    world: int = 1

    @classmethod
    def make(
        cls,
        count: int,
        *,
        batch_size: int,
        order: Order,
        indices: Tensor | None = None,
        drop_last: bool = True,
        rank: int = 0,
        world: int = 1,
    ) -> "Plan":
        """Plan over `count` stored samples, see PlanOptions; UserError when nothing would come."""
        assert 0 <= rank < world, (rank, world)
        indices_M = torch.arange(count) if indices is None else indices.to("cpu", torch.int64)
        chosen = len(indices_M)
        if chosen and not (0 <= int(indices_M.min()) <= int(indices_M.max()) < count):
            raise UserError(f"The chosen indices leave the {count} samples of the file.", "Choose fewer.")
        check_batch_size(batch_size, world)
        if chosen == 0 or (drop_last and chosen < batch_size):
            raise UserError(
                f"batch_size {batch_size} is larger than the set of {chosen} images.",
                f"Set data.batch_size to at most {chosen // world * world or 'the number of images'}.",
            )
        return cls(indices_M, batch_size, order, drop_last, rank, world)

    def __len__(self) -> int:
        """Steps per epoch, the same for every rank."""
        whole, rest = divmod(len(self.indices_M), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def epoch(self, epoch: int) -> Tensor:
        """File positions of the whole epoch in their order, all ranks: int64 (M,)."""
        order_M = self.order(epoch)
        assert len(order_M) == len(self.indices_M), (len(order_M), len(self.indices_M))
        return self.indices_M[order_M.to("cpu")]

    def part(self, step: int) -> slice:
        """This rank's part of a step's global batch in `epoch`; parts of a short batch may differ by one."""
        start = step * self.batch_size
        size = min(self.batch_size, len(self.indices_M) - start)
        return slice(start + size * self.rank // self.world, start + size * (self.rank + 1) // self.world)
