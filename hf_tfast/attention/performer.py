"""Performer: softmax weights replaced by the products of positive random features, linear in the length.

    o_i = sum_j A_ij v_j / sum_j A_ij,   A_ij = 1/R sum_r phi_r(q_i sqrt(scale)) phi_r(k_j sqrt(scale)),
    phi_r(x) = exp(w_r . x - |x|^2 / 2),   w_r ~ N(0, I), orthogonal within blocks of d;   E A_ij = exp(s_ij)

Shapes   q [b h i d]   k [b g j d]   v [b g j e]   ->   o [b h i e]
Cost     O((i + j) features (d + e)) time, O(i + j) memory; training a causal model adds one state of features x e per
         128 positions. A running state (`extend`, `step`) decodes a token in O(features (d + e)).
Exact    fast == reference up to rounding, forward and backward. A_ij is unbiased for the exponential of the score; its
         error falls like features^-1/2 and grows like exp(scale |q + k|^2 / 2).
Source   Choromanski et al., "Rethinking Attention with Performers", sections 2.3 and 2.4, lemmas 1 and 2,
         https://arxiv.org/abs/2009.14794
Padding  exact, left, right and packed.
Causal   yes
Differs  stabilised by the running prefix maximum of the keys' log-features; a maximum over all keys would show a query
         the future. Stabilisers cancel, and nothing is added to the features. Features are drawn per query head from
         (seed, head) and never redrawn. There is no attention dropout and no softcap.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..backends.draws import uniform
from ..backends.running import Running
from ..backends.scan import State, absorb, feature_attention, read
from ..backends.score import Score
from ._base import Mask, Mechanism, whole

MOST_FUSED = 512  # features that the kernel in Triton makes
PAIRS = 2**13  # of a query and a recent slot in a step: so many are cheaper one by one than as a scan


@dataclass(frozen=True, kw_only=True)
class Performer(Mechanism):
    """`features` positive orthogonal random features per head, drawn from `seed`."""

    name: ClassVar[str] = "performer"
    small: ClassVar[dict[str, Any]] = {"features": 24}
    dropout: ClassVar[bool] = False
    backends: ClassVar[tuple[str, ...]] = ("torch", "triton")

    features: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        whole("features", self.features, 1)
        whole("seed", self.seed, 0)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, choice: Any = None) -> Tensor:
        refuse_softcap(self.name, score)
        h, i, j = q.shape[1], q.shape[2], k.shape[2]
        k, v = (x.repeat_interleave(h // k.shape[1], 1) for x in (k, v))
        weights = estimated_logits(q, k, self.directions(q, score), score.factor(q.shape[-1]))
        if mask.causal:
            at = torch.arange(j, device=q.device)
            weights = weights.masked_fill(at > at[j - i :, None], float("-inf"))
        if score.sinks is not None:
            weights = torch.cat(
                [weights, score.sinks.to(weights.dtype)[:, None, None].expand(*weights.shape[:3], 1)], -1
            )
        return (weights.softmax(-1)[..., :j] @ v.to(weights.dtype)).to(v.dtype)

    def fast(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, backend: str = "torch", choice: Any = None
    ) -> Tensor:
        refuse_softcap(self.name, score)
        w, scale = self.directions(q, score), score.factor(q.shape[-1])
        found = feature_attention(q, k, v, w, scale, causal=mask.causal, fused=backend == "triton")
        return with_sinks(*found, score.sinks)

    def lacks(self, backend: str, mask: Mask, score: Score) -> str | None:
        if backend == "triton" and self.features > MOST_FUSED:
            return f"the kernel makes up to {MOST_FUSED} features, not {self.features}; take backend='torch'"
        return None

    def extend(self, state: State | None, q: Tensor, k: Tensor, v: Tensor, score: Score) -> State:
        """The running state after keys k [b g j d] and values v [b g j e] of one document; None is the empty state.

        Only the head count and width of `q` are read. Its size is features x (e + 1) per head, whatever was read.
        """
        refuse_softcap(self.name, score)
        return absorb(state, k, v, self.directions(q, score), score.factor(k.shape[-1]))

    def step(self, state: State, q: Tensor, score: Score) -> Tensor:
        """Attention of q [b h i d] over every key in `state`, without gradient: the decoding step. [b h i e]"""
        refuse_softcap(self.name, score)
        return with_sinks(*read(state, q, self.directions(q, score), score.factor(q.shape[-1])), score.sinks)

    def store(self) -> Running:
        """An empty running state, for a cache."""
        return Running()

    def remember(self, store: Running, q: Tensor, k: Tensor, v: Tensor, score: Score, new: Tensor | None) -> None:
        refuse_softcap(self.name, score)
        store.append(k, v, (self.directions(q, score), score.factor(k.shape[-1])), new)

    @torch.no_grad()
    def resume(self, store: Running, q: Tensor, score: Score, new: Tensor | None) -> Tensor:
        """What the state gives and what the slots give that it does not hold yet, merged by their sums of weights."""
        w, scale = self.directions(q, score), score.factor(q.shape[-1])
        if store.keys is None or store.values is None:
            raise ValueError("nothing is stored yet: remember keys and values first")
        o, lse = self._recent(q, store.keys, store.values, store.there, (w, scale))
        if store.state is not None:
            past, before = read(store.state, q.to(w.dtype), w, scale)
            total = torch.logaddexp(lse, before)
            o = o * (lse - total).exp()[..., None] + past * (before - total).exp()[..., None]
            lse = total
        o = with_sinks(o, lse, score.sinks)
        return (o if new is None else o.masked_fill(~new[:, None, :, None], 0.0)).to(q.dtype)

    def expected(self, store: Running, q: Tensor, score: Score, new: Tensor | None) -> None:
        """A running state no longer tells its keys."""

    def _recent(
        self, q: Tensor, k: Tensor, v: Tensor, there: Tensor | None, features: tuple[Tensor, float]
    ) -> tuple[Tensor, Tensor]:
        """Causal attention of q [b h i d] over the keys `there` [b m] of the last m slots -> [b h i e], [b h i]."""
        (b, h, i, _), (g, m), (w, scale) = q.shape, k.shape[1:3], features
        if i * m > PAIRS and there is None:
            o, lse = feature_attention(q, k, v, w, scale, causal=True)
            return o.to(w.dtype), lse
        if i * m > PAIRS and b > 1:
            rows = (slice(n, n + 1) for n in range(b))
            parts = [self._recent(q[r], k[r], v[r], there[r], features) for r in rows]  # type: ignore[index]
            return torch.cat([o for o, _ in parts]), torch.cat([lse for _, lse in parts])
        if i * m > PAIRS:
            at = there[0].nonzero()[:, 0]  # type: ignore[index]
            own = at[at >= m - i] - (m - i)
            part, mass = self._recent(q[:, :, own], k[:, :, at], v[:, :, at], None, features)
            o, lse = part.new_zeros(1, h, i, v.shape[-1]), mass.new_full((1, h, i), float("-inf"))
            o[:, :, own], lse[:, :, own] = part, mass
            return o, lse
        k, v = (x.repeat_interleave(h // g, 1) for x in (k, v))
        slots = torch.arange(m, device=q.device)
        hidden = slots > slots[m - i :, None]
        if there is not None:
            hidden = hidden | ~there[:, None, None]
        logits = estimated_logits(q, k, w, scale).masked_fill_(hidden, float("-inf"))
        lse = logits.logsumexp(-1)
        return (logits - lse[..., None]).exp().nan_to_num_(0.0) @ v.to(w.dtype), lse

    def directions(self, q: Tensor, score: Score) -> Tensor:
        """[h features d]: w_r of every query head of this call."""
        wide = torch.promote_types(q.dtype, torch.float32)
        return orthogonal(self.seed, score.first_head, q.shape[1], self.features, q.shape[3], wide, q.device)


def estimated_logits(q: Tensor, k: Tensor, w: Tensor, scale: float) -> Tensor:
    """[b h i j]: log A_ij of q [b h i d] and k [b h j d] for the features w [h R d], in at least fp32."""
    q, k = (x.to(w.dtype) * abs(scale) ** 0.5 for x in (q, k))
    q_logits = (q * math.copysign(1.0, scale)) @ w.mT - q.square().sum(-1, keepdim=True) / 2
    k_logits = k @ w.mT - k.square().sum(-1, keepdim=True) / 2
    products = q_logits.softmax(-1) @ k_logits.softmax(-1).mT  # rows that sum to one: neither side overflows
    levels = q_logits.logsumexp(-1)[..., :, None] + k_logits.logsumexp(-1)[..., None, :] - math.log(w.shape[1])
    return products.clamp_min(torch.finfo(w.dtype).tiny ** 0.8).log() + levels


def with_sinks(o: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """o [b h i e] whose weights sum to exp(lse) [b h i], with the sink logits [h] added to that sum."""
    if sinks is None:
        return o
    return (o * torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])[..., None]).to(o.dtype)


def refuse_softcap(name: str, score: Score) -> None:
    if score.softcap is not None:
        raise ValueError(
            f"{name} cannot bound scores by softcap={score.softcap}: random features estimate exp(scale q . k) only; "
            "leave these layers dense or choose a mechanism that computes scores, such as window"
        )


def orthogonal(
    seed: int, first_head: int, heads: int, features: int, width: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[heads features width]: rows ~ N(0, I), orthogonal in blocks of `width`; head n is a function of (seed, n)."""
    return _orthogonal(seed, first_head, heads, features, width, dtype, str(device))


@lru_cache(maxsize=32)  # a pure function: keeping its values keeps no state
def _orthogonal(
    seed: int, first_head: int, heads: int, features: int, width: int, dtype: torch.dtype, device: str
) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        size = (heads, -(-features // width), width, width)
        index = torch.meshgrid(*(torch.arange(n, device="cpu") for n in size), indexing="ij")
        index = (index[0] + first_head, *index[1:])
        basis, upper = torch.linalg.qr(_normal(2 * seed, *index))
        basis = basis * upper.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]  # uniform over all rotations
        rows = basis.mT * _normal(2 * seed + 1, *index).norm(dim=-1, keepdim=True)
        return rows.flatten(1, 2)[:, :features].contiguous().to(device=device, dtype=dtype)


def _normal(seed: int, *index: Tensor) -> Tensor:
    """Standard normal float64 numbers for every combination of `index` (Box and Muller)."""
    part = torch.zeros((), dtype=torch.int64, device="cpu")
    radius = (-2 * torch.log1p(-uniform(seed, part, *index))).sqrt()
    return radius * torch.cos(2 * math.pi * uniform(seed, part + 1, *index))
