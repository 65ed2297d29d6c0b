"""Window over several ranks: the halo of keys and values, and the first tokens.

causal          a rank needs of every document that begins before its slice the window - 1 tokens before it, and the
                first `sinks` ones. These keys and values come from the ranks that hold them, the neighbour alone where
                its slice is long enough; their gradients go back the same way.
bidirectional   the window on both sides. The first `sinks` queries read the whole document: all ranks are told them,
                every rank reads its own keys, and the parts are summed.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ..attention import Mask, Score
from ..attention.window import Window
from ..backends.blocks import attend_tiles
from .sequence_rows import Document, Holder, Rows
from .sequence_wire import Wire, after, swap, total

__all__ = ["attend_window", "spread"]


def attend_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: Window,
    mask: Mask,
    scores: list[Score],
    rows: Rows,
    wire: Wire,
) -> tuple[dict[int, Tensor], Tensor | None]:
    """Outputs [rows h count e] of the crossing documents that this rank holds a part of, by index."""
    if not rows.crossing:
        return {}, None
    layout = mechanism.layout(mask.causal)
    plan = rows.transfer(layout.before, layout.after, layout.sinks)
    width = k.shape[-1]
    tokens = torch.cat([k, v], -1).transpose(1, 2).flatten(0, 1)  # [b * n, g, d + e]
    got = last = swap(wire, tokens, plan.sends, plan.receives)
    opened: list[Tensor | None] = [None] * len(rows.crossing)
    if layout.open_sinks and layout.sinks:
        opened, last = _open_sinks(q, k, v, layout.sinks, scores, rows, wire, got)
    outputs = {}
    for index, (front, back) in plan.places.items():
        document = rows.crossing[index]
        mine = _mine(document, rows)
        cut = slice(mine.slot, mine.slot + mine.count)
        parts = [(got[x].transpose(1, 2)[..., :width], got[x].transpose(1, 2)[..., width:]) for x in (front, back)]
        keys = torch.cat([parts[0][0], k[document.rows, :, cut], parts[1][0]], 2)
        values = torch.cat([parts[0][1], v[document.rows, :, cut], parts[1][1]], 2)
        low = max(mine.first - layout.before, 0)
        kept = min(layout.sinks, low)
        queries, head = q[document.rows, :, cut], opened[index]
        if head is not None:
            queries = queries[:, :, head.shape[2] :]
        done = [] if head is None else [head.to(v.dtype)]
        if queries.shape[2] and mask.causal:
            given = Mask(causal=True, start=low - kept, kept=kept)
            done.append(mechanism.fast(queries, keys, values, given, scores[index]))
        elif queries.shape[2]:
            where = {"start": low - kept, "kept": kept, "behind": back.shape[1]}
            done.append(attend_tiles(queries, keys, values, layout, scores[index], **where))
        outputs[index] = torch.cat(done, 2) if len(done) > 1 else done[0]
    return outputs, after(last, got)


def _mine(document: Document, rows: Rows) -> Holder:
    mine = document.of(rows.rank)
    if mine is None:
        raise ValueError(f"rank {rows.rank} holds nothing of the document in row {document.rows.start}")
    return mine


def spread(x: Tensor, first: int, length: int) -> Tensor:
    """x [b h n d] -> [b h length d]: x from position `first` on, zeros elsewhere."""
    return F.pad(x, (0, 0, first, length - first - x.shape[2]))


def _open_sinks(
    q: Tensor, k: Tensor, v: Tensor, sinks: int, scores: list[Score], rows: Rows, wire: Wire, got: Tensor
) -> tuple[list[Tensor | None], Tensor]:
    """The outputs of the first `sinks` queries of every crossing document, where this rank holds some of them."""
    wide = torch.promote_types(q.dtype, torch.float32)
    held = []
    for document in rows.crossing:
        mine = document.of(rows.rank)
        count = 0 if mine is None else min(max(sinks - mine.first, 0), mine.count)
        first, slot = (mine.first, mine.slot) if mine is not None and count else (0, 0)
        held.append(spread(q[document.rows, :, slot : slot + count].to(wide), first, sinks))
    queries = total(wire, after(torch.cat(held), got)).split([len(x) for x in held])
    parts = [_part(*x, q, k, v, rows) for x in zip(rows.crossing, queries, scores, strict=True)]
    top = wire.reduce(torch.cat([x.amax(-1, keepdim=True) for x, *_ in parts]).detach(), largest=True)
    tops = [_finite(t, score) for t, score in zip(top.split([len(x) for x in held]), scores, strict=True)]
    sums = [_weigh(*part, t) for part, t in zip(parts, tops, strict=True)]
    merged = total(wire, torch.cat(sums))
    outputs: list[Tensor | None] = []
    for document, score, t, x in zip(rows.crossing, scores, tops, merged.split([len(x) for x in held]), strict=True):
        mine = document.of(rows.rank)
        if mine is None or mine.first >= sinks:
            outputs.append(None)
            continue
        den = x[..., -1:]
        if score.sinks is not None:
            den = den + (score.sinks.to(wide)[:, None, None] - t).exp()
        outputs.append((x[..., :-1] / den)[:, :, mine.first : min(mine.end, sinks)])
    return outputs, merged


def _part(
    document: Document, queries: Tensor, score: Score, q: Tensor, k: Tensor, v: Tensor, rows: Rows
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scores [rows h sinks n] over this rank's keys of a document, their values, and what dropout keeps."""
    mine = document.of(rows.rank)
    slots = slice(0, 0) if mine is None else slice(mine.slot, mine.slot + mine.count)
    keys, values = (x[document.rows, :, slots].to(queries.dtype) for x in (k, v))
    if mine is None:  # one key that nobody reads: maxima need one
        keys, values = (x.new_zeros(*x.shape[:2], 1, x.shape[3]) for x in (keys, values))
    (b, h, s, d), g = queries.shape, keys.shape[1]
    grouped = queries.reshape(b, g, h // g * s, d)
    found = score.cap((grouped @ keys.mT).view(b, h, s, -1) * score.factor(d))
    if mine is None:
        found = found.detach().fill_(float("-inf"))
    kept = None
    if score.dropout and mine is not None:
        upto = lambda n, *shape: torch.arange(n, device=q.device).view(shape)  # noqa: E731
        at = upto(mine.count, -1) + mine.first
        kept = score.keep(upto(b, -1, 1, 1, 1), upto(h, -1, 1, 1), upto(s, -1, 1), at).view(b, h, s, -1)
    return found, values, None if kept is None else kept.to(found.dtype) / (1.0 - score.dropout)


def _finite(top: Tensor, score: Score) -> Tensor:
    if score.sinks is not None:
        top = top.maximum(score.sinks.detach().to(top.dtype)[:, None, None])
    return top


def _weigh(found: Tensor, values: Tensor, kept: Tensor | None, top: Tensor) -> Tensor:
    """[rows h sinks e + 1]: the weighted sum of values, and the sum of weights, relative to exp(top)."""
    weights = (found - top).exp()
    (b, h, s, n), g = weights.shape, values.shape[1]
    read = weights if kept is None else weights * kept
    num = (read.reshape(b, g, h // g * s, n) @ values).view(b, h, s, -1)
    return torch.cat([num, weights.sum(-1, keepdim=True)], -1)
