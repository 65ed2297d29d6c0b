"""Nystrom over several ranks: landmarks are sums over ranks, and so is what landmark queries read.

The sums of the queries and keys of every segment go once around; each rank reads its own keys for all landmark
queries, and the parts are merged by their sums of weights; the rest is per query, on its own rank. Documents of no
more tokens than landmarks are dense, as in one process: their keys and values are the sum that goes around.
"""

import torch
from torch import Tensor

from ..attention import Mask, Score
from ..attention.nystrom import Nystrom, pseudo_inverse
from ..backends.few import few_keys, few_queries_part
from ..backends.score import softmax_attention
from .sequence_rows import Document, Rows
from .sequence_window import spread
from .sequence_wire import Wire, after, total

__all__ = ["attend_nystrom"]


def attend_nystrom(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: Nystrom,
    mask: Mask,
    scores: list[Score],
    rows: Rows,
    wire: Wire,
) -> tuple[dict[int, Tensor], Tensor | None]:
    """Outputs [rows h count e] of the crossing documents that this rank holds a part of, by index."""
    short = {i: d for i, d in enumerate(rows.crossing) if d.length <= mechanism.landmarks}
    long = {i: d for i, d in enumerate(rows.crossing) if i not in short}
    outputs: dict[int, Tensor] = {}
    last = None
    if short:
        outputs, last = _dense(q, k, v, mechanism.landmarks, scores, short, rows, wire)
    if long:
        found, last = _landmarks(after(q, last), k, v, mechanism, scores, long, rows, wire)
        outputs |= found
    return outputs, last


def _cut(x: Tensor, document: Document, rank: int) -> Tensor:
    """This rank's tokens of a document: [rows h count d], of no tokens where it holds none."""
    mine = document.of(rank)
    return x[document.rows, :, slice(0, 0) if mine is None else slice(mine.slot, mine.slot + mine.count)]


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: int,
    scores: list[Score],
    documents: dict[int, Document],
    rows: Rows,
    wire: Wire,
) -> tuple[dict[int, Tensor], Tensor]:
    both, held = torch.cat([k, v], -1), []
    for document in documents.values():
        mine = document.of(rows.rank)
        held.append(spread(_cut(both, document, rows.rank), 0 if mine is None else mine.first, length))
    merged = total(wire, torch.cat(held))
    outputs = {}
    for (index, document), x in zip(documents.items(), merged.split([len(x) for x in held]), strict=True):
        if document.of(rows.rank) is not None:
            keys, values = x[:, :, : document.length].split([k.shape[-1], v.shape[-1]], -1)
            outputs[index] = softmax_attention(_cut(q, document, rows.rank), keys, values, None, scores[index])
    return outputs, merged


def _landmarks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: Nystrom,
    scores: list[Score],
    documents: dict[int, Document],
    rows: Rows,
    wire: Wire,
) -> tuple[dict[int, Tensor], Tensor]:
    m, h = mechanism.landmarks, q.shape[1]
    both = torch.cat([q, k], 1)  # query and key heads
    sums = [_segment_sums(_cut(both, d, rows.rank), d, rows.rank, m) for d in documents.values()]
    sizes = [len(x) for x in sums]
    means = total(wire, after(torch.cat(sums), q, k)).split(sizes)
    few = [(x / _segment_sizes(d.length, m, x)) for x, d in zip(means, documents.values(), strict=True)]
    parts, levels = [], []
    for (index, d), x in zip(documents.items(), few, strict=True):
        o, lse = x.new_zeros(len(x), h, m, v.shape[-1]), x.new_full((len(x), h, m), float("-inf"))
        if d.of(rows.rank) is not None:
            score, keys = scores[index], _cut(k, d, rows.rank)
            o, lse = few_queries_part(
                x[:, :h], keys, _cut(v, d, rows.rank), score.factor(q.shape[-1]), softcap=score.softcap
            )
        parts.append(o)
        levels.append(lse)
    level, own = torch.cat(levels), torch.cat(parts)
    top = wire.reduce(level.detach(), largest=True)
    weight = (level - top).exp()[..., None]
    merged = total(wire, after(torch.cat([own * weight, weight], -1), means[0]))
    outputs = {}
    for (index, d), x, few_x, t in zip(documents.items(), merged.split(sizes), few, top.split(sizes), strict=True):
        if d.of(rows.rank) is None:
            continue
        score = scores[index]
        scale, cap, den = score.factor(q.shape[-1]), score.softcap, x[..., -1]
        values = x[..., :-1] / den[..., None]
        if score.sinks is not None:
            values = values * torch.sigmoid(den.log() + t - score.sinks.to(t.dtype)[:, None])[..., None]
        few_q, few_k = few_x[:, :h], few_x[:, h:]
        b, g = len(few_x), few_k.shape[1]
        pairs = few_q.reshape(b, g, -1, q.shape[-1]) @ few_k.mT
        kernel = score.cap(pairs.view(b, h, m, m) * scale).softmax(-1)
        values = pseudo_inverse(kernel, mechanism.iterations) @ values
        outputs[index] = few_keys(_cut(q, d, rows.rank), few_k, values, scale, softcap=cap)
    return outputs, merged


def _segment_sums(x: Tensor, document: Document, rank: int, segments: int) -> Tensor:
    """[rows h segments d] in at least fp32: the sums of this rank's tokens x [rows h count d] in every segment."""
    wide = torch.promote_types(x.dtype, torch.float32)
    into = x.new_zeros(*x.shape[:2], segments, x.shape[3], dtype=wide)
    mine = document.of(rank)
    if mine is None:
        return into
    size, longer = divmod(document.length, segments)
    at = torch.arange(mine.first, mine.end, device=x.device)
    border = longer * (size + 1)
    number = torch.where(at < border, at // (size + 1), longer + (at - border).div(size, rounding_mode="floor"))
    return into.index_add(2, number, x.to(wide))


def _segment_sizes(length: int, segments: int, like: Tensor) -> Tensor:
    """[segments 1]: tokens of every segment."""
    size, longer = divmod(length, segments)
    return size + (torch.arange(segments, device=like.device) < longer).to(like.dtype)[:, None]
