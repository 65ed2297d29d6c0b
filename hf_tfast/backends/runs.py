"""Buckets as lists of tiles: keys sorted by (bucket, position), so that what a query reads is one contiguous run.

A round is an order of the keys and, for every query, the ranks low <= rank < high that it reads. Tiles are cut per
bucket. Under causality a tile holds queries whose newest keys share one cell of `size` ranks, counted from the first
key of the bucket, so that which pairs meet in a tile of which size, and where, depends on nothing that comes later:
outputs do not change by a single bit when the future does.

Axes   b batch, h query heads, g key/value heads, r rounds, i queries, j keys, u tiles that run together,
       t queries and s keys of a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import pad

from .lists import HIDDEN, Sizes, Tiles, entries
from .scratch import Scratch

STEP = 16  # queries and keys of a tile come in multiples of this, so that tiles of one size are many
EVEN = 80  # without causality a tile holds so many queries at most, fewer for short runs
WASTE = 1.25  # and may be so much larger than it needs to be, so as to run with others
SPAN = 512  # and they stand at most so many keys of their bucket apart


@dataclass(frozen=True)
class Runs:
    """What every query reads, in every round: the keys of rank low <= rank < high. All int32.

    order      [r b g j]      the keys, sorted by (bucket, position).
    rank       [r b g j]      place of every key in `order`.
    queries    [r b g i*h/g]  the queries that share a key head, as numbers n * i + (which query), n = 0 to h/g - 1,
                              sorted by (bucket, position).
    start      [r b h i]      rank of the first key of the query's bucket, or where it would be.
    own        [r b h i]      rank of the first key of the bucket after the query's position, or where it would be.
    low, high  [r b h i]
    """

    order: Tensor
    rank: Tensor
    queries: Tensor
    start: Tensor
    own: Tensor
    low: Tensor
    high: Tensor

    @staticmethod
    def of(queries: Tensor, keys: Tensor, cap: int, causal: bool) -> "Runs":
        """Buckets of queries [r b h i] and keys [r b g j], the queries being the last i positions.

        Under causality a query reads the last `cap` keys of its bucket up to its own position; else the last
        ceil(cap / 2) up to it and the first floor(cap / 2) after it. O(i + j): one radix sort of both together.
        """
        (r, b, h, i), (g, j) = queries.shape, keys.shape[2:]
        units, shared, first = r * b * g, h // g, j - i
        label, code = _together(queries.view(units, shared, i), keys.reshape(units, j), first)
        n = code.shape[1]
        code, perm = code.flatten().sort(stable=True)  # one dimension, stable: torch's radix sort
        perm = perm.view(units, n) - torch.arange(units, device=perm.device)[:, None] * n
        label = label[perm]  # [units n]: keys from 0 on, queries from -1 down, by bucket and position
        is_key = label >= 0
        count = is_key.cumsum(1, dtype=torch.int32).flatten()
        starts = _starts(code)
        bucket = torch.repeat_interleave(starts.diff(append=starts.new_tensor([len(code)])))
        begin, end = (count - is_key.flatten().int())[starts], count[pad(starts[1:], (0, 1), value=len(code)) - 1]
        at_keys, at_queries = is_key.flatten().nonzero().view(-1), (~is_key).flatten().nonzero().view(-1)
        order = label.flatten()[at_keys].view(units, j)
        sorted_queries = (-1 - label.flatten()[at_queries]).view(units, -1)
        own, bucket = count[at_queries], bucket[at_queries]
        start = begin[bucket]
        low = torch.maximum(start, own - (cap if causal else (cap + 1) // 2))
        high = own if causal else torch.minimum(end[bucket], own + cap // 2)
        rank = torch.empty_like(order)
        rank.scatter_(1, order.long(), torch.arange(j, dtype=torch.int32, device=order.device).expand_as(order))
        back = sorted_queries.long()
        by_head = [torch.empty_like(sorted_queries).scatter_(1, back, x.view_as(back)).view(r, b, h, i)
                   for x in (start, own, low, high)]  # fmt: skip
        return Runs(order.view(r, b, g, j), rank.view(r, b, g, j), sorted_queries.view(r, b, g, -1), *by_head)

    @staticmethod
    def window(sizes: Sizes, window: int, at: Tensor) -> "Runs":
        """One round: |i - j| <= window, or 0 <= i - j < window under causality, for keys at the ascending positions
        `at` [j]."""
        b, h, g, i, j = sizes.b, sizes.h, sizes.g, sizes.i, sizes.j
        own = at[j - i :]
        low = torch.searchsorted(at, own - (window - 1 if sizes.causal else window))
        high = torch.searchsorted(at, own if sizes.causal else own + window, right=True)
        number = torch.arange(j, dtype=torch.int32, device=at.device)
        queries = torch.arange(h // g * i, dtype=torch.int32, device=at.device).view(h // g, i).T.reshape(-1)
        by_head = [x.int().expand(1, b, h, i) for x in (torch.zeros_like(low), number[j - i :] + 1, low, high)]
        keys = number.expand(1, b, g, j)
        return Runs(keys, keys, queries.expand(1, b, g, -1), *by_head)

    def join(self, other: "Runs") -> "Runs":
        """The rounds of both."""
        return Runs(*(torch.cat([getattr(x, f.name) for x in (self, other)]) for f in fields(Runs)))


def _together(queries: Tensor, keys: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Of buckets of queries [units shared i] and keys [units j]: labels [n], codes [units n] by (unit, bucket).

    In order of position, a key before the queries of its position, so that a stable sort keeps that.
    """
    (units, shared, i), j = queries.shape, keys.shape[1]
    both = torch.cat([keys[:, first:, None], queries.mT], 2)
    code = torch.cat([keys[:, :first], both.flatten(1)], 1)
    number = torch.arange(j, dtype=torch.int32, device=keys.device)
    asks = -1 - torch.arange(shared * i, dtype=torch.int32, device=keys.device).view(shared, i).T
    label = torch.cat([number[:first], torch.cat([number[first:, None], asks], 1).flatten()])
    buckets = int(code.max()) + 1
    small = torch.int32 if units * buckets < 2**31 else torch.int64
    return label, code.to(small) + (torch.arange(units, device=keys.device) * buckets).to(small)[:, None]


