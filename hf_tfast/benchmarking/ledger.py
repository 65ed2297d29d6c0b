"""A results file that grows while it is measured, so that an interrupted suite is continued and not begun again.

The first line names the suite, its format and what it was asked for; then every session that adds to it writes its
machine, and every race its records in one write. A line cut off by a crash is dropped when the file is opened again.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
NAME = "results.jsonl"


@dataclass
class Ledger:
    """The records of a results folder; what is added is on the disk before `add` returns."""

    folder: Path
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.folder / NAME

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        text = "".join(json.dumps(record) + "\n" for record in records)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.records += json.loads(f"[{','.join(text.splitlines())}]")

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]


def begin(folder: Path, about: dict[str, Any]) -> Ledger:
    """A new ledger in a folder that does not exist yet, or is empty."""
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists; continue it with --resume, or name another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(folder)
    ledger.add([{"kind": "suite", "format": FORMAT, **about}])
    return ledger


def resume(folder: Path, about: dict[str, Any]) -> Ledger:
    """The ledger of an earlier session. ValueError where it is another suite or was made by another version."""
    ledger = Ledger(folder, read(folder / NAME))
    first = ledger.records[0]
    for name in about:
        if first.get(name) != about[name]:
            raise ValueError(
                f"{ledger.path} was made with {name} {first.get(name)!r}, now it is {about[name]!r}: "
                "resume it as it was begun, or name another folder with --out"
            )
    whole = "".join(json.dumps(record) + "\n" for record in ledger.records)
    if ledger.path.read_text(encoding="utf-8") != whole:  # a line was cut off
        ledger.path.write_text(whole, encoding="utf-8")
    return ledger


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a results file; a last line that was cut off is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines) or line.endswith("\n"):
                raise ValueError(f"{path}, line {number}, is not JSON") from None
    first = records[0] if records else {}
    if first.get("kind") != "suite" or first.get("format") != FORMAT:
        raise ValueError(f"{path} is no results file of a suite in format {FORMAT}: its first line is {first}")
    return records
