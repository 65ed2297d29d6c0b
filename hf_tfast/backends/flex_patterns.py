"""Patterns as rules and tiles of flex.py: bands with sinks and listed blocks, chosen key blocks, runs in sorted order.

Which tiles a pattern meets is computed from borders: a band from the positions at which tiles begin and end, listed
blocks from sums over rectangles of their table, choices from the blocks that the queries of a tile chose.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F  # noqa: N812

from .flex import TILE, Pattern, Rule, Tiles, attend_flex, hashes, merged, padded, sunk
from .key_blocks import Grid
from .runs import Runs
from .score import Score
from .tiles import Layout

__all__ = ["Blocks", "attend_flex_blocks", "attend_flex_layout", "attend_flex_runs"]

KEPT = 64  # patterns whose tiles are remembered


class _Remembered:
    """The last KEPT patterns by what they depend on. A pattern is a pure function of that."""

    def __init__(self) -> None:
        self.held: OrderedDict[Hashable, Pattern] = OrderedDict()
        self.lock = Lock()

    def get(self, key: Hashable, make: Callable[[], Pattern]) -> Pattern:
        with self.lock:
            if key in self.held:
                self.held.move_to_end(key)
                return self.held[key]
        with torch.inference_mode(False), torch.no_grad():  # used again where gradients flow
            made = make()
        with self.lock:
            self.held[key] = made
            while len(self.held) > KEPT:
                self.held.popitem(last=False)
        return made


REMEMBERED = _Remembered()


class _Span(NamedTuple):
    """Positions of the first and the last row of every tile [n], and which tiles hold rows, and only rows."""

    low: Tensor
    high: Tensor
    some: Tensor
    whole: Tensor

    @staticmethod
    def of(at: Tensor) -> "_Span":
        n, first = len(at), torch.arange(padded(len(at)) // TILE, device=at.device) * TILE
        ends = first + TILE - 1
        return _Span(at[first.clamp_max(n - 1)], at[ends.clamp_max(n - 1)], first < n, ends < n)


@dataclass(frozen=True)
class Banded(Rule):
    """args: numbers (offset, keys, start, kept, before, after, sinks, block) and the table of listed blocks
    [h or 1, n, n] bool, by blocks of positions."""

    causal: bool
    band: bool
    open_sinks: bool
    gap: bool
    listed: bool

    def seen(self, args: tuple[Tensor, ...], b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        offset, keys, start, kept, before, after, sinks, block = args[0].unbind()
        there, i = j < keys, i + offset
        if self.gap:
            i, j = torch.where(i < kept, i, i + start), torch.where(j < kept, j, j + start)
        seen = j < sinks
        if self.band:
            seen = seen | ((i - j <= before) & (j - i <= after))
        if self.open_sinks:
            seen = seen | (i < sinks)
        if self.listed:
            seen = seen | args[1][h if args[1].shape[0] > 1 else 0, i // block, j // block]
        return seen & there & (j <= i) if self.causal else seen & there


def attend_flex_layout(
    q: Tensor, k: Tensor, v: Tensor, layout: Callable[[], Layout], score: Score, *, key: Hashable, start: int,
    kept: int,
) -> Tensor:  # fmt: skip
    """As `attend_tiles`. `layout` is made where the pattern is not remembered; `key` says what it depends on beside
    lengths."""
    (b, h, i, _), j = q.shape, k.shape[2]
    at = torch.arange(j, device=q.device)
    at = torch.where(at < kept, at, at + start)
    about = (key, i, j, start, kept if start else 0, str(q.device))
    pattern = REMEMBERED.get(about, lambda: banded(layout(), at, i, start, kept))
    o, lse = attend_flex(q, k, v, pattern, score, hashes(score, b, h, at, i))
    return sunk(o, lse, None if score.sinks is None else score.sinks[:, None]).to(v.dtype)


def banded(layout: Layout, at: Tensor, i: int, start: int, kept: int) -> Pattern:
    """The pattern of a layout over keys at the positions `at` [j], the last i of them being the queries."""
    lay, j = layout, len(at)
    if start and lay.sinks > kept:
        raise ValueError(f"the first {lay.sinks} keys are read, but a sliding cache dropped {start} and kept {kept}")
    rows, keys = _Span.of(at[j - i :]), _Span.of(at)
    low, high = rows.low[:, None], rows.high[:, None]
    some, full = keys.low < lay.sinks, keys.high < lay.sinks
    some, full = some.expand(len(low), -1), full.expand(len(low), -1)
    if lay.near is not None:
        some = some | ((low - keys.high <= lay.before) & (keys.low - high <= lay.after))
        full = full | ((high - keys.low <= lay.before) & (keys.high - low <= lay.after))
    if lay.open_sinks:
        some, full = some | (low < lay.sinks), full | (high < lay.sinks)
    some, full, args = some[None], full[None], tuple[Tensor, ...]()
    if lay.lists is not None:
        last = start + max(padded(i) + j - i, padded(j)) - 1  # where the last padded row would be
        table = listed_table(lay.lists.to(at.device), last // lay.block + 1)
        beside = _in_rectangles(table, rows, keys, lay.block)
        some, full, args = some | beside[0], full | beside[1], (table,)
    if lay.causal:
        some, full = some & (keys.low <= high), full & (keys.high <= low)
    some, full = some & rows.some[:, None] & keys.some, full & keys.whole & rows.some[:, None]
    numbers = (j - i, j, start, kept, lay.before, lay.after, lay.sinks, lay.block)
    rule = Banded(lay.causal, lay.near is not None, lay.open_sinks and lay.sinks > 0, start > 0, bool(args))
    return Pattern(rule, (torch.tensor(numbers, dtype=torch.int32, device=at.device), *args),
                   Tiles.of(some[None], full[None]))  # fmt: skip


def listed_table(lists: Tensor, blocks: int) -> Tensor:
    """[h or 1, blocks, blocks] bool: the key blocks that each block of queries lists; one more of each than `lists`
    has reads nothing."""
    n = max(blocks, lists.shape[1])
    table = torch.zeros(len(lists), n, max(n, int(lists.max()) + 1) + 1, dtype=torch.bool, device=lists.device)
    table[:, : lists.shape[1]].scatter_(2, lists.where(lists >= 0, table.shape[2] - 1), True)
    return table[:, :, :-1].contiguous()


def _in_rectangles(table: Tensor, rows: _Span, keys: _Span, block: int) -> tuple[Tensor, Tensor]:
    """[h r c]: does the table hold any block that a tile of queries and one of keys meet in; does it hold all."""
    sums = F.pad(table.to(torch.int32), (1, 0, 1, 0)).cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32)
    top, bottom = (rows.low // block)[:, None], (rows.high // block + 1)[:, None]
    left, right = keys.low // block, keys.high // block + 1
    held = sums[:, bottom, right] - sums[:, top, right] - sums[:, bottom, left] + sums[:, top, left]
    return held > 0, held == (bottom - top) * (right - left)


@dataclass(frozen=True)
class Blocked(Rule):
    """args: numbers (offset, keys, queries, reach), own [i] block of every query, number and slot [j] of the block of
    every key, chosen [n b h i] bool by slot."""

    causal: bool

    def seen(self, args: tuple[Tensor, ...], b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        offset, keys, queries, reach = args[0].unbind()
        there = (j < keys) & (i < queries)
        there = there & (j <= i + offset) if self.causal else there
        query = torch.minimum(i, queries - 1)  # what lies behind is padding
        away = args[1][i] - args[2][j]
        near = (away >= 0) & (away <= reach) if self.causal else away.abs() <= reach
        return there & (near | args[4][args[3][j], b, h, query])


class Blocks(NamedTuple):
    """Key blocks at most `reach` from a query's own (behind only, under causality), and those in `chosen` [n b h i];
    `beside` [b h i] is None, or a log mass that joins the softmax."""

    grid: Grid
    reach: int
    chosen: Tensor
    beside: Tensor | None = None


def attend_flex_blocks(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, score: Score, *, causal: bool) -> Tensor:
    """Every query against the blocks near its own and those chosen for it -> [b h i e]"""
    b, h, i = q.shape[:3]
    pattern = blocked(blocks, i, causal)
    o, lse = attend_flex(q, k, v, pattern, score, hashes(score, b, h, blocks.grid.at, i))
    return sunk(o, lse, blocks.beside, None if score.sinks is None else score.sinks[:, None]).to(v.dtype)


@torch.no_grad()
def blocked(blocks: Blocks, i: int, causal: bool) -> Pattern:
    """The pattern of chosen blocks, for i queries."""
    grid, reach, chosen, _ = blocks
    j, device = len(grid.at), grid.at.device
    own = grid.number[grid.slot]
    args = (
        torch.tensor((j - i, j, i, reach), dtype=torch.int32, device=device),
        F.pad(own[j - i :], (0, padded(i) - i)).int(),
        F.pad(own, (0, padded(j) - j)).int(),
        F.pad(grid.slot, (0, padded(j) - j)).int(),
        chosen,
    )
    rows, keys = _Span.of(grid.at[j - i :]), _Span.of(grid.at)
    by_tile = F.pad(chosen, (0, padded(i) - i)).unflatten(-1, (-1, TILE))
    some, full = by_tile.any(-1), by_tile.all(-1)  # [n b h r]: a tile with padding is never read whole
    low, high = rows.low // grid.block - grid.number[:, None], rows.high // grid.block - grid.number[:, None]  # [n r]
    if causal:
        near, within = (high >= 0) & (low <= reach), (low >= 0) & (high <= reach)
    else:
        near, within = (high >= -reach) & (low <= reach), (low >= -reach) & (high <= reach)
    some, full = some | near[:, None, None], full | within[:, None, None]
    index = torch.arange(padded(j) // TILE, device=device) * TILE
    first, last = (grid.slot[at.clamp_max(j - 1)] for at in (index, index + TILE - 1))
    count = (last - first + 1).view(-1, 1, 1, 1)
    some, full = _between(some, first, last) > 0, _between(full, first, last) == count  # [c b h r]
    some, full = some.permute(1, 2, 3, 0), full.permute(1, 2, 3, 0)
    if causal:
        some, full = some & (keys.low <= rows.high[:, None]), full & (keys.high <= rows.low[:, None])
    some, full = some & rows.some[:, None] & keys.some, full & rows.some[:, None] & keys.whole
    return Pattern(Blocked(causal), args, Tiles.of(some, full))


def _between(x: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """x [n ..] bool -> [c ..]: how many of x[first[c]] .. x[last[c]] hold."""
    sums = F.pad(x.cumsum(0, dtype=torch.int32), (0,) * (2 * (x.ndim - 1)) + (1, 0))
    return sums[last + 1] - sums[first]


@dataclass(frozen=True)
class Ranked(Rule):
    """args: round [r*b] of every row; low, high [r, r*b, g, i*h/g] and rank [r, r*b, g, j] of the queries and keys
    where the rows have put them, in every round. A pair is read in the first round that has it."""

    rounds: int

    def seen(self, args: tuple[Tensor, ...], b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        own, low, high, rank = args
        mine = own[b]
        earlier = seen = None
        for r in range(self.rounds):
            place = rank[r, b, h, j]
            inside = (low[r, b, h, i] <= place) & (place < high[r, b, h, i])
            hit = inside & (mine == r)
            seen = hit if seen is None else seen | hit
            before = inside & (mine > r)
            earlier = before if earlier is None else earlier | before
        if seen is None or earlier is None:
            raise ValueError("there is no round")
        return seen & ~earlier


class _Moved(torch.autograd.Function):
    """x [n m w] -> x[n, order[n]], a permutation, whose gradient is another gather instead of a sum."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order, back)
        return x.gather(1, order[..., None].expand(*order.shape, x.shape[-1]))

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        order, back = ctx.saved_tensors  # type: ignore[attr-defined]
        return _Moved.apply(grad, back, order), None, None


