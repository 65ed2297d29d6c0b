"""Long documents with queries, to teach an encoder what a document is about: from files, or made from any text.

Pairs      JSONL (or .gz), {"query": text, "document": text} or {"queries": [text, ...], "document": text} a line;
           lines with one document become one example, so that no document is a wrong answer to its own query.
Clozes     from a text alone: sentences are taken out of it and become queries, the rest is the document that they have
           to find. Every second query is a few sentences from all over the document, as a summary is; the others are
           sentences that stood together, and know the place that they were taken from.
Overlap    an example that shares text with what is evaluated is left out (`without`).

Source     Lee et al., "Latent Retrieval for Weakly Supervised Open Domain Question Answering" (inverse cloze task),
           section 4, https://arxiv.org/abs/1906.00300
"""

import gzip
import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Example", "Query", "cloze", "pieces", "read_pairs", "shared", "without"]

PASSAGE = 150  # words at which a passage ends with its paragraph
QUERY = (12, 60)  # words of a run of sentences that becomes a query
AROUND = 500  # characters on each side of the place that a query was taken from
SHINGLE = 13  # words in a row: who shares them shares text
SCATTERED = 3  # sentences of a query from all over a document

Span = tuple[int, int]  # characters [start, end)


@dataclass(frozen=True)
class Query:
    """A text that asks for a document; `place`: the characters of the document that answer it, where that is known."""

    text: str
    place: Span | None = None


@dataclass(frozen=True)
class Example:
    """A document and the queries that should find it."""

    name: str
    text: str
    queries: tuple[Query, ...]

    @property
    def passages(self) -> list[Span]:
        """The document cut at blank lines into passages of about PASSAGE words."""
        found, first = [], 0
        for paragraph in re.finditer(r"(?:.*\S.*\n?)+", self.text):
            if len(self.text[first : paragraph.end()].split()) >= PASSAGE:
                found.append((first, paragraph.end()))
                first = paragraph.end()
        return found + ([(first, len(self.text))] if self.text[first:].strip() else [])


def read_pairs(path: str | Path) -> list[Example]:
    """The examples of a JSONL file, in the order of their documents. ValueError names the line that is no pair."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"the pairs {path} are not a file; expected JSONL with a query and its document a line")
    found: dict[str, list[Query]] = {}
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    document, queries = _pair(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from None
                found.setdefault(document, []).extend(Query(query) for query in queries)
    if not found:
        raise ValueError(f"{path} holds no pairs")
    return [Example(f"{path.name}:{n}", text, tuple(queries)) for n, (text, queries) in enumerate(found.items())]


def _pair(line: bytes) -> tuple[str, list[str]]:
    wanted = 'expected {"query": text, "document": text} or {"queries": [text, ...], "document": text}'
    try:
        given: Any = json.loads(line)
    except ValueError as error:  # UnicodeDecodeError is one too
        raise ValueError(f"not JSON ({error}); {wanted}") from None
    if not isinstance(given, dict) or set(given) not in ({"query", "document"}, {"queries", "document"}):
        got = ", ".join(map(str, given)) or "nothing" if isinstance(given, dict) else type(given).__name__
        raise ValueError(f"{wanted}, got {got}")
    queries = [given["query"]] if "query" in given else given["queries"]
    for what, texts in (("queries", queries), ("document", [given["document"]])):
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise ValueError(f"{what}: every one must be a text that is not empty")
    return given["document"], queries


def pieces(text: str, characters: int, shortest: int) -> list[str]:
    """A long text cut at blank lines into pieces of at most `characters`; what is under `shortest` is left out.

    A single paragraph longer than that is left out too.
    """
    found, kept = [], ""
    for paragraph in re.split(r"\n\s*\n", text):
        more = f"{kept}\n\n{paragraph.rstrip()}" if kept else paragraph.rstrip()
        if len(more) <= characters:
            kept = more
        else:
            found.append(kept)
            kept = paragraph.rstrip() if len(paragraph.rstrip()) <= characters else ""
    return [piece for piece in [*found, kept] if len(piece) >= shortest]


def cloze(name: str, text: str, queries: int, seed: int = 0) -> Example | None:
    """An example made from a text alone, drawn by seed and name; None where the text has too few sentences.

    At most `queries` queries, fewer of a short text: at most a quarter of it leaves the document.
    """
    draw = random.Random(hashlib.sha256(f"{seed}:{name}".encode()).digest())
    runs = list(_runs(text))
    for count in range(queries, 0, -1):
        apart = count // 2
        together, wanted = count - apart, count - apart + apart * SCATTERED
        spread = [_nth(runs, n, wanted, draw) for n in range(wanted)] if len(runs) >= 2 * wanted else []
        if spread and sum(end - start for start, end in spread) <= len(text) / 4:
            break
    else:
        return None
    alone = set(draw.sample(range(wanted), together))
    body, at, places, scattered = "", 0, list[Query](), list[str]()
    for n, (start, end) in enumerate(spread):
        body += text[at:start]
        at = end
        if n in alone:
            places.append(Query(_line(text[start:end]), (len(body), len(body))))
        else:
            scattered.append(_line(text[start:end]))
    body += text[at:]
    found = [Query(q.text, _around(q.place[0], len(body))) for q in places if q.place is not None]
    found += [Query(" ".join(scattered[n::apart])) for n in range(apart)]
    return Example(name, body, tuple(found))


def _runs(text: str) -> Iterator[Span]:
    """Runs of whole sentences inside a paragraph, none overlapping, of QUERY words each."""
    for paragraph in re.finditer(r"(?:.*\S.*\n?)+", text):
        start = paragraph.start()
        for sentence in re.finditer(r".+?[.!?][\"'”’)_]*(?=\s|$)", paragraph.group(), flags=re.DOTALL):
            end = paragraph.start() + sentence.end()
            words = len(text[start:end].split())
            if words >= QUERY[0]:
                if words <= QUERY[1]:
                    yield start, end
                start = end


def _nth(runs: Sequence[Span], n: int, count: int, draw: random.Random) -> Span:
    """A run from the n-th of `count` equal parts."""
    return runs[draw.randrange(n * len(runs) // count, (n + 1) * len(runs) // count)]


def _line(text: str) -> str:
    return " ".join(text.split())


def _around(at: int, end: int) -> Span:
    return max(at - AROUND, 0), min(at + AROUND, end)


def _shingles(text: str) -> Iterator[str]:
    words = re.findall(r"\w+", text.lower())
    return (" ".join(words[n : n + SHINGLE]) for n in range(max(len(words) - SHINGLE + 1, 0)))


def shared(example: Example, known: set[int]) -> float:
    """The share of the example's runs of SHINGLE words whose hash is known: document and queries."""
    found = [hash(s) in known for text in (example.text, *(q.text for q in example.queries)) for s in _shingles(text)]
    return sum(found) / max(len(found), 1)


def without(
    examples: Iterable[Example], evaluated: Iterable[str], most: float = 0.005
) -> tuple[list[Example], list[str]]:
    """The examples that share at most `most` of their text with the `evaluated` texts, and the names of the others."""
    known = {hash(shingle) for text in evaluated for shingle in _shingles(text)}
    kept, out = [], []
    for example in examples:
        if shared(example, known) <= most:
            kept.append(example)
        else:
            out.append(example.name)
    return kept, out
