"""Graph: blocks of queries read the blocks of keys that a given graph lists.

    o_i = sum_j p_ij v_j,   p_i = softmax over {j : j // block in blocks[i // block]} of (q_i . k_j) * scale

Shapes   q [b h i d]   k [b g j d]   v [b g j e]   ->   o [b h i e]
Cost     O(edges block^2 (d + e)) time, O(i + j) memory
Exact    fast == reference up to rounding, forward and backward.
Source   Child et al., "Generating Long Sequences with Sparse Transformers", section 4.2, for patterns by block; the
         graph is the user's. https://arxiv.org/abs/1904.10509
Padding  exact, left, right and packed: blocks count from the first valid token of each document.
Causal   yes, j <= i is added: edges to later blocks are not read.
Differs  a block of queries without edges reads nothing and gives zeros; the rows past the last block are an error.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..backends.blocks import Layout, attend_tiles
from ..backends.flex_patterns import attend_flex_layout
from ..backends.score import Score
from ._base import Mask, Mechanism, whole


@dataclass(frozen=True, kw_only=True)
class Graph(Mechanism):
    """`blocks[a]` lists the blocks of `block` keys that block `a` of `block` queries reads."""

    name: ClassVar[str] = "graph"
    small: ClassVar[dict[str, Any]] = {"blocks": tuple((a, a // 2, 0) for a in range(128)), "block": 16}
    backends: ClassVar[tuple[str, ...]] = ("torch", "flex")

    blocks: tuple[tuple[int, ...], ...]
    block: int = 64

    def __post_init__(self) -> None:
        whole("block", self.block, 1)
        object.__setattr__(
            self, "blocks", tuple(tuple(row) for row in self.blocks)
        )  # lists are welcome, hash needs tuples
        if not self.blocks:
            raise ValueError("Graph(blocks=...) needs one list of key blocks for each block of queries, got none")
        for row in self.blocks:
            for edge in row:
                whole("every entry of blocks", edge, 0)

    def _lists(self, keys: int, device: torch.device) -> Tensor:
        """[blocks most] int64, -1 where a block has fewer edges."""
        if keys > len(self.blocks) * self.block:
            raise ValueError(
                f"the graph covers {len(self.blocks)} blocks of {self.block}, or {len(self.blocks) * self.block} "
                f"positions, but there are {keys}: list more blocks"
            )
        most = max(1, *map(len, self.blocks))
        return torch.tensor([[*row, *[-1] * (most - len(row))] for row in self.blocks], device=device)

    def allowed(self, choice: Any, b: Tensor, h: Tensor, i: Tensor, j: Tensor, *, causal: bool = False) -> Tensor:
        lists = self._lists(int(torch.maximum(i.max(), j.max())) + 1, i.device)
        return (lists[i // self.block] == (j // self.block)[..., None]).any(-1)

    def fast(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, backend: str = "torch", choice: Any = None
    ) -> Tensor:
        j, place = k.shape[2], {"start": int(mask.start), "kept": int(mask.kept)}

        def layout() -> Layout:
            lists = self._lists(j + place["start"], q.device)[None]
            return Layout(near=None, lists=lists, block=self.block, causal=mask.causal)

        if backend == "flex":
            return attend_flex_layout(q, k, v, layout, score, key=(self, mask.causal), **place)
        return attend_tiles(q, k, v, layout(), score, **place)

    def full(self, length: int) -> "Graph":
        count = -(-max(length, 1) // self.block)
        return Graph(blocks=tuple(tuple(range(count)) for _ in range(count)), block=self.block)
