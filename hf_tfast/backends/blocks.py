"""Static sparse patterns as tiles of batched matmuls in plain torch, CPU and CUDA, forward and backward.

For every tile (see tiles.py)

    S = Q K^T (scaled, capped, masked)     P = softmax(S)     O = P V

and backward recomputes S and P from q, k, v, so that nothing of size [i, j], nor any probability, outlives its tile
(Dao et al., "FlashAttention", section 3.1 and appendix B, at the granularity of batched matmuls). Time and memory are
linear in the number of queries.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from . import fused, native, traced
from .score import Score
from .tiles import Call, Layout, Tile

__all__ = ["Layout", "attend_tiles"]


def attend_tiles(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, score: Score, *, start: int = 0, kept: int = 0, behind: int = 0
) -> Tensor:
    """Attention of q [b h i d] over k [b g j d], v [b g j e] in the pattern of `layout` -> [b h i e].

    Full rows: the queries are the last i positions, or the last in front of the `behind` last keys (where there are no
    lists); key n has position n below `kept` and n + start from there on. Differentiable once, in q, k, v and
    score.sinks. ValueError where a cache dropped keys that the pattern reads.
    """
    if start and layout.sinks > kept:
        raise ValueError(
            f"the first {layout.sinks} keys are read, but a sliding cache dropped {start} and kept {kept}"
        )
    wide = q.device.type == "cpu" and q.dtype == torch.float16  # CPUs multiply fp16 slowly, and accumulate in fp16
    if wide:
        q, k, v = q.float(), k.float(), v.float()
    if traced.serves(layout, score, q.shape[2], k.shape[2], start):
        o = traced.band(q, k, v, layout, score)
        return o.half() if wide else o
    with torch.autocast(q.device.type, enabled=False):
        call = Call(q, k, layout, score, start, kept, behind)
        call.fused = fused.serves(layout, score, q, k, v, start)
        q, k, v = fused.as_rows(q, k, v) if call.fused else (q, k.contiguous(), v.contiguous())
        o = _Tiles.apply(q, k, v, score.sinks, call)
    return o.half() if wide else o


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: Call) -> Tensor:
        ctx.save_for_backward(q, k, v, sinks)  # type: ignore[arg-type]
        ctx.call = call  # type: ignore[attr-defined]
        b, h, i, _ = q.shape
        o = q.new_empty(b, i, h, v.shape[-1]).transpose(1, 2)  # heads side by side: what an output projection reads
        scratch = _Scratch()
        for tile in call.tiles():
            work = _Work(tile, q, k, v, sinks, scratch)
            p = work.weights()
            keep = work.keep()
            p = p if keep is None else p.mul_(keep)
            out = torch.bmm(p, work.v, out=work.like("o", tile.size[:2], v))
            tile.queries(o).copy_(tile.split(out))
        if call.fused:
            fused.forward(call, q, k, v, sinks, o)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks = ctx.saved_tensors  # type: ignore[attr-defined]
        call: Call = ctx.call  # type: ignore[attr-defined]
        wide = torch.promote_types(q.dtype, torch.float32)
        # a band in tiles adds its overlaps up in fp32 first
        summed = q.dtype if call.layout.lists is None and not call.fused else wide
        dq, dk, dv = native.room_like(q), native.room_like(k, summed).zero_(), native.room_like(v, summed).zero_()
        dsinks = None if sinks is None else torch.zeros_like(sinks, dtype=wide)
        scratch = _Scratch()
        for tile in call.tiles():
            _Work(tile, q, k, v, sinks, scratch).backward(grad, dq, dk, dv, dsinks)
        if call.fused:
            fused.add_backward(call, (q, k, v, sinks), grad, (dq, dk, dv, dsinks))
        return dq, dk.to(k.dtype), dv.to(v.dtype), None if dsinks is None else dsinks.to(sinks.dtype), None


class _Scratch:
    """Buffers that all tiles of a pass share: the page faults of fresh memory would cost more than the matmuls."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised, contiguous tensor of `shape`; the next call under this name reuses its memory."""
        if name not in self.held or self.held[name].numel() < math.prod(shape):
            self.held[name] = like.new_empty(math.prod(shape))
        return self.held[name][: math.prod(shape)].view(shape)