def _moved(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """x [.. m w], order and back [.. m]: `back` undoes `order`."""
    return _Moved.apply(x.flatten(0, -3), order.flatten(0, -2), back.flatten(0, -2)).view(x.shape)


def attend_flex_runs(q: Tensor, k: Tensor, v: Tensor, runs: Runs, score: Score) -> Tensor:
    """Every query against its runs: in every round queries and keys are put into the order of their buckets, where
    what is read lies near the diagonal. All rounds are one call. -> [b h i e]"""
    (b, h, i, _), (rounds, _, g, _) = q.shape, runs.order.shape
    if score.dropout:
        raise ValueError("dropout draws by position, which sorted keys have lost: take another path")
    per = h // g * i
    order, asked = runs.order.long(), runs.queries.long()
    rank, place = runs.rank.long(), asked.argsort(-1)
    q, k, v = (x.reshape(b, g, -1, x.shape[-1]).expand(rounds, -1, -1, -1, -1) for x in (q, k, v))
    q = _moved(q, asked, place).flatten(0, 1)
    k, v = (_moved(x, order, rank).flatten(0, 1) for x in (k, v))
    o, lse = attend_flex(q, k, v, ranked(runs, order, asked, per), score)
    o = _moved(o.unflatten(0, (rounds, b)), place, asked).view(rounds, b, h, i, -1)
    lse = lse.unflatten(0, (rounds, b)).gather(-1, place).view(rounds, b, h, i)
    return merged(o, lse, score.sinks).to(v.dtype)


@torch.no_grad()
def ranked(runs: Runs, order: Tensor, asked: Tensor, per: int) -> Pattern:
    """The pattern of all rounds, one below the other."""
    rounds, b, g, j = order.shape
    more_i, more_j = padded(per) - per, padded(j) - j

    def everywhere(x: Tensor, to: Tensor) -> Tensor:
        """x [r b g m] of every round, where every round `to` [r b g m] has put it: [r, r*b, g, m]."""
        return x[:, None].expand(-1, rounds, -1, -1, -1).gather(-1, to.expand(rounds, -1, -1, -1, -1)).flatten(1, 2)

    low, high = (F.pad(everywhere(x.view(rounds, b, g, per), asked), (0, more_i)) for x in (runs.low, runs.high))
    rank = F.pad(everywhere(runs.rank, order), (0, more_j), value=2**30)
    own = torch.arange(rounds, device=low.device, dtype=torch.int32).repeat_interleave(b)
    rows = torch.arange(rounds * b, device=low.device)
    first, stop = (x[own.long(), rows].unflatten(-1, (-1, TILE)) for x in (low, high))  # [r*b g tiles TILE]
    live = stop > first
    begin, end = first.where(live, 2**30).amin(-1) // TILE, stop.where(live, 0).amax(-1)
    tiles = torch.arange(padded(j) // TILE, device=low.device)
    some = (tiles >= begin[..., None]) & (tiles * TILE < end[..., None])
    return Pattern(Ranked(rounds), (own, low, high, rank), Tiles.of(some))
