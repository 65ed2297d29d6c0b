"""Attention over a sequence that several ranks hold: which mechanism has which exchange, how rows are put together.

What lies within a rank is computed as anywhere else. For the documents that cross a border the exchange of the
mechanism gives the outputs, one file each: sequence_window, sequence_nystrom, sequence_performer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..attention import Mask, Mechanism, Score, attend
from ..backends.draws import draw
from ..integration.masks import KeyRow, read_row, remembered
from .sequence_nystrom import attend_nystrom
from .sequence_performer import attend_performer
from .sequence_rows import Rows
from .sequence_window import attend_window
from .sequence_wire import Wire, after, swap

__all__ = ["EXCHANGES", "SharedSequence", "attend_shared", "check_mechanism"]

# q, k, v, mechanism, mask, scores of the crossing documents, rows, wire -> outputs by document, and what came last
# from the wire
Exchange = Callable[..., tuple[dict[int, Tensor], Tensor | None]]
EXCHANGES: dict[str, Exchange] = {
    "nystrom": attend_nystrom,
    "performer": attend_performer,
    "window": attend_window,
}


def check_mechanism(mechanism: Mechanism, where: str = "this layer") -> None:
    """ValueError for a mechanism that has no exchange."""
    if mechanism.name not in EXCHANGES:
        raise ValueError(
            f"{where} runs {mechanism}, which reads keys anywhere in the sequence, and has no sequence-parallel form; "
            f"mechanisms that have: {', '.join(EXCHANGES)}. Choose one of these for every layer, or share the model "
            "otherwise (tensor parallelism, FSDP)"
        )


def attend_shared(
    q: Tensor, k: Tensor, v: Tensor, mechanism: Mechanism, mask: Mask, score: Score, wire: Wire
) -> Tensor:
    """`hf_tfast.attend` where every rank of `wire` holds a slice of the sequence: the slice of the same output.

    q [b h n d], k [b g n d], v [b g n e] of this rank's n slots (n may differ between ranks) -> [b h n e].
    mask.segments [b n]: the document of every slot, numbered along the whole row, 0 for padding; or mask.valid [b n].
    Every rank calls this with the same mechanism, causality and scores. ValueError for mechanisms without an
    exchange, and for documents with holes. The seed of dropout is rank 0's.
    """
    documents = _documents(mask, q)
    return _attend(q, k, v, mechanism, mask, score, Rows.of(documents, wire), wire)


def _documents(mask: Mask, q: Tensor) -> Tensor:
    shape = (q.shape[0], q.shape[2])
    if isinstance(mask.start, Tensor) or mask.start or isinstance(mask.kept, Tensor) or mask.kept:
        raise ValueError("a sequence over several ranks starts at position 0; caches that dropped keys have no part")
    if mask.segments is not None:
        return mask.segments.long() if mask.valid is None else mask.segments.long() * mask.valid
    if mask.valid is not None:
        return mask.valid.long()
    return torch.ones(shape, dtype=torch.int64, device=q.device)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mechanism: Mechanism, mask: Mask, score: Score, rows: Rows, wire: Wire
) -> Tensor:
    check_mechanism(mechanism)
    if q.shape[2] != k.shape[2] or q.shape[2] != rows.slots:
        raise ValueError(
            f"a rank holds queries and keys of the same {rows.slots} slots, got {q.shape[2]} queries and "
            f"{k.shape[2]} keys: caches have no part in sequence parallelism"
        )
    mask = Mask(causal=mask.causal)
    mechanism.check(q, k, mask, score)
    if score.dropout and not mechanism.dropout:
        raise ValueError(f"{mechanism.name} has no attention dropout; set the model's attention dropout to 0.0")
    if score.dropout:
        seed = score.seed if score.seed is not None else int(torch.randint(2**31 - 1, ()))
        score = replace(score, seed=int(wire.gather(torch.tensor([seed], device=q.device))[0]))
    with torch.autocast(q.device.type, enabled=False):
        scores = [_of_piece(score, d.rows.start, d.piece, rows.whole) for d in rows.crossing]
        crossing, last = EXCHANGES[mechanism.name](q, k, v, mechanism, mask, scores, rows, wire)
        if rows.whole and rows.crossing:
            return after(crossing[0], last)
        return after(_together(q, k, v, mechanism, mask, score, rows, crossing), last)


def _of_piece(score: Score, row: int, piece: int, whole: bool) -> Score:
    """The scores of one document: dropout draws as `attend` does for a piece of a row that is cut."""
    if score.seed is None or whole:
        return score
    return replace(score, seed=int(draw(score.seed, torch.tensor(row), torch.tensor(piece))))


def _together(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: Mechanism,
    mask: Mask,
    score: Score,
    rows: Rows,
    crossing: dict[int, Tensor],
) -> Tensor:
    """The outputs of all rows: of crossing documents as given, of the others as `attend` computes them."""
    if rows.whole:  # one rank
        return mechanism.fast(q, k, v, mask, score)
    outputs = []
    for b, pieces in enumerate(rows.pieces):
        parts = []
        for piece in pieces:
            row = slice(b, b + 1)
            if piece.padding:
                # zeros that depend on everything: a rank without a gradient would keep the others waiting
                part = _nothing(q[row, :, piece.slots], k[row, :, piece.slots], v[row, :, piece.slots])
            elif piece.crossing is not None:
                part = crossing[piece.crossing]
            else:
                of_piece = _of_piece(score, b, piece.number, whole=False)
                part = mechanism.fast(
                    q[row, :, piece.slots], k[row, :, piece.slots], v[row, :, piece.slots], mask, of_piece
                )
            parts.append(part)
        outputs.append(torch.cat(parts, 2) if len(parts) > 1 else parts[0])
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Zeros [b h i e] in the graph of q, k and v."""
    o = v.new_zeros(*q.shape[:3], v.shape[-1])
    for x in (q, k, v):
        if x.requires_grad:
            one = x[:, :1, :, :1]
            o = o + one.masked_fill(torch.ones_like(one, dtype=torch.bool), 0.0)
    return o


