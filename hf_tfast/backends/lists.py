"""Patterns made by content as lists of tiles, merged by log-sum-exp, in plain torch, forward and backward.

A tile is any few queries against any few keys: their rows are gathered, so a list can hold the queries that chose one
block of keys, or a bucket. A query may have many tiles; what it has read so far is kept as (maximum, sum, output) and
every further tile is merged into it

    l' = l e^(m - m') + sum_j e^(s_ij - m')    o' = o e^(m - m') + sum_j e^(s_ij - m') v_j    m' = m or max_j s_ij

(Milakov and Gimelshein, "Online normalizer calculation for softmax", section 3; Dao et al., "FlashAttention", section
3.1). Backward recomputes each tile from q, k, v and the log-sum-exp, so memory is linear in rows and lists.

The arithmetic is in base 2, p = 2^(s log2 e - m): torch's exp2 takes a third of the time of its exp on CPUs. All tiles
of a pass work in the same memory. Pairs are hidden by subtracting HIDDEN from their scores, which is vectorised;
filling by a mask of bools is not.

Axes   b batch, h query heads, g key/value heads, i queries, j keys, d key width, e value width,
       u tiles that run together, t queries and s keys of a tile.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .flat import Flat, Sums, by_position
from .score import Score
from .scratch import Scratch, borrowed

ENTRIES = {"cpu": 2**19, "cuda": 2**25}  # scores that run together: about the second-level cache of a CPU
SLACK = 40.0  # a weight may exceed 2^0 by so much before a query's stabiliser is raised
HIDDEN = 1e30  # below every score, with room for its multiples in fp32
LEAST = -1e28  # maximum of a query that has read nothing: above every hidden score
LOG2_E = math.log2(math.e)


def entries(device: torch.device) -> int:
    """How many scores should run together on `device`."""
    return ENTRIES.get(device.type, ENTRIES["cuda"])


@dataclass(frozen=True)
class Tiles:
    """u tiles of equal size.

    rows   [u t] int64: the queries, as rows of q [(b h i) d]; b*h*i stands for nobody. A query is in one tile at most
           of those up to the next number in `again`.
    keys   [u s] int64: the keys, as rows of k [(b g j) d]. Every slot holds a key, hidden ones too: take one that the
           tile reads anyway.
    lower  None, or a function of the scores [u t s] in any unit, and of scratch memory, that lowers in place the
           scores of pairs that are not read, by at least HIDDEN.
    hide   None, or a function of the scores [u t s] (scaled, capped) -> bool, True where a query does not read a key.
           In backward it is asked again, with the same scores.
    drop   the same for weights that are left out after the softmax, whose sum they stay part of.
    """

    rows: Tensor
    keys: Tensor
    lower: Callable[[Tensor, Scratch], None] | None = None
    hide: Callable[[Tensor], Tensor] | None = None
    drop: Callable[[Tensor], Tensor] | None = None
    again: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """What a list needs to know of a call: q [b h i d], k [b g j d]."""

    b: int
    h: int
    g: int
    i: int
    j: int
    causal: bool

    @staticmethod
    def of(q: Tensor, k: Tensor, causal: bool) -> "Sizes":
        return Sizes(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], causal)


class Again:
    """What `make` yields, made anew on every pass instead of stored: for lists that are cheap to make and long."""

    def __init__(self, make: Callable[[], Iterator[Tiles]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Tiles]:
        return self.make()


Pick = Callable[[Tensor, Tensor, slice], Tensor]


def given(hidden: Tensor) -> Callable[[Tensor, Scratch], None]:
    """A `lower` for the pairs where `hidden`, bool and broadcastable to the scores, is true."""

    def lower(s: Tensor, scratch: Scratch) -> None:
        s.sub_(scratch("hidden", tuple(hidden.shape), s.dtype).copy_(hidden), alpha=HIDDEN)

    return lower


def strips(sizes: Sizes, device: torch.device, hide: Pick | None = None, drop: Pick | None = None) -> Iterator[Tiles]:
    """All queries against all keys (before them, under causality), a few queries at a time: O(i j), in linear memory.

    hide, drop   as in Tiles, as functions of (scores [u t s], heads [u] of the flattened b h, which queries); keys are
                 the first s ones.
    """
    heads, shared = sizes.b * sizes.h, sizes.h // sizes.g
    t = max(1, min(sizes.i, 64, entries(device) // max(sizes.j, 1)))
    step = max(1, entries(device) // max(t * sizes.j, 1))
    at = torch.arange(sizes.j, device=device)
    for first in range(0, sizes.i, t):
        part = slice(first, min(first + t, sizes.i))
        stop = sizes.j - sizes.i + part.stop if sizes.causal else sizes.j
        later = at[:stop] > at[sizes.j - sizes.i :][part, None] if sizes.causal else None
        for u in range(0, heads, step):
            unit = torch.arange(u, min(u + step, heads), device=device)

            def picked(
                pick: Pick | None, unit: Tensor = unit, part: slice = part
            ) -> Callable[[Tensor], Tensor] | None:
                return None if pick is None else lambda s: pick(s, unit, part)

            rows = unit[:, None] * sizes.i + torch.arange(part.start, part.stop, device=device)
            keys = (unit // shared)[:, None] * sizes.j + at[:stop]
            yield Tiles(rows, keys, None if later is None else given(later), picked(hide), picked(drop))


def attend_lists(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Iterable[Tiles],
    score: Score,
    at: Tensor | None = None,
    beside: Tensor | None = None,
    *,
    often: bool = False,
) -> Tensor:
    """Attention of q [b h i d] over k [b g j d], v [b g j e], each query over the keys of its tiles -> [b h i e].

    lists    is iterated in forward and again in backward.
    at       [j] positions of the keys, None for 0 to j - 1: dropout's draws are by position.
    beside   None, or [b h i]: the logarithm of a mass that takes part in the softmax and carries no value or gradient.
    often    queries have many tiles each: on CPUs it pays to put the rows of a head together first.
    Computed in at least fp32, given back in the dtype of v. A query without keys reads zeros. Differentiable once, in
    q, k, v and score.sinks.
    """
    call = _Call(q, k, v, lists, score, at, beside, together=often and q.device.type == "cpu")
    with torch.autocast(q.device.type, enabled=False):
        return _Lists.apply(q, k, v, score.sinks, call)


@torch.no_grad()
def log_mass(q: Tensor, k: Tensor, lists: Iterable[Tiles], score: Score) -> Tensor:
    """[b h i]: log of the sum of e^s_ij over the keys of each query's tiles, sink logit included; without gradient."""
    call = _Call(q, k, k, lists, score, None, None)
    with torch.autocast(q.device.type, enabled=False):
        flat_q, flat_k = Flat.of(q, spare=True), Flat.of(k)
        mass = torch.full((call.rows + 1,), float("-inf"), dtype=call.wide, device=q.device)
        if score.sinks is not None:
            mass[:-1] = call.sink_logits(score.sinks)
        with borrowed(q) as scratch:
            for tiles in call.lists:
                q_tile, k_tile = (_gather(scratch, n, x, at, call.wide) for n, x, at in
                                  (("q", flat_q, tiles.rows), ("k", flat_k, tiles.keys)))  # fmt: skip
                s = call.scores(q_tile, k_tile, tiles, scratch, natural=True).s
                rows = tiles.rows.flatten()
                here = s.logsumexp(-1).masked_fill_(s.amax(-1) < LEAST, float("-inf")).flatten()
                mass.index_copy_(0, rows, torch.logaddexp(mass.index_select(0, rows), here))
    return mass[:-1].view(call.b, call.h, call.i)


