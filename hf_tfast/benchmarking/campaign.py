"""Suites that take minutes: many races, each kept as soon as it is run, continued where an earlier session stopped."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

from .environment import busy, environment
from .environment import describe as describe_machine
from .folder import fresh_name
from .ledger import Ledger, begin, resume
from .plot import need_matplotlib
from .speed import Meter, describe
from .workload import DTYPES, PASSES, Case, Competitor

Record = dict[str, Any]
Report = Callable[[str], None]
LENGTHS = (1024, 4096, 16384)
QUICK = (256, 1024)


@dataclass(frozen=True)
class Suite:
    """A named set of races.

    causal       which kinds there are.
    competitors  who runs in a case, given the records so far.
    prepare      records that a case needs beside its timings and that the ledger does not hold yet.
    markdown     the tables of its records. draw: its PNG plots, from records, into a folder, with a subtitle.
    patience     seconds of samples of one entry; a slower call is made once.
    passes       those that it has. rounds: samples of an entry at most, unless the run says another number.
    turn         samples that an entry takes in a row. sample: as in Meter.
    """

    name: str
    causal: tuple[bool, ...]
    competitors: Callable[[Case, Sequence[Record]], list[Competitor]]
    prepare: Callable[[Case, Sequence[Record], Report], list[Record]]
    markdown: Callable[[Sequence[Record]], str]
    draw: Callable[[Sequence[Record], Path, str], None]
    content: str = "normal"
    patience: float = 4.0
    level: str = "module"
    passes: tuple[str, ...] = PASSES
    rounds: int = 5
    turn: int = 1
    sample: float | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a suite is run.

    passes    None: all that the suite has. rounds: None, as many as the suite says.
    seconds   an entry whose single call would take longer is skipped, and says so.
    minutes   no race is begun after so many; the suite can be continued with `resume`.
    """

    out: Path | None = None
    resume: bool = False
    plots: bool = True
    lengths: Sequence[int] = LENGTHS
    dtypes: Sequence[str] = ("fp32", "bf16")
    passes: Sequence[str] | None = None
    rounds: int | None = None
    seconds: float = 60.0
    minutes: float | None = None
    base: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, known in (("dtypes", DTYPES), ("passes", PASSES)):
            if unknown := [x for x in getattr(self, name) or () if x not in known]:
                raise ValueError(f"{name} must be of {', '.join(known)}, got {unknown[0]!r}")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths must be at least 1, got {list(self.lengths)}")


def races(suite: Suite, run: Run) -> list[Case]:
    """The cases of a suite, short ones first, so that what is there after an interruption is whole in itself."""
    base, passes = {"level": suite.level, "content": suite.content, **run.base}, run.passes or suite.passes
    if lacking := [x for x in passes if x not in suite.passes]:
        raise ValueError(
            f"the suite {suite.name} has {', '.join(suite.passes)} alone; leave out --passes {lacking[0]}"
        )
    order = product(sorted(run.lengths), run.dtypes, passes, suite.causal)
    return [Case(length=n, dtype=t, passes=p, causal=c, **base) for n, t, p, c in order]


def conduct(suite: Suite, run: Run, report: Report) -> tuple[Path, list[Record]]:
    """Run what is not measured yet; write tables and plots of all there is. Returns the folder and its records."""
    if run.plots:
        need_matplotlib()
    cases, folder = races(suite, run), run.out or fresh_name(f"bench-{suite.name}")
    rounds = suite.rounds if run.rounds is None else run.rounds
    about = {"suite": suite.name, "rounds": rounds, "patience": suite.patience}
    ledger = resume(folder, about) if run.resume else begin(folder, about)
    machine = {"kind": "environment", **environment()}
    report(describe_machine(machine))
    if warning := busy(machine):
        report(warning)
    meter = Meter(rounds=rounds, seconds=run.seconds, patience=suite.patience, baseline=3, report=report,
                  turn=suite.turn, sample=suite.sample)  # fmt: skip
    _remember(meter, ledger)
    done = [_case(r) for r in ledger.of("timing")]
    began, told = time.monotonic(), False
    for number, case in enumerate(cases, 1):
        if case in done:
            continue
        if run.minutes is not None and time.monotonic() - began > 60 * run.minutes:
            report(f"{run.minutes:g} minutes are over before race {number} of {len(cases)}: continue with --resume")
            break
        if not told:
            ledger.add([machine])
            told = True
        report(f"race {number} of {len(cases)}: {describe(case)}")
        ledger.add(suite.prepare(case, ledger.records, report))
        meter.report = lambda text, n=number: report(f"[{n}/{len(cases)}] {text}")  # type: ignore[misc]
        ledger.add([timing.record() for timing in meter.race(case, suite.competitors(case, ledger.records))])
    write(suite, ledger.folder, ledger.records, run.plots)
    return folder, ledger.records


def write(suite: Suite, folder: Path, records: Sequence[Record], plots: bool) -> None:
    """table.md and the plots."""
    (folder / "table.md").write_text(suite.markdown(records), encoding="utf-8")
    machine = next((r for r in records if r["kind"] == "environment"), None)
    if plots and machine is not None:
        suite.draw(records, folder, describe_machine(machine))


def _case(record: Record) -> Case:
    return Case(**{f.name: record[f.name] for f in fields(Case)})


def _remember(meter: Meter, ledger: Ledger) -> None:
    for r in ledger.of("timing"):
        if "skipped" not in r:
            forecast = meter.forecast(_case(r), r.get("series") or r["label"])
            forecast.add(r["length"], r["seconds"], r["peak_bytes"] or 0)


def same_case(record: Record, case: Case, *names: str) -> bool:
    """Does a record speak of the case, as far as these fields go?"""
    given = asdict(case)
    return all(record[name] == given[name] for name in names)
