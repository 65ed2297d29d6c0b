"""Batches that grow: their size doubles up to a limit at equal shares of the training.

A larger batch has the effect of a smaller learning rate, in fewer steps: Smith et al., "Don't Decay the Learning Rate,
Increase the Batch Size", https://arxiv.org/abs/1711.00489. The whole training is one pass over a list of batches that
runs through the examples as often as it needs to.
"""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

__all__ = ["GrowingBatches"]


class GrowingBatches(Sampler[list[int]]):
    """rows, first, last  examples, and the sizes of the first and last batches of a process; each size doubles.
    batches          how many a process gets; or, where None, as many as `epochs` passes need.
    rank, world      this process and how many there are: neighbouring batches go to different ones.
    """

    def __init__(
        self,
        rows: int,
        first: int,
        last: int,
        *,
        batches: int | None = None,
        epochs: float = 1.0,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if last < first:
            raise ValueError(f"batches grow: --grow_batch_to {last} is less than the first batch, {first}")
        if rows < last * world:
            raise ValueError(f"a step takes up to {last * world} examples at once, and there are {rows}")
        self.rows, self.seed, self.rank, self.world = rows, seed, rank, world
        sizes = [first]
        while sizes[-1] < last:
            sizes.append(min(2 * sizes[-1], last))
        if batches is None:
            share = rows * epochs / world / len(sizes)  # every size reads as many examples
            counts = [max(1, round(share / size)) for size in sizes]
        else:
            counts = [(n + 1) * batches // len(sizes) - n * batches // len(sizes) for n in range(len(sizes))]
        self.sizes = [size for size, count in zip(sizes, counts, strict=True) for _ in range(count)]

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed)
        waiting: list[int] = []
        for size in self.sizes:
            while len(waiting) < size * self.world:
                waiting += torch.randperm(self.rows, generator=generator).tolist()
            taken, waiting = waiting[: size * self.world], waiting[size * self.world :]
            yield taken[self.rank :: self.world]
