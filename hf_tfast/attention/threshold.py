"""Threshold: a query leaves out keys, or blocks of keys, whose softmax weight is under tau.

    A = softmax over j of (q_i . k_j) * scale, future, sinks and softcap as in dense attention
    block = 1   o_i = sum_j A_ij [A_ij >= tau or j in the window of i] v_j
    block > 1   o_i = sum_j A'_ij v_j over {j : block(j) near block(i), or u_in >= log tau + z_i for its block n}
                u_in    upper bound of the scores of block n:  sum_d max(q_id low_nd, q_id high_nd), scaled, capped
                z_i     lower bound of the log denominator:  log (sum of e^s over near keys + sum_n l_in)
                l_in    |n| e^(scale q_i . mean of n) <= sum of e^s over n (Jensen); |n| e^(least s) with softcap
                A'_ij   e^s_ij / (sum of e^s over the keys read + sum of l_in over the blocks left out)
                Every block left out holds weights A_ij < tau only; a block is read as a whole.
    renormalise divides the weights that are left by their sum (with block > 1: no l_in in A').
    block(j) = floor(j / block); near: at most ceil((window - 1) / block) blocks behind, its own included; without
    causality ceil(window / block) on each side. All bounds run over keys before the query's near blocks only.

Shapes   q [b h i d]   k [b g j d]   v [b g j e]   ->   o [b h i e]
Cost     block = 1: O(i j (d + e)) time, the same as dense attention or more, O(i + j) memory
         block > 1: O(i r (d + e) + i j d / block) time, r keys read per query, O(i + j) memory and i j / block bytes
Exact    fast == reference up to rounding, forward and backward, given the choice, which has no gradient.
Source   Zhao et al., "Explicit Sparse Transformer", section 3 (dropping weights), https://arxiv.org/abs/1912.11637;
         bounds of a block: Tang et al., "Quest", section 3.2, https://arxiv.org/abs/2406.10774
Padding  exact, left, right and packed: blocks count from the first valid token of each document.
Causal   yes
Differs  the paper keeps a number of weights, here those of a size; what blocks leave out is
         proven small, never guessed; bounds are loose where the keys of a block differ: small blocks skip more.
"""

from dataclasses import dataclass, replace
from math import log
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..backends.block_store import BlockStore
from ..backends.key_blocks import Bounds, Grid, in_blocks, near_lists, over_queries
from ..backends.lists import Again, Sizes, attend_lists, log_mass, strips
from ..backends.score import Score
from ..backends.scratch import Scratch
from ._base import Mask, whole
from ._chosen import NO_BLOCKS, BlockChoice, Choice, Chosen, candidates, reach_of
from ._steps import Far, Picked, Stepped, listed


