"""Patterns made by content as lists of tiles, merged by log-sum-exp, in plain torch, forward and backward.

A tile is any few queries against any few keys: their rows are gathered, so a list can hold the queries that chose one
block of keys, or a bucket. A query may have many tiles; what it has read so far is kept as (maximum, sum, output) and
every further tile is merged into it

    m' = max(m, max_j s_ij)    l' = l e^(m - m') + sum_j e^(s_ij - m')    o' = o e^(m - m') + sum_j e^(s_ij - m') v_j

(Milakov and Gimelshein, "Online normalizer calculation for softmax", section 3; Dao et al., "FlashAttention", section
3.1). Backward recomputes each tile from q, k, v and the log-sum-exp, so memory is linear in rows and lists.

Axes   b batch, h query heads, g key/value heads, i queries, j keys, d key width, e value width,
       u tiles that run together, t queries and s keys of a tile.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .score import Score

ENTRIES = {"cpu": 2**20, "cuda": 2**25}  # scores that run together: a few MB on a CPU, so that they stay in cache


def entries(device: torch.device) -> int:
    """How many scores should run together on `device`."""
    return ENTRIES.get(device.type, ENTRIES["cuda"])


@dataclass(frozen=True)
class Tiles:
    """u tiles of equal size.

    rows  [u t] int64: the queries, as rows of q [(b h i) d]; b*h*i stands for nobody. A query is in one tile at most.
    keys  [u s] int64: the keys, as rows of k [(b g j) d]. Every slot holds a key, hidden ones too: take one that the
          tile reads anyway.
    hide  None, or a function of the scores [u t s] (scaled, capped) -> bool, True where a query does not read a key.
          In backward it is asked again, with the same scores.
    drop  the same for weights that are left out after the softmax, whose sum they stay part of.
    """

    rows: Tensor
    keys: Tensor
    hide: Callable[[Tensor], Tensor] | None = None
    drop: Callable[[Tensor], Tensor] | None = None


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


def given(hidden: Tensor) -> Callable[[Tensor], Tensor]:
    """A `hide` that does not look at the scores."""
    return lambda s: hidden


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

            def hidden(s: Tensor, unit: Tensor = unit, part: slice = part, later: Tensor | None = later) -> Tensor:
                out = s.new_zeros((), dtype=torch.bool) if later is None else later
                return out if hide is None else out | hide(s, unit, part)

            def left_out(s: Tensor, unit: Tensor = unit, part: slice = part) -> Tensor:
                return drop(s, unit, part)  # type: ignore[misc]

            rows = unit[:, None] * sizes.i + torch.arange(part.start, part.stop, device=device)
            keys = (unit // shared)[:, None] * sizes.j + at[:stop]
            yield Tiles(
                rows, keys, None if hide is None and later is None else hidden, None if drop is None else left_out
            )


def attend_lists(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Iterable[Tiles],
    score: Score,
    at: Tensor | None = None,
    beside: Tensor | None = None,
) -> Tensor:
    """Attention of q [b h i d] over k [b g j d], v [b g j e], each query over the keys of its tiles -> [b h i e].

    lists    is iterated in forward and again in backward.
    at       [j] positions of the keys, None for 0 to j - 1: dropout's draws are by position.
    beside   None, or [b h i]: the logarithm of a mass that takes part in the softmax and carries no value or gradient.
    Computed in at least fp32, given back in the dtype of v. A query without keys reads zeros. Differentiable once, in
    q, k, v and score.sinks.
    """
    call = _Call(q, k, v, lists, score, at, beside)
    with torch.autocast(q.device.type, enabled=False):
        return _Lists.apply(q, k, v, score.sinks, call)


@torch.no_grad()
def log_mass(q: Tensor, k: Tensor, lists: Iterable[Tiles], score: Score) -> Tensor:
    """[b h i]: log of the sum of e^s_ij over the keys of each query's tiles, sink logit included; without gradient."""
    call = _Call(q, k, k, lists, score, None, None)
    with torch.autocast(q.device.type, enabled=False):
        flat_q, flat_k = call.padded(q, score.factor(call.d)), _flat(k)
        mass = flat_q.new_full((call.rows + 1,), float("-inf"))
        if score.sinks is not None:
            mass[:-1] = call.sink_logits(score.sinks)
        for tiles in call.lists:
            s, _ = call.scores(call.gather(flat_q, tiles.rows), call.gather(flat_k, tiles.keys), tiles)
            rows = tiles.rows.flatten()
            mass.index_copy_(0, rows, torch.logaddexp(mass.index_select(0, rows), s.logsumexp(-1).flatten()))
    return mass[:-1].view(call.b, call.h, call.i)


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
    ) -> None:
        (self.b, self.h, self.i, self.d), self.j = q.shape, k.shape[2]
        self.e, self.lists, self.score = v.shape[-1], lists, score
        self.at = torch.arange(self.j, device=q.device) if at is None else at
        self.beside = beside
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.rows = self.b * self.h * self.i

    def padded(self, x: Tensor, factor: float = 1.0) -> Tensor:
        """[b h i d] -> [b*h*i + 1, d] in the wide dtype, times `factor`; the row of nobody is zeros."""
        flat = torch.zeros(self.rows + 1, x.shape[-1], dtype=self.wide, device=x.device)
        flat[:-1].view(x.shape).copy_(x).mul_(factor)
        return flat

    def gather(self, x: Tensor, index: Tensor) -> Tensor:
        """Rows of x [n d] -> [*index d] in the wide dtype."""
        return x.index_select(0, index.flatten()).to(self.wide).view(*index.shape, x.shape[-1])

    def scores(self, q: Tensor, k: Tensor, tiles: Tiles, slope: bool = False) -> tuple[Tensor, Tensor | None]:
        """[u t s], hidden pairs at -inf, and the derivative of the softcap where asked for."""
        s = torch.bmm(q, k.mT)
        steep = None
        if self.score.softcap is not None:
            s = s.div_(self.score.softcap).tanh_()
            steep = 1 - s.square() if slope else None
            s = s.mul_(self.score.softcap)
        if tiles.hide is not None:
            s = s.masked_fill_(tiles.hide(s), float("-inf"))
        return s, steep

    def keep(self, tiles: Tiles, s: Tensor) -> Tensor | None:
        """What weights are multiplied with after the softmax."""
        kept = None
        if tiles.drop is not None:
            kept = (~tiles.drop(s)).to(self.wide)
        if self.score.dropout:
            row = tiles.rows[..., None]
            i_at = self.at[self.j - self.i + row % self.i]
            drawn = self.score.keep(row // (self.h * self.i), row // self.i % self.h, i_at, self.key_at(tiles))
            drawn = drawn.to(self.wide).mul_(1 / (1 - self.score.dropout))
            kept = drawn if kept is None else kept.mul_(drawn)
        return kept

    def key_at(self, tiles: Tiles) -> Tensor:
        """[u 1 s]: positions of the keys of the tiles."""
        return self.at[tiles.keys[:, None] % self.j]

    def sink_logits(self, sinks: Tensor) -> Tensor:
        """[h] -> [b*h*i]: the sink logit of every query."""
        return sinks.detach().to(self.wide)[None, :, None].expand(self.b, self.h, self.i).reshape(-1)


class _Lists(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: _Call) -> Tensor:
        rows = call.rows
        flat_q, flat_k, flat_v = call.padded(q, call.score.factor(call.d)), _flat(k), _flat(v)
        top = flat_q.new_full((rows + 1, 1), float("-inf"))
        total, o = torch.zeros_like(top), flat_q.new_zeros(rows + 1, call.e)
        for extra in [call.beside, None if sinks is None else call.sink_logits(sinks)]:
            if extra is not None:
                _merge_logit(top[:-1], total[:-1], extra.reshape(-1, 1).to(call.wide))
        for tiles in call.lists:
            _read(call, tiles, (flat_q, flat_k, flat_v), (top, total, o))
        some = total > 0
        o = o.div_(total.where(some, 1.0))[:-1].view(call.b, call.h, call.i, call.e)
        lse = (top + total.log()).masked_fill_(~some, float("inf"))  # a row without keys: exp(s - inf) = 0
        lse[-1] = float("inf")
        ctx.save_for_backward(q, k, v, sinks, o, lse)  # type: ignore[arg-type]
        ctx.call = call  # type: ignore[attr-defined]
        return o.to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):  # backward may run inside one
            return _gradients(ctx.call, grad, *ctx.saved_tensors)  # type: ignore[attr-defined]


