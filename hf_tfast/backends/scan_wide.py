"""The causal scan of scan.py for devices that want few, large operations: many chunks at once instead of one by one.

The same numbers up to rounding: features p, u = [v, 1], and t_c, the largest key level up to the end of chunk c. With
the sums S_c of a chunk's keys held to its own largest level m_c,

    state before chunk c   = sum_{s < c} exp(m_s - t_{c-1}) S_s
    gradient after chunk c = sum_{s > c} exp(t_c - t_{s-1}) G_s,   G_s = p^T g of the queries of chunk s

Every exponent is at most 0. Both sums are one matmul with a triangular matrix for a span of up to MOST chunks; the
state is carried from span to span, so time and memory stay linear in the length. Training keeps one state a span.

Axes   n batch x query heads, m positions of a span, c chunks of a span, r features, d key width, e value width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F  # noqa: N812

from .scan import CHUNK, _add, _Back, _Features, _Met, _Rows, _spans, bulk

__all__ = ["WideScan"]

MOST = 64  # chunks of a span: more make the triangular products dear
ROWS = 2**18  # positions of all heads in a span


def span(n: int) -> int:
    """Positions of a span, for n heads."""
    return CHUNK * min(MOST, max(1, ROWS // (n * CHUNK)))


class _Span(NamedTuple):
    """Queries and keys of a span, cut into chunks; what pads the last one has no weight."""

    rows: _Rows  # [n m .]
    keys: _Rows
    p: Tensor  # [n*c CHUNK r] of the queries
    met: _Met
    chunk: _Rows  # keys [n*c CHUNK .]; x is not cut
    u: Tensor  # [n*c CHUNK e+1]
    levels: Tensor  # [n c+1]: before each chunk, and at the end
    states: Tensor  # [n c+1 r e+1] in at least fp32, held to these

    @staticmethod
    def of(
        to: _Features, qkv: tuple[Tensor, Tensor, Tensor], at: slice, shared: int, sums: Tensor, level: Tensor
    ) -> "_Span":
        """The positions `at` of the queries, and the keys beside them, after the state `sums` [n r e+1] at `level`."""
        (q, k, v), own = qkv, slice(shared + at.start, shared + at.stop)
        rows, keys, u = to.queries(q, at), to.keys(k, own), cut(to.values(v, own))
        key_level = cut(keys.level, torch.finfo(to.wide).min)
        chunk, n = _Rows(keys.x, cut(keys.p), key_level), len(sums)
        most = key_level.amax(1).view(n, -1)
        levels = torch.cat([level, torch.maximum(most.cummax(1).values, level)], 1)
        weighed = u * (key_level - most.view(-1, 1)).exp()[..., None].to(u.dtype)
        parts = torch.bmm(chunk.p.mT, weighed).to(sums.dtype).unflatten(0, (n, -1))
        held = torch.cat([level, most], 1)[:, None] - levels[..., None]  # [n to from]
        states = _triangle(held, torch.cat([sums[:, None], parts], 1), lower=True)
        met = _Met(levels[:, :-1].reshape(-1, 1), key_level)
        return _Span(rows, keys, cut(rows.p), met, chunk, u, levels, states)

    @property
    def before(self) -> Tensor:
        """[n*c r e+1]: the state that every chunk begins with."""
        return self.states[:, :-1].flatten(0, 1)

    def later(self, parts: Tensor, total: Tensor) -> Tensor:
        """[n c+1 r e+1]: sums of parts [n c r e+1] over a chunk and those after it, and of `total` after all."""
        held = self.levels[..., None] - self.levels[:, None]  # [n to from]
        return _triangle(held, torch.cat([parts, total[:, None]], 1), lower=False)


def _triangle(held: Tensor, x: Tensor, *, lower: bool) -> Tensor:
    """The exponentials of a triangle of `held` [n t s], 0 outside, times x [n s ..]."""
    side = torch.tril if lower else torch.triu
    return torch.bmm(side(side(held).exp()), x.flatten(2)).view(x.shape)


def cut(x: Tensor, value: float = 0.0) -> Tensor:
    """x [n m ..] -> [n*c CHUNK ..], padded with `value`."""
    more = -x.shape[1] % CHUNK
    if more:
        x = F.pad(x, (*(0,) * (2 * (x.ndim - 2)), 0, more), value=value)
    return x.reshape(-1, CHUNK, *x.shape[2:])


def joined(x: Tensor, n: int, m: int) -> Tensor:
    """`cut` undone: [n m ..]."""
    return x.reshape(n, -1, *x.shape[2:])[:, :m]


class WideScan(torch.autograd.Function):
    """What `feature_attention` computes under causality."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, w: Tensor, scale: float, train: bool, fused: bool
    ) -> tuple[Tensor, Tensor]:
        to, (b, h, i, _) = _Features(w, q, scale, fused), q.shape
        shared, n = k.shape[2] - i, b * h
        sums, level = to.nothing(v)
        for at in _spans(0, shared, bulk(n, q.device)):
            sums, level = _add(sums, level, to.keys(k, at), to.values(v, at))
        o = v.new_empty(b, i, h, v.shape[-1]).transpose(1, 2)  # heads side by side: what an output projection reads
        lse, den = sums.new_empty(n, i), sums.new_empty(n, i)
        states = [sums, level]
        for at in _spans(0, i, span(n)):
            s = _Span.of(to, (q, k, v), at, shared, sums, level)
            num = torch.bmm(s.p, s.before.to(to.dtype)) * s.met.past
            num = num + torch.bmm(s.met.weigh(torch.bmm(s.p, s.chunk.p.mT)), s.u)
            row_level = cut(s.rows.level) + s.met.top
            part, part_lse, part_den = (joined(x, n, at.stop - at.start) for x in to.divide(num, row_level))
            o[:, :, at], lse[:, at], den[:, at] = part.unflatten(0, (b, h)).to(o.dtype), part_lse, part_den
            sums, level = s.states[:, -1].contiguous(), s.levels[:, -1:]
            if train:
                states += [sums, level]
        if train:
            ctx.save_for_backward(q, k, v, w, o, den, *states)
            ctx.scale, ctx.fused = scale, fused  # type: ignore[attr-defined]
        return o, lse.view(b, h, i)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, w, o, den, *states = ctx.saved_tensors  # type: ignore[attr-defined]
        with torch.autocast(q.device.type, enabled=False):
            to = _Features(w, q, ctx.scale, ctx.fused)  # type: ignore[attr-defined]
            back, (b, h, i, _) = _Back(to, q, k, v, do, dlse, o, den), q.shape
            shared, n = k.shape[2] - i, b * h
            total, level = torch.zeros_like(states[0]), states[-1]
            for number, at in reversed(list(enumerate(_spans(0, i, span(n))))):
                s = _Span.of(to, (q, k, v), at, shared, *states[2 * number : 2 * number + 2])
                total, level = _back(back, s, at, shared, total)
            for at in _spans(0, shared, bulk(n, q.device)):
                back.shared(at, total, level)
        return back.dq, back.dk, back.dv, *(None,) * 4