@dataclass(frozen=True, kw_only=True)
class Cut(Choice):
    """Scores under cut [b h i] are left out, but for the window. Scores are those of q, k, score; `at` [j] as ever."""

    q: Tensor
    k: Tensor
    at: Tensor
    cut: Tensor
    window: int
    causal: bool
    score: Score

    def allows(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        over = scores_of(self.q, self.k, self.score) >= self.cut[..., None]
        return over[b, self.head(h), self.query(i), self.key(j)] | self.near(i, j)

    def near(self, i: Tensor, j: Tensor) -> Tensor:
        return i - j < self.window if self.causal else ((i - j).abs() <= self.window) & (self.window > 0)

    def out(self, s: Tensor, heads: Tensor, part: slice) -> Tensor:
        """Which of the scores s [u t s] are left out."""
        i = self.at[self.offset :][part, None]
        return (s < self.cut.flatten(0, 1)[heads, part, None]) & ~self.near(i, self.at[: s.shape[-1]])


@dataclass(frozen=True, kw_only=True)
class Threshold(Stepped, Chosen):
    """Weights under `tau` are left out: one by one (`block` = 1) or by whole blocks; see the module for the window."""

    name: ClassVar[str] = "threshold"
    means: ClassVar[bool] = True
    small: ClassVar[dict[str, Any]] = {"tau": 0.02, "block": 4, "window": 3}
    backends: ClassVar[tuple[str, ...]] = ("torch", "flex")

    tau: float = 1e-3
    block: int = 1
    window: int = 1
    renormalise: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.tau, bool) or not isinstance(self.tau, int | float) or not 0 <= self.tau <= 1:
            raise ValueError(f"tau is a softmax weight and must lie in [0, 1], got {self.tau!r}")
        whole("block", self.block, 1)
        whole("window", self.window, 0)
        if not isinstance(self.renormalise, bool):
            raise ValueError(f"renormalise must be True or False, got {self.renormalise!r}")

    @torch.no_grad()
    def choose(self, q: Tensor, k: Tensor, mask: Mask, score: Score = Score()) -> Choice:  # noqa: B008 frozen
        sizes, place = Sizes.of(q, k, mask.causal), Choice.place(q, k, mask, score)
        at, least = mask.positions(k.shape[2], q.device), log(self.tau) if self.tau else -torch.inf
        score = replace(score, sinks=None if score.sinks is None else score.sinks.detach())
        q, k = q.detach(), k.detach()
        with torch.autocast(q.device.type, enabled=False):
            if self.block == 1:
                cut = log_mass(q, k, Again(lambda: strips(sizes, q.device)), score) + least
                return Cut(**place, q=q, k=k, at=at, cut=cut, window=self.window, causal=mask.causal, score=score)
            return self._blocks(q, k, score, Grid.of(at, self.block), sizes, place, least)

    def _blocks(
        self, q: Tensor, k: Tensor, score: Score, grid: Grid, sizes: Sizes, place: dict[str, Any], least: float
    ) -> BlockChoice:
        reach = reach_of(self.window, self.block, sizes.causal)
        near = log_mass(q, k, Again(lambda: near_lists(sizes, grid, reach)), score)
        boxes, factor = Bounds.of(k, grid).boxes(near.dtype), score.factor(q.shape[-1])
        there = grid.keys < sizes.j
        count = there.sum(-1)
        blocks = in_blocks(k, grid).to(near.dtype) * there[:, :, None]
        mean = blocks.sum(3) / count[:, None]
        beside = torch.empty_like(near)

        def rule(part_q: Tensor, part: slice, scratch: Scratch) -> Tensor:
            rows = part_q.to(near.dtype) * factor
            far = candidates(grid, place["offset"], reach, part, sizes.causal)
            shape = (*rows.shape[:3], len(count))
            highest = score.cap(boxes.highest(rows, scratch))
            if score.softcap is None:
                each = (rows.reshape(sizes.b, sizes.g, -1, rows.shape[-1]) @ mean.mT).view(shape)
            else:
                each = score.cap(-boxes.highest(-rows, scratch))
            mass = (each + count.to(each.dtype).log()).masked_fill(~far, float("-inf"))
            whole_mass = torch.logaddexp(near[:, :, part], mass.logsumexp(-1))
            read = far & (highest >= (whole_mass + least)[..., None])
            beside[:, :, part] = mass.masked_fill(read, float("-inf")).logsumexp(-1)
            return read

        chosen = over_queries(q, len(count), rule)
        rest = None if self.renormalise else beside
        return BlockChoice(**place, grid=grid, reach=reach, chosen=chosen, beside=rest)

    def at(self, q: Tensor, k: Tensor, mask: Mask, score: Score, choice: Any) -> Any:
        choice = super().at(q, k, mask, score, choice)
        return replace(choice, score=score) if isinstance(choice, Cut) else choice

    def allowed(self, choice: Any, b: Tensor, h: Tensor, i: Tensor, j: Tensor, *, causal: bool = False) -> Tensor:
        return choice.allows(b, h, i, j) if self.block == 1 else choice.allows(b, h, i, j, causal)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, choice: Any = None) -> Tensor:
        choice = self.at(q, k, mask, score, choice)
        o = super().reference(q, k, v, mask, score, choice)  # the weights that are left sum to 1
        if self.renormalise:
            return o
        (b, h, i, _), j = q.shape, k.shape[2]
        at = mask.positions(j, q.device)
        earlier = at <= at[j - i :, None] if mask.causal else torch.ones(i, j, dtype=torch.bool, device=q.device)
        up_to = lambda n, *shape: torch.arange(n, device=q.device).view(shape)  # noqa: E731
        heads = up_to(h, -1, 1, 1) + score.first_head
        read = earlier & self.allowed(choice, up_to(b, -1, 1, 1, 1), heads, at[j - i :, None], at, causal=mask.causal)
        s = scores_of(q, k, score)
        left = _log_sum(s, read, score)
        total = _log_sum(s, earlier, score) if self.block == 1 else torch.logaddexp(left, choice.beside)
        share = (left - total).exp().masked_fill(left == float("-inf"), 0.0)
        return (o.to(share.dtype) * share[..., None]).to(o.dtype)

    def fast(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, backend: str = "torch", choice: Any = None
    ) -> Tensor:
        choice = self.at(q, k, mask, score, choice)
        if self.block > 1:
            return choice.attend(q, k, v, mask.causal, score, backend)
        pick = {"hide": choice.out} if self.renormalise else {"drop": choice.out}
        lists = Again(lambda: strips(Sizes.of(q, k, mask.causal), q.device, **pick))
        return attend_lists(q, k, v, lists, score, choice.at)

    def pick(self, store: BlockStore, far: Far, score: Score) -> Picked:
        q = far.q * score.factor(far.q.shape[-1])
        highest = far.heads(score.cap(store.highest(q, far.count)))
        if score.softcap is None and store.means is not None:
            each = q @ store.means.first(far.count).mT
        else:
            each = score.cap(-store.highest(-q, far.count))
        mass = far.heads(each + log(self.block))
        whole_mass = torch.logaddexp(far.near.logsumexp(-1), mass.logsumexp(-1))
        least = log(self.tau) if self.tau else -torch.inf
        read = highest >= (whole_mass + least)[..., None]
        read = read if far.there is None else read & far.there
        beside = mass.masked_fill(read, float("-inf")).logsumexp(-1)
        return listed(read)._replace(beside=None if self.renormalise else beside)

    def lacks(self, backend: str, mask: Mask, score: Score) -> str | None:
        return NO_BLOCKS if backend == "flex" and self.block == 1 else None

    def full(self, length: int) -> "Threshold":
        return replace(self, tau=0.0)


def scores_of(q: Tensor, k: Tensor, score: Score) -> Tensor:
    """[b h i j]: scaled, capped scores in at least fp32."""
    (b, h, i, d), (g, j) = q.shape, k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    s = q.to(wide).reshape(b, g, -1, d) @ k.to(wide).mT
    return score.cap(s.reshape(b, h, i, j) * score.factor(d))


def _log_sum(s: Tensor, pairs: Tensor, score: Score) -> Tensor:
    """[b h i]: log of the sum of e^s over `pairs` and the sink logit; -inf, without gradient, where there is none."""
    some = pairs.any(-1, keepdim=True)
    s = s.masked_fill(~pairs, float("-inf")).masked_fill(~some, 0.0)
    mass = s.logsumexp(-1).masked_fill(~some[..., 0], float("-inf"))
    if score.sinks is None:
        return mass
    return torch.logaddexp(mass, score.sinks.to(mass.dtype)[:, None])
