"""The geometry of tiles: which queries go together, which keys they read, where their results go.

A tile is a run of queries that read one common set of keys. Most tiles of a band see the same mask and a run of keys
at a fixed offset: many of them are one batched matmul (`Band`). Tiles near the borders slice their keys (`Edge`),
tiles with listed blocks gather them (`Listed`).

Axes   b batch, h query heads, g key/value heads, i queries, j keys, n tiles, c queries in a tile, w keys of a tile,
       u query heads that share the keys of a tile, m = u c rows of a tile: grouped heads need no copies of keys.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .score import Score

ROWS = 2048  # rows (n * m) of one batched matmul: its scores should fit the second-level cache of a core
ABSENT = 1 << 40  # a block number behind every real one


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The keys that queries read: a band around the diagonal, the first keys, and listed blocks.

    near        (i, j) -> bool: the band, a function of i - j alone, on positions. None: there is no band.
    before      how many keys before its own the band reaches; `after`: how many behind.
    sinks       every query reads the first `sinks` keys; with `open_sinks` these queries also read every key.
    lists       [h or 1, query blocks, most] int64: the blocks of `block` keys that each block of `block` queries reads
                beside the band, -1 where there are fewer. None: there are none.
    causal      no key after the query's own position is read, whatever the above says.
    solid       the band holds every key from `before` to `after`, apart from what causality hides.
    """

    near: Callable[[Tensor, Tensor], Tensor] | None
    before: int = 0
    after: int = 0
    sinks: int = 0
    open_sinks: bool = False
    lists: Tensor | None = None
    block: int = 64
    causal: bool = True
    solid: bool = False

    def hidden(self, i: Tensor, j: Tensor, listed: Tensor | None = None) -> Tensor:
        """Pairs of positions that are not read; `listed`: the ones that lists add."""
        seen = j < self.sinks
        for more in (self.near(i, j) if self.near else None, listed, i < self.sinks if self.open_sinks else None):
            seen = seen if more is None else seen | more
        return ~(seen & (j <= i)) if self.causal else ~seen.expand(torch.broadcast_shapes(i.shape, j.shape))

    @property
    def queries(self) -> int:
        """Queries of a tile: more make larger matmuls, and more pairs outside the band."""
        return self.block if self.lists is not None else 64 if self.before + self.after < 512 else 128