def _starts(*columns: Tensor) -> Tensor:
    """Where a row of the columns [n] differs from the one before."""
    new = torch.zeros_like(columns[0], dtype=torch.bool)
    new[:1] = True
    for x in columns:
        new[1:] |= x[1:] != x[:-1]
    return new.nonzero().view(-1)


def run_lists(sizes: Sizes, runs: Runs, reach: tuple[int, ...], size: int) -> Iterator[Tiles]:
    """Every query against its runs, tile by tile; a pair is read in the first round that has it.

    reach   how many keys a run may hold up to the query's own position, per round.
    size    queries of a tile under causality; else a tile holds a bucket, or an even part of a large one.
    """
    seen = _Seen(sizes, runs)
    last = len(runs.order) - 1
    for r in (last, *range(last)):  # a query's own window first: its scores are a good stabiliser for the others
        yield from _Round(sizes, runs, seen, r, reach[r], size).tiles()


class _Seen:
    """Which ranks every query reads, as middle and half width, flattened and with nobody at the end."""

    def __init__(self, sizes: Sizes, runs: Runs) -> None:
        self.rank = runs.rank.flatten(1)
        low, high = (pad(x.flatten(1), (0, 1)) for x in (runs.low, runs.high))  # nobody reads [0, 0)
        self.low, self.high = low, high
        self.middle, self.half = (low + high - 1) * 0.5, (high - 1 - low) * 0.5  # fp32: exact up to 2^23 keys


