"""What the docstrings of the mechanisms say, as data, for `tfast list` and the table of the README."""

import inspect
import re
from dataclasses import fields
from typing import Any

from ..attention import Mechanism, mechanisms

HEADINGS = ("Shapes", "Cost", "Exact", "Source", "Padding", "Causal", "Differs")
BEGIN, END = "<!-- mechanisms: made by `tfast list --markdown` -->", "<!-- end of mechanisms -->"


def sections(doc: str) -> dict[str, str]:
    """{"name": ..., "does": ..., "formula": ..., heading: text} of a module docstring in the project's form.

    The form: first line "Name: what it does.", an indented formula, then the headings at the start of a line, their
    further lines indented. ValueError names what is missing.
    """
    lines = inspect.cleandoc(doc).splitlines()
    first = re.fullmatch(r"(\w+): (.+)", lines[0]) if lines else None
    if first is None:
        raise ValueError(f'the first line must read "Name: what it does.", got {lines[0] if lines else ""!r}')
    found = {"name": first[1], "does": first[2]}
    current, texts = "formula", {"formula": [""]}
    for line in lines[1:]:
        start = re.match(rf"({'|'.join(HEADINGS)})\s+(.*)", line)
        if start:
            current = start[1]
            texts[current] = [start[2]]
        elif line and not line.startswith(" "):
            current = "rest"  # prose between or after the headings
            texts.setdefault(current, []).append(line)
        else:
            texts[current].append(line)
    if missing := [heading for heading in HEADINGS if heading not in texts]:
        raise ValueError(f"the docstring of {first[1]} has no {', '.join(missing)}")
    for heading in HEADINGS:
        found[heading] = " ".join(" ".join(texts[heading]).split())
    found["formula"] = "\n".join(line.strip() for line in texts["formula"] if line.strip())
    return found


def describe(cls: type[Mechanism]) -> dict[str, Any]:
    """One mechanism: its sections, implementation name and fields with defaults."""
    try:
        said = sections(inspect.getdoc(inspect.getmodule(cls)) or "")
    except ValueError as error:
        raise ValueError(f"{cls.__module__}: {error}") from None
    defaults = {f.name: getattr(cls, f.name, None) for f in fields(cls)}  # type: ignore[arg-type]
    return {
        "mechanism": cls.name,
        "class": cls.__name__,
        "attn_implementation": f"tfast_{cls.name}",
        "does": said["does"],
        "cost": said["Cost"],
        "causal": cls.causal,
        "causal_text": said["Causal"],
        "exact": said["Exact"],
        "source": said["Source"],
        "fields": defaults,
        "formula": said["formula"],
        "padding": said["Padding"],
        "differs": said["Differs"],
    }


def catalogue() -> list[dict[str, Any]]:
    """All mechanisms, in alphabetical order."""
    return [describe(cls) for cls in mechanisms().values()]


def markdown_table() -> str:
    """The README's table, without its markers."""
    rows = ["| mechanism | what it does | cost | causal | source |", "|---|---|---|---|---|"]
    for entry in catalogue():
        source = re.sub(r"[,.;:]?\s*(https?://[^\s,;]*[^\s,;.])", r" ([link](\1))", entry["source"])
        does = entry["does"][:1].upper() + entry["does"][1:]
        cells = (f"`{_signature(entry)}`", does, entry["cost"], "yes" if entry["causal"] else "no", source)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _signature(entry: dict[str, Any]) -> str:
    return f"{entry['class']}({', '.join(entry['fields'])})"


def renew(text: str) -> str:
    """`text`, a README, with the table between its markers made anew. ValueError where the markers are missing."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected one line {BEGIN!r} and after it one line {END!r}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{markdown_table()}\n{END}{rest.split(END)[1]}"
