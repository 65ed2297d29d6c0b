"""Decoding by key blocks: a step scores the boxes of blocks, and reads no keys but those of its window and its choice.

A step at position p reads, of L = p + 1 keys per key head, the last (reach + 1) blocks and, per query head, the blocks
it chose: (reach + 1 + chosen) block keys and values, and L / block boxes, each the size of two keys.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..backends.block_store import BlockStore
from ..backends.growing import Lengths, longest, positions
from ..backends.key_blocks import best, tied
from ..backends.rows import group
from ..backends.score import Score
from ._base import Mechanism
from ._cached import over_rows
from ._chosen import reach_of

STEPS = 16  # queries of one call that are decoded one by one; more of them share what they read


@dataclass(frozen=True)
class Far:
    """What one query knows of the blocks that it may choose: the first `count` ones.

    q       [b g m d] in at least fp32, the m = h / g query heads of a key head.
    there   None, or [b 1 n] bool: which of the blocks a row has.
    near    [b h n]: the scores of the keys of the window, and the sink logit.
    """

    q: Tensor
    count: int
    there: Tensor | None
    near: Tensor

    def heads(self, x: Tensor) -> Tensor:
        """[b g m n] -> [b h n], -inf for blocks that are not there."""
        x = x.flatten(1, 2)
        return x if self.there is None else x.masked_fill(~self.there, float("-inf"))


class Picked(NamedTuple):
    """blocks [b h n] int64, those in `live` (None: all) to be read; `beside` as in BlockChoice."""

    blocks: Tensor
    live: Tensor | None = None
    beside: Tensor | None = None


class Stepped(Mechanism):
    """A mechanism of chosen key blocks whose cache keeps their boxes."""

    block: int
    window: int
    means: ClassVar[bool] = False  # does `pick` read the means of blocks?

    def pick(self, store: BlockStore, far: Far, score: Score) -> Picked:
        """The blocks among the first `far.count` that a query reads."""
        raise NotImplementedError

    def store(self) -> BlockStore | None:
        """Keys and values with the boxes of their blocks; single keys need no cache of ours."""
        return BlockStore(self.block, means=self.means) if self.block > 1 else None

    def remember(self, store: BlockStore, q: Tensor, k: Tensor, v: Tensor, score: Score, new: Tensor | None) -> None:
        store.append(k, v, new)

    @torch.no_grad()
    def resume(self, store: BlockStore, q: Tensor, score: Score, new: Tensor | None) -> Tensor:
        i = q.shape[2]
        if i > STEPS or score.dropout:
            run = lambda q, k, v, mask: self.fast(q, k, v, mask, score)  # noqa: E731
            return over_rows(run, q, store.keys.held, store.values.held, store.lengths, new)
        if isinstance(store.lengths, int) and new is None:
            last: list[Lengths] = list(range(store.lengths - i + 1, store.lengths + 1))
        else:
            lengths = torch.as_tensor(store.lengths, device=q.device).expand(len(q))
            last = list((positions(lengths - (i if new is None else new.sum(-1)), i, new) + 1).unbind(1))
        return torch.cat([self._step(store, q[:, :, t : t + 1], n, score) for t, n in enumerate(last)], 2)

    def expected(self, store: BlockStore, q: Tensor, score: Score, new: Tensor | None) -> Tensor | None:
        if score.dropout:
            return None
        run = lambda q, k, v, mask: self.reference(q, k, v, mask, score)  # noqa: E731
        return over_rows(run, q, store.keys.held, store.values.held, store.lengths, new)

    def _step(self, store: BlockStore, q: Tensor, n: Lengths, score: Score) -> Tensor:
        """Query q [b h 1 d], the last of the first n tokens of each row (0: none) -> [b h 1 e]."""
        (b, h), g, dtype = q.shape[:2], store.keys.held.shape[1], q.dtype
        rows = group(q.to(torch.promote_types(dtype, torch.float32)), g).flatten(0, 1)  # [b*g h/g d]
        k, v, hidden, first = self._near(store, n, reach_of(self.window, self.block, True))
        scale = score.factor(q.shape[-1])
        s = score.cap(torch.bmm(rows, k.flatten(0, 1).to(rows.dtype).mT).view(b, h, -1) * scale)
        parts = [s if hidden is None else s.masked_fill_(hidden, float("-inf"))]
        if score.sinks is not None:
            parts.append(score.sinks.to(s.dtype).expand(b, h)[..., None])
        sizes, far_values = [s.shape[-1], len(parts) - 1, 0], None
        if count := longest(first):
            there = None
            if isinstance(first, Tensor):
                there = (torch.arange(count, device=q.device) < first[:, None])[:, None]
            far = Far(rows.unflatten(0, (b, g)), count, there, torch.cat(parts, -1) if len(parts) > 1 else s)
            picked = self.pick(store, far, score)
            if picked.beside is not None:
                parts.append(picked.beside[..., None])
                sizes[1] += 1
            if picked.blocks.shape[-1]:
                keys = store.gather(store.keys, picked.blocks).to(rows.dtype)
                s = score.cap(torch.bmm(keys, rows.reshape(b * h, -1, 1)).view(b, h, -1) * scale)
                if picked.live is not None:
                    s = s.masked_fill_(~picked.live.repeat_interleave(self.block, -1), float("-inf"))
                far_values = store.gather(store.values, picked.blocks).to(rows.dtype)
                parts.append(s)
                sizes[2] = s.shape[-1]
        weights = torch.cat(parts, -1).softmax(-1)
        if hidden is not None:  # rows without a token
            weights = weights.nan_to_num_(0.0)
        own, _, chosen = weights.split(sizes, -1)
        o = torch.bmm(own.reshape(b * g, h // g, -1), v.flatten(0, 1).to(rows.dtype)).view(b * h, 1, -1)
        if far_values is not None:
            o = torch.baddbmm(o, chosen.reshape(b * h, 1, -1), far_values)
        return o.view(b, h, 1, -1).to(dtype)

    def _near(self, store: BlockStore, n: Lengths, reach: int) -> tuple[Tensor, Tensor, Tensor | None, Lengths]:
        """Keys and values of the query's own block and `reach` before it, which of them are not there ([b 1 m] bool,
        None: all are), and the number of its first block."""
        if isinstance(n, int):
            first = max((n - 1) // self.block - reach, 0)
            at = slice(first * self.block, n)
            return store.keys.held[:, :, at], store.values.held[:, :, at], None, first
        begins = ((n - 1) // self.block - reach).clamp(min=0)
        slots = (begins * self.block)[:, None] + torch.arange((reach + 1) * self.block, device=n.device)
        hidden = (slots >= n[:, None])[:, None]
        slots = slots.clamp(max=store.keys.held.shape[2] - 1)
        return store.keys.at(slots), store.values.at(slots), hidden, begins


def largest(scores: Tensor, count: int) -> Picked:
    """The `count` blocks with the largest scores [b h n], `tied` ones by the earlier; -inf is never among them."""
    n = scores.shape[-1]
    if count >= n:
        live = scores > float("-inf")
        return Picked(torch.arange(n, device=scores.device).expand_as(scores), None if bool(live.all()) else live)
    values, blocks = scores.topk(count + 1, dim=-1)
    if bool(tied(values[..., 0], values[..., -2], values[..., -1]).any()):  # or rows with fewer blocks
        return listed(best(scores, count))
    return Picked(blocks[..., :count])


def listed(read: Tensor) -> Picked:
    """The blocks where `read` [b h n] is true."""
    most = int(read.sum(-1).max())
    blocks = (~read).to(torch.int8).sort(dim=-1, stable=True).indices[..., :most]
    return Picked(blocks, read.gather(-1, blocks))