class _Round:
    def __init__(self, sizes: Sizes, runs: Runs, seen: _Seen, r: int, reach: int, size: int) -> None:
        self.sizes, self.runs, self.seen, self.r, self.reach, self.size = sizes, runs, seen, r, reach, size
        self.per = sizes.h // sizes.g * sizes.i  # queries that share a key head
        self.order = runs.order[r].flatten()
        self.rows = self._live()

    def _live(self) -> Tensor:
        """[n] int64: the queries that read anything, in order."""
        queries = self.runs.queries[self.r].view(-1, self.per)
        rows = (queries + torch.arange(len(queries), device=queries.device)[:, None] * self.per).flatten()
        some = (self.runs.high[self.r] > self.runs.low[self.r]).flatten()
        return rows if bool(some.all()) else rows[some[rows]]

    def tiles(self) -> Iterator[Tiles]:
        """Tiles of about as many queries and keys run together; under causality of exactly as many."""
        first, count, base, width = self._cut()
        height = torch.full_like(count, self.size) if self.sizes.causal else (count + STEP - 1) // STEP * STEP
        order = (height * (self.sizes.j + STEP) + width).sort(stable=True).indices
        first, count, base = first[order], count[order], base[order]
        heights, widths, at, most = height[order].tolist(), width[order].tolist(), 0, entries(self.order.device) // 2
        while at < len(widths):
            t, s, area, stop = heights[at], widths[at], heights[at] * widths[at], at + 1
            while stop < len(widths):
                high, wide = max(t, heights[stop]), max(s, widths[stop])
                sum_area, whole = area + heights[stop] * widths[stop], high * wide * (stop + 1 - at)
                if whole > most or ((high, wide) != (t, s) if self.sizes.causal else whole > WASTE * sum_area):
                    break
                t, s, area, stop = high, wide, sum_area, stop + 1
            yield self._tile(first[at:stop], count[at:stop], base[at:stop], (t, s))
            at = stop

    def _cut(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of every tile: place of its first query, number of queries, rank of its first key, number of keys."""
        s, r, rows = self.sizes, self.r, self.rows
        low, high, start, own = (x[r].flatten()[rows] for x in
                                 (self.runs.low, self.runs.high, self.runs.start, self.runs.own))  # fmt: skip
        cell = (own - 1 - start).clamp_min_(0) // (self.size if s.causal else SPAN)
        groups = _starts(rows // self.per, start, cell)
        length = groups.diff(append=groups.new_tensor([len(rows)]))
        most = self.size if s.causal else min(EVEN, max(STEP, 2 * self.reach))
        tiles = (length + most - 1) // most
        each = torch.full_like(tiles, self.size) if s.causal else (length + tiles - 1) // tiles
        group = torch.repeat_interleave(tiles)
        inside = (torch.arange(len(group), device=rows.device) - (tiles.cumsum(0) - tiles)[group]) * each[group]
        first, count = groups[group] + inside, torch.minimum(each[group], length[group] - inside)
        if s.causal:
            before = (cell[first] * self.size + 1 - self.reach).clamp_min_(0)
            base, width = start[first] + before, (cell[first] + 1) * self.size - before
        else:
            base, width = low[first], high[first + count - 1] - low[first]
        return first, count, base.long(), (width.long() + STEP - 1) // STEP * STEP

    def _tile(self, first: Tensor, count: Tensor, base: Tensor, shape: tuple[int, int]) -> Tiles:
        s, r, seen, device = self.sizes, self.r, self.seen, self.order.device
        inside = torch.arange(shape[0], device=device)
        rows = self.rows.take((first[:, None] + inside).clamp_max_(len(self.rows) - 1))
        unit = rows[:, :1] // self.per * s.j
        rows = rows.masked_fill_(inside >= count[:, None], s.b * s.h * s.i)
        places = base[:, None] + torch.arange(shape[1], device=device)
        keys = self.order.take(unit + places.clamp_max(s.j - 1)) + unit
        flat, column = rows.flatten(), (*rows.shape, 1)

        def lower(scores: Tensor, scratch: Scratch) -> None:
            far = scratch("far", tuple(scores.shape), scores.dtype)

            def away(ranks: Tensor, r: int) -> tuple[Tensor, Tensor]:
                """|rank - middle|, and the half width: a key is read where the first is not larger."""
                middle, half = (
                    x[r].index_select(0, flat).view(column).to(far.dtype) for x in (seen.middle, seen.half)
                )
                return torch.sub(ranks.to(far.dtype)[:, None], middle, out=far).abs_(), half

            distance, half = away(places, r)
            scores.sub_(distance.sub_(half).clamp_min_(0), alpha=HIDDEN)  # the next rank is one too far
            for earlier in range(r):
                distance, half = away(seen.rank[earlier].take(keys), earlier)
                scores.sub_(torch.sub(half + 1, distance, out=far).clamp_min_(0), alpha=HIDDEN)

        return Tiles(rows, keys, lower)
