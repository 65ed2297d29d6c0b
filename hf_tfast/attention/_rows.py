"""Cuts a batch with padding and packed segments into full rows, the only thing that mechanisms meet.

A full row is one document: all keys valid, counted from 0 (or from where a sliding cache left off), the queries last.
So every grid, draw and "first" of a mechanism counts from the first valid key and from the valid length, padded equals
unpadded and packed equals separate, by construction. Rows that fill the whole batch stay one call; contiguous rows are
views, cut by `split` so that the backward pass is one concatenation; only holes and interleaved segments are sorted.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..backends.draws import draw
from ..backends.score import Score
from ._base import Mask

Run = Callable[[Tensor, Tensor, Tensor, Mask, Score], Tensor]


@dataclass(frozen=True)
class Piece:
    """`keys` consecutive keys of one row with `queries` consecutive queries; padding has `document` 0."""

    document: int
    queries: int
    keys: int


def over_full_rows(run: Run, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score) -> Tensor:
    """Call `run` on every full row of the batch and put the outputs back; invalid rows are zeros. [b h i e]"""
    if mask.valid is None and mask.segments is None and _single(mask.start) and _single(mask.kept):
        return run(q, k, v, replace(mask, start=_of_row(mask.start, 0), kept=_of_row(mask.kept, 0)), score)
    documents = _documents(mask)
    if documents is None:  # one start per row, nothing padded
        documents = torch.ones(k.shape[0], k.shape[2], dtype=torch.int64, device=k.device)
    elif _single(mask.start) and _single(mask.kept) and _full(documents):
        return run(q, k, v, Mask(causal=mask.causal, start=_of_row(mask.start, 0), kept=_of_row(mask.kept, 0)), score)
    rows = zip(q.unbind(), k.unbind(), v.unbind(), documents.unbind(), strict=True)
    outputs = [_row(run, *row, mask, score, b) for b, row in enumerate(rows)]
    o = torch.stack(outputs) if len(outputs) > 1 else outputs[0][None]  # a view: long rows are costly to copy
    return o if o.requires_grad or not torch.is_grad_enabled() else _tied(o, q, k, v, score.sinks)


def _documents(mask: Mask) -> Tensor | None:
    """[b j] int64: the document of every key, 0 where there is none."""
    if mask.segments is None:
        return None if mask.valid is None else mask.valid.long()
    return mask.segments.long() if mask.valid is None else mask.segments.long() * mask.valid


def _row(run: Run, q: Tensor, k: Tensor, v: Tensor, documents: Tensor, mask: Mask, score: Score, b: int) -> Tensor:
    """One row of the batch, q [h i d], k [g j d], v [g j e], documents [j] -> [h i e]."""
    i, j = q.shape[1], k.shape[1]
    kept = int((documents[: _of_row(mask.kept, b)] != 0).sum())
    pieces = _pieces(documents, i)
    numbers = [piece.document for piece in pieces if piece.document]
    if len(set(numbers)) > 1 and _of_row(mask.start, b):
        raise ValueError("a cache that has dropped keys cannot hold packed documents: it is not known whose they were")
    order = None
    if len(numbers) != len(set(numbers)):  # holes or interleaved documents: sorting makes each document one run
        order = documents.argsort(stable=True)
        q, k, v = q[:, order[order >= j - i] - (j - i)], k[:, order], v[:, order]
        pieces = _pieces(documents[order], i, order)
    queries, keys = [p.queries for p in pieces], [p.keys for p in pieces]
    parts = zip(pieces, q.split(queries, 1), k.split(keys, 1), v.split(keys, 1), strict=True)
    full = Mask(causal=mask.causal, start=_of_row(mask.start, b), kept=kept)
    outputs = []
    for n, (piece, qn, kn, vn) in enumerate(parts):
        if piece.document and piece.queries:
            seed = None if score.seed is None else int(draw(score.seed, torch.tensor(b), torch.tensor(n)))
            outputs.append(run(qn[None], kn[None], vn[None], full, replace(score, seed=seed))[0])
        else:
            outputs.append(q.new_zeros(q.shape[0], piece.queries, v.shape[-1], dtype=v.dtype))
    o = torch.cat(outputs, dim=1)
    return o if order is None else o[:, order[order >= j - i].argsort()]


def _pieces(documents: Tensor, queries: int, order: Tensor | None = None) -> list[Piece]:
    """The runs of equal document in [j]; a key is also a query when its slot (`order` after sorting) is a last one."""
    first = documents.shape[0] - queries
    slots = torch.arange(documents.shape[0], device=documents.device) if order is None else order
    numbers, keys = documents.unique_consecutive(return_counts=True)
    ends = (slots >= first).cumsum(0)[keys.cumsum(0) - 1] if len(slots) else keys
    ends = ends.diff(prepend=ends.new_zeros(1))
    return [Piece(*run) for run in zip(numbers.tolist(), ends.tolist(), keys.tolist(), strict=True)]


def _tied(o: Tensor, *inputs: Tensor | None) -> Tensor:
    """`o` in the graph of the inputs, with zero gradients: where nothing is valid no row has put it there, and a
    parameter without a gradient stalls distributed training."""
    for x in inputs:
        if x is not None and x.requires_grad:
            one = x[(slice(1),) * x.ndim]
            o = o + one.masked_fill(torch.ones_like(one, dtype=torch.bool), 0.0).to(o.dtype)
    return o


def _full(documents: Tensor) -> bool:
    """Is every row one document without padding?"""
    return bool((documents == documents[:, :1]).all()) and bool((documents[:, 0] != 0).all())


def _single(x: int | Tensor) -> bool:
    return not isinstance(x, Tensor) or x.numel() == 1 or bool((x == x.flatten()[0]).all())


def _of_row(x: int | Tensor, b: int) -> int:
    return int(x.flatten()[b if x.numel() > 1 else 0]) if isinstance(x, Tensor) else x
