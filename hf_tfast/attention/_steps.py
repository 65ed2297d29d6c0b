"""Decoding by key blocks: a step scores the boxes of blocks, and reads no keys but those of its window and its choice.

A step at position p reads, of L = p + 1 keys per key head, the last (reach + 1) blocks and, per query head, the blocks
it chose: (reach + 1 + chosen) block keys and values, and L / block boxes, each the size of two keys.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..backends.block_store import BlockStore
from ..backends.growing import Lengths, longest
from ..backends.one_query import Reads, attend_one, best_blocks, near_scores, where_true
from ..backends.rows import group
from ..backends.score import Score
from ._base import Mechanism
from ._cached import STEPS, ends, over_rows
from ._chosen import reach_of


@dataclass(frozen=True)
class Far:
    """What one query knows of the blocks that it may choose.

    query   [b h 1 d] as it came.
    counts  it may choose among the first so many blocks: one number, or [b].
    near    what it reads in any case, of `keys` [b g n d].
    """

    query: Tensor
    counts: Lengths
    keys: Tensor
    reads: Reads
    score: Score

    @cached_property
    def count(self) -> int:
        """Blocks that some row may choose."""
        return longest(self.counts)

    @cached_property
    def q(self) -> Tensor:
        """[b g m d] in at least fp32, the m = h / g query heads of a key head."""
        return group(self.query.to(torch.promote_types(self.query.dtype, torch.float32)), self.keys.shape[1])

    @cached_property
    def there(self) -> Tensor | None:
        """None, or [b 1 n] bool: which of the blocks a row has."""
        if not isinstance(self.counts, Tensor):
            return None
        return (torch.arange(self.count, device=self.query.device) < self.counts[:, None])[:, None]

    @cached_property
    def near(self) -> Tensor:
        """[b h n]: the scores of the keys that are read in any case, and the sink logit."""
        return near_scores(self.query, self.keys, self.reads, self.score)

    def heads(self, x: Tensor) -> Tensor:
        """[b g m n] -> [b h n], -inf for blocks that are not there."""
        x = x.flatten(1, 2)
        return x if self.there is None else x.masked_fill(~self.there, float("-inf"))


class Picked(NamedTuple):
    """blocks [b h n] int64, -1 for none; `beside` as in BlockChoice, [b h]."""

    blocks: Tensor
    beside: Tensor | None = None


class Stepped(Mechanism):
    """A mechanism of chosen key blocks whose cache keeps their boxes."""

    block: int
    window: int
    means: ClassVar[bool] = False  # does `pick` read the means of blocks?

    def pick(self, store: BlockStore, far: Far, score: Score) -> Picked:
        """The blocks among the first `far.counts` that a query reads."""
        raise NotImplementedError

    def store(self) -> BlockStore | None:
        """Keys and values with the boxes of their blocks; single keys need no cache of ours."""
        return BlockStore(self.block, means=self.means) if self.block > 1 else None

    def remember(self, store: BlockStore, q: Tensor, k: Tensor, v: Tensor, score: Score, new: Tensor | None) -> None:
        store.append(k, v, new)

    @torch.no_grad()
    def resume(self, store: BlockStore, q: Tensor, score: Score, new: Tensor | None) -> Tensor:
        if q.shape[2] > STEPS or score.dropout:
            run = lambda q, k, v, mask: self.fast(q, k, v, mask, score)  # noqa: E731
            return over_rows(run, q, store.keys.held, store.values.held, store.lengths, new)
        last = ends(store.lengths, q, new)
        if len(last) == 1:
            return self._step(store, q, last[0], score)
        return torch.cat([self._step(store, q[:, :, t : t + 1], n, score) for t, n in enumerate(last)], 2)

    def expected(self, store: BlockStore, q: Tensor, score: Score, new: Tensor | None) -> Tensor | None:
        if score.dropout:
            return None
        run = lambda q, k, v, mask: self.reference(q, k, v, mask, score)  # noqa: E731
        return over_rows(run, q, store.keys.held, store.values.held, store.lengths, new)

    def _step(self, store: BlockStore, q: Tensor, n: Lengths, score: Score) -> Tensor:
        """Query q [b h 1 d], the last of the first n tokens of each row (0: none) -> [b h 1 e]."""
        k, v, beside = store.keys.held, store.values.held, None
        counts = before(n, self.block, reach_of(self.window, self.block, True))
        reads = Reads(counts * self.block, n)
        far = Far(q, counts, k, reads, score)
        if far.count:
            blocks, beside = self.pick(store, far, score)
            if blocks.shape[-1]:
                reads = reads._replace(starts=blocks * self.block, span=self.block)
        return attend_one(q, k, v, reads, score, beside)


def before(n: Lengths, block: int, reach: int) -> Lengths:
    """How many blocks lie before those that the last of n tokens reads in any case."""
    if isinstance(n, int):
        return max((n - 1) // block - reach, 0)
    return ((n - 1) // block - reach).clamp(min=0)


def best_boxes(store: BlockStore, far: Far, most: int, sign: float) -> Picked:
    """The `most` blocks whose boxes allow the largest sign q . k."""
    return Picked(best_blocks(far.query, store.boxes.held, far.counts, most, sign))


def listed(read: Tensor) -> Picked:
    """The blocks where `read` [b h n] is true."""
    return Picked(where_true(read))
