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

import torch
from torch import Tensor

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
        return self.reference(q, k, v, mask, score)

    def full(self, length: int) -> "Dense":
        return self
