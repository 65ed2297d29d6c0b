"""Sparse patterns through torch's FlexAttention: fused kernels on CUDA, forward and backward.

A pattern is a `Rule`, which says of every pair whether it is read, and tiles of TILE queries against TILE keys: those
that hold no pair are never looked at, those that are read whole are not asked pair by pair. Both are given as indices
(`Tiles`); nothing of size [i, j] is ever made.

Every number of a rule is an element of a tensor, lengths are padded to whole tiles, and each combination of rule, head
count, width and dtype is compiled by itself: one kernel for its first length, one more for all others.

Axes   b batch, h query heads, g key/value heads, i queries, j keys, d key width, e value width,
       r tiles of queries, c tiles of keys, w tiles of keys that one tile of queries reads.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .draws import draw, kept_of, threshold
from .score import Score

__all__ = [
    "TILE",
    "Pattern",
    "Rule",
    "Tiles",
    "attend_flex",
    "hashes",
    "merged",
    "padded",
    "sunk",
    "unfused",
    "why_not",
]

TILE = 128  # FlexAttention's own default: its kernels' blocks divide it at every head width
LEAST = 2 * TILE  # a length of one tile would be compiled apart: sizes of 1 always are
NOTHING = -1e30  # log-sum-exp of a query that reads nothing


class Rule:
    """Static part of a pattern: frozen, hashable, without any number that changes from call to call."""

    def seen(self, args: tuple[Tensor, ...], b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Does query i of the padded queries read key j of the padded keys? By elementwise operations and lookups in
        `args` alone: it runs inside a kernel, for one pair, and in plain torch, for broadcast indices."""
        raise NotImplementedError


class Lists(NamedTuple):
    """number [b or 1, h or 1, n] and places [b or 1, h or 1, n, w], int32: the tiles that each of n tiles meets."""

    number: Tensor
    places: Tensor

    @staticmethod
    def of(met: Tensor) -> "Lists":
        """Of met [.. n m] bool, ascending; w is rounded up, so that lists of about one length share a kernel."""
        met = met.expand(*met.shape[:-2], max(met.shape[-2], 1), met.shape[-1])
        count = met.sum(-1, dtype=torch.int32)
        most = int(count.max()) if count.numel() else 0
        width = min(max(2, 1 << max(most - 1, 0).bit_length()), max(met.shape[-1], 2))
        place = (met.cumsum(-1, dtype=torch.int32) - 1).where(met, width).long()
        index = torch.zeros(*met.shape[:-1], width + 1, dtype=torch.int32, device=met.device)
        tiles = torch.arange(met.shape[-1], dtype=torch.int32, device=met.device)
        index.scatter_(-1, place, tiles.expand_as(met).contiguous())
        return Lists(count, index[..., :width].contiguous())

    def met(self, tiles: int) -> Tensor:
        """[.. n tiles] bool: `of` undone."""
        width = self.places.shape[-1]
        live = torch.arange(width, device=self.places.device) < self.number[..., None]
        met = torch.zeros(*self.number.shape, tiles + 1, dtype=torch.bool, device=self.places.device)
        return met.scatter_(-1, self.places.long().where(live, tiles), True)[..., :tiles]


class Tiles(NamedTuple):
    """Tiles that are asked pair by pair, and tiles that are read whole (None: there are none), from both sides."""

    partial: Lists
    partial_back: Lists
    full: Lists | None = None
    full_back: Lists | None = None

    @staticmethod
    @torch.no_grad()
    def of(some: Tensor, full: Tensor | None = None) -> "Tiles":
        """some [b or 1, h or 1, r, c] bool: at least the tiles that hold a pair; full: only tiles read whole."""
        asked = some if full is None else some & ~full
        back = None if full is None else Lists.of(full.mT)
        return Tiles(Lists.of(asked), Lists.of(asked.mT), None if full is None else Lists.of(full), back)


class Pattern(NamedTuple):
    """A rule, the tensors that it looks things up in, and the tiles that hold its pairs."""

    rule: Rule
    args: tuple[Tensor, ...]
    tiles: Tiles


