"""Attention of every query over all keys in linear memory: a few query rows at a time, in plain torch, CPU and CUDA.

A strip is a run of queries with a whole row of scores each, so its softmax is exact, and weights can be rounded or
keys left out by content without a running maximum. Backward recomputes the strip, so that nothing of size [i, j]
outlives it. Time is O(i j), memory O(i + j).

Axes   b batch, h query heads, g key/value heads, i queries, j keys, c queries of a strip, n keys that a strip reads,
       m = (h / g) c rows that share keys, so that grouped heads need no copies.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .score import Score

ENTRIES = 2**21  # scores of one strip: a few MB, so that a strip stays in cache between its passes

Multiply = Callable[[int, int, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What the strips of one call share.

    causal    query t reads keys up to j - i + t only.
    at        [j] positions of the keys, None for 0 to j - 1: dropout, whose draws are by position, needs them.
    chosen    None, or [b h i n] integer: the keys that each query reads, -1 for none.
    products  None, or (first, stop, keys) -> [b g m n] of q . k, unscaled: a cheaper way to the same numbers that q
              and k give, from codes; the gradient is that of q k^T.
    weights   None, or the dtype that weights are rounded to before they meet the values; gradients pass through.
    sums      None, or the dtype that the sum over keys is rounded to after every `block` keys; gradients pass too.
    """

    causal: bool
    score: Score
    at: Tensor | None = None
    chosen: Tensor | None = None
    products: Multiply | None = None
    weights: torch.dtype | None = None
    sums: torch.dtype | None = None
    block: int = 128


