"""How one (query, key) pair is scored, whatever the pattern: scale, softcap, sink logits, dropout.

Axes   b batch, h query heads, g key/value heads, i queries, j keys, d key width, e value width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .draws import keep


@dataclass(frozen=True, kw_only=True)
class Score:
    """s_ij = softcap * tanh(scale * q_i . k_j / softcap), then a softmax that may hold one extra logit per head.

    scale       None means d^-0.5.
    softcap     None, or the bound of the scores (Gemma 2, section 2).
    sinks       None, or [h]: a learned logit per query head that takes part in the softmax, without a value (gpt-oss).
    dropout     probability of dropping a weight after the softmax; kept weights grow by 1 / (1 - dropout).
    seed        the call's draw for dropout. None: `attend` draws it from torch's global generator, so that gradient
                checkpointing, which restores that generator, replays the same weights.
    first_head  number of the first query head of this call among the heads of all ranks: seeded draws depend on it.
    basis       None, or (B, C), each [g d r], calibrated beforehand: (q B) . (k C) stands for q . k where a mechanism
                of low rank asks for it.
    """

    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0
    seed: int | None = None
    first_head: int = 0
    basis: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be positive, got {self.softcap}; None switches it off")

    def factor(self, width: int) -> float:
        """The number that q . k is multiplied with."""
        return width**-0.5 if self.scale is None else float(self.scale)

    def cap(self, scores: Tensor) -> Tensor:
        """Bound scaled scores smoothly to (-softcap, softcap)."""
        return scores if self.softcap is None else torch.tanh(scores / self.softcap) * self.softcap

    def keep(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Which weights dropout keeps, for broadcastable index tensors: a pure function of (seed, b, h, i, j)."""
        if self.seed is None:
            raise ValueError("dropout needs Score.seed: call attend, which draws it, or set it")
        return keep(self.dropout, self.seed, b, h + self.first_head, i, j)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None,
    score: Score,
    at: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Softmax attention over the pairs where `allowed` is true: the definition the other paths are held to.

    q [b h i d], k [b g j d], v [b g j e], allowed bool broadcastable to [b h i j] or None for all -> [b h i e], in the
    dtype of v. Computed in at least fp32. A query that may read nothing reads zeros. `at` [j] are the positions of the
    keys, None for 0 to j - 1: dropout, whose draws are by position, needs them. `bias`, broadcastable to [b h i j], is
    added to the capped scores. O(i j) time and memory.
    """
    (b, h, i, d), (g, j) = q.shape, k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).reshape(b, g, h // g * i, d)  # queries that share a key head: one matmul, no repeated keys
    scores = (grouped @ k.to(wide).mT).reshape(b, h, i, j) * score.factor(d)
    scores = score.cap(scores)
    if bias is not None:
        scores = scores + bias.to(wide)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    top = scores.amax(-1, keepdim=True) if j else scores.new_full((b, h, i, 1), float("-inf"))
    if score.sinks is not None:
        top = top.maximum(score.sinks.to(wide)[:, None, None])
    top = top.detach().nan_to_num(neginf=0.0)  # a row without keys: exp(-inf - 0) = 0
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    if score.sinks is not None:
        total = total + (score.sinks.to(wide)[:, None, None] - top).exp()
    weights = weights / total.where(total > 0, 1.0)
    if score.dropout:
        upto = lambda n, *shape: torch.arange(n, device=q.device).view(shape)  # noqa: E731
        at = upto(j, -1) if at is None else at
        kept = score.keep(upto(b, -1, 1, 1, 1), upto(h, -1, 1, 1), at[j - i :, None], at)
        weights = weights * kept / (1.0 - score.dropout)
    return (weights.reshape(b, g, h // g * i, j) @ v.to(wide)).reshape(b, h, i, v.shape[-1]).to(v.dtype)
