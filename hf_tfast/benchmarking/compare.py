"""Two results of the same benchmark, the earlier and the later: what got slower or faster beyond noise.

A change counts where it is larger than `LEAST` and the quartiles of the two do not overlap; with fewer than three
samples quartiles say nothing, and only a change of more than `ALONE` counts. Machines and versions that differ are
named: between them everything may have changed.
"""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .pages import Record, ms, table
from .speed import describe
from .workload import Case

__all__ = ["compared", "lines", "read_records"]

LEAST, ALONE = 0.05, 0.25
MACHINE = ("cpu", "cores", "threads", "gpus", "python", "versions")


def read_records(path: Path) -> list[Record]:
    """The records of a results.jsonl, or of the folder that holds it. ValueError for any other file."""
    file = path / "results.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} is no results.jsonl of `tfast bench`, and no folder with one")
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            raise ValueError(f"{file}, line {number}, is not JSON") from None
        if not isinstance(record, dict) or "kind" not in record:
            raise ValueError(f"{file}, line {number}, is no record of `tfast bench`: was it made by another version?")
        found.append(record)
    timings = [r for r in found if r["kind"] == "timing"]
    if not timings:
        raise ValueError(f"{file} holds no timings")
    needed = {"label", "dtype", "passes", "length"}
    if lacking := next((needed - set(r) for r in timings if needed - set(r)), None):
        raise ValueError(f"{file} was made by another version: its timings have no {', '.join(sorted(lacking))}")
    return found


def compared(old: Sequence[Record], new: Sequence[Record]) -> list[Record]:
    """One record for every timing that both have, the largest slow-down first.

    ratio    new over old median seconds: above 1 is slower.
    verdict  "slower", "faster" or "noise".
    """
    before = {_key(r): r for r in old if r["kind"] == "timing" and "seconds" in r}
    after = {_key(r): r for r in new if r["kind"] == "timing" and "seconds" in r}
    if not before.keys() & after.keys():
        raise ValueError("the two results have no case in common: compare runs of the same suite or the same options")
    found = []
    for key in before.keys() & after.keys():
        was, now = before[key], after[key]
        ratio = now["seconds"] / was["seconds"]
        found.append({"kind": "compared", "label": now["label"], "case": _case(now), "old": was["seconds"],
                      "new": now["seconds"], "ratio": ratio, "verdict": _verdict(was, now, ratio)})  # fmt: skip
    return sorted(found, key=lambda r: -r["ratio"])


def _verdict(was: Record, now: Record, ratio: float) -> str:
    change = max(ratio, 1 / ratio) - 1
    if min(len(was["samples"]), len(now["samples"])) < 3:
        apart = change > ALONE
    else:
        apart = change > LEAST and (
            now["quartiles"][0] > was["quartiles"][1] or now["quartiles"][1] < was["quartiles"][0]
        )
    return "noise" if not apart else "slower" if ratio > 1 else "faster"


def _key(record: Record) -> tuple[Any, ...]:
    """What makes two timings the same: everything of the case and the competitor, in the form it had."""
    case = tuple(str(record.get(f.name)) for f in fields(Case))
    return (record["label"], record.get("series"), json.dumps(record.get("mechanism"), sort_keys=True), *case)


def _case(record: Record) -> str:
    known = {f.name: record[f.name] for f in fields(Case) if f.name in record}
    try:
        return describe(Case(**{**known, "device": "cpu"}))
    except (TypeError, ValueError):
        return " ".join(f"{name}={value}" for name, value in known.items())


def lines(found: Sequence[Record], old: Sequence[Record], new: Sequence[Record]) -> str:
    """Markdown: what changed beyond noise, how many did not, and in what the machines differ."""
    changed = [r for r in found if r["verdict"] != "noise"]
    rows = [[r["label"], r["case"], ms(r["old"]), ms(r["new"]), f"{r['ratio']:.2f}", r["verdict"]] for r in changed]
    parts = [table(["competitor", "case", "old, ms", "new, ms", "new / old", ""], rows, 2)] if rows else []
    parts.append(f"{len(found)} cases in both; {len(found) - len(changed)} did not change beyond noise.")
    if differ := _differences(old, new):
        parts.append(f"Not the same machine or versions: {'; '.join(differ)}.")
    return "\n".join(parts) + "\n"


def _differences(old: Sequence[Record], new: Sequence[Record]) -> list[str]:
    was, now = (next((r for r in reversed(records) if r["kind"] == "environment"), {}) for records in (old, new))
    return [f"{name} {was.get(name)} and {now.get(name)}" for name in MACHINE if was.get(name) != now.get(name)]