def _gradients(
    call: _Call, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, o: Tensor, lse: Tensor
) -> tuple[Tensor | None, ...]:
    """Of q, k, v, sinks and, None, the call."""
    factor = call.score.factor(call.d)
    flat_q, flat_k, flat_v, do = call.padded(q, factor), _flat(k), _flat(v), call.padded(grad)
    delta = torch.zeros_like(lse)
    torch.sum(do[:-1] * o.reshape(-1, call.e), -1, keepdim=True, out=delta[:-1])
    dq = torch.zeros_like(flat_q)
    dk, dv = torch.zeros_like(flat_k, dtype=call.wide), torch.zeros_like(flat_v, dtype=call.wide)
    for tiles in call.lists:
        _read_back(call, tiles, (flat_q, flat_k, flat_v, do, lse, delta), (dq, dk, dv))
    dsinks = None
    if sinks is not None:
        share = (call.sink_logits(sinks)[:, None] - lse[:-1]).exp() * -delta[:-1]
        dsinks = share.view(call.b, call.h, call.i).sum((0, 2)).to(sinks.dtype)
    dq = dq[:-1].mul_(factor).view(q.shape).to(q.dtype)
    return dq, dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype), dsinks, None


def _read(call: _Call, tiles: Tiles, inputs: tuple[Tensor, ...], running: tuple[Tensor, Tensor, Tensor]) -> None:
    """Merge what the queries of `tiles` read into (top, total, o)."""
    (q, k, v), (top, total, o) = inputs, running
    rows, shape = tiles.rows.flatten(), (*tiles.rows.shape, 1)
    s, _ = call.scores(call.gather(q, tiles.rows), call.gather(k, tiles.keys), tiles)
    keep = call.keep(tiles, s)
    before = top.index_select(0, rows).view(shape)
    now = torch.maximum(before, s.amax(-1, keepdim=True))
    finite = now if tiles.hide is None else now.nan_to_num(neginf=0.0)  # nothing read yet: exp(-inf - 0) = 0
    p = s.sub_(finite).exp_()
    shrink = (before - finite).exp_()
    top.index_copy_(0, rows, now.view(-1, 1))
    total.index_copy_(
        0, rows, torch.addcmul(p.sum(-1, keepdim=True), total.index_select(0, rows).view(shape), shrink).view(-1, 1)
    )
    p = p if keep is None else p.mul_(keep)
    out = call.gather(o, tiles.rows).mul_(shrink)
    o.index_copy_(0, rows, out.baddbmm_(p, call.gather(v, tiles.keys)).view(-1, call.e))