def attend_rows(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """Attention of q [b h i d] over k [b g j d] and v [b g j e] -> [b h i e], in the dtype of v, computed in at least
    fp32. Differentiable in q, k, v and score.sinks, once. A query that may read nothing reads zeros.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    return _Rows.apply(q.to(wide), k.to(wide), v.to(wide), rows.score.sinks, rows).to(v.dtype)


def rounded(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x rounded to the numbers of `dtype`, kept in its own dtype; the gradient passes straight through."""
    return x if dtype is None or holds(dtype, x.dtype) else straight_through(x, x.detach().to(dtype).to(x.dtype))


def holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Does `dtype` hold every number of `other`?"""
    return torch.promote_types(dtype, other) == dtype


def straight_through(x: Tensor, y: Tensor) -> Tensor:
    """y in value, x in gradient: rounding, whose own gradient is zero almost everywhere, counts as the identity."""
    return _Straight.apply(x, y)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return y.view_as(y)

    @staticmethod
    def backward(ctx, do: Tensor):  # type: ignore[no-untyped-def]
        return do, None


def product(weights: Tensor, v: Tensor, sums: torch.dtype | None, block: int) -> Tensor:
    """weights [.. m n] times v [.. n e], the running sum rounded to `sums` after every `block` keys."""
    if sums is None or holds(sums, weights.dtype):
        return weights @ v
    total = weights.new_zeros(*weights.shape[:-1], v.shape[-1])
    for n in range(0, v.shape[-2], block):
        total = rounded(total + weights[..., n : n + block] @ v[..., n : n + block, :], sums)
    return total


class _Strip:
    """The weights of queries first..stop over the keys they may read, and what their gradient needs."""

    def __init__(self, q: Tensor, k: Tensor, sinks: Tensor | None, rows: Rows, first: int, stop: int) -> None:
        (b, h, i, _), j = q.shape, k.shape[2]
        self.rows, self.first, self.stop, self.score = rows, first, stop, rows.score
        self.keys = j - i + stop if rows.causal else j
        self.scale = rows.score.factor(q.shape[-1])
        if rows.products is None:
            s = group(q[:, :, first:stop], k.shape[1]) @ k[:, :, : self.keys].mT
        else:
            s = rows.products(first, stop, self.keys)
        s = s.reshape(b, h, stop - first, self.keys) * self.scale
        self.slope: Tensor | None = None  # of the softcap
        if self.score.softcap is not None:
            s = torch.tanh(s / self.score.softcap)
            self.slope, s = 1.0 - s * s, s * self.score.softcap
        at = torch.arange(j, device=q.device)
        i_at = at[j - i + first : j - i + stop, None]
        if rows.causal and self.keys > 1:
            own = self.keys - (stop - first)
            s[..., own:].masked_fill_(at[own : self.keys] > i_at, float("-inf"))
        if rows.chosen is not None:
            s = s.masked_fill_(~scatter(rows.chosen[:, :, first:stop], self.keys), float("-inf"))
        empty = rows.chosen is not None or not self.keys
        self.p = s.softmax(-1)
        if empty:
            self.p = self.p.nan_to_num(0.0)
        self.sunk: Tensor | None = None  # the share that the sink logits take
        if sinks is not None:
            self.sunk = torch.sigmoid(sinks.to(s.dtype).view(-1, 1, 1) - s.logsumexp(-1, keepdim=True))
            self.p = self.p * (1.0 - self.sunk)
        self.kept: Tensor | None = None
        if self.score.dropout:
            heads = torch.arange(h, device=q.device).view(-1, 1, 1)
            batch = torch.arange(b, device=q.device).view(-1, 1, 1, 1)
            at = at if rows.at is None else rows.at
            kept = self.score.keep(batch, heads, at[j - i + first : j - i + stop, None], at[: self.keys])
            self.kept = kept.to(s.dtype) / (1.0 - self.score.dropout)

    def weights(self) -> Tensor:
        """[b h c n] what multiplies the values."""
        return rounded(self.p if self.kept is None else self.p * self.kept, self.rows.weights)

    def slopes(self, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of q . k and of the sink logits from that of the weights."""
        if self.kept is not None:
            weights = weights * self.kept
        inner = (self.p * weights).sum(-1, keepdim=True)
        s = self.p * (weights - inner)
        if self.slope is not None:
            s = s * self.slope
        return s * self.scale, None if self.sunk is None else -(self.sunk * inner).sum((0, 2, 3))


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, rows: Rows) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(q, k, v, sinks)
        ctx.rows = rows
        b, h, i, _ = q.shape
        o = v.new_empty(b, h, i, v.shape[-1])
        for first, stop in strips(q, k):
            strip = _Strip(q, k, sinks, rows, first, stop)
            w = group(strip.weights(), k.shape[1])
            o[:, :, first:stop] = product(w, v[:, :, : strip.keys], rows.sums, rows.block).view(b, h, stop - first, -1)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do: Tensor):  # type: ignore[no-untyped-def]
        q, k, v, sinks = ctx.saved_tensors
        (b, h), g = q.shape[:2], k.shape[1]
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        dsinks = None if sinks is None else torch.zeros_like(sinks)
        for first, stop in strips(q, k):
            strip = _Strip(q, k, sinks, ctx.rows, first, stop)
            out = group(do[:, :, first:stop], g)
            dv[:, :, : strip.keys] += group(strip.weights(), g).mT @ out
            dw = (out @ v[:, :, : strip.keys].mT).view(b, h, stop - first, -1)
            ds, dsink = strip.slopes(dw)
            ds = group(ds, g)
            dq[:, :, first:stop] = (ds @ k[:, :, : strip.keys]).view(b, h, stop - first, -1)
            dk[:, :, : strip.keys] += ds.mT @ group(q[:, :, first:stop], g)
            if dsinks is not None and dsink is not None:
                dsinks += dsink
        return dq, dk, dv, dsinks, None


def strips(q: Tensor, k: Tensor) -> list[tuple[int, int]]:
    """Query ranges whose scores fill about ENTRIES; the ranges depend on shapes alone."""
    (b, h, i, _), j = q.shape, k.shape[2]
    c = max(8, min(256, ENTRIES // max(1, b * h * j)))
    return [(n, min(n + c, i)) for n in range(0, i, c)]


def group(x: Tensor, g: int) -> Tensor:
    """[b h c w] -> [b g m w]: the rows that share a key head, one below the other."""
    b, h, c, w = x.shape
    return x.reshape(b, g, h // g * c, w)


def scatter(chosen: Tensor, keys: int) -> Tensor:
    """[b h c n] key indices, -1 for none -> [b h c keys] bool."""
    seen = torch.zeros(*chosen.shape[:-1], keys + 1, dtype=torch.bool, device=chosen.device)
    return seen.scatter_(-1, chosen.where(chosen >= 0, keys).long(), True)[..., :keys]
