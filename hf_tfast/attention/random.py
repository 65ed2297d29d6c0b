"""Random: a local window, the first tokens, and a few blocks drawn at random for each block of queries.

    o_i = sum_j p_ij v_j,   p_i = softmax over {j : allowed(i, j)} of (q_i . k_j) * scale
    allowed(i, j) = window(i, j) or j // block in drawn(i // block)
    drawn(a) = `blocks` of the blocks 0 .. a - 1, from hash(seed, head, a); bidirectional: or the other one drew a

Shapes   q [b h i d]   k [b g j d]   v [b g j e]   ->   o [b h i e]
Cost     O(i (window + sinks + blocks block) (d + e)) time, O(i + j) memory
Exact    fast == reference up to rounding, forward and backward.
Source   Zaheer et al., "Big Bird: Transformers for Longer Sequences", section 2. https://arxiv.org/abs/2007.14062
Padding  exact, left, right and packed: blocks count from the first valid token of each document.
Causal   yes
Differs  draws depend on the block's own number only, not on the length, so that a longer row and a cached step repeat
         them; without causality the drawn graph is made symmetric. Drawn with replacement: early blocks read fewer.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..backends.blocks import attend_tiles
from ..backends.draws import draw
from ..backends.flex_patterns import attend_flex_layout
from ..backends.score import Score
from ..backends.tiles import Layout
from ._base import Mask, Mechanism, whole
from .window import Window


@dataclass(frozen=True, kw_only=True)
class Random(Mechanism):
    """A `Window` of `window` and `sinks`, and `blocks` random blocks of `block` keys for each block of queries."""

    name: ClassVar[str] = "random"
    small: ClassVar[dict[str, Any]] = {"window": 4, "sinks": 1, "blocks": 2, "block": 4}
    backends: ClassVar[tuple[str, ...]] = ("torch", "flex")

    window: int = 192
    sinks: int = 1
    blocks: int = 3
    block: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("sinks", 0), ("blocks", 0), ("block", 1), ("seed", 0)):
            whole(name, getattr(self, name), least)

    @property
    def local(self) -> Window:
        """The part of the pattern that is not drawn."""
        return Window(window=self.window, sinks=self.sinks)

    def drawn(self, h: Tensor, a: Tensor) -> Tensor:
        """[.. blocks] the earlier blocks that query block `a` of head `h` draws; -1 for block 0, which has none."""
        r = torch.arange(self.blocks, device=a.device)
        uniform = draw(self.seed, h[..., None], a[..., None], r).long() + 2**31
        return torch.where(a[..., None] > 0, (uniform * a[..., None]) >> 32, -1)

    def allowed(self, choice: Any, b: Tensor, h: Tensor, i: Tensor, j: Tensor, *, causal: bool = False) -> Tensor:
        own, other = i // self.block, j // self.block
        seen = (self.drawn(h, own) == other[..., None]).any(-1)
        if not causal:
            seen = seen | (self.drawn(h, other) == own[..., None]).any(-1)
        return seen | self.local.allowed(None, b, h, i, j, causal=causal)

    def lists(self, heads: Tensor, count: int, causal: bool) -> Tensor:
        """[h count most] int64: the drawn blocks of every block of queries, -1 where there are fewer."""
        a = torch.arange(count, device=heads.device)
        drawn = self.drawn(heads[:, None], a)  # [h count blocks]
        if causal:
            return drawn
        both = torch.cat([a[:, None].expand_as(drawn), drawn], -1).flatten(1)  # every edge from both of its ends
        other = torch.cat([drawn, a[:, None].expand_as(drawn)], -1).flatten(1)
        both, order = both.masked_fill((both < 0) | (other < 0), count).sort(dim=-1, stable=True)
        rank = torch.arange(both.shape[-1], device=both.device) - torch.searchsorted(both, both)
        most = int(rank.masked_fill(both == count, -1).max()) + 1 if both.numel() else 0
        lists = both.new_full((len(heads), count + 1, max(most, 1)), -1)
        slots = both * lists.shape[2] + rank.clamp_max(lists.shape[2] - 1)
        lists.flatten(1).scatter_(1, slots, other.gather(1, order))
        return lists[:, :count]

    def fast(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, backend: str = "torch", choice: Any = None
    ) -> Tensor:
        h, j, causal = q.shape[1], k.shape[2], mask.causal
        place = {"start": int(mask.start), "kept": int(mask.kept)}

        def layout() -> Layout:
            heads = torch.arange(score.first_head, score.first_head + h, device=q.device)
            lists = self.lists(heads, -(-(j + place["start"]) // self.block), causal)
            return replace(self.local.layout(causal), lists=lists, block=self.block)

        if backend == "flex":
            return attend_flex_layout(q, k, v, layout, score, key=(self, causal, h, score.first_head), **place)
        return attend_tiles(q, k, v, layout(), score, **place)

    def full(self, length: int) -> "Random":
        return replace(self, window=max(length, 1))
