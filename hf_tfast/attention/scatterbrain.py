"""Scatterbrain: softmax weights inside a window, random features for everything outside it.

    o_i = sum_j A_ij v_j / sum_j A_ij,   A_ij = exp(s_ij) inside the window, else the estimate of Performer
    causal          inside: i - window < j <= i, outside: j <= i - window
    bidirectional   inside: |i - j| <= window

Shapes   q [b h i d]   k [b g j d]   v [b g j e]   ->   o [b h i e]
Cost     O((i + j) features (d + e) + i window (d + e)) time, without causality twice the features; O(i + j) memory;
         training adds one state of features x e per 128 positions
Exact    fast == reference up to rounding, forward and backward. Weights inside the window are exact, all others
         unbiased; with window >= length it is dense attention.
Source   Chen et al., "Scatterbrain: Unifying Sparse and Low-rank Attention Approximation", section 4,
         https://arxiv.org/abs/2110.15343
Padding  exact, left, right and packed.
Causal   yes
Differs  the support is a window instead of hashed pairs. The features' share inside the window is never added, instead
         of added and subtracted again, so nothing cancels and no weight is negative: prefix sums end where the window
         begins. Distances count the keys that are there. There is no attention dropout and no softcap.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..backends.band import band_attention, merge
from ..backends.scan import feature_attention
from ..backends.score import Score
from ._base import Mask, Mechanism, whole
from .performer import Performer, estimated_logits, refuse_softcap


@dataclass(frozen=True, kw_only=True)
class Scatterbrain(Mechanism):
    """A window as that of `Window`, and `features` random features per head, drawn from `seed`, for the rest."""

    name: ClassVar[str] = "scatterbrain"
    small: ClassVar[dict[str, Any]] = {"window": 8, "features": 24}
    dropout: ClassVar[bool] = False

    window: int = 128
    features: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        whole("window", self.window, 1)
        whole("features", self.features, 1)
        whole("seed", self.seed, 0)

    def directions(self, q: Tensor, score: Score) -> Tensor:
        """[h features d]: those of a `Performer` with these fields."""
        return Performer(features=self.features, seed=self.seed).directions(q, score)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, choice: Any = None) -> Tensor:
        refuse_softcap(self.name, score)
        h, i, j = q.shape[1], q.shape[2], k.shape[2]
        k, v = (x.repeat_interleave(h // x.shape[1], 1) for x in (k, v))
        w, scale = self.directions(q, score), score.factor(q.shape[-1])
        key = torch.arange(j, device=q.device)
        apart = key[j - i :, None] - key
        near = apart < self.window if mask.causal else apart.abs() <= self.window
        exact = q.to(w.dtype) @ k.to(w.dtype).mT * scale
        logits = torch.where(near, exact, estimated_logits(q, k, w, scale))
        if mask.causal:
            logits = logits.masked_fill(apart < 0, float("-inf"))
        if score.sinks is not None:
            logits = torch.cat([logits, score.sinks.to(logits.dtype)[:, None, None].expand(*logits.shape[:3], 1)], -1)
        return (logits.softmax(-1)[..., :j] @ v.to(logits.dtype)).to(v.dtype)

    def fast(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, backend: str = "torch", choice: Any = None
    ) -> Tensor:
        refuse_softcap(self.name, score)
        w, scale = self.directions(q, score), score.factor(q.shape[-1])
        i = q.shape[2]
        before, after = (self.window - 1, 0) if mask.causal else (self.window, self.window)
        parts = [band_attention(q, k, v, scale, before, after), _behind(q, k, v, w, scale, before + 1)]
        if not mask.causal:  # what comes after a query is what comes before it, read backwards
            last = slice(k.shape[2] - i, None)
            ahead = _behind(q.flip(2), k[:, :, last].flip(2), v[:, :, last].flip(2), w, scale, after + 1)
            parts.append((ahead[0].flip(2), ahead[1].flip(2)))
        return merge(parts, score.sinks).to(v.dtype)

    def full(self, length: int) -> "Scatterbrain":
        return replace(self, window=max(length, 1))


def _behind(q: Tensor, k: Tensor, v: Tensor, w: Tensor, scale: float, distance: int) -> tuple[Tensor, Tensor]:
    """Features of the keys that are at least `distance` before each query: prefix sums over keys that far back."""
    i, keys = q.shape[2], k.shape[2] - distance
    reading = max(min(i, keys), 0)
    o = q.new_zeros(*q.shape[:2], i - reading, v.shape[-1], dtype=w.dtype)
    lse = o.new_full(o.shape[:3], torch.finfo(w.dtype).min)
    if not reading:
        return o, lse
    read = feature_attention(q[:, :, i - reading :], k[:, :, :keys], v[:, :, :keys], w, scale, causal=True)
    return torch.cat([o, read[0].to(w.dtype)], 2), torch.cat([lse, read[1]], 2)