@dataclass(frozen=True)
class _Scored:
    """Scores [u t s] of a tile, times log2 e unless natural, and what their slope (softcap) and weights (dropout) are
    multiplied with, or None."""

    s: Tensor
    slope: Tensor | None
    keep: Tensor | None


class _Call:
    """What forward and backward share: the sizes, the lists, the arithmetic of a tile."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lists: Iterable[Tiles],
        score: Score,
        at: Tensor | None,
        beside: Tensor | None,
        together: bool = False,
    ) -> None:
        (self.b, self.h, self.i, self.d), self.j = q.shape, k.shape[2]
        self.e, self.lists, self.score = v.shape[-1], lists, score
        self.at = torch.arange(self.j, device=q.device) if at is None else at
        self.beside, self.together = beside, together
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.rows = self.b * self.h * self.i
        self.factor = score.factor(self.d)

    def queries(self, x: Tensor) -> Flat:
        """Rows of [b h i d], and one for nobody."""
        return Flat.of(x.contiguous() if self.together else x, spare=True)

    def scores(
        self, q: Tensor, k: Tensor, tiles: Tiles, scratch: Scratch, *, natural: bool = False, slope: bool = False
    ) -> _Scored:
        """Of the tile q [u t d], k [u s d]; `slope`: keep that of the softcap."""
        s = scratch("s", (*tiles.rows.shape, tiles.keys.shape[1]), self.wide)
        blind = tiles.hide is None and tiles.drop is None  # nobody looks at natural scores
        early = blind and not natural and self.score.softcap is None
        torch.baddbmm(s, q, k.mT, beta=0, alpha=self.factor * (LOG2_E if early else 1.0), out=s)
        steep = None
        if self.score.softcap is not None:
            s.div_(self.score.softcap).tanh_()
            steep = 1 - s.square() if slope else None
            s.mul_(self.score.softcap)
        hidden = None if tiles.hide is None else tiles.hide(s)
        keep = self._keep(tiles, s)
        if not (early or natural):
            s.mul_(LOG2_E)
        if hidden is not None:
            given(hidden)(s, scratch)
        if tiles.lower is not None:
            tiles.lower(s, scratch)
        return _Scored(s, steep, keep)

    def _keep(self, tiles: Tiles, s: Tensor) -> Tensor | None:
        """What weights are multiplied with after the softmax."""
        kept = None
        if tiles.drop is not None:
            kept = (~tiles.drop(s)).to(self.wide)
        if self.score.dropout:
            row = tiles.rows[..., None]
            i_at = self.at[self.j - self.i + row % self.i]
            j_at = self.at[tiles.keys[:, None] % self.j]
            drawn = self.score.keep(row // (self.h * self.i), row // self.i % self.h, i_at, j_at)
            drawn = drawn.to(self.wide).mul_(1 / (1 - self.score.dropout))
            kept = drawn if kept is None else kept.mul_(drawn)
        return kept

    def sink_logits(self, sinks: Tensor) -> Tensor:
        """[h] -> [b*h*i]: the sink logit of every query."""
        return sinks.detach().to(self.wide)[None, :, None].expand(self.b, self.h, self.i).reshape(-1)


class _Lists(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: _Call) -> Tensor:
        inputs, rows = (call.queries(q), Flat.of(k), Flat.of(v)), call.rows
        sums = Sums.zeros((call.b, call.h, call.i, call.e), call.wide, q.device, by_position=not call.together)
        top = sums.flat.rows.new_full((rows + 1,), LEAST)
        total = torch.zeros_like(top)
        for extra in [call.beside, None if sinks is None else call.sink_logits(sinks)]:
            if extra is not None:
                _merge_logit(top[:-1], total[:-1], extra.reshape(-1).to(call.wide) * LOG2_E)
        with borrowed(q) as scratch:
            for tiles in call.lists:
                _read(call, tiles, inputs, (top, total, sums.flat), scratch)
        some = total > 0
        o = sums.view()
        o.div_(total.where(some, 1.0)[:-1].view(call.b, call.h, call.i, 1))
        mass = top.add_(total.log2_()).masked_fill_(~some, float("inf"))  # a row without keys: 2^(s - inf) = 0
        mass[-1] = float("inf")
        ctx.save_for_backward(q, k, v, sinks, o, mass)  # type: ignore[arg-type]
        ctx.call = call  # type: ignore[attr-defined]
        return o.to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):  # backward may run inside one
            return _gradients(ctx.call, grad, *ctx.saved_tensors)  # type: ignore[attr-defined]


def _gradients(
    call: _Call, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, o: Tensor, mass: Tensor
) -> tuple[Tensor | None, ...]:
    """Of q, k, v, sinks and, None, the call."""
    delta = torch.zeros_like(mass)
    by_head = delta[:-1].view(call.b, call.h, call.i)
    sums = [Sums.zeros(x.shape, call.wide, x.device, by_position(x) and (x is not q or not call.together))
            for x in (q, k, v)]  # fmt: skip
    inputs = call.queries(q), Flat.of(k), Flat.of(v), call.queries(grad)
    with borrowed(q) as scratch:
        step = max(1, entries(q.device) // max(1, call.b * call.h * call.e))
        for at in range(0, call.i, step):
            part = o[:, :, at : at + step]
            product = torch.mul(part, grad[:, :, at : at + step], out=scratch("delta", tuple(part.shape), call.wide))
            by_head[:, :, at : at + step] = product.sum(-1)
        for tiles in call.lists:
            _read_back(call, tiles, inputs, (mass, delta), [x.flat for x in sums], scratch)
    dsinks = None
    if sinks is not None:
        share = (call.sink_logits(sinks) * LOG2_E - mass[:-1]).exp2() * -delta[:-1]
        dsinks = share.view(call.b, call.h, call.i).sum((0, 2)).to(sinks.dtype)
    dq, dk, dv = (x.view().to(q.dtype) for x in sums)
    return dq, dk, dv, dsinks, None


def _read(
    call: _Call,
    tiles: Tiles,
    inputs: tuple[Flat, ...],
    running: tuple[Tensor, Tensor, Flat],
    scratch: Scratch,
) -> None:
    """Merge what the queries of `tiles` read into (top, total, o)."""
    (q, k, v), (top, total, o) = inputs, running
    rows = tiles.rows.flatten()
    gather = partial(_gather, scratch, dtype=call.wide)
    scored = call.scores(gather("q", q, tiles.rows), gather("k", k, tiles.keys), tiles, scratch)
    highest = scored.s.amax(-1).flatten()
    over = highest > top.take(rows).add_(SLACK)
    if bool(over.any()):
        if tiles.again:  # a query's tiles are read one after the other, so that it does not matter which come together
            for first, stop in zip((0, *tiles.again), (*tiles.again, len(tiles.rows)), strict=True):
                one = replace(tiles, rows=tiles.rows[first:stop], keys=tiles.keys[first:stop], again=())
                _read(call, one, inputs, running, scratch)
            return
        _raise(running, rows[over], highest[over])
    p = scored.s.sub_(top.take(tiles.rows)[..., None]).exp2_()
    total.index_add_(0, rows, p.sum(-1).flatten())
    p = p if scored.keep is None else p.mul_(scored.keep)
    out = scratch("o", (*tiles.rows.shape, call.e), call.wide)
    o.rows.index_add_(0, o.at(rows), torch.bmm(p, gather("v", v, tiles.keys), out=out).view(-1, call.e))


def _raise(running: tuple[Tensor, Tensor, Flat], rows: Tensor, highest: Tensor) -> None:
    """Give `rows` the stabiliser `highest`, and what they have read so far the weight that goes with it."""
    top, total, o = running
    before = top.take(rows)
    top.scatter_reduce_(0, rows, highest, "amax")  # nobody may come more than once
    begun = before > LEAST
    if bool(begun.any()):
        rows, shrink = rows[begun], (before - top.take(rows))[begun].exp2_()
        total.index_copy_(0, rows, total.take(rows).mul_(shrink))
        rows = o.at(rows)
        o.rows.index_copy_(0, rows, o.rows.index_select(0, rows).mul_(shrink[:, None]))


def _read_back(
    call: _Call,
    tiles: Tiles,
    inputs: tuple[Flat, ...],
    rows_know: tuple[Tensor, Tensor],
    sums: list[Flat],
    scratch: Scratch,
) -> None:
    """Add the gradients of one set of tiles to (dq, dk, dv)."""
    (q, k, v, do), (mass, delta), (dq, dk, dv) = inputs, rows_know, sums
    rows, keys, shape = tiles.rows.flatten(), tiles.keys.flatten(), (*tiles.rows.shape, 1)
    gather, fresh = partial(_gather, scratch, dtype=call.wide), partial(scratch, dtype=call.wide)
    q_tile, k_tile, do_tile = gather("q", q, tiles.rows), gather("k", k, tiles.keys), gather("do", do, tiles.rows)
    scored = call.scores(q_tile, k_tile, tiles, scratch, slope=True)
    p, keep = scored.s.sub_(mass.take(rows).view(shape)).exp2_(), scored.keep
    dropped = p if keep is None else p * keep
    out = torch.bmm(dropped.mT, do_tile, out=fresh("dv", (*tiles.keys.shape, call.e)))
    dv.rows.index_add_(0, dv.at(keys), out.view(-1, call.e))
    ds = torch.bmm(do_tile, gather("v", v, tiles.keys).mT, out=fresh("ds", tuple(p.shape)))
    ds = ds if keep is None else ds.mul_(keep)
    ds = ds.sub_(delta.take(rows).view(shape)).mul_(p)
    ds = ds if scored.slope is None else ds.mul_(scored.slope)
    out = fresh("dk", k_tile.shape)
    torch.baddbmm(out, ds.mT, q_tile, beta=0, alpha=call.factor, out=out)
    dk.rows.index_add_(0, dk.at(keys), out.view(-1, call.d))
    out = fresh("dq", q_tile.shape)
    torch.baddbmm(out, ds, k_tile, beta=0, alpha=call.factor, out=out)
    dq.rows.index_add_(0, dq.at(rows), out.view(-1, call.d))


def _gather(scratch: Scratch, name: str, x: Flat, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of x -> [*index d] in `dtype`, in memory of that name."""
    at, width = x.at(index.flatten()), x.rows.shape[-1]
    out = torch.index_select(x.rows, 0, at, out=scratch(name, (len(at), width), x.rows.dtype))
    out = out if x.rows.dtype == dtype else scratch(name, (len(at), width), dtype).copy_(out)
    return out.view(*index.shape, width)


def _merge_logit(top: Tensor, total: Tensor, logit: Tensor) -> None:
    """Let a logit per query (times log2 e) take part in the softmax, in place."""
    now = torch.maximum(top, logit)
    total.mul_((top - now).exp2_()).add_((logit - now).exp2_())
    top.copy_(now)
