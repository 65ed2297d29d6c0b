"""Whoever makes document vectors, on several corpora: how well queries find documents and passages, and how fast.

The teacher takes part three times: with its first tokens, with its chunks averaged, and with each passage alone. Then
everybody who reads whole documents, each with the encoder of its queries.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from .corpus import Corpus
from .encoder import CHUNK, Encoder
from .progress import steps
from .retrieval import (
    Reading,
    Record,
    Rival,
    Text,
    document_table,
    passage_table,
    quality,
    ranks,
    read_all,
    rivals,
    tokenized,
)

TEACHER = ("truncated", "chunked", "alone")
SPEED = ("documents_per_second", "seconds", "peak_bytes", "peak_method")
TOKENS = 4096  # padded tokens of queries at once


@dataclass(frozen=True)
class Contestant:
    """An encoder of whole documents, and the one that reads its queries."""

    key: str
    label: str
    encoder: Encoder
    asks: Encoder


def vectors(encoder: Encoder, texts: Sequence[str], most: int = CHUNK) -> Tensor:
    """[n d] unit vectors of short texts, of `most` tokens at most, in batches of similar lengths."""
    rows = [encoder.content(text)[0][: most - encoder.special] for text in texts]
    order = sorted(range(len(rows)), key=lambda n: -len(rows[n]))
    found: list[Tensor | None] = [None] * len(rows)
    while order:
        fit = max(TOKENS // (len(rows[order[0]]) + encoder.special), 1)
        batch, order = order[:fit], order[fit:]
        for n, vector in zip(batch, encoder.vectors([rows[n] for n in batch]).cpu(), strict=True):
            found[n] = vector
    return torch.stack([vector for vector in found if vector is not None])


def metrics_of(encoder: Encoder, corpora: Mapping[str, Corpus], length: int) -> dict[str, float]:
    """mrr and recall_at_1 of whole documents, the mean over corpora, and of each by its name."""
    found: dict[str, dict[str, float]] = {}
    read: dict[str, Tensor] = {}
    for name, corpus in corpora.items():
        for text in (d.text for d in corpus.documents):
            if text not in read:
                read[text] = encoder.vectors([encoder.content(text)[0][: length - encoder.special]])[0].cpu()
        made = torch.stack([read[d.text] for d in corpus.documents])
        asked = vectors(encoder, [query for query, _, _ in corpus.queries])
        right = torch.tensor([document for _, document, _ in corpus.queries])
        found[name] = quality(ranks(asked @ made.T, right))
    mean = {key: sum(f[key] for f in found.values()) / len(found) for key in ("mrr", "recall_at_1")}
    return mean | {f"{name}_{key}": value for name, f in found.items() for key, value in f.items()}


def contest(teacher: Encoder, contestants: Sequence[Contestant], length: int, alone: Sequence[str]) -> list[Rival]:
    """Everybody who takes part; of the teacher, what `alone` names: truncated, chunked, alone."""
    chunk, first = min(CHUNK, teacher.native), contestants[0].encoder
    taken = [rival for rival in rivals(teacher, first, first, chunk, length) if rival.key in alone]
    for contestant in contestants:
        whole = rivals(teacher, first, contestant.encoder, chunk, length)[3]
        taken.append(replace(whole, key=contestant.key, label=f"{contestant.label}, {length} tokens"))
    return taken


def measure_quality(
    teacher: Encoder,
    contestants: Sequence[Contestant],
    corpora: Mapping[str, Corpus],
    length: int,
    teacher_as: Sequence[str] = (),
    keep: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """corpus: {"documents", "passages"}: rows of every rival, by its own queries and by the teacher's.

    teacher_as   how the teacher takes part itself: TEACHER, or nothing. Each passage alone only where queries know
                 their passages.
    keep         folder in which vectors stay, so that a call that was stopped goes on; of encoders that stay.
    """
    console, found = Console(), dict[str, dict[str, Any]]()
    asks = {c.key: c.asks for c in contestants}
    read: dict[tuple[str, ...], list[Record]] = {}  # corpora that differ in their queries alone are read once
    for name, corpus in corpora.items():
        texts = [tokenized(teacher, document, length) for document in corpus.documents]
        same = tuple(document.text for document in corpus.documents)
        if same not in read:
            label = f"reading {len(texts)} documents of {name}"
            with steps(console, label, len(texts)) as bar, torch.inference_mode():
                known = any(place is not None for _, _, place in corpus.queries)
                own = [key for key in teacher_as if key != "alone" or known]
                everybody = contest(teacher, contestants, length, own)
                read[same] = read_all([r if keep is None else _kept(r, keep) for r in everybody], texts, bar)
        records = read[same]
        asked: dict[int, Tensor] = {}
        table: dict[str, Any] = {"documents": [], "passages": [], **facts(corpus, texts)}
        for record in records:
            encoders = {id(e): e for e in (asks.get(record.rival.key, teacher), teacher)}
            for encoder in encoders.values():
                if id(encoder) not in asked:
                    with torch.inference_mode():
                        asked[id(encoder)] = vectors(encoder, [query for query, _, _ in corpus.queries])
                by = {"queries_by": "teacher" if encoder is teacher else record.rival.key}
                table["documents"] += [
                    by | _plain(row) for row in document_table([record], corpus, asked[id(encoder)])
                ]
                table["passages"] += [
                    by | _plain(row) for row in passage_table([record], corpus, texts, asked[id(encoder)])
                ]
        found[name] = table
    return found


def _kept(rival: Rival, folder: Path) -> Rival:
    """The rival, who keeps what it read in the folder and reads no text twice."""
    folder.mkdir(parents=True, exist_ok=True)

    def read(text: Text) -> Reading:
        about = json.dumps([rival.label, text.ids, text.spans])
        path = folder / f"{rival.key}-{hashlib.sha256(about.encode()).hexdigest()[:20]}.safetensors"
        if not path.is_file():
            reading = rival.read(text)
            found = {"document": reading.document, "passages": reading.passages}
            new = path.with_suffix(".new")
            save_file({name: x.cpu().contiguous() for name, x in found.items() if x is not None}, new)
            new.replace(path)  # all of it or nothing
        kept = load_file(path)
        return Reading(kept.get("document"), kept.get("passages"))

    return replace(rival, read=read)


def facts(corpus: Corpus, texts: Sequence[Text]) -> dict[str, Any]:
    lengths = [len(text.ids) for text in texts]
    return {
        "source": corpus.source,
        "fingerprint": corpus.fingerprint,
        "count": len(texts),
        "queries": len(corpus.queries),
        "mean_tokens": sum(lengths) / len(lengths),
    }


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Without times and memory: rivals are timed apart, on a quiet machine."""
    return {key: value for key, value in row.items() if key not in SPEED}


def measure_speed(
    teacher: Encoder, contestants: Sequence[Contestant], corpus: Corpus, length: int, count: int
) -> list[dict[str, Any]]:
    """Documents a second of every rival on the `count` first documents, by turns."""
    texts = [tokenized(teacher, document, length) for document in corpus.documents[:count]]
    with steps(Console(), f"timing {len(texts)} documents", len(texts)) as bar, torch.inference_mode():
        records = read_all(contest(teacher, contestants, length, TEACHER), texts, bar)
    return [_speed(record) for record in records]


def _speed(record: Record) -> dict[str, Any]:
    return {
        "key": record.rival.key,
        "label": record.rival.label,
        "documents_per_second": 1 / median(record.seconds),
        "seconds": record.seconds,
        "peak_bytes": record.peak_bytes,
        "peak_method": record.peak_method,
    }
