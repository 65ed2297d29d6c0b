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

from ..backends import run_native
from ..backends.bucket_store import BucketStore
from ..backends.buckets import buckets, directions
from ..backends.draws import uniform
from ..backends.flex_patterns import attend_flex_runs
from ..backends.growing import Lengths
from ..backends.lists import Sizes, attend_lists
from ..backends.one_query import Reads, attend_one
from ..backends.runs import Runs, run_lists
from ..backends.score import Score
from ._base import Mask, whole
from ._cached import STEPS, ends, over_rows
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
    def choose(
        self,
        q: Tensor,
        k: Tensor,
        mask: Mask,
        score: Score = Score(),  # noqa: B008 frozen
        keys: Tensor | None = None,
    ) -> RunChoice:
        """What each query reads. Buckets [r b g j] of the keys, if a cache holds them, spare hashing them."""
        with torch.autocast(q.device.type, enabled=False):
            keys = self._buckets(k, q.shape[1], score) if keys is None else keys
            runs = Runs.of(self._asked(q, k.shape[1], score), keys, self.cap, mask.causal)
        return RunChoice(**Choice.place(q, k, mask, score), runs=runs)

    @torch.no_grad()
    def _buckets(self, k: Tensor, h: int, score: Score) -> Tensor:
        """[r b g j] int32: the buckets of keys [b g j d] that h query heads share."""
        (g, d), dtype = k.shape[1::2], torch.promote_types(k.dtype, torch.float32)
        turns = turned(self, score.first_head // (h // g), g, d, dtype, k.device)
        return buckets(k, turns, self.bits, self.rounds)

    def _asked(self, q: Tensor, g: int, score: Score) -> Tensor:
        """[r b h i] int32: the buckets of queries [b h i d], which share g key heads."""
        b, h, i, d = q.shape
        return self._buckets(q.reshape(b, g, h // g * i, d), h, score).reshape(-1, b, h, i)

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
        if run_native.serves(q, k, v, score, max(self.cap, 2 * self.window + 1)):
            return run_native.attend_runs(q, k, v, runs, score)
        lists = list(run_lists(sizes, runs, reach, tile_size(max(sizes.i * (sizes.h // sizes.g), 1), self.bits)))
        return attend_lists(q, k, v, lists, score, at)

    def lacks(self, backend: str, mask: Mask, score: Score) -> str | None:
        if backend == "flex" and score.dropout:
            return "dropout draws by position, which keys sorted by bucket have lost; take backend='torch'"
        return None

    def store(self) -> BucketStore:
        return BucketStore(self.bits, self.rounds)

    def remember(self, store: BucketStore, q: Tensor, k: Tensor, v: Tensor, score: Score, new: Tensor | None) -> None:
        store.append(k, v, new, self._buckets(k, q.shape[1], score))

    @torch.no_grad()
    def resume(self, store: BucketStore, q: Tensor, score: Score, new: Tensor | None) -> Tensor:
        if q.shape[2] > STEPS or score.dropout:

            def run(q: Tensor, k: Tensor, v: Tensor, mask: Mask, numbers: Tensor) -> Tensor:
                return self.fast(q, k, v, mask, score, choice=self.choose(q, k, mask, score, store.of_round(numbers)))

            held = store.keys.held, store.values.held
            return over_rows(run, q, *held, store.lengths, new, store.numbers.held)
        asked, last = self._asked(q, store.keys.held.shape[1], score), ends(store.lengths, q, new)
        o = [self._step(store, q[:, :, t : t + 1], asked[..., t], n, score) for t, n in enumerate(last)]
        return torch.cat(o, 2) if len(o) > 1 else o[0]

    def expected(self, store: BucketStore, q: Tensor, score: Score, new: Tensor | None) -> Tensor | None:
        if score.dropout:
            return None
        run = lambda q, k, v, mask: self.reference(q, k, v, mask, score)  # noqa: E731
        return over_rows(run, q, store.keys.held, store.values.held, store.lengths, new)

    def _step(self, store: BucketStore, q: Tensor, asked: Tensor, n: Lengths, score: Score) -> Tensor:
        """Query q [b h 1 d] with buckets [r b h], the last of the first n tokens of a row (0: none) -> [b h 1 e]."""
        low = (n - self.window).clamp(min=0) if isinstance(n, Tensor) else max(n - self.window, 0)
        reads = Reads(low, n, starts=store.found(asked, low, n, self.cap))
        return attend_one(q, store.keys.held, store.values.held, reads, score)

    def full(self, length: int) -> "Hashed":
        return replace(self, bits=0, rounds=1, cap=2 * max(length, 1))


def tile_size(queries: int, bits: int) -> int:
    """Queries of a tile under causality: about half a bucket, within what matmuls do well."""
    return min(64, max(16, 2 ** (queries >> bits).bit_length() // 4))


@lru_cache(maxsize=8)
def turned(mechanism: Hashed, first: int, g: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[g width rounds*directions]: the rotations of g key/value heads from `first` on; layers alike share them."""
    seed, rounds, bits = mechanism.seed, mechanism.rounds, mechanism.bits
    with torch.inference_mode(False), torch.no_grad():
        each = [rotations(seed, first + n, rounds, width, bits) for n in range(g)]
        return torch.stack(each).to(device, dtype)


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
