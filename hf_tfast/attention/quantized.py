"""Quantized: keys and values, and queries if asked, are stored as small integers with one scale per token.

    o_i = sum_j round(p_ij) v^_j,   p_i = softmax_j (q_i . k^_j) * scale
    k^_j = scale_j level[code_j] + m_j,   code_j = nearest level to (k_j - m_j) / scale_j,   v^_j likewise without m
    m_j  = mean of the keys in the blocks of `smooth` positions before the one of j (0 in the first block)
    queries   q_i . k^_j becomes q^_i . (k^_j - m_j) + q_i . m_j; the first product runs in integers if `linear`

Shapes   q [b h i d]   k [b g j d]   v [b g j e]   ->   o [b h i e]
Cost     O(i j (d + e)) time as dense; memory O(i + j), and d + 4 bytes of storage per key and head at 8 bits,
         d/2 + 4 at 4, beside the means
Exact    fast == reference given the codes, forward and backward. A stored number is off by at most half the step
         between the levels around it. Gradients pass every rounding as if it were the identity (straight-through).
Source   linear codes, smoothed keys: Zhang et al., "SageAttention", section 4.2, https://arxiv.org/abs/2410.02367;
         dynamic codes: Dettmers et al., section 1.3, https://arxiv.org/abs/2110.02861
Padding  exact, left, right and packed: scales are per token, blocks count from the first valid key of a document.
Causal   yes
Differs  SageAttention subtracts one mean over all keys, which tells every key of the future; here it is the mean of
         earlier blocks, added back exactly. Powers of two spend 8 bits on 127 octaves: `log` is meant for 4.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ..backends.codes import Smoothed, decode, earlier_means, encode, levels, multiply
from ..backends.growing import positions
from ..backends.rows import ENTRIES, Rows, attend_rows, group, product, rounded, straight_through
from ..backends.score import Score, softmax_attention
from ..backends.stored import Stored
from ..backends.triton_kernels import forward_by, kernel
from ._base import Mask, Mechanism, whole
from ._cached import over_rows

DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}  # None: at least fp32, not rounded
BLOCK = 128  # keys between two roundings of the running sum


class Codes(NamedTuple):
    """What is rounded by content: codes [.. d] int8, scales [.. 1]; None where a side keeps its numbers."""

    keys: Tensor | None
    key_scale: Tensor | None
    means: Tensor  # [b g n d], n 0 without smoothing
    block: Tensor  # [j] the mean of every key
    queries: Tensor | None
    query_scale: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Quantized(Mechanism):
    """Codes of `bits` (8 or 4) in `scheme` (linear, log, sine, dynamic) for keys, values and queries as switched on.

    smooth   positions per block whose earlier keys' mean is taken off a key before rounding; 0 takes off nothing.
    weights  dtype that attention weights are rounded to before they meet the values: float32, bfloat16 or float16.
    sums     dtype that their running sum is rounded to after every 128 keys.
    """

    name: ClassVar[str] = "quantized"
    small: ClassVar[dict[str, Any]] = {"smooth": 8}
    backends: ClassVar[tuple[str, ...]] = ("torch", "triton")
    forward_only: ClassVar[tuple[str, ...]] = ("triton",)

    bits: int = 8
    scheme: str = "linear"
    keys: bool = True
    values: bool = True
    queries: bool = False
    smooth: int = 128
    weights: str = "float32"
    sums: str = "float32"

    def __post_init__(self) -> None:
        levels(self.scheme, self.bits)
        whole("smooth", self.smooth, 0)
        for field in ("keys", "values", "queries"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} must be true or false, got {getattr(self, field)!r}")
        if self.queries and not self.keys:
            raise ValueError("queries=True multiplies codes of queries with codes of keys: it needs keys=True")
        for field in ("weights", "sums"):
            if getattr(self, field) not in DTYPES:
                raise ValueError(f"{field} must be one of {', '.join(DTYPES)}, got {getattr(self, field)!r}")

    def choose(self, q: Tensor, k: Tensor, mask: Mask) -> Codes:
        """The codes of keys and queries; those of the values follow from the values alone."""
        k = k.detach()
        means, block = k.new_zeros(*k.shape[:2], 0, k.shape[-1]), torch.zeros(0, dtype=torch.int64, device=k.device)
        keys = key_scale = queries = query_scale = None
        if self.keys:
            if self.smooth:
                smoothed = earlier_means(k, mask.positions(k.shape[2], k.device), self.smooth)
                means, block, k = smoothed.means, smoothed.of, k - smoothed.per_key()
            keys, key_scale = encode(k, self.scheme, self.bits)
        if self.queries:
            queries, query_scale = encode(q, self.scheme, self.bits)
        return Codes(keys, key_scale, means, block, queries, query_scale)

    def _rounded(
        self, q: Tensor, k: Tensor, v: Tensor, codes: Codes, score: Score
    ) -> tuple[Tensor, Tensor, Tensor, Score]:
        """q, k and v after rounding, straight-through, at least fp32. With `queries`, width 2 d: [q^, q], [k^, m]."""
        wide = torch.promote_types(q.dtype, torch.float32)
        score = replace(score, scale=score.factor(q.shape[-1]))
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
        means = Smoothed(codes.means.to(wide), codes.block).per_key() if self.smooth and self.keys else None
        if codes.keys is not None and codes.key_scale is not None:
            stored = decode(codes.keys, codes.key_scale.to(wide), self.scheme, self.bits)
            k = straight_through(k, stored if means is None or self.queries else stored + means)
        if codes.queries is not None and codes.query_scale is not None:
            stored = straight_through(q, decode(codes.queries, codes.query_scale.to(wide), self.scheme, self.bits))
            q = stored if means is None else torch.cat([stored, q], -1)
            k = k if means is None else torch.cat([k, means], -1)
        if self.values:
            v = straight_through(v, decode(*encode(v, self.scheme, self.bits), self.scheme, self.bits))
        return q, k, v, score

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, choice: Codes | None = None
    ) -> Tensor:
        choice = self.choose(q, k, mask) if choice is None else choice
        (i, j), dtype = (q.shape[2], k.shape[2]), v.dtype
        at = mask.positions(j, q.device)
        pairs = at <= at[j - i :, None] if mask.causal else None
        q, k, v, score = self._rounded(q, k, v, choice, score)
        if self._plain():
            return softmax_attention(q, k, v, pairs, score, at).to(dtype)
        ones = torch.eye(j, dtype=v.dtype, device=v.device).expand(*k.shape[:3], j)
        weights = rounded(softmax_attention(q, k, ones, pairs, score, at), DTYPES[self.weights])
        o = product(group(weights, k.shape[1]), v, DTYPES[self.sums], BLOCK)
        return o.view(*q.shape[:3], v.shape[-1]).to(dtype)

    def fast(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask,
        score: Score,
        backend: str = "torch",
        choice: Codes | None = None,
    ) -> Tensor:
        choice = self.choose(q, k, mask) if choice is None else choice
        if backend == "triton":
            return self._fused(q, k, v, mask, score, choice)
        (i, j), dtype = (q.shape[2], k.shape[2]), v.dtype
        square = not mask.causal or i == j or i == 1
        q, k, v, score = self._rounded(q, k, v, choice, score)
        bare = score.softcap is None and score.sinks is None and not score.dropout
        if bare and square and self._plain() and q.shape[-1] == v.shape[-1]:
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
            causal, grouped = mask.causal and i > 1, q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=score.scale, enable_gqa=grouped)
        rows = Rows(
            causal=mask.causal,
            score=score,
            at=mask.positions(j, q.device) if score.dropout else None,
            products=self._products(q, choice) if self.queries and self.scheme == "linear" else None,
            weights=DTYPES[self.weights],
            sums=DTYPES[self.sums],
            block=BLOCK,
        )
        return attend_rows(q, k, v, rows).to(dtype)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, codes: Codes) -> Tensor:
        """All in one kernel; the gradient is that of plain torch."""
        kernels, n = kernel("codes_triton"), 2 ** (self.bits - 1) - 1

        def side(code: Tensor | None, scale: Tensor | None, x: Tensor) -> Any:
            return kernels.Side(x) if code is None or scale is None else kernels.Side(code, scale / n)

        @torch.no_grad()
        def run() -> Tensor:
            means = None
            if self.smooth and self.keys:
                means = kernels.Means(codes.means, codes.block, 0 if int(mask.start) else self.smooth)
            code, scale = encode(v, self.scheme, self.bits) if self.values else (None, None)
            return kernels.attend_codes(
                q, side(codes.queries, codes.query_scale, q), side(codes.keys, codes.key_scale, k),
                side(code, scale, v), means, score, causal=mask.causal,
            )  # fmt: skip

        def again(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
            return self.fast(q, k, v, mask, replace(score, sinks=sinks), "torch", codes)

        return forward_by(run, again, q, k, v, score.sinks)

    def lacks(self, backend: str, mask: Mask, score: Score) -> str | None:
        if backend != "triton":
            return None
        if self.scheme != "linear":
            return f"the kernel multiplies linear codes, not those of {self.scheme}; take backend='torch'"
        if not self._plain():
            return "the kernel leaves weights and sums in fp32; take weights='float32' and sums='float32'"
        return "the kernel draws no dropout; take backend='torch'" if score.dropout else None

    def _plain(self) -> bool:
        """Are weights and sums left as they are?"""
        return self.weights == self.sums == "float32"

    def _products(self, q: Tensor, codes: Codes) -> Any:
        """q . k of a strip from integers: (q8 . k8) scale_i scale_j + q . m."""
        keys, queries = codes.keys, codes.queries
        if keys is None or queries is None or codes.key_scale is None or codes.query_scale is None:
            raise ValueError("integer products need the codes of queries and keys")
        g, n = keys.shape[1], 2 ** (self.bits - 1) - 1
        key_scale, query_scale = codes.key_scale.to(q) / n, codes.query_scale.to(q) / n
        means, d = codes.means.to(q), queries.shape[-1]

        def products(first: int, stop: int, count: int) -> Tensor:
            exact = multiply(group(queries[:, :, first:stop], g), keys[:, :, :count])
            s = exact.to(q.dtype) * group(query_scale[:, :, first:stop], g) * key_scale[:, :, :count].mT
            if self.smooth:
                s += (group(q[:, :, first:stop, d:], g) @ means.mT)[..., codes.block[:count]]
            return s

        return products

    def store(self) -> Stored:
        """An empty storage for keys and values in these codes, for a cache."""
        return Stored(bits=self.bits, scheme=self.scheme, smooth=self.smooth, keys=self.keys, values=self.values)

    def remember(self, store: Stored, q: Tensor, k: Tensor, v: Tensor, score: Score, new: Tensor | None) -> None:
        store.append(k, v, new)

    @torch.no_grad()
    def resume(self, store: Stored, q: Tensor, score: Score, new: Tensor | None) -> Tensor:
        """The last queries over the codes as they are stored: nothing is rounded a second time."""
        (b, h, i, _), g, n, dtype = q.shape, store.heads, len(store), q.dtype
        wide = torch.promote_types(dtype, torch.float32)
        factor, q = score.factor(q.shape[-1]), q.to(wide)
        rounded_q = decode(*encode(q, self.scheme, self.bits), self.scheme, self.bits) if self.queries else q
        last = torch.as_tensor(store.lengths, device=q.device)
        at = positions(last - (i if new is None else new.sum(-1)), i, new)  # [b or 1, i]
        step, o = max(1, ENTRIES // max(1, b * h * n)), []
        for first in range(0, i, step):
            part = slice(first, min(first + step, i))
            s = store.scores(group(rounded_q[:, :, part], g), group(q[:, :, part], g), n).view(b, h, -1, n) * factor
            s = score.cap(s)
            if i > 1 or at.numel() > 1 or new is not None:
                s.masked_fill_(torch.arange(n, device=q.device) > at[:, None, part, None], float("-inf"))
            p = s.softmax(-1) if new is None else s.softmax(-1).nan_to_num_(0.0)
            if score.sinks is not None:
                p = p * torch.sigmoid(s.logsumexp(-1, keepdim=True) - score.sinks.to(wide).view(-1, 1, 1))
            if score.dropout:
                up_to = lambda m, *shape: torch.arange(m, device=q.device).view(shape)  # noqa: E731
                kept = score.keep(up_to(b, -1, 1, 1), up_to(h, -1, 1), at[:, None, part, None], up_to(n, -1))
                p = p * kept / (1.0 - score.dropout)
            weights, sums = rounded(p, DTYPES[self.weights]), DTYPES[self.sums]
            after = None if sums is None else lambda total: rounded(total, sums)  # noqa: B023
            o.append(store.outputs(group(weights, g), after, BLOCK).view(b, h, p.shape[2], -1))
        return torch.cat(o, 2).to(dtype)

    def expected(self, store: Stored, q: Tensor, score: Score, new: Tensor | None) -> Tensor | None:
        if self.queries or score.dropout:
            return None
        k, v = store.read()
        plain = replace(self, keys=False, values=False, smooth=0)  # what is read has been rounded
        run = lambda q, k, v, mask: plain.reference(q, k, v, mask, score)  # noqa: E731
        return over_rows(run, q.to(k.dtype), k, v, store.lengths, new).to(q.dtype)