class Call:
    """What the tiles of one call share: q [b h i d], k [b g j d]; see `attend_tiles` for start, kept and behind."""

    fused = False  # does C serve it? see fused.py

    def __init__(
        self, q: Tensor, k: Tensor, layout: Layout, score: Score, start: int, kept: int, behind: int = 0
    ) -> None:
        self.b, self.h, self.i, self.d = q.shape
        self.g, self.j = k.shape[1:3]
        self.dtype, self.device = q.dtype, q.device
        self.layout, self.score, self.start = layout, score, start
        self.kept = kept if start else 0  # the band may not reach across the gap by index
        self.groups = self.h // self.g
        self.behind = behind
        self.offset = self.j - self.i - behind
        self.at = torch.arange(self.j, device=q.device)  # positions of the keys
        if start:
            self.at[self.kept :] += start

    @property
    def opened(self) -> int:
        """How many queries, the first ones, read every key."""
        return min(self.i, max(self.layout.sinks - self.offset, 0)) if self.layout.open_sinks else 0

    def tiles(self) -> Iterator["Tile"]:
        """Every query in exactly one tile; none with `fused`."""
        lay, query = self.layout, self.opened
        if not self.fused:
            if query:
                yield Edge(self, slice(0, query), slice(0, self.j))
            yield from self._band(query) if lay.lists is None else self._listed(lay.lists, query)

    def _band(self, query: int) -> Iterator["Tile"]:
        lay, c = self.layout, self.layout.queries
        ready = max(self.kept, lay.sinks) + lay.before - self.offset  # from here on neither border nor sinks are met
        inner = max((self.i + min(self.behind - lay.after, 0) - max(query, ready)) // c, 0)
        while query < self.i:
            if inner and query >= ready:
                most = max(1, ROWS // (c * self.groups))
                shared = BandMask(self, c, most)
                for row in range(self.b * self.g):
                    for tile in range(0, inner, most):
                        yield Band(self, divmod(row, self.g), query + tile * c, min(most, inner - tile), shared)
                query, inner = query + inner * c, 0
                continue
            stop = min(query + c, self.i, ready if inner else self.i)
            low = max(self.kept, query + self.offset - lay.before)
            yield Edge(self, slice(query, stop), slice(low, min(self.j, stop + self.offset + lay.after)))
            query = stop

    def _listed(self, lists: Tensor, query: int) -> Iterator["Tile"]:
        table, c = Table(self, lists.to(self.device)), self.layout.block
        units = self.g if len(lists) == 1 else self.h  # tiles are shared by the heads that share lists and keys
        cuts = self._cuts(query, c)
        ends = set(cuts)
        for unit in range(units):
            for b in range(self.b):
                n = 0
                while n < len(cuts) - 1:
                    size, block = cuts[n + 1] - cuts[n], self.position(cuts[n]) // c
                    most = table.chunk(block, unit) if size == c else 1
                    many = 1
                    while (
                        many < most
                        and cuts[n + many] + c in ends
                        and self.position(cuts[n + many]) // c == block + many
                    ):
                        many += 1  # whole blocks that follow one another go together
                    yield Listed(self, table, (b, unit), slice(cuts[n], cuts[n] + many * size), many)
                    n += many

    def position(self, query: int) -> int:
        """The position of a query."""
        slot = query + self.offset
        return slot + self.start if slot >= self.kept else slot

    def _cuts(self, query: int, c: int) -> list[int]:
        """Queries at which a block of positions begins, or the gap ends, from `query` to the end."""
        shift = self.offset + self.start
        gap = min(max(self.kept - self.offset, 0), self.i)
        before = range(-(-self.offset // c) * c - self.offset, gap, c)
        behind = range(-(-(gap + shift) // c) * c - shift, self.i, c)
        return sorted({query, self.i, *(cut for cut in (*before, gap, *behind) if query < cut < self.i)})


class Tile:
    """Some tiles at once, of w keys and `rows` queries each.

    `heads`, `batch`, `i` and `j` (positions) broadcast to the shape that `split` gives.
    """

    call: Call
    size: tuple[int, int, int]  # n, m, w
    i: Tensor
    j: Tensor
    heads: Tensor
    batch: Tensor

    def queries(self, x: Tensor) -> Tensor:
        """[b h i d] -> [.. u c d], a view."""
        raise NotImplementedError

    def load(self, x: Tensor, into: Tensor) -> None:
        """Copy the keys of the tiles from [b g j d] to [n w d]."""
        raise NotImplementedError

    def add(self, total: Tensor, part: Tensor) -> None:
        """Add [n w d] to its places in [b g j d]; tiles overlap."""
        raise NotImplementedError

    def split(self, x: Tensor) -> Tensor:
        """[n m w] as a view in which heads, queries and keys are axes of their own: [.. u c w]."""
        return x.view(*self.shape, x.shape[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """[.. u c], the axes of n and m."""
        raise NotImplementedError

    def hide(self, s: Tensor) -> None:
        """Set the scores [n m w] of pairs that are not read to -inf, in place."""
        raise NotImplementedError

    def zero(self, p: Tensor) -> None:
        """Set the weights [n m w] of rows that read nothing to zero, in place; needed where such rows exist."""


class Edge(Tile):
    """One tile, all batch rows and heads at once: a slice of keys, and the first ones before it."""

    def __init__(self, call: Call, rows: slice, keys: slice) -> None:
        self.call, self.rows = call, rows
        firsts = min(call.kept if call.start else call.layout.sinks, keys.start)
        self.parts = (
            [keys] if not firsts else [slice(0, keys.stop)] if firsts == keys.start else [slice(0, firsts), keys]
        )
        self.i = call.at[rows.start + call.offset : rows.stop + call.offset, None]
        self.j = torch.cat([call.at[part] for part in self.parts]) if len(self.parts) > 1 else call.at[self.parts[0]]
        self.size = (call.b * call.g, call.groups * len(self.i), len(self.j))
        self.hidden = call.layout.hidden(self.i, self.j)

    @property
    def heads(self) -> Tensor:  # type: ignore[override]
        return torch.arange(self.call.h, device=self.call.device).view(1, self.call.g, self.call.groups, 1, 1)

    @property
    def batch(self) -> Tensor:  # type: ignore[override]
        return torch.arange(self.call.b, device=self.call.device).view(-1, 1, 1, 1, 1)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.call.b, self.call.g, self.call.groups, len(self.i))

    def queries(self, x: Tensor) -> Tensor:
        return x[:, :, self.rows].unflatten(1, (self.call.g, self.call.groups))

    def load(self, x: Tensor, into: Tensor) -> None:
        into, done = into.unflatten(0, (self.call.b, self.call.g)), 0
        for part in self.parts:
            into[:, :, done : done + part.stop - part.start] = x[:, :, part]
            done += part.stop - part.start

    def add(self, total: Tensor, part: Tensor) -> None:
        part, done = part.unflatten(0, (self.call.b, self.call.g)), 0
        for keys in self.parts:
            total[:, :, keys] += part[:, :, done : done + keys.stop - keys.start]
            done += keys.stop - keys.start

    def hide(self, s: Tensor) -> None:
        self.split(s).masked_fill_(self.hidden, float("-inf"))


class Band(Tile):
    """n tiles of one batch row and key head, away from the borders: overlapping runs of keys, then the first keys."""

    def __init__(self, call: Call, at: tuple[int, int], query: int, n: int, shared: "BandMask") -> None:
        self.call, self.at, self.n, self.shared = call, at, n, shared
        self.c = call.layout.queries
        self.rows = slice(query, query + n * self.c)
        self.low = query + call.offset - call.layout.before
        self.w = call.layout.before + self.c + call.layout.after
        self.size = (n, call.groups * self.c, self.w + call.layout.sinks)

    @property
    def heads(self) -> Tensor:  # type: ignore[override]
        return self.shared.heads + self.at[1] * self.call.groups

    @property
    def batch(self) -> Tensor:  # type: ignore[override]
        return torch.tensor(self.at[0], device=self.call.device)

    @property
    def i(self) -> Tensor:  # type: ignore[override]
        return self.shared.i[: self.n] + (self.low + self.call.start)

    @property
    def j(self) -> Tensor:  # type: ignore[override]
        band = self.shared.j[: self.n] + (self.low + self.call.start)
        sinks = torch.arange(self.call.layout.sinks, device=band.device).expand(*band.shape[:-1], -1)
        return torch.cat([band, sinks], -1)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.n, self.call.groups, self.c)

    def queries(self, x: Tensor) -> Tensor:
        b, g = self.at
        mine = x[b, g * self.call.groups : (g + 1) * self.call.groups, self.rows]
        return mine.unflatten(1, (self.n, self.c)).transpose(0, 1)

    def load(self, x: Tensor, into: Tensor) -> None:
        d, (b, g) = x.shape[-1], self.at
        first = x.storage_offset() + b * x.stride(0) + g * x.stride(1)
        runs = x.as_strided((self.n, self.w, d), (self.c * d, d, 1), first + self.low * d)
        if self.call.layout.sinks:
            into, beside = into.split((self.w, self.call.layout.sinks), 1)
            beside.copy_(x[b, g, : self.call.layout.sinks])
        into.copy_(runs)

    def add(self, total: Tensor, part: Tensor) -> None:
        wide = torch.promote_types(part.dtype, torch.float32)
        fold = part.new_zeros(self.n * self.c + self.w, part.shape[-1], dtype=wide)
        for skip in range(0, self.w, self.c):  # c keys of every tile at a time do not overlap
            width = min(self.c, self.w - skip)
            run = fold[skip : skip + self.n * self.c].unflatten(0, (self.n, self.c))[:, :width]
            run += part[:, skip : skip + width]
        total[self.at][self.low : self.low + self.n * self.c + self.w - self.c] += fold[: -self.c]
        if sinks := self.call.layout.sinks:
            total[self.at][:sinks] += part[:, self.w :].sum(0, dtype=wide)

    def hide(self, s: Tensor) -> None:
        for columns, bias in self.shared.bias:
            self.split(s)[..., columns].add_(bias)


class BandMask:
    """What all inner tiles of a band have in common: mask and positions, counted from the first key of a tile."""

    def __init__(self, call: Call, c: int, most: int) -> None:
        before, w = call.layout.before, call.layout.before + c + call.layout.after
        tile = torch.arange(most, device=call.device).view(-1, 1, 1, 1) * c
        self.i = tile + torch.arange(c, device=call.device).view(-1, 1) + before
        self.j = tile + torch.arange(w, device=call.device)
        self.heads = torch.arange(call.groups, device=call.device).view(-1, 1, 1)
        far = call.layout.sinks  # inner tiles lie behind the sinks: move the positions there too
        hidden = call.layout.hidden(self.i[0, 0] + far, self.j[0, 0] + far)
        self.bias: list[tuple[slice, Tensor]] = []
        columns = list(range(w)) if torch.compiler.is_exporting() else hidden.any(0).nonzero().flatten().tolist()
        while columns:  # only those that hide something are touched; a trace cannot ask which
            run = next((n for n, column in enumerate(columns) if column != columns[0] + n), len(columns))
            where = slice(columns[0], columns[0] + run)
            bias = torch.zeros(c, run, dtype=call.dtype, device=call.device)
            self.bias.append((where, bias.masked_fill_(hidden[:, where], float("-inf"))))
            columns = columns[run:]


class Table:
    """[heads, query blocks, most] key blocks per query block: band, first keys and lists together, each block once."""

    def __init__(self, call: Call, lists: Tensor) -> None:
        lay, size = call.layout, call.layout.block
        count = -(-(call.j + call.start) // size)
        if lists.shape[1] < count:
            raise ValueError(f"the lists cover {lists.shape[1] * size} positions, but there are {call.j + call.start}")
        a = torch.arange(count, device=call.device)
        band = a[:0].expand(count, 0)
        if lay.near:
            low = ((a * size - lay.before).div(size, rounding_mode="floor")).clamp_min(0)
            high = ((a + 1) * size - 1 + lay.after).div(size, rounding_mode="floor").clamp_max(count - 1)
            reach = -(-lay.before // size) - (-lay.after // size) + 1  # blocks that a band touches, its own included
            band = low[:, None] + torch.arange(reach, device=call.device)
            band = band.masked_fill(band > high[:, None], ABSENT)
        firsts = torch.arange(-(-lay.sinks // size), device=call.device).expand(count, -1)
        near = torch.cat([band, firsts], -1).expand(len(lists), -1, -1)
        listed = lists[:, :count].masked_fill((lists[:, :count] < 0) | (lists[:, :count] >= count), ABSENT)
        both = torch.cat([listed * 2, near * 2 + 1], -1)  # a block in both is listed: it is read whole
        if lay.causal:
            both = both.masked_fill(both // 2 > a[:, None], ABSENT * 2)
        both = both.sort(-1).values
        again = torch.zeros_like(both, dtype=torch.bool)
        again[..., 1:] = both[..., 1:] // 2 == both[..., :-1] // 2
        both = both.masked_fill(again, ABSENT * 2).sort(-1).values
        self.blocks, self.listed = both // 2, both % 2 == 0
        self.most = (self.blocks < ABSENT).sum(-1).tolist()

    def chunk(self, block: int, unit: int) -> int:
        """How many query blocks from `block` on go together: about ROWS rows, of similar numbers of key blocks."""
        counts = self.most[unit if len(self.most) > 1 else 0][block : block + 32]
        return next((n for n, most in enumerate(counts) if most > 2 * counts[0] + 2), len(counts)) or 1


class Listed(Tile):
    """n tiles of one batch row that gather their blocks of keys: one query head, or all that share lists and keys."""

    def __init__(self, call: Call, table: Table, at: tuple[int, int], rows: slice, n: int) -> None:
        self.call, self.rows, self.n = call, rows, n
        self.c, size, shared = (rows.stop - rows.start) // n, call.layout.block, len(table.blocks) == 1
        b, unit = at
        self.at = (b, unit if shared else unit // call.groups)
        self.head = slice(unit * call.groups, (unit + 1) * call.groups) if shared else slice(unit, unit + 1)
        tile = call.position(rows.start) // size
        lists = slice(tile, tile + n)
        most = max(1, *table.most[0 if shared else unit][lists])
        blocks = table.blocks[0 if shared else unit, lists, :most]  # [n most]
        inside = torch.arange(size, device=call.device)
        keys = blocks[..., None] * size + inside  # [n most size]
        slots = torch.where(keys < call.kept, keys, keys - call.start)  # a sliding cache has dropped those in between
        absent = (slots >= call.j) | ((slots < call.kept) & (keys >= call.kept))
        self.index = slots.clamp(0, call.j - 1).flatten()  # [n * w]
        self.size = (n, (self.head.stop - self.head.start) * self.c, most * size)
        self.i = call.at[rows.start + call.offset : rows.stop + call.offset].view(n, 1, self.c, 1)
        self.j = keys.flatten(1)[:, None, None]
        listed = table.listed[0 if shared else unit, lists, :most, None].expand(-1, -1, size).flatten(1)[:, None, None]
        self.hidden = call.layout.hidden(self.i, self.j, listed) | absent.flatten(1)[:, None, None]

    @property
    def heads(self) -> Tensor:  # type: ignore[override]
        return torch.arange(self.head.start, self.head.stop, device=self.call.device).view(-1, 1, 1)

    @property
    def batch(self) -> Tensor:  # type: ignore[override]
        return torch.tensor(self.at[0], device=self.call.device)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.n, self.head.stop - self.head.start, self.c)

    def queries(self, x: Tensor) -> Tensor:
        return x[self.at[0], self.head, self.rows].unflatten(1, (self.n, self.c)).transpose(0, 1)

    def load(self, x: Tensor, into: Tensor) -> None:
        into.copy_(x[self.at].index_select(0, self.index).view_as(into))

    def add(self, total: Tensor, part: Tensor) -> None:
        total[self.at].index_add_(0, self.index, part.flatten(0, 1).to(total.dtype))

    def hide(self, s: Tensor) -> None:
        self.split(s).masked_fill_(self.hidden, float("-inf"))

    def zero(self, p: Tensor) -> None:
        self.split(p).masked_fill_(self.hidden, 0.0)
