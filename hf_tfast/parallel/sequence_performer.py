"""Performer over several ranks: the running state of the ranks before (bidirectional: and behind), from neighbours.

A rank sums its keys and values up into features^T [v, 1], adds what came from the rank before it, relative to the
larger of the two levels, and hands it on: one state of features x (e + 1) per head crosses every border, whatever
the length. Its own keys are read as in one process; both are merged by their sums of weights. A level is the largest
of the keys so far, never of later ones: no query's rounding depends on the future.
"""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..attention import Mask, Score
from ..attention.performer import Performer, refuse_softcap, with_sinks
from ..backends.scan import feature_attention
from .sequence_rows import Document, Rows
from .sequence_wire import Wire, after, prefix

__all__ = ["attend_performer"]

BULK = 1024  # tokens whose features are held at a time


def attend_performer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: Performer,
    mask: Mask,
    scores: list[Score],
    rows: Rows,
    wire: Wire,
) -> tuple[dict[int, Tensor], Tensor | None]:
    """Outputs [rows h count e] of the crossing documents that this rank holds a part of, by index."""
    if not rows.crossing:
        return {}, None
    score = scores[0]  # they differ in seeds of dropout alone
    refuse_softcap(mechanism.name, score)
    w, scale = mechanism.directions(q, score), score.factor(q.shape[-1])
    held = {i: d for i, d in enumerate(rows.crossing) if d.of(rows.rank) is not None}
    states = {i: _state(_cut(k, d, rows.rank), _cut(v, d, rows.rank), w, scale) for i, d in held.items()}
    last: Tensor | None = None
    came: dict[int, list[tuple[Tensor, Tensor]]] = {i: [] for i in held}
    for backwards in (False,) if mask.causal else (False, True):
        sums, level, on = _to_hand_on(states, held, rows, (w, v), backwards)
        others, others_level = prefix(wire, after(sums, last, k, v), level, on, backwards)
        last = others if last is None else after(others, last)
        for i, d in held.items():
            if d.holders[-1 if backwards else 0].rank != rows.rank:
                came[i].append((last[d.rows], others_level[d.rows]))
    outputs = {}
    for i, d in held.items():
        queries = _cut(q, d, rows.rank)
        o, lse = feature_attention(queries, _cut(k, d, rows.rank), _cut(v, d, rows.rank), w, scale, causal=mask.causal)
        for given in came[i]:
            past, before = _read(queries, *given, w, scale)
            both = torch.logaddexp(lse, before)
            o = o * (lse - both).exp()[..., None] + past * (before - both).exp()[..., None]
            lse = both
        outputs[i] = with_sinks(o, lse, score.sinks).to(v.dtype)
    return outputs, last


def _cut(x: Tensor, document: Document, rank: int) -> Tensor:
    mine = document.of(rank)
    return x[document.rows, :, slice(0, 0) if mine is None else slice(mine.slot, mine.slot + mine.count)]


def _to_hand_on(
    states: dict[int, tuple[Tensor, Tensor]],
    held: dict[int, Document],
    rows: Rows,
    shapes: tuple[Tensor, Tensor],
    backwards: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per row of the batch: sums [b h R e+1] and level [b h 1 1] of the document that goes on in the next rank, and
    whether it came from the one before."""
    w, v = shapes
    nothing = w.new_zeros(1, *w.shape[:2], v.shape[-1] + 1)
    nowhere = w.new_full((1, w.shape[0], 1, 1), torch.finfo(w.dtype).min)
    per_row: list[tuple[Tensor, Tensor, bool]] = [(nothing, nowhere, False)] * rows.batch
    for i, d in held.items():
        first, end = (d.holders[0].rank, d.holders[-1].rank)[:: -1 if backwards else 1]
        if end != rows.rank:
            sums, level = states[i]
            for n, row in enumerate(range(rows.batch)[d.rows]):
                per_row[row] = (sums[n : n + 1], level[n : n + 1], first != rows.rank)
    on = torch.tensor([entry[2] for entry in per_row], device=v.device)
    return torch.cat([entry[0] for entry in per_row]), torch.cat([entry[1] for entry in per_row]), on


def _features(x: Tensor, w: Tensor, scale: float, sign: float = 1.0) -> tuple[Tensor, Tensor]:
    """p [b h n R], whose rows sum to one, and level [b h n] of x [b h n d]: phi_r = p_r exp(level)."""
    x = x.to(w.dtype) * abs(scale) ** 0.5
    logits = (x * sign) @ w.mT
    return logits.softmax(-1), logits.logsumexp(-1) - x.square().sum(-1) / 2


def _state(k: Tensor, v: Tensor, w: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Sums [b h R e+1] of keys k [b g n d] and values v [b g n e] relative to exp(level) [b h 1 1], a constant."""
    with torch.no_grad():
        level = torch.stack([_key_level(part, w, scale) for part in k.split(BULK, 2)]).amax(0)[..., None]
    parts = zip(k.split(BULK, 2), v.split(BULK, 2), strict=True)
    sums = [checkpoint(_sums, *part, level, w, scale, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.stack(sums).sum(0) if len(sums) > 1 else sums[0], level


def _key_level(k: Tensor, w: Tensor, scale: float) -> Tensor:
    """[b h 1]: the largest level of some keys."""
    return _features(_repeat(k, w), w, scale)[1].amax(-1, keepdim=True)


def _sums(k: Tensor, v: Tensor, level: Tensor, w: Tensor, scale: float) -> Tensor:
    p, own = _features(_repeat(k, w), w, scale)
    values = torch.nn.functional.pad(_repeat(v, w).to(w.dtype), (0, 1), value=1.0)
    return p.mT @ (values * (own[..., None] - level).exp())


def _repeat(x: Tensor, w: Tensor) -> Tensor:
    return x.repeat_interleave(w.shape[0] // x.shape[1], 1)


def _read(q: Tensor, sums: Tensor, level: Tensor, w: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What q [b h n d] reads of a state: o [b h n e] and the logarithm of its sum of weights [b h n]."""
    parts = [
        checkpoint(_read_part, x, sums, level, w, scale, use_reentrant=False, preserve_rng_state=False)
        for x in q.split(BULK, 2)
    ]
    o, lse = zip(*parts, strict=True)
    return torch.cat(o, 2), torch.cat(lse, 2)


def _read_part(q: Tensor, sums: Tensor, level: Tensor, w: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    p, own = _features(q, w, scale, math.copysign(1.0, scale))
    num = p @ sums
    den = num[..., -1] + torch.finfo(w.dtype).tiny ** 0.8
    return num[..., :-1] / den[..., None], den.log() + own + level[..., 0] - math.log(w.shape[1])
