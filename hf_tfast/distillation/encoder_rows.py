"""Examples as rows of token ids, and batches of them without padding.

A row is a document (a crop of it, another one every epoch, where it is longer than a step reads), some of its queries,
and some of its passages. What a row holds is drawn by seed, epoch and number, so a resumed training meets the same.
"""

import hashlib
import random
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .encoder_pairs import Example

__all__ = ["Rows", "TextEncoder", "collate"]


class TextEncoder(Protocol):
    """A model and how texts become vectors: what `hf_tfast.quickstart.encoder.Encoder` is."""

    @property
    def model(self) -> Any: ...
    @property
    def pooling(self) -> str: ...
    @property
    def front(self) -> tuple[int, ...]: ...
    @property
    def back(self) -> tuple[int, ...]: ...
    @property
    def special(self) -> int: ...
    def content(self, text: str) -> tuple[list[int], list[tuple[int, int]]]: ...


@dataclass(frozen=True)
class _Text:
    """An example in tokens; spans are [start, end) of content ids, the place of a query None where it is not known."""

    ids: list[int]
    passages: list[tuple[int, int]]
    queries: list[list[int]]
    places: list[tuple[int, int] | None]


class Rows(Dataset[dict[str, Any]]):
    """One row an example and epoch.

    length    tokens of a document that a step reads, special ones counted
    query     tokens of a query at most, likewise; of a longer one the row has a part
    queries   of an example in a row at most; the rest have their turn in other epochs
    passages  of a document in a row at most, apart from the places of its queries
    """

    def __init__(
        self,
        examples: Sequence[Example],
        encoder: TextEncoder,
        *,
        length: int = 2048,
        query: int = 128,
        queries: int = 8,
        passages: int = 2,
        seed: int = 0,
    ) -> None:
        for name, value in (("length", length), ("query", query)):
            if value <= encoder.special:
                raise ValueError(f"{name} must leave room beside {encoder.special} special tokens, got {value}")
        if queries < 1 or passages < 0:
            raise ValueError(f"a row has at least 1 query and 0 passages, got {queries} and {passages}")
        if not examples:
            raise ValueError("there are no examples to train on")
        self.encoder, self.seed, self.epoch = encoder, seed, 0
        self.length, self.query = length - encoder.special, query - encoder.special
        self.queries, self.passages = queries, passages
        made = {id(example): _tokens(example, encoder) for example in {id(e): e for e in examples}.values()}
        self.texts = [made[id(example)] for example in examples]  # an example may stand here several times
        number = {key: n for n, key in enumerate(made)}
        self.examples = [number[id(example)] for example in examples]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, number: int) -> dict[str, Any]:
        text = self.texts[number]
        draw = random.Random(hashlib.sha256(f"{self.seed}:{self.epoch}:{number}".encode()).digest())
        start = draw.randint(0, max(len(text.ids) - self.length, 0))
        end = min(start + self.length, len(text.ids))
        offset = len(self.encoder.front) - start
        chosen = sorted(draw.sample(range(len(text.queries)), min(self.queries, len(text.queries))))
        spans, places = list[tuple[int, int]](), list[int]()
        for n in chosen:
            where = text.places[n]
            inside = where is not None and where[0] >= start and where[1] <= end
            places.append(len(spans) if inside else -1)
            if inside and where is not None:
                spans.append(where)
        able = [p for p in text.passages if p[0] >= start and p[1] <= end]
        spans += draw.sample(able, min(self.passages, len(able)))
        return {
            "document": self._whole(text.ids[start:end]),
            "queries": [self._whole(self._part(text.queries[n], draw)) for n in chosen],
            "spans": [(a + offset, b + offset) for a, b in spans],
            "places": places,
            "example": self.examples[number],
        }

    def _part(self, ids: list[int], draw: random.Random) -> list[int]:
        start = draw.randint(0, max(len(ids) - self.query, 0))
        return ids[start : start + self.query]

    def _whole(self, ids: list[int]) -> list[int]:
        return [*self.encoder.front, *ids, *self.encoder.back]


def _tokens(example: Example, encoder: TextEncoder) -> _Text:
    ids, offsets = encoder.content(example.text)
    starts, ends = [first for first, _ in offsets], [last for _, last in offsets]

    def span(where: tuple[int, int] | None) -> tuple[int, int] | None:
        if where is None:
            return None
        first, last = bisect_right(ends, where[0]), bisect_left(starts, where[1])
        return (first, last) if first < last else None

    queries = [encoder.content(query.text)[0] for query in example.queries]
    if not ids or not all(queries):
        raise ValueError(f"{example.name}: the document or a query holds nothing that the tokenizer reads")
    passages = [found for where in example.passages if (found := span(where)) is not None]
    return _Text(ids, passages, queries, [span(query.place) for query in example.queries])


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows behind one another, with their lengths: nothing is padded.

    input_ids [t], lengths [n]             documents
    query_ids [u], query_lengths [m]       queries; owner [m]: which document of the batch is right
    spans [p 3]                            (document, first token, end) of passages; places [m]: the span that answers
                                           a query, or -1
    example [n]                            its number: documents of one example are not each other's wrong answers
    """
    queries = [(n, query) for n, row in enumerate(rows) for query in row["queries"]]
    spans, places = list[tuple[int, int, int]](), list[int]()
    for n, row in enumerate(rows):
        places += [place + len(spans) if place >= 0 else -1 for place in row["places"]]
        spans += [(n, start, end) for start, end in row["spans"]]
    return {
        "input_ids": torch.tensor([token for row in rows for token in row["document"]]),
        "lengths": torch.tensor([len(row["document"]) for row in rows]),
        "query_ids": torch.tensor([token for _, query in queries for token in query]),
        "query_lengths": torch.tensor([len(query) for _, query in queries]),
        "owner": torch.tensor([n for n, _ in queries]),
        "spans": torch.tensor(spans, dtype=torch.long).view(-1, 3),
        "places": torch.tensor(places),
        "example": torch.tensor([row["example"] for row in rows]),
    }
