"""Long documents with queries: Python's own documentation, or a JSONL file.

The default corpus is read from the files of the running Python; nothing is imported from them. It consists of the
docstrings of standard library modules in source order, and of the topics of `help()`. A query is the first sentence of
a passage (of a docstring: its summary line). That sentence is taken out of the document, so the rest of the passage
has to be found by meaning; a sentence that stands anywhere else in the corpus is no query. One version of Python
gives one corpus.
"""

import ast
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

LONGEST = 16_000  # characters of a document: about 4,000 tokens
SHORTEST = 7_000
PASSAGE = 180  # words at which a passage ends with its paragraph
QUERY = (5, 40)  # words
BODY = 20  # words that must be left of a passage when its query is gone

# Not documentation of Python (tests, generated tables, bundled wheels), or the same text a second time.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo"}
SKIPPED |= {"encodings", "pydoc_data", "ensurepip", "distutils", "__pycache__", "_pyio.py", "_pydecimal.py"}


Entry = tuple[str, str]  # a heading (a signature) and the text under it


@dataclass
class Document:
    """A text, its passages as [start, end) characters, and queries, each with its passage (None: not known)."""

    name: str
    text: str
    passages: list[tuple[int, int]]
    queries: list[tuple[str, int | None]]


@dataclass
class Corpus:
    """Documents and where they come from. `fingerprint` is equal exactly when texts and queries are."""

    source: str
    documents: list[Document]
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        content = json.dumps([(d.name, d.text, d.queries) for d in self.documents])
        self.fingerprint = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    @property
    def queries(self) -> list[tuple[str, int, int | None]]:
        """(query, document, passage of that document or None), in order."""
        return [(text, n, at) for n, document in enumerate(self.documents) for text, at in document.queries]


def load_corpus(path: str | Path | None = None, documents: int = 32, queries: int = 6) -> Corpus:
    """The JSONL corpus at `path`, whole; without one the `documents` longest of Python's own, `queries` each."""
    return python_corpus(documents, queries) if path is None else read_corpus(Path(path))


def read_corpus(path: Path) -> Corpus:
    """One {"document": text, "queries": [text, ...]} a line. ValueError names the line that is something else."""
    if not path.is_file():
        raise ValueError(f"the corpus {path} is not a file; expected JSONL with a document and its queries a line")
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found.append(_from_line(line, number))
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if len(found) < 2:
        raise ValueError(f"{path} holds {len(found)} documents; finding the right one takes at least 2")
    return Corpus(source=path.name, documents=found)


