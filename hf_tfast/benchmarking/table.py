"""Tables of timings: for a terminal (rich) and in Markdown, losses and skipped cases left in.

Both take the records of results.jsonl, so that a table can be made again from a file.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Any

from .environment import describe

if TYPE_CHECKING:
    from rich.table import Table

Record = dict[str, Any]
COLUMNS = ("L", "attention", "ms", "quartiles", "against SDPA", "peak MiB")
PASSES = {"forward": "forward", "both": "forward and backward"}
_SIZE = ("dtype", "passes", "causal", "heads", "kv_heads", "width", "batch", "level", "left_padding", "device")


def groups(records: Iterable[Record]) -> list[tuple[str, list[Record]]]:
    """Timings that differ in length and competitor only, each group under its title, shorter lengths first."""
    timings = [r for r in records if r.get("kind") == "timing"]
    key = lambda r: tuple(str(r[name]) for name in _SIZE)  # noqa: E731
    order = list(dict.fromkeys(key(r) for r in timings))
    timings.sort(key=lambda r: (order.index(key(r)), r["length"]))
    return [(title(same[0]), same) for same in (list(run) for _, run in groupby(timings, key=key))]


def title(r: Record) -> str:
    """What a group of timings has in common, in words."""
    heads = (
        f"{r['heads']} heads"
        if r["heads"] == r["kv_heads"]
        else f"{r['heads']} query, {r['kv_heads']} key/value heads"
    )
    extra = f", left padding {r['left_padding']}" if r["left_padding"] else ""
    kind = "causal" if r["causal"] else "bidirectional"
    return (
        f"{r['dtype']}, {PASSES[r['passes']]}, {kind}, {heads} x {r['width']}, batch {r['batch']}{extra}, "
        f"{r['level']}, {r['device']}"
    )


def cells(r: Record) -> list[str]:
    """One row of the table."""
    if "skipped" in r:
        return [str(r["length"]), r["label"], "-", "", "", f"skipped: {r['skipped']}"]
    first, third = r["quartiles"]
    faster = "" if r["speedup"] is None else f"{r['speedup']:.2f}x"
    peak = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:.1f}"
    return [str(r["length"]), r["label"], _ms(r["seconds"]), f"{_ms(first)} - {_ms(third)}", faster, peak]


def _ms(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def wins_from(records: Sequence[Record]) -> dict[str, int | None]:
    """For every mechanism of one group: the length from which it is at least as fast as SDPA at all longer ones too.

    None where it loses at the longest length measured. Lengths without both figures say nothing.
    """
    found: dict[str, int | None] = {}
    compared = [r for r in records if r["mechanism"] is not None and r.get("speedup") is not None]
    for name in dict.fromkeys(r["label"] for r in compared):
        longest_first = sorted((r for r in compared if r["label"] == name), key=lambda r: -r["length"])
        won = list(takewhile(lambda r: r["speedup"] >= 1, longest_first))
        found[name] = won[-1]["length"] if won else None
    return found


def verdicts(records: Sequence[Record]) -> list[str]:
    """One sentence per mechanism of a group: from which length it wins on this machine."""
    sentences = []
    for name, length in wins_from(records).items():
        last = max(r["length"] for r in records if r["label"] == name and r.get("speedup") is not None)
        where = f"loses at L={last}, the longest compared" if length is None else f"wins from L={length} on"
        sentences.append(f"{name} {where}")
    return sentences


def beside_floors(same: Sequence[Record], records: Sequence[Record]) -> list[str]:
    """One sentence per timing of a group that has an arithmetic floor: how far above it stands. Floors of what is not
    in the group, as on the card of a model that runs something else, are left out."""
    mine = [r for r in records if r.get("kind") == "floor" and all(r[name] == same[0][name] for name in _SIZE)]
    found = []
    for floor in sorted(mine, key=lambda r: r["length"]):
        named = (floor["label"], floor["length"])
        for took in (r["seconds"] for r in same if (r["label"], r["length"]) == named and "seconds" in r):
            found.append(
                f"{named[0]} at L={named[1]} takes {took / floor['seconds']:.1f} times its matrix products: "
                f"{_ms(floor['seconds'])} ms at {floor['peak'] / 1e9:,.0f} GFLOP/s"
            )
    return found


def terminal_tables(records: Sequence[Record]) -> "list[Table]":
    """One rich table a group; faster than SDPA is green, slower red."""
    from rich.markup import escape
    from rich.table import Table

    tables = []
    for heading, same in groups(records):
        notes = [f"{r['label']} at L={r['length']}: {r['skipped']}" for r in same if "skipped" in r]
        caption = "\n".join([*verdicts(same), *beside_floors(same, records), *notes])
        table = Table(title=heading, title_justify="left", caption=escape(caption), caption_justify="left")
        for name in COLUMNS:
            names = name == "attention"
            table.add_column(name, justify="left" if names else "right", overflow="fold", no_wrap=names)
        length = None
        for r in same:
            if length not in (None, r["length"]):
                table.add_section()
            repeated, length = r["length"] == length, r["length"]
            row = [escape(cell) for cell in cells(r)]
            if "skipped" in r:
                row[2:] = ["skipped", "", "", ""]
            elif r["speedup"] is not None and r["mechanism"] is not None:
                row[4] = f"[{'green' if r['speedup'] >= 1 else 'red'}]{row[4]}[/]"
            table.add_row("" if repeated else row[0], *row[1:])
        tables.append(table)
    return tables


def markdown(records: Sequence[Record]) -> str:
    """All groups as Markdown, with the machine at the foot."""
    parts = []
    for heading, same in groups(records):
        rows = [COLUMNS, ["---:", "---", "---:", "---:", "---:", "---:"], *(cells(r) for r in same)]
        parts.append(f"### {heading}\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n")
        parts.extend(f"{sentence}.\n" for sentence in [*verdicts(same), *beside_floors(same, records)])
    for record in records:
        if record.get("kind") == "environment":
            parts.append(f"Machine: {describe(record)}\n\nMade by: `{record['command']}`\n")
    return "\n".join(parts)