def padded(length: int) -> int:
    """The length in whole tiles."""
    return max(LEAST, -(-length // TILE) * TILE)


@dataclass(frozen=True)
class _Plan:
    """All that a kernel is compiled for, apart from lengths."""

    rule: Rule
    scale: float
    softcap: bool
    dropout: bool
    sizes: tuple[int, ...]  # b, h, g, d, e
    dtype: torch.dtype
    grad: bool

    def score_mod(self, args: tuple[Tensor, ...]) -> Callable[..., Tensor] | None:
        if not self.softcap and not self.dropout:
            return None

        def score_mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if self.softcap:
                s = torch.tanh(s / args[0]) * args[0]
            if self.dropout:
                _, rows, columns, least = args
                s = torch.where(kept_of(rows[b, h, i], columns[j], least), s, -float("inf"))
            return s

        return score_mod


def attend_flex(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, score: Score, drop: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax over the pairs of a pattern: q [b h i d], k [b g j d], v [b g j e] -> o [b h i e], lse [b h i].

    `score` gives scale, softcap and dropout (its sink logits are the caller's: `sunk`). `drop` [b h i], [j] int32 are
    the hashes of queries and keys that dropout draws by. lse is in at least fp32, NOTHING where nothing is read, and
    differentiable.
    """
    i, longer, keys = q.shape[2], padded(q.shape[2]), padded(k.shape[2])
    q = F.pad(q, (0, 0, 0, longer - i)) if longer > i else q
    k, v = (F.pad(x, (0, 0, 0, keys - x.shape[2])) if keys > x.shape[2] else x for x in (k, v))
    numbers: tuple[Tensor, ...] = (torch.tensor(score.softcap or 0.0, device=q.device, dtype=torch.float32),)
    plan = _Plan(pattern.rule, score.factor(q.shape[-1]), score.softcap is not None, False,
                 (*q.shape[:2], k.shape[1], q.shape[3], v.shape[3]), q.dtype, torch.is_grad_enabled())  # fmt: skip
    o, lse = _run(plan, (q, k, v), numbers, pattern)
    if score.dropout:  # the softmax of what is kept, times the share that it has of all
        if drop is None:
            raise ValueError("dropout needs the hashes of queries and keys")
        rows, columns = F.pad(drop[0], (0, longer - i)), F.pad(drop[1], (0, keys - len(drop[1])))
        least = torch.tensor(threshold(score.dropout), dtype=torch.int32, device=q.device)
        plan = replace(plan, dropout=True)
        kept, share = _run(plan, (q, k, v), (*numbers, rows, columns, least), pattern)
        o = kept * ((share - lse).exp() / (1.0 - score.dropout))[..., None]
    return o[:, :, :i], lse[:, :, :i]


def sunk(o: Tensor, lse: Tensor, *masses: Tensor | None) -> Tensor:
    """o whose weights sum to exp(lse) [b h i], with further log masses (broadcastable to lse) in the softmax."""
    for mass in masses:
        if mass is not None:
            total = torch.logaddexp(lse, mass.to(lse.dtype))
            o, lse = o * (lse - total).exp()[..., None], total
    return o


def merged(o: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Rounds o [r b h i e], lse [r b h i] over disjoint keys, and sink logits [h] -> [b h i e] in at least fp32."""
    total = lse.logsumexp(0)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.to(total.dtype)[:, None])
    return (o.to(lse.dtype) * (lse - total).exp()[..., None]).sum(0)


def hashes(score: Score, b: int, h: int, at: Tensor, i: int) -> tuple[Tensor, Tensor] | None:
    """What dropout draws by, for keys at the positions `at` [j] and the last i of them as queries; None without."""
    if not score.dropout:
        return None
    if score.seed is None:
        raise ValueError("dropout needs Score.seed: call attend, which draws it, or set it")
    rows, heads = torch.arange(b, device=at.device), torch.arange(h, device=at.device) + score.first_head
    asked = draw(score.seed, rows[:, None, None], heads[:, None], at[len(at) - i :])
    return asked.contiguous(), draw(score.seed + 1, at)


_UNFUSED: ContextVar[bool] = ContextVar("tfast_flex_unfused", default=False)


@contextmanager
def unfused() -> Iterator[None]:
    """Within, rules and tiles are evaluated in plain torch, O(i j), on any device: for tests of patterns."""
    token = _UNFUSED.set(True)
    try:
        yield
    finally:
        _UNFUSED.reset(token)


def why_not(q: Tensor, v: Tensor) -> str | None:
    """Why FlexAttention cannot run on these tensors; None where it can."""
    if _UNFUSED.get():
        return None
    if q.device.type != "cuda":
        return f"FlexAttention is fused, and has a backward pass, on CUDA only; these tensors are on {q.device.type}"
    if q.dtype == torch.float64:
        return "FlexAttention's kernels compute in fp32; these tensors are float64"
    if min(q.shape[-1], v.shape[-1]) < 16:
        return f"FlexAttention needs heads of width 16 at least, got {q.shape[-1]} and {v.shape[-1]}"
    if find_spec("triton") is None:
        return "its kernels are made by Triton, which is not installed: pip install triton"
    return None


def _run(
    plan: _Plan, qkv: tuple[Tensor, Tensor, Tensor], numbers: tuple[Tensor, ...], pattern: Pattern
) -> tuple[Tensor, Tensor]:
    if _UNFUSED.get():
        return _dense(plan, qkv, numbers, pattern)
    o, lse = compiled(plan)(*qkv, pattern.args, numbers, pattern.tiles)
    return o, lse.masked_fill(lse == -float("inf"), NOTHING)


Kernel = Callable[..., tuple[Tensor, Tensor]]


@lru_cache(maxsize=256)
def compiled(plan: _Plan, backend: str | Callable[..., Any] = "inductor") -> Kernel:
    """The kernel of a plan, in code of its own: the compiler counts recompilations by code."""
    run = kernel_of(plan)
    own = FunctionType(run.__code__.replace(), run.__globals__, run.__name__, run.__defaults__, run.__closure__)
    return torch.compile(own, backend=backend, fullgraph=True)


def kernel_of(plan: _Plan) -> Any:
    """(q, k, v, args, numbers, tiles) -> o, lse by FlexAttention."""
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

    rule, grouped = plan.rule, plan.sizes[1] != plan.sizes[2]

    def run(
        q: Tensor, k: Tensor, v: Tensor, args: tuple[Tensor, ...], numbers: tuple[Tensor, ...], tiles: Tiles
    ) -> tuple[Tensor, Tensor]:
        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return rule.seen(args, b, h, i, j)

        whole, whole_back = tiles.full or (None, None), tiles.full_back or (None, None)
        lengths, size = (q.shape[2], k.shape[2]), (TILE, TILE)
        lists = (*tiles.partial, *whole, *tiles.partial_back, *whole_back)
        mask = BlockMask(lengths, *lists, BLOCK_SIZE=size, mask_mod=mask_mod)  # type: ignore[misc]
        o, aux = flex_attention(q, k, v, plan.score_mod(numbers), mask, plan.scale, enable_gqa=grouped,
                                return_aux=AuxRequest(lse=True))  # fmt: skip
        return o, aux.lse  # type: ignore[return-value]

    return run


def _dense(
    plan: _Plan, qkv: tuple[Tensor, Tensor, Tensor], numbers: tuple[Tensor, ...], pattern: Pattern
) -> tuple[Tensor, Tensor]:
    """What the kernel computes: rule in partial tiles, everything in full ones, nothing elsewhere."""
    q, k, v = qkv
    (b, h, i, _), (g, j) = q.shape, k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    index = [torch.arange(n, device=q.device).view(-1, *(1,) * axis) for n, axis in ((b, 3), (h, 2), (i, 1), (j, 0))]
    pairs = pairs_of(pattern, index)
    s = (q.to(wide).reshape(b, g, -1, q.shape[-1]) @ k.to(wide).mT).view(b, h, i, j) * plan.scale
    score_mod = plan.score_mod(numbers)
    s = (s if score_mod is None else score_mod(s, *index)).masked_fill(~pairs, -float("inf"))
    top = s.amax(-1, keepdim=True).detach().clamp_min(NOTHING)
    p = (s - top).exp()
    total = p.sum(-1, keepdim=True)
    o = (p / total.where(total > 0, 1.0)).view(b, g, -1, j) @ v.to(wide)
    lse = (total.where(total > 0, 1.0).log() + top).masked_fill(total == 0, NOTHING)
    return o.view(b, h, i, -1).to(q.dtype), lse[..., 0]


def pairs_of(pattern: Pattern, index: list[Tensor]) -> Tensor:
    """[b h i j] bool: the pairs that the kernel reads; b or h are 1 where all are alike."""
    (rule, args, tiles), i, j = pattern, index[2].numel(), index[3].numel()
    asked = tiles.partial.met(j // TILE).repeat_interleave(TILE, -2).repeat_interleave(TILE, -1)
    pairs = asked[..., :i, :] & rule.seen(args, *index)
    if tiles.full is not None:
        pairs = pairs | tiles.full.met(j // TILE).repeat_interleave(TILE, -2).repeat_interleave(TILE, -1)[..., :i, :]
    return pairs
