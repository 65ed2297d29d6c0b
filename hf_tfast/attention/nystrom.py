"""Nystrom: softmax attention of a few landmark queries, carried over to all queries by way of landmark keys.

    o = K1 pinv(K2) (K3 v),   K1 = softmax(q k~'),   K2 = softmax(q~ k~'),   K3 = softmax(q~ k'),
    q~_m, k~_m = the means of the m-th of `landmarks` segments of queries and of keys;   x' is x transposed

Shapes   q [b h i d]   k [b g j d]   v [b g j e]   ->   o [b h i e]
Cost     O((i + j) landmarks (d + e) + iterations landmarks^3) time, O(i + j) memory
Exact    fast == reference up to rounding, forward and backward. Calls with no more queries than `landmarks` are
         dense, by a branch: every query is a landmark there, where an unfinished pseudo-inverse would still be off.
Source   Xiong et al., "Nyströmformer", section 3, https://arxiv.org/abs/2102.03902; the iteration: Razavi et al., "A
         New Iterative Method for Finding Approximate Inverses of Complex Matrices", equation 7
Padding  exact, left, right and packed: segments are of a document's own tokens.
Causal   no: a landmark averages tokens before and after a query.
Differs  any length: segments differ by at most one token, the longer ones first. The pseudo-inverse starts from each
         matrix's own norm, not from the largest of the batch, and stops once its residual is rounding. Landmark
         queries are means over the queries given, so fewer queries than keys is another approximation, not a part of
         the whole. Sink logits and softcap hold for landmark queries as in dense attention. There is no attention
         dropout. The depthwise convolution of values belongs to a module: add `value_convolution`.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..backends.few import few_keys, few_queries, with_means
from ..backends.score import Score, softmax_attention
from ._base import Mask, Mechanism, whole
from ._rows import over_full_rows


@dataclass(frozen=True, kw_only=True)
class Nystrom(Mechanism):
    """`landmarks` segment means of queries and keys; at most `iterations` steps towards the pseudo-inverse.

    More steps are not better: where the landmarks' kernel is close to singular they follow its smallest directions,
    which are noise. 6 is the number that published models were trained with.
    """

    name: ClassVar[str] = "nystrom"
    small: ClassVar[dict[str, Any]] = {"landmarks": 6, "iterations": 3}
    causal: ClassVar[bool] = False
    dropout: ClassVar[bool] = False

    landmarks: int = 64
    iterations: int = 6

    def __post_init__(self) -> None:
        whole("landmarks", self.landmarks, 1)
        whole("iterations", self.iterations, 1)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, choice: Any = None) -> Tensor:
        if q.shape[2] <= self.landmarks:
            return softmax_attention(q, k, v, None, score)
        wide = torch.promote_types(q.dtype, torch.float32)
        k, v = (x.to(wide).repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        few_q, few_k = (_means_by_matrix(x.to(wide), self.landmarks) for x in (q, k))
        kernel = replace(score, sinks=None)
        weights = lambda q, k: _softmax(q, k, kernel)  # noqa: E731
        landmark_values = softmax_attention(few_q, k, v, None, score)
        inverse = pseudo_inverse(weights(few_q, few_k), self.iterations)
        return (weights(q.to(wide), few_k) @ (inverse @ landmark_values)).to(q.dtype)

    def fast(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, backend: str = "torch", choice: Any = None
    ) -> Tensor:
        if q.shape[2] <= self.landmarks:
            return softmax_attention(q, k, v, None, score)
        scale, cap = score.factor(q.shape[-1]), score.softcap
        (q, few_q), (k, few_k) = with_means(q, self.landmarks), with_means(k, self.landmarks)
        landmark_values = few_queries(few_q, k, v, scale, softcap=cap, sinks=score.sinks)
        b, g = k.shape[:2]
        with torch.autocast(q.device.type, enabled=False):
            pairs = few_q.reshape(b, g, -1, q.shape[-1]) @ few_k.mT  # the queries of a group are rows of one matmul
            kernel = score.cap(pairs.view(b, q.shape[1], self.landmarks, self.landmarks) * scale).softmax(-1)
            values = pseudo_inverse(kernel, self.iterations) @ landmark_values
        return few_keys(q, few_k, values, scale, softcap=cap)

    def full(self, length: int) -> "Nystrom":
        return replace(self, landmarks=max(length, 1))


def pseudo_inverse(a: Tensor, iterations: int) -> Tensor:
    """The Moore-Penrose inverse of row-stochastic matrices a [.. m m], approached in at most `iterations` steps.

    Third-order steps from a' / (|a|_1 |a|_inf). A matrix whose residual |a z a - a| / |a| has fallen to rounding is
    left alone: another step would only blow up the rounding in directions that it does not have. Each matrix is
    treated by itself, so neither other rows of a batch nor other ranks show. Differentiable.
    """
    shape, a = a.shape, a.flatten(0, -3)
    z = a.mT / (a.sum(-2).amax(-1) * a.sum(-1).amax(-1))[:, None, None]
    rounding = a.shape[-1] * torch.finfo(a.dtype).eps
    for _ in range(iterations):
        az = torch.bmm(a, z)
        with torch.no_grad():
            off = torch.baddbmm(a, az, a, beta=-1).square().sum((-2, -1), keepdim=True)
            unfinished = off > rounding**2 * a.square().sum((-2, -1), keepdim=True)
            if not torch.compiler.is_exporting() and not unfinished.any():  # a trace takes all steps, to the same end
                break
        step = torch.baddbmm(az, az, az, beta=7, alpha=-1)  # az (7 - az)
        step = torch.baddbmm(az, az, step, beta=15, alpha=-1)  # az (15 - az (7 - az))
        step = torch.baddbmm(z, z, step, beta=13 / 4, alpha=-1 / 4)  # z (13 - az (15 - az (7 - az))) / 4
        z = torch.where(unfinished, step, z)
    return z.view(shape)


def value_convolution(v: Tensor, weight: Tensor, mask: Mask | None = None, queries: int | None = None) -> Tensor:
    """The depthwise convolution of values along the sequence, a residual for modules that carry its weights.

    v [b g j e], weight [h kernel]: one filter of odd size per query head, h % g == 0; `conv.weight.flatten(1)` of a
    Conv2d(h, h, (kernel, 1), groups=h). Padding and other documents are not read. -> [b h i e], the last `queries`
    positions or all, in the dtype of v: attend(q, k, v, ...) + value_convolution(v, weight, mask).
    """
    h, kernel = weight.shape
    if kernel % 2 == 0 or h % v.shape[1]:
        raise ValueError(f"expected weight [h kernel], odd kernel, h % {v.shape[1]} == 0, got {tuple(weight.shape)}")

    def run(q: Tensor, _: Tensor, v: Tensor, mask: Mask, score: Score) -> Tensor:
        v = v.repeat_interleave(h // v.shape[1], 1)
        o = torch.nn.functional.conv2d(v, weight.to(v.dtype)[:, None, :, None], padding=(kernel // 2, 0), groups=h)
        return o[:, :, v.shape[2] - q.shape[2] :]

    i = v.shape[2] if queries is None else queries
    like_queries = v[:, :1, v.shape[2] - i :].expand(-1, h, -1, -1)
    return over_full_rows(run, like_queries, v, v, replace(mask or Mask(), causal=False), Score())


def _means_by_matrix(x: Tensor, segments: int) -> Tensor:
    """`segment_means` by its definition: one row of weights per segment."""
    n = x.shape[2]
    size, longer = divmod(n, segments)
    at, m = torch.arange(n, device=x.device), torch.arange(segments, device=x.device)[:, None]
    first = m * size + m.clamp(max=longer)
    length = size + (m < longer).to(x.dtype)
    return (((at >= first) & (at < first + length)) / length) @ x


def _softmax(q: Tensor, k: Tensor, score: Score) -> Tensor:
    """Softmax weights [b h i j] of q [b h i d] over k [b h j d]."""
    return score.cap(q @ k.mT * score.factor(q.shape[-1])).softmax(-1)
