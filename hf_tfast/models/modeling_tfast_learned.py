"""Learned parts of mechanisms, which therefore belong to a model: Linformer's projection, Nystrom's convolution.

Linformer   E_rj = W_rj / sum over the row's keys j of |W_rj|,   W [rank, max_position_embeddings] learned,
            one for all heads and for keys and values; W begins as the drawn projection, 1 where key j falls to r
Nystrom     a depthwise convolution of the values along the sequence is added to the attention output, one filter
            per head, whatever implementation runs
"""

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..attention import Mask, Score
from ..attention.linformer import Linformer
from ..attention.nystrom import value_convolution
from ..backends.few import few_keys
from ..backends.score import softmax_attention

__all__ = ["LearnedLinformer", "TFastProjection", "TFastValueConvolution", "local_part"]


def local_part(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter: under tensor parallelism that of its own heads."""
    return cast(Any, parameter).to_local() if hasattr(parameter, "to_local") else parameter


class TFastProjection(nn.Module):
    """x [b g j d] -> [b g rank d]: learned averages of the keys, or values, of one document."""

    def __init__(self, linformer: Linformer, length: int) -> None:
        super().__init__()
        self.linformer = linformer
        self.weight = nn.Parameter(torch.empty(linformer.rank, length))

    def start(self) -> Tensor:
        """[rank length]: the drawn projection, from which learning begins."""
        falls = self.linformer.rows(self.weight.shape[1], torch.device("cpu"))
        return (falls == torch.arange(self.linformer.rank)[:, None]).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        j, wide = x.shape[2], torch.promote_types(x.dtype, torch.float32)
        if j > self.weight.shape[1]:
            raise ValueError(
                f"a document has {j} tokens, but Linformer's learned projection was made for {self.weight.shape[1]}: "
                "truncate it, or train with a larger max_position_embeddings"
            )
        rows = self.weight[:, :j].to(wide)
        rows = rows / rows.abs().sum(-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
        return rows @ x.to(wide)


@dataclass(frozen=True, kw_only=True)
class LearnedLinformer(Linformer):
    """Linformer by a projection that a model owns. Rows of no more than `rank` keys are dense, as in Linformer."""

    projection: TFastProjection = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        return Linformer(rank=self.rank, seed=self.seed).to_dict()

    def reference(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, choice: Any = None) -> Tensor:
        if k.shape[2] > self.rank:
            dtype, (k, v) = v.dtype, (self.projection(k), self.projection(v))
            return softmax_attention(q.to(k.dtype), k, v, None, score).to(dtype)
        return softmax_attention(q, k, v, None, score)

    def fast(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, backend: str = "torch", choice: Any = None
    ) -> Tensor:
        if k.shape[2] <= self.rank or score.sinks is not None:
            return self.reference(q, k, v, mask, score)
        return few_keys(q, self.projection(k), self.projection(v), score.factor(q.shape[-1]), softcap=score.softcap)


class TFastValueConvolution(nn.Module):
    """The depthwise convolution of values v [b g j d] with one filter per query head -> [b h i d]."""

    def __init__(self, heads: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, kernel))

    def forward(self, v: Tensor, documents: Tensor | None, queries: int) -> Tensor:
        """`documents` [b j]: the packed document of every token, 0 for padding; None: one document, no padding."""
        return value_convolution(v, local_part(self.weight), Mask(segments=documents), queries)
