"""What the pages of both suites share: figures as words, and tables between the markers of a Markdown page."""

from collections.abc import Iterable, Sequence
from math import exp, log
from pathlib import Path
from typing import Any

from .environment import busy, describe

Record = dict[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose first `left` columns are aligned to the left."""
    lines = [head, ["---" if n < left else "---:" for n in range(len(head))], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def ms(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def mib(record: Record) -> str:
    return "-" if record.get("peak_bytes") is None else f"{record['peak_bytes'] / 2**20:.0f}"


def times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def spread(record: Record) -> str:
    first, third = record["quartiles"]
    return f"{ms(first)} - {ms(third)}"


def find(records: Iterable[Record], **wanted: Any) -> Record | None:
    """The last record with these values."""
    found = None
    for record in records:
        if all(record.get(name) == value for name, value in wanted.items()):
            found = record
    return found


def wins_from(speedups: Sequence[tuple[int, float]]) -> tuple[str, int | None]:
    """From which length on it is faster than SDPA, in words and as a number, given (length, speed-up).

    It has to win at every longer length measured. Between the last length where it loses and the next one the crossing
    is interpolated, logarithms over logarithms.
    """
    points = sorted(speedups)
    if not points:
        return "not measured", None
    longest = points[-1][0]
    lost = [n for n, (_, faster) in enumerate(points) if faster < 1]
    if not lost:
        return f"{points[0][0]}, the shortest", points[0][0]
    if lost[-1] == len(points) - 1:
        return f"never up to {longest}", None
    (short, below), (long, above) = points[lost[-1]], points[lost[-1] + 1]
    part = -log(below) / (log(above) - log(below))
    at = round(exp(log(short) + part * (log(long) - log(short))))
    rounded = round(at, 1 - len(str(at)) + 1)
    return f"about {rounded}", rounded


def foot(records: Sequence[Record]) -> str:
    """On what machine, in how many sessions, by which command, and whether others were at work."""
    machines = [r for r in records if r["kind"] == "environment"]
    lines = []
    for machine in machines:
        lines.append(f"- {describe(machine)}: `{machine['command']}`")
        if warning := busy(machine):
            lines.append(f"  - {warning}")
    return "Measured on:\n\n" + "\n".join(lines) + "\n" if lines else ""


def renew(page: Path, name: str, text: str) -> None:
    """Put `text` between the markers of `name` on a page. ValueError where they are missing."""
    page.write_text(renewed(page.read_text(encoding="utf-8"), name, text, str(page)), encoding="utf-8")


def renewed(page: str, name: str, text: str, where: str = "the page") -> str:
    """The page with `text` between its markers of `name`."""
    begin, end = f"<!-- {name}: made by `tfast ... --update` -->", f"<!-- end of {name} -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"{where}: expected one line {begin!r} and after it one line {end!r}")
    return f"{page.split(begin)[0]}{begin}\n\n{text}\n{end}{page.split(end)[1]}"
