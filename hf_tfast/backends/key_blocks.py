"""Keys cut into blocks by position, cheap bounds of a block's scores, and lists of tiles for chosen blocks.

A query reads the blocks near its own, and any blocks that were chosen for it alone. On the chosen ones the loops are
turned inside out: for each block of keys, the queries that chose it. A gather of keys per query would move
block * (d + e) numbers for every pair of query and block, this moves 2 (d + e).

Axes   b batch, h query heads, g key/value heads, i queries, j keys, n blocks, c keys of a block, d key width,
       u tiles that run together, t queries and s keys of a tile.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .lists import Sizes, Tiles, entries, given
from .scratch import Scratch, borrowed

FEW = 32  # queries that share a key head: below, gathering the keys of each is cheaper than one list per block


@dataclass(frozen=True)
class Grid:
    """Keys by blocks of `block` positions: position p is in block p // block, however many keys a cache dropped.

    number  [n] int64: p // block of every block that holds keys, ascending.
    keys    [n c] int64: the keys of each block; j stands for none.
    slot    [j] int64: which of the n blocks a key is in.
    at      [j] int64: the positions.
    """

    block: int
    number: Tensor
    keys: Tensor
    slot: Tensor
    at: Tensor

    @staticmethod
    def of(at: Tensor, block: int) -> "Grid":
        """The grid of keys at the ascending positions `at` [j]."""
        number, slot = torch.unique_consecutive(at // block, return_inverse=True)
        widest = min(block, int(at[-1]) + 1)  # a block may be longer than the row
        keys = torch.full((len(number), widest), len(at), device=at.device)
        keys[slot, at % block] = torch.arange(len(at), device=at.device)
        return Grid(block, number, keys, slot, at)

    def filled(self) -> Tensor:
        """[n c]: `keys`, with the first key of the block where there is none."""
        first = self.keys.amin(-1, keepdim=True)
        return torch.where(self.keys == len(self.at), first, self.keys)


@dataclass(frozen=True)
class Bounds:
    """low, high [b g n d]: the least and the largest key of every block, by coordinate."""

    low: Tensor
    high: Tensor

    @staticmethod
    def of(k: Tensor, grid: Grid) -> "Bounds":
        """Bounds of the keys k [b g j d]; O(j d)."""
        blocks = in_blocks(k, grid)
        return Bounds(blocks.amin(3), blocks.amax(3))

    def boxes(self, dtype: torch.dtype) -> "Boxes":
        """For scores in `dtype`."""
        low, high = self.low.to(dtype), self.high.to(dtype)
        return Boxes(torch.cat([(low + high) / 2, (high - low) / 2], -1))


@dataclass(frozen=True)
class Boxes:
    """data [b g n 2d]: the middle and half the width of the box that holds the keys of a block."""

    data: Tensor

    def highest(self, q: Tensor, scratch: Scratch, factor: float = 1.0) -> Tensor:
        """[b h i n] in scratch memory: no key of block n has a larger factor q . k, for q [b h i d].

        max over the box low <= k <= high of q . k = q . (low + high) / 2 + |q| . (high - low) / 2
        (Tang et al., "Quest", section 3.2, https://arxiv.org/abs/2406.10774).
        """
        (b, h, i, d), (g, n) = q.shape, self.data.shape[1:3]
        both = scratch("q and |q|", (b, h, i, 2 * d), self.data.dtype)
        torch.mul(q, factor, out=both[..., :d])
        torch.abs(both[..., :d], out=both[..., d:])
        s = scratch("highest", (b * g, h // g * i, n), self.data.dtype)  # the heads that share a key head, one matmul
        return torch.bmm(both.view(b * g, -1, 2 * d), self.data.flatten(0, 1).mT, out=s).view(b, h, i, n)


def in_blocks(k: Tensor, grid: Grid) -> Tensor:
    """[b g j d] -> [b g n c d]; empty slots of a block repeat its first key."""
    (b, g, j, d), (n, c) = k.shape, grid.keys.shape
    if n * c == j:
        return k.reshape(b, g, n, c, d)
    return k.index_select(2, grid.filled().flatten()).view(b, g, n, c, d)


def best(scores: Tensor, k: int) -> Tensor:
    """Bool like `scores` [.. n]: the k largest of each row, `tied` ones by the earlier; -inf is never among them."""
    if k >= scores.shape[-1]:
        return scores > float("-inf")
    top, cut, following = _border(scores, k)
    chosen = scores >= cut[..., None]
    close = tied(top, cut, following)
    if bool(close.any()):
        rows, cut, slack = scores[close], cut[close][:, None], _slack(top, cut)[close][:, None]
        above = rows > cut + slack
        equal = (rows >= cut - slack) & ~above & (rows > float("-inf"))
        room = k - above.sum(-1, keepdim=True)
        chosen[close] = above | (equal & (equal.cumsum(-1) <= room))
    return chosen


def tied(top: Tensor, cut: Tensor, following: Tensor) -> Tensor:
    """Are the k-th score and the next one as good as equal, in rows whose largest is `top`? Equal keys have equal
    scores up to rounding, which differs between a pass over many queries and a step: what it decides is no choice."""
    return cut - _slack(top, cut) <= following


def _slack(top: Tensor, cut: Tensor) -> Tensor:
    return torch.maximum(top.abs(), cut.abs()) * (64 * torch.finfo(cut.dtype).eps)


def _border(scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """[..] each: the largest, the k-th and the next of each row [.. n], k < n; the first two no less than the least
    number, so that -inf lies below them."""
    n, least = scores.shape[-1], torch.finfo(scores.dtype).min
    if scores.device.type != "cpu" or type(scores) is not Tensor or torch.compiler.is_compiling():
        values = scores.topk(k + 1, dim=-1).values
        return values[..., 0].clamp_min(least), values[..., -2].clamp_min(least), values[..., -1]
    split = torch.from_numpy(np.partition(scores.numpy(), n - k - 1, axis=-1))  # several times as fast as torch's topk
    low, high = split[..., n - k :].aminmax(dim=-1)
    return high.clamp_min_(least), low.clamp_min_(least), split[..., n - k - 1]


def over_queries(q: Tensor, n: int, rule: Callable[[Tensor, slice, Scratch], Tensor]) -> Tensor:
    """[n b h i] bool from rule(q[:, :, part], part, scratch) -> [b h part n], a few queries at a time: scores are
    large."""
    b, h, i, _ = q.shape
    chosen = torch.empty(n, b, h, i, dtype=torch.bool, device=q.device)
    step = max(1, 2 * entries(q.device) // max(1, b * h * n))
    with borrowed(q) as scratch:
        for first in range(0, i, step):
            part = slice(first, min(first + step, i))
            chosen[..., part] = rule(q[:, :, part], part, scratch).permute(3, 0, 1, 2)
    return chosen


def near_lists(sizes: Sizes, grid: Grid, reach: int) -> Iterator[Tiles]:
    """Every query against the blocks at most `reach` from its own, behind only under causality."""
    n, c = grid.keys.shape
    device, first = grid.at.device, sizes.j - sizes.i
    own = torch.arange(int(grid.slot[first]), n, device=device)
    cuts = -(-c // 128)
    rows = grid.keys[own] - first
    rows = torch.nn.functional.pad(rows, (0, -c % cuts), value=sizes.i).view(len(own), cuts, -1)
    rows = rows.masked_fill((rows < 0) | (rows >= sizes.i), sizes.i).flatten(0, 1)  # [blocks * cuts, t]
    near = torch.arange(-min(reach, n - 1), (0 if sizes.causal else min(reach, n - 1)) + 1, device=device)
    slots = own[:, None] + near
    absent = (slots < 0) | (slots >= n)
    slots = slots.masked_fill(absent, 0)
    absent = absent | ((grid.number[slots] - grid.number[own, None]).abs() > reach)
    slots = torch.where(absent, own[:, None], slots)
    gone = (absent[..., None] | (grid.keys[slots] == sizes.j)).flatten(1).repeat_interleave(cuts, 0)
    keys = grid.filled()[slots].flatten(1).repeat_interleave(cuts, 0)  # [blocks * cuts, s]
    step = max(1, entries(device) // (rows.shape[1] * keys.shape[1]))
    every, nobody, shared = sizes.b * sizes.h * len(rows), sizes.b * sizes.h * sizes.i, sizes.h // sizes.g
    for u in range(0, every, step):
        unit = torch.arange(u, min(u + step, every), device=device)
        head, tile = unit // len(rows), unit % len(rows)
        query, key = rows[tile], keys[tile]
        hidden = gone[tile, None]
        if sizes.causal:
            hidden = hidden | (key[:, None] > query[..., None] + first)
        query = torch.where(query == sizes.i, nobody, query + head[:, None] * sizes.i)
        yield Tiles(query, key + (head // shared)[:, None] * sizes.j, lower=given(hidden))


def far_lists(sizes: Sizes, grid: Grid, chosen: Tensor) -> Iterator[Tiles]:
    """Every query against its blocks in `chosen` [n b h i], whole: none of their keys may be hidden from it."""
    if sizes.i * (sizes.h // sizes.g) <= FEW:
        yield from _gathered(sizes, grid, chosen)
        return
    nobody, shared = sizes.b * sizes.h * sizes.i, sizes.h // sizes.g * sizes.i
    filled, empty = grid.filled(), grid.keys == sizes.j
    t = 128 if shared >= 1024 else 32
    step = max(1, entries(grid.at.device) // (t * grid.block))
    whole = ~empty.any(-1)
    if grid.at.device.type == "cpu":  # head by head: its queries and outputs stay in the cache
        by_head, filled_whole = chosen[whole].view(int(whole.sum()), -1, shared), filled[whole]
        for unit in range(sizes.b * sizes.g if len(by_head) else 0):
            rows, none, block = _cut(by_head[:, unit].contiguous(), t)
            rows = rows.add_(unit * shared).masked_fill_(none, nobody)
            keys, numbers = filled_whole[block] + unit * sizes.j, block.tolist()
            for u in range(0, len(rows), step):
                part = numbers[u : u + step]
                again = tuple(n for n in range(1, len(part)) if part[n] != part[n - 1])
                yield Tiles(rows[u : u + step], keys[u : u + step], again=again)
    for n in range(len(chosen)):
        if bool(whole[n]) and grid.at.device.type == "cpu":
            continue
        rows, none, units = _cut(chosen[n].view(-1, shared), t)
        rows = rows.add_(units[:, None] * shared).masked_fill_(none, nobody)
        keys = filled[n] + units[:, None] * sizes.j
        hide = None if bool(whole[n]) else given(empty[n].expand(1, 1, -1))
        for u in range(0, len(rows), step):
            yield Tiles(rows[u : u + step], keys[u : u + step], hide)


def _cut(members: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
    """members [m r] bool -> [u t] where (of r) it is true, each m cut into tiles of t, filled up; which of them are
    filling [u t]; and [u] the m of each tile."""
    m, r = members.shape
    rows = members.view(-1).nonzero().view(-1)
    count = torch.bincount(rows // r, minlength=m) if m > 1 else torch.tensor([len(rows)], device=rows.device)
    tiles = (count + t - 1) // t
    units = torch.repeat_interleave(torch.arange(m, device=rows.device), tiles)
    shift = (tiles.cumsum(0) - tiles) * t - (
        count.cumsum(0) - count
    )  # from the place in `rows` to the place in a tile
    places = torch.arange(len(rows), device=rows.device) + torch.repeat_interleave(shift, count)
    padded = torch.full((len(units) * t,), -1, device=rows.device)
    padded[places] = rows % r
    padded = padded.view(-1, t)
    return padded, padded < 0, units


def _gathered(sizes: Sizes, grid: Grid, chosen: Tensor) -> Iterator[Tiles]:
    """A tile per query with the keys of its blocks, for calls of few queries: no other key is read."""
    n = len(chosen)
    flat = chosen.reshape(n, -1).T  # [b*h*i n]
    count = flat.sum(-1)
    most = int(count.max()) if count.numel() else 0
    if not most:
        return
    order = (~flat).to(torch.int8).sort(dim=-1, stable=True).indices[:, :most]  # chosen blocks first, in order
    live = torch.arange(most, device=flat.device) < count[:, None]
    order = torch.where(live, order, order[:, :1])
    gone = (~live[..., None] | (grid.keys == sizes.j)[order]).flatten(1)[:, None]  # [b*h*i 1 s]
    rows = torch.arange(len(flat), device=flat.device)
    unit = rows // (sizes.h * sizes.i) * sizes.g + rows // sizes.i % sizes.h // (sizes.h // sizes.g)
    keys = grid.filled()[order].flatten(1) + unit[:, None] * sizes.j
    step = max(1, entries(flat.device) // keys.shape[1])
    for u in range(0, len(rows), step):
        part = slice(u, u + step)
        yield Tiles(rows[part, None], keys[part], lower=given(gone[part]))