def _from_line(line: bytes, number: int) -> Document:
    wanted = 'expected {"document": text, "queries": [text, ...]}'
    try:
        given = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error}); {wanted}") from None
    if not isinstance(given, dict) or set(given) != {"document", "queries"}:
        got = ", ".join(map(str, given)) or "nothing" if isinstance(given, dict) else type(given).__name__
        raise ValueError(f"{wanted}, got {got}")
    text, queries = given["document"], given["queries"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError("the document must be a text that is not empty")
    if not isinstance(queries, list) or not queries or not all(isinstance(q, str) and q.strip() for q in queries):
        raise ValueError("queries must be a list of at least one text, none of them empty")
    return Document(f"line {number}", text, _passages(text, 0, len(text)), [(q, None) for q in queries])


def python_corpus(documents: int, queries: int) -> Corpus:
    """The `documents` longest texts of the running Python's documentation, each with at most `queries` queries."""
    texts = sorted(_texts(), key=lambda text: (-_length(text[1]), text[0]))[:documents]
    if len(texts) < 2:
        raise ValueError(
            f"{sysconfig.get_paths()['stdlib']} holds no documentation of Python: give --corpus a JSONL file instead"
        )
    everything = "\n".join(_plain(body) for _, entries in texts for _, body in entries)
    found = []
    for name, entries in sorted(texts):
        able = [n for n, (_, body) in enumerate(entries) if _is_query(_split(body), everything)]
        if asked := _spread(able, queries):
            found.append(_document(name, entries, set(asked)))
    return Corpus(source="Python's own documentation", documents=found)


def _document(name: str, entries: list[Entry], asked: set[int]) -> Document:
    """The entries as one text; the first sentences of the `asked` ones become queries and leave the text."""
    text, passages = "", list[tuple[int, int]]()
    queries: list[tuple[str, int | None]] = []
    for n, (heading, body) in enumerate(entries):
        start = len(text)
        if n in asked:
            query, body = _split(body)
            queries.append((query, len(passages)))
        text += f"{heading}{body.rstrip()}\n\n"
        passages += _passages(text, start, len(text) - 2)
    return Document(name, text.rstrip(), passages, queries)


def _spread(items: list[int], count: int) -> list[int]:
    """`count` of the items, evenly from first to last."""
    if len(items) <= count:
        return items
    return [items[round((n + 0.5) * len(items) / count - 0.5)] for n in range(count)]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _texts() -> Iterator[tuple[str, list[Entry]]]:
    """Every long text: module documentation, and help topics that do not repeat an earlier, longer one."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root)
        if not SKIPPED & set(parts.parts):
            name = ".".join(parts.with_suffix("").parts).removesuffix(".__init__")
            yield from _long(name, list(_docstrings(path)))
    seen: set[str] = set()
    for name, text in sorted(_topics().items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = text.split("\n\n")
        if sum(p in seen for p in paragraphs) < 0.2 * len(paragraphs):
            seen.update(paragraphs)
            yield from _long(f"topic {name}", [("", p) for p in paragraphs])


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return {}
    return topics


def _docstrings(path: Path) -> Iterator[Entry]:
    """(signature, docstring) of the module, its classes and functions, in source order."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # templates and deliberately broken files: no documentation is lost
    yield from _of_node(tree)


def _of_node(node: ast.AST) -> Iterator[Entry]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if text := ast.get_docstring(node):
            yield _signature(node), text
        for child in node.body:
            yield from _of_node(child)


def _signature(node: ast.AST) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}\n"
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"{node.name}({', '.join(a.arg for a in node.args.args)})\n"
    return ""


def _long(name: str, entries: list[Entry]) -> Iterator[tuple[str, list[Entry]]]:
    """The text up to LONGEST characters, cut between entries; nothing where it stays short."""
    kept: list[Entry] = []
    for entry in entries:
        if _length([*kept, entry]) <= LONGEST:
            kept.append(entry)
        elif _length(kept) >= SHORTEST:
            break  # else: one entry longer than all the rest, left out
    if _length(kept) >= SHORTEST:
        yield name, kept


def _length(entries: list[Entry]) -> int:
    return sum(len(heading) + len(body) + 2 for heading, body in entries)


def _split(text: str) -> tuple[str, str]:
    """(first sentence on one line, the rest) of a text."""
    first, _, more = text.strip().partition("\n\n")
    end = re.search(r"[.!?](?=\s|$)", first)
    cut = end.end() if end else len(first)
    return " ".join(first[:cut].split()), (first[cut:].strip() + "\n\n" + more).strip()


def _is_query(parts: tuple[str, str], everything: str) -> bool:
    """Does the sentence say enough, leave enough behind, and stand nowhere else?"""
    query, rest = parts
    words = re.findall(r"[A-Za-z]{2,}", query)
    enough = QUERY[0] <= len(words) <= QUERY[1] and query[0].isalpha() and len(rest.split()) >= BODY
    return enough and everything.count(_plain(query)) == 1


def _passages(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """[start, end) cut at blank lines into passages of about PASSAGE words; one paragraph is never cut."""
    found, first = [], start
    for paragraph in re.finditer(r"(?:.+\n?)+", text[start:end]):
        stop = start + paragraph.end()
        if len(text[first:stop].split()) >= PASSAGE:
            found.append((first, stop))
            first = stop
    if text[first:end].strip():
        found.append((first, end))
    return found
