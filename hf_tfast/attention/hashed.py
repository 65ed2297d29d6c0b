"""Hashed: a query reads keys that fall into its bucket in one of several random hashings, and its neighbours.

    o_i = sum_j p_ij v_j,   p_i = softmax over {j : allowed(i, j)} of (q_i . k_j) * scale
    allowed(i, j) = j in the window of i, or in some round bucket(q_i) = bucket(k_j) and j is among the `cap` last keys
                    of that bucket up to i; without causality among the ceil(cap / 2) last up to i or the
                    floor(cap / 2) first after it. The window is as in Window; 0 is none, not even the query's own
                    position: a query that finds nothing then reads zeros.
    bucket(x)     = argmax of [x R, -x R], R [d 2^(bits - 1)] with orthonormal columns (several such sets if there are
                    more than d): the nearest corner of a turned cross-polytope. Beyond 8 bits, of several in a row

Shapes   q [b h i d]   k [b g j d]   v [b g j e]   ->   o [b h i e]
Cost     O((i + j) (rounds (cap (d + e) + 2^min(bits, 8) d) + window (d + e))) time, O((i + j) (rounds + d + e))
         memory, also when everything falls into one bucket
Exact    fast == reference up to rounding, forward and backward, given the buckets, which have no gradient.
Source   buckets: Andoni et al., "Practical and Optimal LSH for Angular Distance", section 3,
         https://arxiv.org/abs/1509.02897; attention within buckets: Kitaev et al., "Reformer", section 2,
         https://arxiv.org/abs/2001.04451
Padding  exact, left, right and packed: padding has no bucket.
Causal   yes
Differs  queries and keys are two vectors, hashed by one R per key/value head; Reformer shares them. Reformer cuts the
         sorted order into chunks, whose borders move with the future; here a query counts back from itself.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..backends.buckets import buckets, directions
from ..backends.draws import uniform
from ..backends.flex_patterns import attend_flex_runs
from ..backends.lists import Sizes, attend_lists
from ..backends.runs import Runs, run_lists
from ..backends.score import Score
from ._base import Mask, whole
from ._chosen import Choice, Chosen

MOST_BITS, MOST_ROUNDS = 16, 64


@dataclass(frozen=True, kw_only=True)
class RunChoice(Choice):
    """The keys that each query finds in its buckets."""

    runs: Runs

    def allows(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        head, query, key = self.head(h), self.query(i), self.key(j)
        shared = self.runs.low.shape[2] // self.runs.rank.shape[2]
        found = torch.zeros((), dtype=torch.bool, device=i.device)
        for rank, low, high in zip(self.runs.rank, self.runs.low, self.runs.high, strict=True):
            place = rank[b, head // shared, key]
            found = found | ((place >= low[b, head, query]) & (place < high[b, head, query]))
        return found


@dataclass(frozen=True, kw_only=True)
class Hashed(Chosen):
    """At most `cap` keys of the query's bucket among 2^bits, in each of `rounds`, and `window` neighbours or none."""

    name: ClassVar[str] = "hashed"
    small: ClassVar[dict[str, Any]] = {"bits": 2, "rounds": 3, "cap": 6, "window": 4}
    backends: ClassVar[tuple[str, ...]] = ("torch", "flex")

    bits: int = 7
    rounds: int = 2
    cap: int = 128
    window: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        whole("bits", self.bits, 0)
        if self.bits > MOST_BITS:
            raise ValueError(f"bits must be at most {MOST_BITS} ({2**MOST_BITS} buckets), got {self.bits}")
        whole("rounds", self.rounds, 1)
        if self.rounds > MOST_ROUNDS:
            raise ValueError(
                f"rounds must be at most {MOST_ROUNDS}, got {self.rounds}: fewer bits or a larger cap reads more"
            )
        whole("cap", self.cap, 1)
        whole("window", self.window, 0)
        whole("seed", self.seed, -(2**63))

    @torch.no_grad()
    def choose(self, q: Tensor, k: Tensor, mask: Mask, score: Score = Score()) -> RunChoice:  # noqa: B008 frozen
        (b, h, i, d), g = q.shape, k.shape[1]
        shared = h // g
        with torch.autocast(q.device.type, enabled=False):
            wide = torch.promote_types(q.dtype, torch.float32)
            first = score.first_head // shared
            turns = torch.stack([rotations(self.seed, first + n, self.rounds, d, self.bits) for n in range(g)])
            turns = turns.to(q.device, wide)  # [g d r*directions]
            asked = buckets(q.reshape(b, g, shared * i, d), turns, self.bits, self.rounds)
            runs = Runs.of(
                asked.reshape(-1, b, h, i), buckets(k, turns, self.bits, self.rounds), self.cap, mask.causal
            )
        return RunChoice(**Choice.place(q, k, mask, score), runs=runs)

    def allowed(self, choice: Any, b: Tensor, h: Tensor, i: Tensor, j: Tensor, *, causal: bool = False) -> Tensor:
        near = i - j < self.window if causal else ((i - j).abs() <= self.window) & (self.window > 0)
        return near | choice.allows(b, h, i, j)

    def fast(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, backend: str = "torch", choice: Any = None
    ) -> Tensor:
        choice = self.at(q, k, mask, score, choice)
        sizes, at = Sizes.of(q, k, mask.causal), mask.positions(k.shape[2], q.device)
        runs, reach = choice.runs, (self.cap,) * self.rounds
        if self.window:
            runs, reach = runs.join(Runs.window(sizes, self.window, at)), (*reach, self.window)
        if backend == "flex":
            return attend_flex_runs(q, k, v, runs, score)
        lists = list(run_lists(sizes, runs, reach, tile_size(max(sizes.i * (sizes.h // sizes.g), 1), self.bits)))
        return attend_lists(q, k, v, lists, score, at)

    def lacks(self, backend: str, mask: Mask, score: Score) -> str | None:
        if backend == "flex" and score.dropout:
            return "dropout draws by position, which keys sorted by bucket have lost; take backend='torch'"
        return None

    def full(self, length: int) -> "Hashed":
        return replace(self, bits=0, rounds=1, cap=2 * max(length, 1))


def tile_size(queries: int, bits: int) -> int:
    """Queries of a tile under causality: about half a bucket, within what matmuls do well."""
    return min(64, max(16, 2 ** (queries >> bits).bit_length() // 4))


@lru_cache(maxsize=1024)
def rotations(seed: int, head: int, rounds: int, width: int, bits: int) -> Tensor:
    """[width rounds*directions(bits)] float64 on the CPU: random directions, orthonormal within a round by sets of at
    most `width`, for one key/value head.

    A pure function of its arguments; round r does not depend on how many rounds there are.
    """
    rows, columns = torch.arange(width)[:, None], torch.arange(width)
    count = directions(bits)
    made = []
    for r in range(rounds):
        for part in range(-(-count // width)):
            index = torch.tensor(head), torch.tensor(r), torch.tensor(part), rows, columns
            radius = (-2 * (1 - uniform(seed, *index, torch.tensor(0))).log()).sqrt()  # Box and Muller
            normal = radius * (2 * torch.pi * uniform(seed, *index, torch.tensor(1))).cos()
            turn, upper = torch.linalg.qr(normal)
            turn = turn * upper.diagonal().sign()  # one of the two signs that QR may give
            made.append(turn[:, : min(width, count - part * width)])
    return torch.cat(made, -1) if made else torch.zeros(width, 0, dtype=torch.float64)
