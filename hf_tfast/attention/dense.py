"""Dense: every query reads every key, the softmax attention that the others are measured against.

    o_i = sum_j p_ij v_j,   p_i = softmax_j (q_i . k_j) * scale

Shapes   q [b h i d]   k [b g j d]   v [b g j e]   ->   o [b h i e]
Cost     O(i j (d + e)) time, O(i + j) memory
Exact    it is the definition.
Source   Vaswani et al., "Attention Is All You Need", section 3.2.1. https://arxiv.org/abs/1706.03762
Padding  exact, left, right and packed.
Causal   yes
Differs  nothing.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from ..backends.blocks import Layout, attend_tiles
from ..backends.score import Score
from ._base import Mask, Mechanism


@dataclass(frozen=True, kw_only=True)
class Dense(Mechanism):
    """Softmax attention over all keys."""

    name: ClassVar[str] = "dense"

    def allowed(self, choice: Any, b: Tensor, h: Tensor, i: Tensor, j: Tensor, *, causal: bool = False) -> Tensor:
        return (i >= 0) & (j >= 0)

    def fast(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, backend: str = "torch", choice: Any = None
    ) -> Tensor:
        plain = score.softcap is None and score.sinks is None and not score.dropout and not mask.start
        i, j = q.shape[2], k.shape[2]
        if plain and (i == j or i == 1 or not mask.causal):  # its causal flag aligns queries with the first keys
            causal, grouped = mask.causal and bool(i > 1), q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=score.scale, enable_gqa=grouped)
        layout = Layout(
            near=lambda i, j: (i >= 0) & (j >= 0), before=j, after=0 if mask.causal else j, causal=mask.causal
        )
        return attend_tiles(q, k, v, layout, score, start=int(mask.start), kept=int(mask.kept))

    def full(self, length: int) -> "Dense":
        return self
