"""Finding documents and passages: the rivals, how they are timed in turns, and how rankings are scored.

Whole documents   four rivals make one vector of a document: the teacher from its first tokens, the teacher from chunks
                  (the mean of all token states), the dense and the fast model from the whole text.
Passages          late chunking averages the states that a whole document gives to a passage's tokens (Günther et al.,
                  "Late Chunking", https://arxiv.org/abs/2409.04701); the rival embeds each passage alone.

Every rival reads one document at a time; they take turns by document and begin with another one each time. Queries are
short and embedded by the teacher for all.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..benchmarking.memory import peak_memory
from .corpus import Corpus, Document
from .encoder import Encoder, pool, span_vectors
from .progress import Steps

BATCH = 2048  # padded tokens of passages embedded at once


@dataclass(frozen=True)
class Text:
    """A document in tokens: content ids (at most what `length` leaves) and the token span of each passage read."""

    ids: list[int]
    spans: list[tuple[int, int]]
    passages: list[int]  # which passages of the document these are; those beyond `length` are left out


@dataclass(frozen=True)
class Reading:
    """What a rival makes of a document: its vector [d], or none; vectors of its passages [n d], or none."""

    document: Tensor | None
    passages: Tensor | None = None


@dataclass(frozen=True)
class Rival:
    """`key` names it in results.json, `label` in tables; `read` is all that is timed."""

    key: str
    label: str
    read: Callable[[Text], Reading]


@dataclass
class Record:
    """A rival's vectors, seconds of each document, and peak memory on the longest one."""

    rival: Rival
    documents: list[Tensor] = field(default_factory=list)
    passages: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    peak_method: str = ""


def tokenized(encoder: Encoder, document: Document, length: int) -> Text:
    """The document as `length` tokens at most, special ones counted."""
    ids, offsets = encoder.content(document.text)
    ids, offsets = ids[: length - encoder.special], offsets[: length - encoder.special]
    spans, passages = [], []
    for n, (start, end) in enumerate(document.passages):
        inside = [t for t, (first, last) in enumerate(offsets) if first < end and last > start]
        if inside:
            spans.append((inside[0], inside[-1] + 1))
            passages.append(n)
    return Text(ids, spans, passages)


def rivals(teacher: Encoder, dense: Encoder, fast: Encoder, chunk: int, length: int) -> list[Rival]:
    """Everybody who takes part; `chunk` tokens are what the teacher reads at once."""
    room = chunk - teacher.special

    def truncated(text: Text) -> Reading:
        return Reading(teacher.vectors([text.ids[:room]])[0])

    def chunked(text: Text) -> Reading:
        pieces = [text.ids[n : n + room] for n in range(0, len(text.ids), room)]
        return _from_chunks(teacher, pieces, text)

    def alone(text: Text) -> Reading:
        return Reading(None, _alone(teacher, [text.ids[a:b][:room] for a, b in text.spans]))

    def whole(encoder: Encoder) -> Callable[[Text], Reading]:
        def read(text: Text) -> Reading:
            states, valid = encoder.states([text.ids])
            content = states[0, len(encoder.front) :]
            return Reading(pool(states, valid, encoder.pooling)[0], span_vectors(content, text.spans))

        return read

    return [
        Rival("truncated", f"teacher, first {chunk} tokens", truncated),
        Rival("chunked", f"teacher, {chunk}-token chunks averaged", chunked),
        Rival("dense", f"dense, {length} tokens", whole(dense)),
        Rival("fast", f"fast plan, {length} tokens", whole(fast)),
        Rival("alone", "teacher, each passage alone", alone),
    ]


def _from_chunks(encoder: Encoder, pieces: list[list[int]], text: Text) -> Reading:
    """Equal chunks in one batch, the shorter last one apart, so that no padding is computed."""
    split = len(pieces) - (len(pieces[-1]) < len(pieces[0]))
    batches = [encoder.states(batch) for batch in (pieces[:split], pieces[split:]) if batch]
    front, tail = len(encoder.front), len(encoder.back)
    every = torch.cat([states.flatten(0, 1) for states, _ in batches])
    if encoder.pooling == "cls":
        document = torch.cat([pool(*batch, "cls") for batch in batches]).mean(0)
        document = document / document.norm()
    else:
        document = span_vectors(every, [(0, len(every))])[0]
    content = torch.cat([states[:, front : states.shape[1] - tail].flatten(0, 1) for states, _ in batches])
    return Reading(document, span_vectors(content, text.spans))


