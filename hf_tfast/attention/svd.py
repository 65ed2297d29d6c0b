"""SVD: scores of rank r, to attend with or to choose the keys that are then attended to exactly.

    Q K^T ~ (Q B) (K C)^T,   B, C [d r] the best of rank r in the Frobenius norm over the queries that share a key head
    Q = U_q R_q,  K = U_k R_k  (QR),   R_q R_k^T = U S V^T  (d x d),   B = R_k^T V_r S_r^-1/2,   C = R_q^T U_r S_r^-1/2
    keys = None   o_i = sum_j p_ij v_j,  p_i = softmax_j (q_i B) . (k_j C) * scale
    keys = n      o_i = sum_j p_ij v_j,  p_i = softmax over the n keys with the largest (q_i B) . (k_j C) of
                  (q_i . k_j) * scale

Shapes   q [b h i d]   k [b g j d]   v [b g j e]   ->   o [b h i e]
Cost     keys = None: O(i j (r + e) + (i + j) d^2) time; keys = n: O(i j (r + d + e)) time: never below dense in
         order, and on a CPU slower than it. Memory O(i + j), with keys O(i n + j). A cache of k C takes r / d.
Exact    fast == reference given the choice, forward and backward. The basis and the chosen keys have no gradient: the
         gradient of a singular vector grows without bound where singular values meet.
Source   Eckart and Young, "The approximation of one matrix by another of lower rank",
         https://doi.org/10.1007/BF02288367; keys chosen in few dimensions: Singhania et al., "Loki", section 4,
         https://arxiv.org/abs/2406.02542
Padding  exact, left, right and packed: the basis is that of one document's valid tokens.
Causal   no: a basis made of all queries and keys tells each query of the future.
Differs  Loki takes the principal axes of keys alone, measured beforehand; this basis weighs queries too, and is made
         of the row itself. A rank of at least d is exact, and runs without a basis.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..backends.rows import Rows, attend_rows, group, scatter, strips
from ..backends.score import Score, softmax_attention
from ._base import Mask, whole
from ._chosen import Choice, Chosen


@dataclass(frozen=True, kw_only=True)
class LowRankChoice(Choice):
    """basis  None for exact scores, or (B, C), each [b g d r].
    keys   None, or [b h i n] int32: indices of the keys that each query reads. `total` keys there are."""

    basis: tuple[Tensor, Tensor] | None
    keys: Tensor | None
    total: int

    def scores_of(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k whose products are the low-rank scores, in at least fp32: [b h i r], [b g j r]."""
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(wide), k.to(wide)
        if self.basis is None:
            return q, k
        b, c = (x.to(wide) for x in self.basis)
        return (group(q, k.shape[1]) @ b).view(*q.shape[:3], -1), k @ c

    def pairs(self) -> Tensor | None:
        """[b h i j] bool: who reads whom."""
        return None if self.keys is None else scatter(self.keys, self.total)


@dataclass(frozen=True, kw_only=True)
class SVD(Chosen):
    """Scores of `rank`; with `keys`, they only choose that many keys for each query."""

    name: ClassVar[str] = "svd"
    small: ClassVar[dict[str, Any]] = {"rank": 3, "keys": 12}
    causal: ClassVar[bool] = False

    rank: int = 16
    keys: int | None = None

    def __post_init__(self) -> None:
        whole("rank", self.rank, 1)
        if self.keys is not None:
            whole("keys", self.keys, 1)

    @torch.no_grad()
    def choose(self, q: Tensor, k: Tensor, mask: Mask, score: Score = Score()) -> LowRankChoice:  # noqa: B008 frozen
        j = k.shape[2]
        exact = self.rank >= q.shape[-1] or (self.keys is not None and self.keys >= j)
        with torch.autocast(q.device.type, enabled=False):
            basis = None if exact else best_basis(group(q, k.shape[1]), k, self.rank)
            choice = LowRankChoice(**Choice.place(q, k, mask, score), basis=basis, keys=None, total=j)
            if self.keys is None or self.keys >= j:
                return choice
            low_q, low_k = choice.scores_of(q, k)
            if score.factor(q.shape[-1]) < 0:
                low_q = -low_q
            keys = torch.empty(*q.shape[:3], self.keys, dtype=torch.int32, device=q.device)
            for first, stop in strips(low_q, low_k):
                s = (group(low_q[:, :, first:stop], k.shape[1]) @ low_k.mT).view(*q.shape[:2], stop - first, j)
                keys[:, :, first:stop] = s.topk(self.keys, sorted=False).indices
        return replace(choice, keys=keys)

    def allowed(self, choice: Any, b: Tensor, h: Tensor, i: Tensor, j: Tensor, *, causal: bool = False) -> Tensor:
        if self.keys is None:
            return super().allowed(choice, b, h, i, j, causal=causal)  # raises: scores change, not the pairs
        pairs = choice.pairs()
        if pairs is None:
            return (i >= 0) & (j >= 0)
        return pairs[b, choice.head(h), choice.query(i), choice.key(j)]

    def reference(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, choice: Any = None) -> Tensor:
        choice, at = self.at(q, k, mask, score, choice), mask.positions(k.shape[2], q.device)
        if self.keys is None:
            score = replace(score, scale=score.factor(q.shape[-1]))
            q, k = choice.scores_of(q, k)
        return softmax_attention(q, k, v, choice.pairs(), score, at)

    def fast(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, backend: str = "torch", choice: Any = None
    ) -> Tensor:
        choice = self.at(q, k, mask, score, choice)
        if self.keys is None:
            score = replace(score, scale=score.factor(q.shape[-1]))
            q, k = choice.scores_of(q, k)
        at = mask.positions(k.shape[2], q.device) if score.dropout else None
        return attend_rows(q, k, v, Rows(causal=False, score=score, at=at, chosen=choice.keys))

    def full(self, length: int) -> "SVD":
        every = max(length, 1)
        return replace(self, rank=every, keys=None if self.keys is None else every)


def best_basis(q: Tensor, k: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B, C [.. d r] with (q B) (k C)^T the best approximation of q k^T of rank r = min(rank, d), for q [.. i d] and
    k [.. j d]; in at least fp32. Directions that q k^T does not have, or only as rounding, are zeros."""
    wide = torch.promote_types(q.dtype, torch.float32)
    tiny = torch.finfo(wide).tiny
    q, k = (x.to(wide) for x in (q, k))
    q, k = (x / x.abs().amax((-2, -1), keepdim=True).clamp(min=tiny) for x in (q, k))  # large squares overflow
    rq, rk = (torch.linalg.qr(x, mode="r").R for x in (q, k))
    u, s, vh = torch.linalg.svd(rq @ rk.mT, full_matrices=False)
    u, s, v = u[..., :rank], s[..., :rank], vh.mT[..., :rank]
    noise = s[..., :1] * (max(q.shape[-2], k.shape[-2]) * torch.finfo(wide).eps)
    root = torch.where(s > noise, s, torch.inf).rsqrt()[..., None, :]
    return rk.mT @ v * root, rq.mT @ u * root