class _Work:
    """The arithmetic of one tile. With sink logits the tile has one more key: zeros, whose scores are these logits."""

    def __init__(self, tile: Tile, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scratch: _Scratch) -> None:
        self.tile, self.score, self.sinks, self.scratch = tile, tile.call.score, sinks, scratch
        self.scale = self.score.factor(q.shape[-1])
        n, m, w = tile.size
        self.w = w
        self.columns = w + (sinks is not None)
        self.q = self.like("q", (n, m), q)
        torch.mul(tile.queries(q), self.scale, out=self.q.view(*tile.shape, q.shape[-1]))
        self.k, self.v = self.like("k", (n, self.columns), k), self.like("v", (n, self.columns), v)
        for source, into in ((k, self.k), (v, self.v)):
            tile.load(source, into if sinks is None else into[:, :w])
            if sinks is not None:
                into[:, w:] = 0
        self.slope: Tensor | None = None  # of the softcap

    def like(self, name: str, shape: tuple[int, ...], x: Tensor) -> Tensor:
        """Scratch of [*shape, width of x]."""
        return self.scratch(name, (*shape, x.shape[-1]), x)

    def scores(self, name: str) -> Tensor:
        """Scratch of [n m columns]."""
        return self.scratch(name, (*self.tile.size[:2], self.columns), self.q)

    def weights(self, slope: bool = False) -> Tensor:
        """P [n m columns]; `slope` keeps the derivative of the softcap."""
        s = torch.bmm(self.q, self.k.mT, out=self.scores("s"))
        if self.score.softcap is not None:
            s.div_(self.score.softcap).tanh_()
            self.slope = 1 - s.square() if slope else None
            s.mul_(self.score.softcap)
        self.tile.hide(s if self.sinks is None else s[..., : self.w])
        if self.sinks is not None:
            self.tile.split(s)[..., -1:] = self.sinks.to(s.dtype)[self.tile.heads]
        torch.softmax(s, -1, out=s)
        self.tile.zero(s if self.sinks is None else s[..., : self.w])
        return s

    def keep(self) -> Tensor | None:
        """What dropout multiplies P with. [n m columns]"""
        if not self.score.dropout:
            return None
        kept = self.score.keep(self.tile.batch, self.tile.heads, self.tile.i, self.tile.j)
        factor = self.scores("keep")
        factor[..., self.w :] = 1
        self.tile.split(factor)[..., : self.w] = kept
        return factor.mul_(1 / (1 - self.score.dropout))

    def backward(self, grad: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, dsinks: Tensor | None) -> None:
        """Write dq and add to dk, dv, dsinks, given the gradient [b h i e] of the output."""
        tile, w = self.tile, self.w
        p, keep = self.weights(slope=True), self.keep()
        rows = self.like("grad", tile.size[:2], grad)
        rows.view(*tile.shape, grad.shape[-1]).copy_(tile.queries(grad))
        dp = torch.bmm(rows, self.v.mT, out=self.scores("dp"))
        dropped = p
        if keep is not None:
            dp.mul_(keep)
            dropped = keep.mul_(p)
        out = torch.bmm(dropped.mT, rows, out=self.like("dv", (tile.size[0], self.columns), grad))
        tile.add(dv, out if self.columns == w else out[:, :w])
        ds = torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp)
        if dsinks is not None:
            by_head = tile.split(ds)[..., -1:].to(dsinks.dtype)
            dsinks.index_add_(0, tile.heads.expand(by_head.shape).flatten(), by_head.flatten())
        if self.slope is not None:
            ds.mul_(self.slope)
        out = torch.bmm(ds, self.k, out=self.like("dq", tile.size[:2], dq)).mul_(self.scale)
        tile.queries(dq).copy_(tile.split(out))
        out = torch.bmm(ds.mT, self.q, out=self.like("dk", (tile.size[0], self.columns), dq))
        tile.add(dk, out if self.columns == w else out[:, :w])
