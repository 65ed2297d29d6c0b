"""What a person sees while and after something is measured: progress on standard error, tables on standard output."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


@contextmanager
def progress(quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Yield `report(text)`: a spinner that says what runs, or plain lines where there is no terminal."""
    console = Console(stderr=True)
    if quiet:
        yield lambda text: None
    elif not console.is_terminal:
        yield lambda text: console.print(escape(text), highlight=False, soft_wrap=True)
    else:
        with console.status("starting") as status:
            yield lambda text: status.update(escape(text))


def show_catalogue(entries: Sequence[dict[str, Any]]) -> None:
    """The mechanisms, one row each."""
    table = Table(title="attn_implementation, or a mechanism of a FastPlan", title_justify="left", show_lines=True)
    for name in ("name", "what it does", "cost", "causal", "source"):
        table.add_column(name, overflow="fold")
    for entry in entries:
        causal = "yes" if entry["causal"] else "no"
        cells = (entry["attn_implementation"], entry["does"], entry["cost"], causal, entry["source"])
        table.add_row(*(escape(cell) for cell in cells))
    Console().print(table)


def show_timings(records: Sequence[dict[str, Any]], folder: Path) -> None:
    """Tables of a benchmark run, its targets, and where it was written."""
    from .environment import busy, describe
    from .table import terminal_tables

    console = Console()
    for table in terminal_tables(records):
        console.print(table)
        console.print()
    if targets := [r for r in records if r["kind"] == "target"]:
        console.print(target_table(targets))
    console.print(f"Machine: {describe(records[0])}", highlight=False, style="dim")
    if warning := busy(records[0]):
        console.print(warning, style="bold red", highlight=False)
    console.print(f"Written to {folder}", highlight=False)


def show_page(text: str, folder: Path) -> None:
    """Tables in Markdown, as they are, and where they were written."""
    print(text)
    Console().print(f"Written to {folder}", highlight=False)


def target_table(targets: Sequence[dict[str, Any]]) -> Table:
    """Targets of a suite beside what was reached."""
    table = Table(title="targets, times as fast as SDPA", title_justify="left")
    table.add_column("case")
    for name in ("target", "reached"):
        table.add_column(name, justify="right")
    table.add_column("")
    for t in targets:
        reached = "-" if t["reached"] is None else f"{t['reached']:.2f}x"
        colour, word = ("green", "met") if t["met"] else ("red", "missed")
        table.add_row(escape(t["case"]), f"{t['target']:g}x", reached, f"[{colour}]{escape(t['note'] or word)}[/]")
    return table


def show_fidelity(records: Sequence[dict[str, Any]], folder: Path) -> None:
    """How near each mechanism came to dense attention, and where it was written."""
    from .environment import describe
    from .fidelity_pages import summaries

    table = Table(title="against dense attention, mean of layers", title_justify="left")
    table.add_column("mechanism", overflow="fold")
    for name in ("density", "recall", "error", "worst layer", "cosine"):
        table.add_column(name, justify="right")
    share = lambda x: "-" if x is None else f"{x:.1%}"  # noqa: E731
    for s in summaries(records):
        figures = (share(s.density), share(s.recall), f"{s.error:.3g}", f"{s.worst:.3g}", f"{s.cosine:.4f}")
        table.add_row(escape(s.label), *figures)
    console = Console()
    console.print(table)
    for record in records:
        if record["kind"] == "skipped":
            console.print(f"{record['label']}: skipped, {record['why']}", highlight=False)
    console.print(f"Machine: {describe(records[0])}", highlight=False, style="dim")
    console.print(f"Written to {folder}", highlight=False)