def _read_back(call: _Call, tiles: Tiles, inputs: tuple[Tensor, ...], totals: tuple[Tensor, Tensor, Tensor]) -> None:
    """Add the gradients of one set of tiles to (dq, dk, dv)."""
    (q, k, v, do, lse, delta), (dq, dk, dv) = inputs, totals
    rows, keys, shape = tiles.rows.flatten(), tiles.keys.flatten(), (*tiles.rows.shape, 1)
    q_tile, k_tile, do_tile = call.gather(q, tiles.rows), call.gather(k, tiles.keys), call.gather(do, tiles.rows)
    s, steep = call.scores(q_tile, k_tile, tiles, slope=True)
    keep = call.keep(tiles, s)
    p = s.sub_(lse.index_select(0, rows).view(shape)).exp_()
    dropped = p if keep is None else p * keep
    dv.index_add_(0, keys, torch.bmm(dropped.mT, do_tile).view(-1, call.e))
    ds = torch.bmm(do_tile, call.gather(v, tiles.keys).mT)
    ds = ds if keep is None else ds.mul_(keep)
    ds = ds.sub_(delta.index_select(0, rows).view(shape)).mul_(p)
    ds = ds if steep is None else ds.mul_(steep)
    dk.index_add_(0, keys, torch.bmm(ds.mT, q_tile).view(-1, call.d))
    dq.index_copy_(0, rows, call.gather(dq, tiles.rows).baddbmm_(ds, k_tile).view(-1, call.d))


def _merge_logit(top: Tensor, total: Tensor, logit: Tensor) -> None:
    """Let a logit per query take part in the softmax, in place."""
    now = torch.maximum(top, logit)
    finite = now.nan_to_num(neginf=0.0)
    total.mul_((top - finite).exp_()).add_((logit - finite).exp_())
    top.copy_(now)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
