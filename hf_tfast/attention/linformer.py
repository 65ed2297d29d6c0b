"""Linformer: every query reads `rank` averages of keys and values instead of all of them.

    o_i = sum_r p_ir v'_r,   k' = E k,   v' = E v,   p_i = softmax over r of (q_i . k'_r) * scale + log n_r,
    E_rj = 1 / n_r where key j falls to row r, else 0;   n_r keys fall to row r

Shapes   q [b h i d]   k [b g j d]   v [b g j e]   ->   o [b h i e]
Cost     O(i rank (d + e) + j (d + e)) time, O(i + j) memory
Exact    fast == reference up to rounding, forward and backward. Rows of no more than `rank` keys are dense, by a
         branch that changes nothing: n_r is 1 there.
Source   Wang et al., "Linformer: Self-Attention with Linear Complexity", section 4 (pooling as the projection, shared
         by heads and by keys and values), https://arxiv.org/abs/2006.04768
Padding  exact, left, right and packed: E counts the keys of a document.
Causal   no: every row of E averages over the whole document.
Differs  E is drawn, not learned, and sparse: keys 0 to rank - 1 fall to the rows in one random order, the next
         `rank` keys in another, so that E is defined at any length, and a longer row keeps the draws of a shorter
         one. A row averages n_r = length / rank keys (give or take one) and counts n_r times, so that sums of weights
         are as large as dense ones at any length. There is no attention dropout: a weight belongs to many keys.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ..backends.draws import draw
from ..backends.few import few_keys
from ..backends.score import Score, softmax_attention
from ..backends.traced import tracing
from ._base import Mask, Mechanism, whole


@dataclass(frozen=True, kw_only=True)
class Linformer(Mechanism):
    """Keys and values averaged into `rank` rows, in an order drawn from `seed`."""

    name: ClassVar[str] = "linformer"
    small: ClassVar[dict[str, Any]] = {"rank": 12}
    causal: ClassVar[bool] = False
    dropout: ClassVar[bool] = False

    rank: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        whole("rank", self.rank, 1)
        whole("seed", self.seed, 0)

    def rows(self, keys: int, device: torch.device) -> Tensor:
        """[keys] int64: the row of E that each key falls to, a function of (seed, key) alone."""
        return self._places(keys, device).argsort(-1).flatten()[:keys]

    def _places(self, keys: int, device: torch.device) -> Tensor:
        """[blocks rank] int64: which of its `rank` keys each block gives to each row."""
        block = torch.arange(-(-keys // self.rank), device=device)[:, None]
        return draw(self.seed, block, torch.arange(self.rank, device=device)).argsort(dim=-1, stable=True)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, choice: Any = None) -> Tensor:
        if k.shape[2] <= self.rank:
            return softmax_attention(q, k, v, None, score)
        wide = torch.promote_types(q.dtype, torch.float32)
        falls = self.rows(k.shape[2], q.device) == torch.arange(self.rank, device=q.device)[:, None]
        counts = falls.sum(-1).to(wide)
        e = falls / counts[:, None]
        o = softmax_attention(q.to(wide), e @ k.to(wide), e @ v.to(wide), None, score, bias=counts.log())
        return o.to(v.dtype)

    def fast(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, backend: str = "torch", choice: Any = None
    ) -> Tensor:
        j = k.shape[2]
        if j <= self.rank:
            return softmax_attention(q, k, v, None, score)
        places, rows = self._places(j, q.device), self.rows(j, q.device)
        wide = torch.promote_types(q.dtype, torch.float32)
        block = torch.arange(len(places), device=q.device)[:, None] * self.rank
        counts = (block + places < j).sum(0).to(wide)
        folded = (_folded(x, places) if tracing() else _Fold.apply(x, places, rows) for x in (k, v))
        k, v = (x / counts[:, None] for x in folded)
        bias = counts.log().expand(q.shape[1], -1)
        if score.sinks is not None:  # one more key, which scores zero everywhere, with the logit as its bias
            k, v = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
            bias = torch.cat([bias, score.sinks.to(wide)[:, None]], -1)
        return few_keys(q, k, v, score.factor(q.shape[-1]), softcap=score.softcap, bias=bias)

    def full(self, length: int) -> "Linformer":
        return replace(self, rank=max(length, 1))


def _folded(x: Tensor, places: Tensor) -> Tensor:
    """What `_Fold` computes, without a loop, as an exported program wants it."""
    blocks, rank = places.shape
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = torch.nn.functional.pad(x, (0, 0, 0, blocks * rank - x.shape[2]))
    at = torch.arange(blocks, device=x.device)[:, None] * rank + places
    return x.index_select(2, at.flatten()).unflatten(2, (blocks, rank)).sum(2)


class _Fold(torch.autograd.Function):
    """The sum of the keys x [b g j d] of every row [b g rank d], in at least fp32; backward is a gather."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, places: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.dtype = x.dtype  # type: ignore[attr-defined]
        rank = places.shape[1]
        total = x.new_zeros(*x.shape[:2], rank, x.shape[3], dtype=torch.promote_types(x.dtype, torch.float32))
        for n, order in enumerate(places):
            block = x[:, :, n * rank : (n + 1) * rank]
            if block.shape[2] == rank:
                total += block[:, :, order]
            else:  # the last keys are fewer
                total.index_add_(2, rows[n * rank :], block.to(total.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad.to(ctx.dtype).index_select(2, rows), None, None  # type: ignore[attr-defined]