def _alone(encoder: Encoder, rows: list[list[int]]) -> Tensor:
    """Passages by themselves, longest first, in batches of at most BATCH padded tokens."""
    order = sorted(range(len(rows)), key=lambda n: -len(rows[n]))
    found: list[Tensor | None] = [None] * len(rows)
    while order:
        fit = max(BATCH // (len(rows[order[0]]) + encoder.special), 1)
        batch, order = order[:fit], order[fit:]
        for n, vector in zip(batch, encoder.vectors([rows[n] for n in batch]), strict=True):
            found[n] = vector
    return torch.stack([vector for vector in found if vector is not None])


def read_all(contest: Sequence[Rival], texts: Sequence[Text], steps: Steps) -> list[Record]:
    """Every rival reads every document, in turns. Then each reads the longest one again, for its peak memory."""
    records = [Record(rival) for rival in contest]
    shortest, longest = (f(texts, key=lambda text: len(text.ids)) for f in (min, max))
    for rival in contest:
        rival.read(shortest)  # warm up
    for n, text in enumerate(texts):
        turn = n % len(contest)
        for record in records[turn:] + records[:turn]:
            start = time.perf_counter()
            reading = record.rival.read(text)
            # Waits for an accelerator too: the figures are needed on the host.
            document, passages = (None if x is None else x.cpu() for x in (reading.document, reading.passages))
            record.seconds.append(time.perf_counter() - start)
            if document is not None:
                record.documents.append(document)
            if passages is not None:
                record.passages.append(passages)
        steps.to(n + 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for record in records:
        peak = peak_memory(partial(record.rival.read, longest), device)
        record.peak_bytes, record.peak_method = peak.bytes, peak.method
    return records


def ranks(scores: Tensor, right: Tensor) -> Tensor:
    """[q n] scores, [q] right answers -> [q] ranks from 1. Of equal scores the wrong answer counts as higher."""
    best = scores.gather(1, right[:, None])
    return (scores >= best).sum(1)


def quality(rank: Tensor) -> dict[str, float]:
    """Mean reciprocal rank and the share of queries whose first answer is right."""
    return {"mrr": (1 / rank.double()).mean().item(), "recall_at_1": (rank == 1).double().mean().item()}


def speed(record: Record) -> dict[str, Any]:
    return {
        "documents_per_second": 1 / median(record.seconds),
        "seconds": record.seconds,
        "peak_bytes": record.peak_bytes,
        "peak_method": record.peak_method,
    }


def document_table(records: Sequence[Record], corpus: Corpus, asked: Tensor) -> list[dict[str, Any]]:
    """A row for each rival with document vectors; `asked` [q d] are the query vectors."""
    right = torch.tensor([document for _, document, _ in corpus.queries])
    return [
        {"key": r.rival.key, "label": r.rival.label}
        | quality(ranks(asked @ torch.stack(r.documents).T, right))
        | speed(r)
        for r in records
        if r.documents
    ]


def passage_table(
    records: Sequence[Record], corpus: Corpus, texts: Sequence[Text], asked: Tensor
) -> list[dict[str, Any]]:
    """A row for each rival with passage vectors: the right passage among all, and the right document by its best one.

    Queries whose passage lies beyond the tokens read are left out; where the passage is not known (a corpus of the
    user's) there are figures for documents alone.
    """
    owner = torch.tensor([n for n, text in enumerate(texts) for _ in text.passages])
    place = {(n, p): at for at, (n, p) in enumerate((n, p) for n, t in enumerate(texts) for p in t.passages)}
    known = [q for q, (_, n, p) in enumerate(corpus.queries) if p is None or (n, p) in place]
    right = torch.tensor([corpus.queries[q][1] for q in known])
    exact = [place.get((corpus.queries[q][1], corpus.queries[q][2] or 0)) for q in known]
    every = all(corpus.queries[q][2] is not None for q in known)
    rows = []
    for record in records:
        if not record.passages:
            continue
        scores = asked[known] @ torch.cat(record.passages).T  # [q n]
        best = torch.full((len(known), len(texts)), -1.0)
        best = best.scatter_reduce(1, owner.expand(len(known), -1), scores, "amax", include_self=True)
        row = {"key": record.rival.key, "label": _passage_label(record.rival), "queries": len(known)}
        row["passage"] = quality(ranks(scores, torch.tensor(exact))) if every else None
        rows.append(row | {"document": quality(ranks(best, right))} | speed(record))
    return rows


def _passage_label(rival: Rival) -> str:
    return rival.label if rival.key == "alone" else f"late chunking: {rival.label.removesuffix(' averaged')}"
