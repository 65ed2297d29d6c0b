"""Static sparse patterns as tiles of batched matmuls in plain torch, CPU and CUDA, forward and backward.

For every tile (see tiles.py)

    S = Q K^T (scaled, capped, masked)     P = softmax(S)     O = P V

and backward recomputes S and P from q, k, v, so that nothing of size [i, j], nor any probability, outlives its tile
(Dao et al., "FlashAttention", section 3.1 and appendix B, at the granularity of batched matmuls). Time and memory are
linear in the number of queries.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .score import Score
from .tiles import Call, Layout, Tile

__all__ = ["Layout", "attend_tiles"]


def attend_tiles(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, score: Score, *, start: int = 0, kept: int = 0
) -> Tensor:
    """Attention of q [b h i d] over k [b g j d], v [b g j e] in the pattern of `layout` -> [b h i e].

    Full rows: the queries are the last i positions; key n has position n below `kept` and n + start from there on.
    Differentiable once, in q, k, v and score.sinks. ValueError where a cache dropped keys that the pattern reads.
    """
    if start and layout.sinks > kept:
        raise ValueError(f"the first {layout.sinks} keys are read, but a sliding cache dropped {start} and kept {kept}")
    wide = q.device.type == "cpu" and q.dtype == torch.float16  # CPUs multiply fp16 slowly, and accumulate in fp16
    if wide:
        q, k, v = q.float(), k.float(), v.float()
    with torch.autocast(q.device.type, enabled=False):
        o = _Tiles.apply(q, k.contiguous(), v.contiguous(), score.sinks, Call(q, k, layout, score, start, kept))
    return o.half() if wide else o


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: Call) -> Tensor:
        ctx.save_for_backward(q, k, v, sinks)
        ctx.call = call  # type: ignore[attr-defined]
        o = q.new_empty(*q.shape[:3], v.shape[-1])
        for tile in call.tiles():
            work = _Work(tile, q, k, sinks)
            p = work.weights()
            keep = work.keep()
            p = p if keep is None else p.mul_(keep)
            out = torch.bmm(p[..., : work.w], tile.keys(v))
            if (first := tile.first(v)) is not None:
                out.view(-1, out.shape[-1]).addmm_(work.beside(p), first)
            tile.put(o, out)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks = ctx.saved_tensors  # type: ignore[attr-defined]
        call: Call = ctx.call  # type: ignore[attr-defined]
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        dsinks = None if sinks is None else torch.zeros_like(sinks, dtype=wide)
        for tile in call.tiles():
            work = _Work(tile, q, k, sinks)
            work.backward(v, tile.queries(grad), (dq, dk, dv, dsinks))
        return dq, dk.to(k.dtype), dv.to(v.dtype), dsinks if sinks is None else dsinks.to(sinks.dtype), None


class _Work:
    """The arithmetic of one tile. Columns of scores: w keys, then the first keys beside them, then the sink logit."""

    def __init__(self, tile: Tile, q: Tensor, k: Tensor, sinks: Tensor | None) -> None:
        self.tile, self.score, self.sinks = tile, tile.call.score, sinks
        self.scale = self.score.factor(q.shape[-1])
        self.q, self.k, self.first = tile.queries(q) * self.scale, tile.keys(k), tile.first(k)
        self.w = self.k.shape[1]
        self.slope: Tensor | None = None  # of the softcap

    def weights(self, slope: bool = False) -> Tensor:
        """P [n m columns]; `slope` keeps the derivative of the softcap."""
        columns = [torch.bmm(self.q, self.k.mT)]
        if self.first is not None:
            columns.append((self.q.flatten(0, 1) @ self.first.mT).unflatten(0, self.q.shape[:2]))
        if self.score.softcap is not None:
            columns = [column.div_(self.score.softcap).tanh_() for column in columns]
            if slope:
                self.slope = 1 - torch.cat(columns, -1).square()
            columns = [column.mul_(self.score.softcap) for column in columns]
        self.tile.hide(columns[0])
        if self.sinks is not None:
            logits = self.sinks.to(self.q.dtype)[self.tile.heads]
            extra = columns[0].new_empty(*self.q.shape[:2], 1)
            self.tile.split(extra).copy_(logits)
            columns.append(extra)
        p = torch.softmax(columns[0] if len(columns) == 1 else torch.cat(columns, -1), -1)
        self.tile.zero(p[..., : self.w])
        return p

    def keep(self) -> Tensor | None:
        """What dropout multiplies P with."""
        if not self.score.dropout:
            return None
        tile, at = self.tile, self.tile.j
        if self.first is not None:
            at = torch.cat([at, torch.arange(len(self.first), device=at.device).expand(*at.shape[:-1], -1)], -1)
        kept = self.score.keep(tile.batch, tile.heads, tile.i, at)
        shape = (*self.q.shape[:2], at.shape[-1])
        kept = kept.expand(tile.split(self.q).shape[:-1] + at.shape[-1:]).reshape(shape).to(self.q.dtype)
        if self.sinks is not None:
            kept = torch.cat([kept, kept.new_ones(*shape[:2], 1)], -1)
        return kept.mul_(1 / (1 - self.score.dropout))

    def beside(self, p: Tensor) -> Tensor:
        """The columns of the first keys, rows flattened. [n m sinks]"""
        return p[..., self.w : self.w + len(self.first)].flatten(0, 1)  # type: ignore[arg-type]

    def backward(self, v: Tensor, grad: Tensor, totals: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> None:
        """Write dq and add to dk, dv, dsinks, given the gradient [n m e] of the tile's output."""
        dq, dk, dv, dsinks = totals
        tile, w = self.tile, self.w
        p, keep = self.weights(slope=True), self.keep()
        dp = [torch.bmm(grad, tile.keys(v).mT)]
        first = tile.first(v)
        if first is not None:
            dp.append((grad.flatten(0, 1) @ first.mT).unflatten(0, grad.shape[:2]))
        if self.sinks is not None:
            dp.append(dp[0].new_zeros(*grad.shape[:2], 1))
        dweights = dp[0] if len(dp) == 1 else torch.cat(dp, -1)
        dropped = p if keep is None else p * keep
        dweights = dweights if keep is None else dweights.mul_(keep)
        tile.add(dv, torch.bmm(dropped[..., :w].mT, grad))
        if first is not None:
            tile.first(dv).addmm_(self.beside(dropped).mT.to(dv.dtype), grad.flatten(0, 1).to(dv.dtype))  # type: ignore[union-attr]
        ds = torch.ops.aten._softmax_backward_data(dweights, p, -1, p.dtype)
        if dsinks is not None:
            by_head = tile.split(ds[..., -1:].contiguous()).to(dsinks.dtype)
            heads = tile.heads.expand(by_head.shape)
            dsinks.index_add_(0, heads.flatten(), by_head.flatten())
        if self.slope is not None:
            ds[..., : self.slope.shape[-1]].mul_(self.slope)
        into = torch.bmm(ds[..., :w], self.k)
        if self.first is not None:
            into.view(-1, into.shape[-1]).addmm_(self.beside(ds), self.first)
            tile.first(dk).addmm_(self.beside(ds).mT.to(dk.dtype), self.q.flatten(0, 1).to(dk.dtype))  # type: ignore[union-attr]
        tile.put(dq, into.mul_(self.scale))
        tile.add(dk, torch.bmm(ds[..., :w].mT, self.q))
