"""SVD: scores of rank r, to attend with or to choose the keys that are then attended to exactly.

    Q K^T ~ (Q B) (K C)^T,   B, C [d r] the best of rank r in the Frobenius norm over the queries that share a key head
    Q = U_q R_q,  K = U_k R_k  (QR),   R_q R_k^T = U S V^T  (d x d),   B = R_k^T V_r S_r^-1/2,   C = R_q^T U_r S_r^-1/2
    keys = None   o_i = sum_j p_ij v_j,  p_i = softmax_j (q_i B) . (k_j C) * scale
    keys = n      o_i = sum_j p_ij v_j,  p_i = softmax over the n keys with the largest (q_i B) . (k_j C) of
                  (q_i . k_j) * scale;  under causality the n best of j <= i, all of them where there are fewer
    B, C come from the row itself, or from `Score.basis`, [g d r], calibrated beforehand; ties go to the earlier key.

Shapes   q [b h i d]   k [b g j d]   v [b g j e]   ->   o [b h i e]
Cost     keys = None: O(i j (r + e) + (i + j) d^2) time; keys = n: O(i j (r + d + e)) time: never below dense in
         order, and on a CPU slower than it. Memory O(i + j), with keys O(i n + j). A cache of k C takes r / d.
Exact    fast == reference given the choice, forward and backward. The basis and the chosen keys have no gradient: the
         gradient of a singular vector grows without bound where singular values meet.
Source   Eckart and Young, "The approximation of one matrix by another of lower rank",
         https://doi.org/10.1007/BF02288367; keys chosen in few dimensions: Singhania et al., "Loki", section 4,
         https://arxiv.org/abs/2406.02542
Padding  exact, left, right and packed: the basis is that of one document's valid tokens.
Causal   no, but with a calibrated basis for each layer and key head, which hf_tfast.calibrate(model, batches) makes
         and stores with the model: one made of the row itself tells each query of the future.
Differs  Loki takes the principal axes of keys alone, measured beforehand; this basis weighs queries too. It is made
         of the row itself where none is calibrated, and that only without causality. A rank of at least d is exact,
         and runs without a basis, under causality too.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..backends.rows import Rows, attend_rows, group, scatter, strips
from ..backends.score import Score, softmax_attention
from ._base import Mask, causal_ones, whole
from ._chosen import Choice, Chosen

_UNCALIBRATED = (
    "svd has no causal form without a calibrated basis: one made of the whole row would tell a query of the future. "
    "hf_tfast.calibrate(model, batches) makes it for every layer of a model under a plan and stores it with the model "
    "(attend takes it as Score(basis=(B, C))); a rank of at least the key width needs none; "
)


@dataclass(frozen=True, kw_only=True)
class LowRankChoice(Choice):
    """basis  None for exact scores, or (B, C), each [b g d r] or, calibrated, [g d r].
    keys   None, or [b h i n] int32: indices of the keys that each query reads, -1 for none; `total` there are."""

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
    calibrated: ClassVar[bool] = True

    rank: int = 16
    keys: int | None = None

    def __post_init__(self) -> None:
        whole("rank", self.rank, 1)
        if self.keys is not None:
            whole("keys", self.keys, 1)

    def check(self, q: Tensor, k: Tensor, mask: Mask, score: Score) -> None:
        (g, d), basis = (k.shape[1], k.shape[3]), score.basis
        if basis is None:
            if mask.causal and self.basis_shape(g, d) is not None:
                raise ValueError(_UNCALIBRATED + causal_ones())
            return
        if self.basis_shape(g, d) is None:
            raise ValueError(f"a rank of {self.rank} is exact at a key width of {d}: leave score.basis out")
        for name, x in zip("BC", basis, strict=True):
            if x.shape != self.basis_shape(g, d) or not x.is_floating_point() or x.device != k.device:
                raise ValueError(
                    f"{name} of score.basis must be [g d r] = {(g, d, self.rank)}, floating, on {k.device}, "
                    f"got {tuple(x.shape)}, {x.dtype}, on {x.device}"
                )

    def basis_shape(self, g: int, d: int) -> tuple[int, int, int] | None:
        return None if self.rank >= d else (g, d, self.rank)

    @torch.no_grad()
    def choose(self, q: Tensor, k: Tensor, mask: Mask, score: Score = Score()) -> LowRankChoice:  # noqa: B008 frozen
        (i, d), (g, j) = q.shape[2:], k.shape[1:3]
        exact = self.rank >= d or (self.keys is not None and self.keys >= j)
        with torch.autocast(q.device.type, enabled=False):
            basis = None if exact else self._basis(q, k, mask, score)
            choice = LowRankChoice(**Choice.place(q, k, mask, score), basis=basis, keys=None, total=j)
            if self.keys is None or self.keys >= j:
                return choice
            low_q, low_k = choice.scores_of(q, k)
            if score.factor(d) < 0:
                low_q = -low_q
            at = torch.arange(j, device=q.device)
            keys = torch.full((*q.shape[:3], self.keys), -1, dtype=torch.int32, device=q.device)
            for first, stop in strips(low_q, low_k):
                seen = j - i + stop if mask.causal else j
                s = group(low_q[:, :, first:stop], g) @ low_k[:, :, :seen].mT
                s = s.view(*q.shape[:2], stop - first, seen)
                if mask.causal:
                    s.masked_fill_(at[:seen] > at[j - i + first : j - i + stop, None], float("-inf"))
                keys[:, :, first:stop, :seen] = _best(s, self.keys).int()
        return replace(choice, keys=keys)

    def _basis(self, q: Tensor, k: Tensor, mask: Mask, score: Score) -> tuple[Tensor, Tensor]:
        """The basis of the call, or the row's own."""
        if score.basis is not None:
            return score.basis
        if mask.causal:
            raise ValueError(_UNCALIBRATED + causal_ones())
        return best_basis(group(q, k.shape[1]), k, self.rank)

    def allowed(self, choice: Any, b: Tensor, h: Tensor, i: Tensor, j: Tensor, *, causal: bool = False) -> Tensor:
        if self.keys is None:
            return super().allowed(choice, b, h, i, j, causal=causal)  # raises: scores change, not the pairs
        pairs = choice.pairs()
        if pairs is None:
            return (i >= 0) & (j >= 0)
        return pairs[b, choice.head(h), choice.query(i), choice.key(j)]

    def reference(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, choice: Any = None) -> Tensor:
        choice, at = self.at(q, k, mask, score, choice), mask.positions(k.shape[2], q.device)
        pairs, queries = choice.pairs(), at[k.shape[2] - q.shape[2] :, None]
        if mask.causal:
            pairs = at <= queries if pairs is None else pairs & (at <= queries)
        if self.keys is None:
            score = replace(score, scale=score.factor(q.shape[-1]))
            q, k = choice.scores_of(q, k)
        return softmax_attention(q, k, v, pairs, score, at)

    def fast(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, backend: str = "torch", choice: Any = None
    ) -> Tensor:
        choice = self.at(q, k, mask, score, choice)
        if self.keys is None:
            score = replace(score, scale=score.factor(q.shape[-1]))
            q, k = choice.scores_of(q, k)
        at = mask.positions(k.shape[2], q.device) if score.dropout else None
        return attend_rows(q, k, v, Rows(causal=mask.causal, score=score, at=at, chosen=choice.keys))

    def full(self, length: int) -> "SVD":
        every = max(length, 1)
        return replace(self, rank=every, keys=None if self.keys is None else every)


def _best(s: Tensor, n: int) -> Tensor:
    """[.. min(n, j)]: indices of the n largest of s [.. j], in no order, ties to the earlier; -1 in place of -inf."""
    top = s.topk(min(n, s.shape[-1]), sorted=False)
    index, cut = top.indices, top.values.amin(-1, keepdim=True)
    tied = ((s == cut).sum(-1) > (top.values == cut).sum(-1)) & (cut[..., 0] > float("-inf"))
    if bool(tied.any()):
        index[tied] = s[tied].sort(dim=-1, descending=True, stable=True).indices[..., : index.shape[-1]]
    return index.masked_fill_(s.gather(-1, index) == float("-inf"), -1)


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
