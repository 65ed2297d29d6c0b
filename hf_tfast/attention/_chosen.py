"""What mechanisms share whose pattern is made by content: a choice that knows its positions, and chosen key blocks."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..backends.flex_patterns import Blocks, attend_flex_blocks
from ..backends.key_blocks import Grid, far_lists, near_lists
from ..backends.lists import Again, Sizes, Tiles, attend_lists
from ..backends.score import Score
from ._base import Mask, Mechanism

NO_BLOCKS = "single keys (block=1) have no layout of blocks; take block > 1, or backend='torch'"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Where the tensors of a choice lie among positions and heads.

    offset       j - i: query t is key offset + t.
    start, kept  as in Mask.
    first_head   number of the first head of the tensors: `allowed` is asked about heads of all ranks.
    """

    offset: int
    start: int = 0
    kept: int = 0
    first_head: int = 0

    @staticmethod
    def place(q: Tensor, k: Tensor, mask: Mask, score: Score) -> dict[str, Any]:
        """The fields of every choice for one call."""
        start, kept = int(mask.start), int(mask.kept)
        return {"offset": k.shape[2] - q.shape[2], "start": start, "kept": kept, "first_head": score.first_head}

    def key(self, position: Tensor) -> Tensor:
        """Index among the keys of a position."""
        return torch.where(position < self.kept, position, position - self.start)

    def query(self, position: Tensor) -> Tensor:
        """Index among the queries of a position."""
        return self.key(position) - self.offset

    def head(self, h: Tensor) -> Tensor:
        return h - self.first_head


class Chosen(Mechanism):
    """A mechanism whose `choose` may depend on the score; its choices are `Choice`s."""

    def choose(self, q: Tensor, k: Tensor, mask: Mask, score: Score = Score()) -> Any:  # noqa: B008 frozen
        raise NotImplementedError

    def at(self, q: Tensor, k: Tensor, mask: Mask, score: Score, choice: Any) -> Any:
        """The choice given, or made, with its heads counted as in `score`."""
        if choice is None:
            return self.choose(q, k, mask, score)
        return replace(choice, first_head=score.first_head)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, choice: Any = None) -> Tensor:
        return super().reference(q, k, v, mask, score, self.at(q, k, mask, score, choice))


@dataclass(frozen=True, kw_only=True)
class BlockChoice(Choice):
    """Key blocks: those at most `reach` from the query's own, and for each query the ones in `chosen` [n b h i].

    beside  None, or [b h i]: log of a mass that takes part in the softmax for the blocks left out.
    """

    grid: Grid
    reach: int
    chosen: Tensor
    beside: Tensor | None = None

    def allows(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, causal: bool) -> Tensor:
        away = i // self.grid.block - j // self.grid.block
        near = (away >= 0) & (away <= self.reach) if causal else away.abs() <= self.reach
        query = self.query(i)
        return near | self.chosen[self.grid.slot[self.key(j)], b, self.head(h), query]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, score: Score, backend: str = "torch") -> Tensor:
        if backend == "flex":
            blocks = Blocks(self.grid, self.reach, self.chosen, self.beside)
            return attend_flex_blocks(q, k, v, blocks, score, causal=causal)
        sizes = Sizes.of(q, k, causal)
        near = Again(lambda: near_lists(sizes, self.grid, self.reach))
        far = list(far_lists(sizes, self.grid, self.chosen))

        def both() -> Iterator[Tiles]:
            yield from near
            yield from far

        return attend_lists(q, k, v, Again(both), score, self.grid.at, self.beside, often=True)


def reach_of(window: int, block: int, causal: bool) -> int:
    """How many blocks away from a query's own its window goes: window - 1 keys back, or window keys each way."""
    return -(-max(window - causal, 0) // block)


def candidates(grid: Grid, offset: int, reach: int, part: slice, causal: bool) -> Tensor:
    """[part n]: blocks that a query may choose: complete before it under causality, and further than `reach` away."""
    own = grid.number[grid.slot[offset:]][part, None]
    return grid.number < own - reach if causal else (grid.number - own).abs() > reach
