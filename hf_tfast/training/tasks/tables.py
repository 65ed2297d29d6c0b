"""Rows of examples from local files or a data set of the Hub, and their columns by role.

JSONL, JSON (a list of rows, or SQuAD's nested form), CSV, TSV and plain text (one row a line, its column is "text");
each may be gzipped (.gz). Columns of CSV and TSV are named by the first line, or, when every column is asked for by
its number from 0, there is no such line.
"""

import csv
import glob
import gzip
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["Row", "hub_rows", "read_rows", "renamed", "split_rows", "text_of"]

Row = dict[str, Any]
ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".txt")


def read_rows(sources: Sequence[str], columns: Sequence[str]) -> list[Row]:
    """All rows of files or globs, in order. ValueError for names that match nothing and files that cannot be read."""
    found: list[Row] = []
    for source in sources:
        paths = [source] if Path(source).is_file() else sorted(glob.glob(source, recursive=True))
        if not paths:
            raise ValueError(f"{source} is no file, and as a glob it matches none")
        for path in paths:
            found += _file(Path(path), columns)
    return found


def _file(path: Path, columns: Sequence[str]) -> list[Row]:
    ending = (path.with_suffix("") if path.suffix == ".gz" else path).suffix
    if ending not in ENDINGS:
        raise ValueError(f"{path} ends with none of {', '.join(ENDINGS)} (nor those with .gz): rename or convert it")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8-sig")
    except (UnicodeDecodeError, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as text in UTF-8: {error}") from error
    if ending == ".txt":
        return [{"text": line} for line in text.splitlines() if line.strip()]
    if ending in (".csv", ".tsv"):
        return _separated(text, "," if ending == ".csv" else "\t", columns, path)
    try:
        if ending == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = _json(json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if wrong := [n for n, row in enumerate(rows) if not isinstance(row, dict)]:
        raise ValueError(f"{path}: row {wrong[0]} is {type(rows[wrong[0]]).__name__}, not an object with columns")
    return rows


def _json(content: Any) -> list[Row]:
    """A list of rows, or SQuAD: data > paragraphs > qas, as rows of id, title, context, question and answers."""
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
        if content and isinstance(content[0], dict) and "paragraphs" in content[0]:
            return [
                {"title": part.get("title", str(n)), "context": paragraph["context"], **question}
                for n, part in enumerate(content)
                for paragraph in part["paragraphs"]
                for question in paragraph["qas"]
            ]
    return content if isinstance(content, list) else [content]


def _separated(text: str, sign: str, columns: Sequence[str], path: Path) -> list[Row]:
    lines = csv.reader(
        io.StringIO(text), delimiter=sign, quoting=csv.QUOTE_NONE if sign == "\t" else csv.QUOTE_MINIMAL
    )
    rows = [line for line in lines if line]
    if not rows:
        return []
    if columns and all(column.isdecimal() for column in columns):
        names = [str(n) for n in range(len(rows[0]))]
    else:
        names, rows = rows[0], rows[1:]
    if wrong := [n for n, row in enumerate(rows) if len(row) != len(names)]:
        raise ValueError(
            f"{path}: row {wrong[0]} has {len(rows[wrong[0]])} columns where {len(names)} are expected "
            f"({', '.join(names)})"
        )
    return [dict(zip(names, row, strict=True)) for row in rows]


def hub_rows(dataset: str, config: str | None, split: str) -> list[Row]:
    """Every row of a split; uses the network unless it is in the cache (HF_HUB_OFFLINE=1 forbids it)."""
    try:
        from datasets import load_dataset  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError:
        raise ImportError(
            'data sets of the Hub need datasets: pip install "hf_tfast[data]", or name local files'
        ) from None
    return list(load_dataset(dataset, config, split=split))


def renamed(rows: Sequence[Row], columns: dict[str, str], needed: Sequence[str], where: str) -> list[Row]:
    """Rows with the names that a task knows; `columns` maps them to the file's. Other columns stay.

    ValueError where there are no rows, or a needed column is missing or empty in all of them.
    """
    if not rows:
        raise ValueError(f"{where} has no rows")
    for name in needed:
        column = columns.get(name, name)
        if column not in rows[0]:
            raise ValueError(
                f"{where} has no column {column!r} for {name}; it has {', '.join(rows[0])}. Name it with --columns "
                f"{name}=COLUMN"
            )
        if all(row.get(column) in (None, "", []) for row in rows):
            raise ValueError(f"column {column!r} of {where} is empty in all of its {len(rows)} rows")
    return [{**row, **{name: row.get(column) for name, column in columns.items()}} for row in rows]


def split_rows(rows: Sequence[Row], share: float, seed: int, group: str | None = None) -> tuple[list[Row], list[Row]]:
    """(kept, held out): by a hash of seed and the row, or of its column `group`, whose rows stay together.

    ValueError for a share outside (0, 1), a group that is not there, and where one part would be empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share that is held out must lie between 0 and 1, got {share}")
    if group is not None and group not in rows[0]:
        raise ValueError(f"there is no column {group!r} to split by; there are {', '.join(rows[0])}")
    keys = [str(row[group]) if group else json.dumps(row, sort_keys=True, default=str) for row in rows]
    order = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    if len(order) < 2:
        raise ValueError(f"{len(rows)} rows cannot be split: they are all the same or of one group")
    aside = set(order[: min(max(1, round(share * len(order))), len(order) - 1)])
    kept = [row for row, key in zip(rows, keys, strict=True) if key not in aside]
    return kept, [row for row, key in zip(rows, keys, strict=True) if key in aside]


def text_of(row: Row, name: str, where: str) -> str:
    """The text in a column; a list of strings is joined. ValueError for what is no text."""
    value = row[name]
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = " ".join(value)
    if not isinstance(value, str):
        raise ValueError(f"{name} of {where} is not text but {type(value).__name__}: {str(value)[:60]!r}")
    return value
