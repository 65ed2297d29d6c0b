"""Buckets as lists of tiles: keys sorted by (bucket, position), so that what a query reads is one contiguous run.

Tiles are cut per bucket, counted from its first query and its first key in order of position, so that which pairs meet
in a tile, and where, depends on nothing that comes later: outputs do not change by a single bit when the future does.

Axes   b batch, h query heads, g key/value heads, r rounds, i queries, j keys, u tiles that run together,
       t queries and s keys of a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .lists import Sizes, Tiles, entries, given


@dataclass(frozen=True)
class Runs:
    """What every query reads, in every round: the keys of rank low <= rank < high.

    order      [r b g j]   the keys, sorted by (bucket, position).
    rank       [r b g j]   place of every key in `order`.
    bucket     [r b h i]   bucket of every query.
    start      [r b h i]   rank of the first key of the query's bucket, or where it would be.
    low, high  [r b h i]
    """

    order: Tensor
    rank: Tensor
    bucket: Tensor
    start: Tensor
    low: Tensor
    high: Tensor

    @staticmethod
    def of(queries: Tensor, keys: Tensor, cap: int, causal: bool) -> "Runs":
        """Buckets of queries [r b h i] and keys [r b g j], the queries being the last i positions.

        Under causality a query reads the last `cap` keys of its bucket up to its own position; else the last
        ceil(cap / 2) up to it and the first floor(cap / 2) after it. O((i + j) log j).
        """
        (r, b, h, i), (g, j) = queries.shape, keys.shape[2:]
        device = keys.device
        code = keys.long().contiguous() * j + torch.arange(j, device=device)  # unique, so that the order is one
        code, order = code.sort(dim=-1)
        rank = torch.empty_like(order).scatter_(-1, order, torch.arange(j, device=device).expand_as(order))
        shared = queries.long().reshape(r, b, g, h // g * i).contiguous()
        own = torch.arange(j - i, j, device=device).repeat(h // g)
        start = torch.searchsorted(code, shared * j)
        middle = torch.searchsorted(code, shared * j + own, right=True)
        if causal:
            low, high = torch.maximum(start, middle - cap), middle
        else:
            stop = torch.searchsorted(code, (shared + 1) * j)
            low, high = torch.maximum(start, middle - (cap + 1) // 2), torch.minimum(stop, middle + cap // 2)
        by_head = [x.view(r, b, h, i).int() for x in (start, low, high)]
        return Runs(order.int(), rank.int(), queries.int(), *by_head)


def run_lists(sizes: Sizes, runs: Runs, at: Tensor, window: int, size: int) -> Iterator[Tiles]:
    """Every query against its runs, in tiles of `size` queries and keys; keys lie at the positions `at` [j].

    A pair is read in the first round that has it, and not at all in the window: |i - j| <= window, or
    0 <= i - j < window under causality.
    """
    for r in range(len(runs.order)):
        yield from _Round(sizes, runs, at, r, window, size).tiles()


class _Round:
    def __init__(self, sizes: Sizes, runs: Runs, at: Tensor, r: int, window: int, size: int) -> None:
        self.sizes, self.runs, self.r, self.window, self.size = sizes, runs, r, window, size
        self.at = at.int()
        self.nobody = sizes.b * sizes.h * sizes.i
        self.low, self.high = (
            pad(x[: r + 1].flatten(1), (0, 1)) for x in (runs.low, runs.high)
        )  # nobody reads [0, 0)
        self.rank = runs.rank[: r + 1].flatten(1)
        self.order = runs.order[r].flatten().long()

    def tiles(self) -> Iterator[Tiles]:
        """In waves: the first tile of keys of every tile of queries, the second, ..., so that no query comes twice."""
        rows = self._rows()
        low, high = self.low[self.r][rows], self.high[self.r][rows]
        live = high > low
        start = self.runs.start[self.r].flatten()[rows[:, 0]].long()
        first = (low.masked_fill(~live, self.sizes.j).amin(-1) - start).clamp_min(0) // self.size * self.size
        last = high.masked_fill(~live, 0).amax(-1) - start
        waves = ((last - first + self.size - 1) // self.size).clamp_min(0)
        base = start + first
        head = rows[:, 0] // self.sizes.i
        shared = self.sizes.h // self.sizes.g
        unit = (head // shared) * self.sizes.j
        step = max(1, entries(rows.device) // self.size**2)
        for wave in range(int(waves.max()) if len(waves) else 0):
            now = (waves > wave).nonzero().view(-1)
            for u in range(0, len(now), step):
                these = now[u : u + step]
                yield self._tile(rows[these], base[these] + wave * self.size, unit[these])

    def _rows(self) -> Tensor:
        """[u t]: the queries of every bucket in order of position, cut into tiles."""
        s, device = self.sizes, self.order.device
        bucket = self.runs.bucket[self.r].flatten(0, 1)  # [b*h i]
        bucket, order = bucket.sort(dim=-1, stable=True)
        order = (order + torch.arange(s.b * s.h, device=device)[:, None] * s.i).flatten()
        place = torch.arange(s.i, device=device).expand_as(bucket)
        new = torch.ones_like(bucket, dtype=torch.bool)
        new[:, 1:] = bucket[:, 1:] != bucket[:, :-1]
        inside = place - place.masked_fill(~new, 0).cummax(-1).values  # place among the queries of the bucket
        starts = (inside % self.size == 0).flatten().nonzero().view(-1)
        stops = pad(starts[1:], (0, 1), value=len(order))
        places = starts[:, None] + torch.arange(self.size, device=device)
        return order[places.clamp_max(len(order) - 1)].masked_fill(places >= stops[:, None], self.nobody)

    def _tile(self, rows: Tensor, base: Tensor, unit: Tensor) -> Tiles:
        s = self.sizes
        places = (base[:, None] + torch.arange(self.size, device=rows.device)).clamp_max(s.j - 1)
        keys = self.order[unit[:, None] + places] + unit[:, None]
        past_end = base[:, None] + torch.arange(self.size, device=rows.device) >= s.j

        def hide(_: Tensor) -> Tensor:
            ranks = self.rank[self.r][keys].masked_fill(past_end, -1)[:, None]  # the end of `order` comes once only
            hidden = (ranks < self.low[self.r][rows][..., None]) | (ranks >= self.high[self.r][rows][..., None])
            away = self.at[rows % s.i + s.j - s.i][..., None] - self.at[keys % s.j][:, None]
            hidden |= (away < self.window) if s.causal else (away.abs() <= self.window)
            for r in range(self.r):
                ranks = self.rank[r][keys][:, None]
                hidden |= (ranks >= self.low[r][rows][..., None]) & (ranks < self.high[r][rows][..., None])
            return hidden

        return Tiles(rows, keys, hide)


def window_lists(sizes: Sizes, window: int, at: Tensor) -> Iterator[Tiles]:
    """Every query against its window: |i - j| <= window, or 0 <= i - j < window under causality, for keys at
    the ascending positions `at` [j]."""
    device, size = at.device, 16 if window <= 16 else 64  # a small window fills little of a large tile
    first, after = sizes.j - sizes.i, 0 if sizes.causal else min(window, sizes.j)
    before = min(window - 1 if sizes.causal else window, sizes.j)
    cuts = range(0, sizes.i, size)
    heads, shared = sizes.b * sizes.h, sizes.h // sizes.g
    start = torch.tensor(list(cuts), device=device)
    offset = torch.arange(-before, size + after, device=device)
    step = max(1, entries(device) // (size * len(offset)))
    for u in range(0, heads * len(cuts), step):
        unit = torch.arange(u, min(u + step, heads * len(cuts)), device=device)
        head, begin = unit // len(cuts), start[unit % len(cuts), None]
        query = begin + torch.arange(size, device=device)
        key = begin + first + offset
        there = (key >= 0) & (key < sizes.j)
        away = at[(query + first).clamp_max(sizes.j - 1)][..., None] - at[key.clamp(0, sizes.j - 1)][:, None]
        hidden = ~there[:, None] | (away < -after) | (away > before)
        rows = torch.where(query < sizes.i, query + head[:, None] * sizes.i, heads * sizes.i)
        keys = torch.where(there, key, begin + first) + (head // shared)[:, None] * sizes.j
        yield Tiles(rows, keys, given(hidden))
