"""TopK: a query reads the keys, or blocks of keys, that suit it best, and its neighbours.

    o_i = sum_j p_ij v_j,   p_i = softmax over {j : allowed(i, j)} of (q_i . k_j) * scale
    block = 1   allowed(i, j) = j in the window of i, or among the k largest q_i . k_j outside it
    block > 1   allowed(i, j) = block(j) near block(i), or among the ceil(k / block) blocks n with the largest
                sum_d max(q_id low_nd, q_id high_nd); low, high: least and largest key of the block, by coordinate
    block(j) = floor(j / block); near: at most ceil((window - 1) / block) blocks behind, its own included; without
    causality ceil(window / block) on each side. Chosen are blocks further away only; under causality those lie wholly
    before i. Ties go to the earlier position.

Shapes   q [b h i d]   k [b g j d]   v [b g j e]   ->   o [b h i e]
Cost     block = 1: O(i j (d + e)) time, O(i (k + window) + j) memory
         block > 1: O(i (k + window) (d + e) + i j d / block) time, O((i + j) (d + e)) memory and i j / block bytes
Exact    fast == reference up to rounding, forward and backward, given the choice, which has no gradient.
Source   block = 1: Gupta et al., "Memory-efficient Transformers via Top-k Attention", section 2,
         https://arxiv.org/abs/2106.06899; blocks: Tang et al., "Quest", section 3, https://arxiv.org/abs/2406.10774
Padding  exact, left, right and packed: blocks count from the first valid token of each document.
Causal   yes
Differs  every query chooses for itself, in prefill as in decoding; Quest chooses pages in decoding only and keeps the
         page of the newest token by chance, here it is always read. A choice shared by a block of queries would leak.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..backends.block_store import BlockStore
from ..backends.key_blocks import Bounds, Grid, best, over_queries
from ..backends.lists import Again, Sizes, attend_lists, entries, strips
from ..backends.score import Score
from ..backends.scratch import Scratch
from ._base import Mask, whole
from ._chosen import NO_BLOCKS, BlockChoice, Choice, Chosen, candidates, reach_of
from ._steps import Far, Picked, Stepped, best_boxes


@dataclass(frozen=True, kw_only=True)
class KeyChoice(Choice):
    """keys [b h i n] int64: indices of the keys that each query reads, -1 for none; `total` keys there are."""

    keys: Tensor
    total: int

    def read(self, keys: Tensor) -> Tensor:
        """keys [.. n] -> [.. total] bool"""
        read = torch.zeros(*keys.shape[:-1], self.total + 1, dtype=torch.bool, device=keys.device)
        return read.scatter_(-1, keys.masked_fill(keys < 0, self.total), True)[..., :-1]

    def allows(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self.read(self.keys)[b, self.head(h), self.query(i), self.key(j)]

    def hidden(self, s: Tensor, heads: Tensor, part: slice) -> Tensor:
        """What the queries `part` of `heads` do not read, of the first s keys."""
        return ~self.read(self.keys.flatten(0, 1)[heads, part])[..., : s.shape[-1]]


@dataclass(frozen=True, kw_only=True)
class TopK(Stepped, Chosen):
    """The `k` best keys, as ceil(k / block) blocks of `block` keys, and a window, which is rounded up to blocks."""

    name: ClassVar[str] = "topk"
    small: ClassVar[dict[str, Any]] = {"k": 16, "block": 8, "window": 6}
    backends: ClassVar[tuple[str, ...]] = ("torch", "flex")

    k: int = 512
    block: int = 64
    window: int = 64

    def __post_init__(self) -> None:
        whole("k", self.k, 1)
        whole("block", self.block, 1)
        whole("window", self.window, 0)

    @torch.no_grad()
    def choose(
        self,
        q: Tensor,
        k: Tensor,
        mask: Mask,
        score: Score = Score(),  # noqa: B008 frozen
        bounds: Bounds | None = None,
    ) -> Choice:
        """What each query reads. `bounds` of the blocks of Grid.of(mask.positions(j), block), if a cache holds them,
        spare reading the keys."""
        with torch.autocast(q.device.type, enabled=False):
            if self.block == 1:
                return self._keys(q, k, mask, score)
            grid, offset = Grid.of(mask.positions(k.shape[2], q.device), self.block), k.shape[2] - q.shape[2]
            reach = reach_of(self.window, self.block, mask.causal)
            bounds, count = Bounds.of(k, grid) if bounds is None else bounds, -(-self.k // self.block)
            boxes = bounds.boxes(torch.promote_types(q.dtype, torch.float32))

            def rule(part_q: Tensor, part: slice, scratch: Scratch) -> Tensor:
                far = candidates(grid, offset, reach, part, mask.causal)
                highest = boxes.highest(part_q, scratch, _sign(score))
                out = torch.zeros((), dtype=highest.dtype, device=far.device).where(far, float("-inf"))
                return best(highest.add_(out), count)  # far faster than filling by a mask

            chosen = over_queries(q, len(grid.number), rule)
            return BlockChoice(**Choice.place(q, k, mask, score), grid=grid, reach=reach, chosen=chosen)

    def _keys(self, q: Tensor, k: Tensor, mask: Mask, score: Score) -> KeyChoice:
        """block = 1: exact, a few queries at a time."""
        (b, h, i, d), (g, j) = q.shape, k.shape[1:3]
        at = mask.positions(j, q.device)
        most = min(j, self.k + (self.window if mask.causal else 2 * self.window + 1))
        keys = torch.full((b, h, i, most), -1, dtype=torch.int64, device=q.device)
        wide = torch.promote_types(q.dtype, torch.float32)
        columns = k.to(wide).mT
        step = max(1, 4 * entries(q.device) // max(1, b * h * j))
        for first in range(0, i, step):
            part = slice(first, min(first + step, i))
            rows = q[:, :, part].to(wide) * _sign(score)
            s = (rows.reshape(b, g, -1, d) @ columns).view(b, h, -1, j)
            back = at[j - i :][part, None] - at
            near = back < self.window if mask.causal else (back.abs() <= self.window) & (self.window > 0)
            out = back < 0 if mask.causal else torch.zeros_like(near)
            read = best(s.masked_fill_(near | out, float("-inf")), self.k) | (near & ~out)
            *row, column = read.nonzero(as_tuple=True)
            place = (read.cumsum(-1) - 1)[read]
            keys[:, :, part].index_put_((*row, place), column)
        return KeyChoice(**Choice.place(q, k, mask, score), keys=keys, total=j)

    def allowed(self, choice: Any, b: Tensor, h: Tensor, i: Tensor, j: Tensor, *, causal: bool = False) -> Tensor:
        return choice.allows(b, h, i, j) if self.block == 1 else choice.allows(b, h, i, j, causal)

    def fast(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, backend: str = "torch", choice: Any = None
    ) -> Tensor:
        choice = self.at(q, k, mask, score, choice)
        if self.block > 1:
            return choice.attend(q, k, v, mask.causal, score, backend)
        lists = Again(lambda: strips(Sizes.of(q, k, mask.causal), q.device, hide=choice.hidden))
        return attend_lists(q, k, v, lists, score, mask.positions(k.shape[2], q.device))

    def pick(self, store: BlockStore, far: Far, score: Score) -> Picked:
        return best_boxes(store, far, -(-self.k // self.block), _sign(score))

    def lacks(self, backend: str, mask: Mask, score: Score) -> str | None:
        return NO_BLOCKS if backend == "flex" and self.block == 1 else None

    def full(self, length: int) -> "TopK":
        return replace(self, k=max(length, 1))


def _sign(score: Score) -> float:
    """Scores order keys as q . k does, or the other way round under a negative scale."""
    return -1.0 if score.scale is not None and score.scale < 0 else 1.0