@dataclass
class _Layer:
    """What the dispatcher calls instead of `attend`, in the manner of a cache's layer."""

    rows: Rows
    wire: Wire

    @property
    def seen(self) -> int:
        return self.rows.length

    span = seen

    def fit(self, row: KeyRow | None) -> KeyRow | None:
        return row

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mechanism: Mechanism, mask: Mask, score: Score) -> Tensor:
        return _attend(q, k, v, mechanism, mask, score, self.rows, self.wire)

    @torch.no_grad()
    def expected(self, q: Tensor, k: Tensor, v: Tensor, mechanism: Mechanism, mask: Mask, score: Score) -> Tensor:
        """The reference over the whole sequence, which every rank collects: for HF_TFAST_CHECK=1 only."""
        q, k, v = (whole_sequence(x, self.wire, dim=2) for x in (q, k, v))
        documents = whole_sequence(_documents(mask, q[:, :, : self.rows.slots]), self.wire, dim=1)
        if score.dropout and score.seed is not None:
            score = replace(score, seed=int(self.wire.gather(torch.tensor([score.seed]))[0]))
        o = attend(q, k, v, mechanism, Mask(causal=mask.causal, segments=documents), score, backend="reference")
        counts = self.wire.gather(torch.tensor([self.rows.slots])).flatten().tolist()
        start = sum(counts[: self.wire.rank])
        return o[:, :, start : start + self.rows.slots]


class SharedSequence:
    """Put on attention modules (see integration/_sequence.py): their sequence goes over the ranks of `wire`."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    def layer(self, row: Tensor | None) -> _Layer:
        """`row`: the words of this rank's slice; what the ranks tell each other of it is asked once per forward."""
        if row is None:
            raise ValueError(
                "the model was given no mask of its slice: call it with what `shard` makes of a batch, "
                "model(**shared.shard(batch))"
            )

        def follow() -> Rows:
            mask = read_row(row).mask
            documents = mask.segments if mask.segments is not None else mask.valid
            if documents is None:
                documents = torch.ones(row.shape[0], row.shape[-1], dtype=torch.int64, device=row.device)
            return Rows.of(documents.long(), self.wire)

        return _Layer(remembered(row, "_tfast_rows", follow), self.wire)


def whole_sequence(x: Tensor, wire: Wire, dim: int) -> Tensor:
    """The slices of all ranks, which may differ in length, along `dim`; no gradient."""
    moved = x.detach().movedim(dim, 0).contiguous()
    counts = wire.gather(torch.tensor([len(moved)], device=x.device)).flatten().tolist()
    others = [r for r in range(wire.size) if r != wire.rank]
    every = torch.arange(len(moved), device=x.device)
    got = swap(wire, moved, dict.fromkeys(others, every), {r: counts[r] for r in others})
    parts = list(got.split([counts[r] for r in others]))
    parts.insert(wire.rank, moved)
    return torch.cat(parts).movedim(0, dim)