def _back(back: _Back, s: _Span, at: slice, shared: int, total: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a span, given `total` at its end -> `total` and level at its start. See `_Back.chunk`."""
    to, n, m = back.to, len(total), at.stop - at.start
    g = cut(back.g[:, at])
    past = g * s.met.past.to(g.dtype)
    totals = s.later(torch.bmm(s.p.mT, past).to(total.dtype).unflatten(0, (n, -1)), total)
    later = totals[:, 1:].flatten(0, 1).to(s.u.dtype)
    held = (s.chunk.level - s.levels[:, 1:].reshape(-1, 1)).exp()[..., None].to(s.u.dtype)
    pairs, dpairs = s.met.weigh(torch.bmm(s.p, s.chunk.p.mT)), s.met.weigh(torch.bmm(g, s.u.mT))
    dp = torch.bmm(past, s.before.to(to.dtype).mT).add_(torch.bmm(dpairs, s.chunk.p))
    back._query(at, s.rows, joined(dp, n, m))
    dp = torch.bmm(s.u * held, later.mT).add_(torch.bmm(dpairs.mT, s.p))
    du = torch.bmm(pairs.mT, g).add_(torch.bmm(s.chunk.p, later) * held)
    own, u = slice(shared + at.start, shared + at.stop), joined(s.u, n, m)
    back._key(own, s.keys, u, joined(dp, n, m), joined(du, n, m))
    return totals[:, 0], s.levels[:, :1]
