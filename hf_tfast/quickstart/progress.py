"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVERY = 15.0  # seconds between plain lines


class Steps:
    """Tells how far the work is: `to(done)` in the unit of `total`, with a note."""

    def __init__(self, console: Console, label: str, total: float, bar: Progress | None) -> None:
        self.console, self.label, self.total, self.bar = console, label, total, bar
        self.task = None if bar is None else bar.add_task(label, total=total, note="")
        self.told = time.monotonic()

    def to(self, done: float, note: str = "") -> None:
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, note=note)
        elif time.monotonic() - self.told >= EVERY:
            self.told = time.monotonic()
            self.console.print(f"  {self.label}: {done:.0f} of {self.total:.0f} {note}".rstrip(), highlight=False)


@contextmanager
def steps(console: Console, label: str, total: float) -> Iterator[Steps]:
    """A `Steps` for `total` units of work called `label`."""
    if not console.is_terminal:
        console.print(label, highlight=False)
        yield Steps(console, label, total, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as bar:
        yield Steps(console, label, total, bar)
