"""Attention as an exported program holds it: a few products over whole tensors, no loops and no writes in place.

The loops over tiles (blocks.py, few.py) and the C of fused.py suit torch as it runs. A program that torch.export
records is run by something else, often by a compiler (ONNX Runtime, OpenVINO, AOTInductor), which wants few, large
operations that it knows. Batch and length may stay open: no choice here depends on their values. Forward only.

Axes   b batch, h query heads, g key/value heads, u = h / g, n positions, c queries of a block, w keys of a block.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .score import Score
from .tiles import Layout

__all__ = ["band", "few_keys", "few_queries", "serves", "tracing"]


def tracing() -> bool:
    """Does torch.export record what is computed?"""
    return torch.compiler.is_exporting()


def serves(layout: Layout, score: Score, i: int, j: int, start: int) -> bool:
    """Is this a call of a program, and one that `band` can write down?"""
    plain = layout.near is not None and layout.lists is None and not score.dropout
    plain = plain and not (layout.causal and layout.open_sinks)
    return tracing() and plain and not start and i == j


def band(q: Tensor, k: Tensor, v: Tensor, layout: Layout, score: Score) -> Tensor:
    """q [b h n d] over k [b g n d], v [b g n e] in a band with its first keys -> [b h n e].

    Blocks of queries meet the run of keys that they reach, put together from neighbouring blocks of keys; what a query
    does not read is hidden by a bias [blocks, c, w], the same in all rows and heads.
    """
    (b, h, n, d), g, e = q.shape, k.shape[1], v.shape[-1]
    u, before, after = h // g, layout.before, layout.after
    known = isinstance(n, int)  # else the length is open
    c = layout.queries if layout.solid else n  # one that is not solid may reach as far as an open length
    if whole := not layout.solid or (known and c + before + after >= n):
        c, before, after = n, 0, 0  # one block
    first = min(layout.sinks, n) if known else layout.sinks
    blocks, many = (1, 1) if whole else ((n + c - 1) // c, -(-(before + c + after) // c))
    if not known and not whole:
        blocks += 1  # a program is another one where a size is 1: so that it never is
    rows = F.pad(q, (0, 0, 0, blocks * c - n))
    if u > 1:  # queries that share keys are rows of one product
        rows = rows.reshape(b * g, u, blocks, c, d).transpose(1, 2)
    rows = rows.reshape(b * g, blocks, u * c, d)
    keys, values = (_runs(x.reshape(b * g, n, -1), blocks, c, many, before, first) for x in (k, v))
    bias = _bias(layout, first, blocks, c, many, before, q)
    o = _softmax(rows, keys, values, bias.repeat(1, u, 1) if u > 1 else bias, score, _logits(score, b, h, g, c))
    if u > 1:
        o = o.reshape(b * g, blocks, u, c, e).transpose(1, 2)
    o = o.reshape(b, h, blocks * c, e)[:, :, :n]
    if not first or not layout.open_sinks:
        return o
    every = q[:, :, :first].reshape(b * g, 1, u * first, d)
    k, v = (x.reshape(b * g, 1, n, -1) for x in (k, v))
    dense = _softmax(every, k, v, None, score, _logits(score, b, h, g, first))
    return torch.cat([dense.reshape(b, h, first, e), o[:, :, first:]], 2)


def few_keys(q: Tensor, k: Tensor, v: Tensor, softcap: float | None, bias: Tensor | None) -> Tensor:
    """q [b h i d] over k [b*h j d], already scaled, and v [b*h j e]; bias [b*h 1 j] -> [b h i e] in the dtype of k."""
    b, h = q.shape[:2]
    k, v = k.unflatten(0, (b, h)), v.unflatten(0, (b, h))
    bias = None if bias is None else bias.unflatten(0, (b, h))
    return _softmax(q.to(k.dtype), k, v, bias, Score(scale=1.0, softcap=softcap), None)


def few_queries(rows: Tensor, k: Tensor, v: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """rows [b*g m d], already scaled, over k, v [b g j .] -> [b*g m e], and log-sums of weights [b*g m]."""
    k, v = (x.flatten(0, 1).to(rows.dtype) for x in (k, v))
    scores = Score(softcap=softcap).cap(rows @ k.mT)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def _softmax(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, score: Score, logits: Tensor | None) -> Tensor:
    """[.. i d] over [.. j d], [.. j e] with a bias broadcastable to [.. i j]; `logits` [.. i 1] carry no value."""
    factor = score.factor(q.shape[-1])
    if score.softcap is None and logits is None:  # a runtime knows this operation as one
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=factor)
    scores = score.cap(q @ k.mT * factor)
    scores = scores if bias is None else scores + bias
    if logits is None:
        return scores.softmax(-1) @ v
    both = torch.cat([scores, logits.to(scores.dtype).expand(*scores.shape[:-1], 1)], -1)
    return both.softmax(-1)[..., :-1] @ v


def _logits(score: Score, b: int, h: int, g: int, c: int) -> Tensor | None:
    """The sink logits [h] as [b*g 1 u*c 1]."""
    if score.sinks is None:
        return None
    return score.sinks.view(1, g, h // g, 1).expand(b, g, h // g, c).reshape(b * g, 1, h // g * c, 1)


def _runs(x: Tensor, blocks: int, c: int, many: int, before: int, first: int) -> Tensor:
    """[b*g n d] -> [b*g blocks first+many*c d]: the first keys, and the run of `many` blocks that each block meets."""
    behind = (blocks + many - 1) * c - x.shape[1] - before
    wide = F.pad(x, (0, 0, before, behind)).unflatten(1, (blocks + many - 1, c))
    parts = [wide[:, near : near + blocks] for near in range(many)]
    if first:
        parts.insert(0, x[:, None, :first].expand(-1, blocks, -1, -1))
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def _bias(layout: Layout, first: int, blocks: int, c: int, many: int, before: int, q: Tensor) -> Tensor:
    """[blocks c first+many*c]: 0 where a query reads a key, else -inf. Queries behind the last read something, too."""
    n, w = q.shape[2], many * c
    block = torch.arange(blocks, device=q.device).view(-1, 1, 1) * c
    i = block + torch.arange(c, device=q.device).view(-1, 1)
    j = block + torch.arange(w, device=q.device) - before
    near = (j >= first) & ((j < n) | (i >= n))
    near = near if layout.near is None else near & layout.near(i, j)
    if layout.causal:
        near = near & (j <= i)
    if first:
        at = torch.arange(first, device=q.device)
        sinks = at <= i if layout.causal else torch.ones((), dtype=torch.bool, device=q.device)
        near = torch.cat([sinks.expand(blocks, c, first), near.expand(blocks, c, w)], -1)
    return torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(~near, float("-inf"))
