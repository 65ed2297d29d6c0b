"""A whole benchmark run: from what the command line says to a new folder of JSON lines, tables and plots."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from ..attention import Mechanism, mechanism_from_dict, mechanisms
from .environment import busy, environment
from .environment import describe as describe_machine
from .floor import floors
from .folder import check_new, fresh_name, new_folder
from .plot import has_lengths, need_matplotlib, plot
from .speed import Timing, measure
from .suites import LONG, SUITES, Target, judge, verdict_lines
from .table import groups, markdown
from .workload import SDPA, SDPA_MASKED, Case, Competitor, label

MARK = "results.jsonl"
Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where results go. `out` None takes a new folder under runs/."""

    out: Path | None = None
    overwrite: bool = False
    plots: bool = True

    def check(self) -> Path:
        """The folder, after making sure that writing there will work, so that no measurement is lost."""
        if self.plots:
            need_matplotlib()
        target = self.out or fresh_name("bench")
        check_new(target, self.overwrite, MARK)
        return target


def parse_mechanisms(said: Sequence[str], given: Sequence[str], causal: bool) -> list[Mechanism]:
    """Mechanisms of the command line: "window", or "window:window=256,sinks=4"; `given` fields ("window=256") are set
    on every mechanism that has them. None said: all that need no field and, under `causal`, have a causal form."""
    shared = dict(parse_field(text) for text in given)
    names = list(said) or [name for name, cls in mechanisms().items() if _runs_by_itself(cls, causal)]
    found, used = [], set()
    for text in names:
        name, _, own = text.partition(":")
        known = {f.name for f in fields(mechanisms()[name])} if name in mechanisms() else set()  # type: ignore[arg-type]
        used |= known & set(shared)
        values = {key: value for key, value in shared.items() if key in known}
        values |= dict(parse_field(part) for part in own.split(",") if part)
        mechanism = mechanism_from_dict({"mechanism": name, **values})
        if causal and not mechanism.causal:
            raise ValueError(f"{name} has no causal form; add --bidirectional")
        found.append(mechanism)
    if unused := set(shared) - used:
        raise ValueError(f"no chosen mechanism ({', '.join(names)}) has a field {sorted(unused)[0]!r}")
    return found


def parse_field(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"a field is given as name=value, for example window=256, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _runs_by_itself(cls: type[Mechanism], causal: bool) -> bool:
    try:
        return cls().causal or not causal
    except (TypeError, ValueError):  # a field that has no default, such as a graph's blocks
        return False


def grid(base: Case, lengths: Sequence[int], dtypes: Sequence[str], passes: Sequence[str]) -> list[Case]:
    """`base` at every length, dtype and pass."""
    return [replace(base, length=n, dtype=t, passes=p) for t, p, n in product(dtypes, passes, lengths)]


def bench(
    cases: Sequence[Case], who: Sequence[Mechanism], output: Output, *, rounds: int, seconds: float, report: Report
) -> tuple[Path, list[dict[str, Any]]]:
    """Time `who` against SDPA in every case; write the folder; return it and its records."""
    target = output.check()
    competitors = [SDPA, *(Competitor(label(m), m) for m in who)]
    if any(case.left_padding for case in cases):
        competitors.insert(1, SDPA_MASKED)
    if len({c.label for c in competitors}) < len(competitors):
        raise ValueError(f"a mechanism was given twice: {', '.join(c.label for c in competitors)}")
    records = [_machine(report)]
    timings = list(measure(cases, competitors, rounds=rounds, seconds=seconds, report=report))
    records.extend(timing.record() for timing in timings)
    records.extend(floors(timings))
    return _write(target, records, output), records


def bench_suite(
    name: str, output: Output, *, rounds: int, seconds: float, report: Report, base: dict[str, Any] | None = None
) -> tuple[Path, list[dict[str, Any]]]:
    """Run the targets of a suite; `base` replaces fields of its cases, such as the device or the level."""
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r}; there is {', '.join([*SUITES, *LONG])}")
    target = output.check()
    wanted = [Target(replace(t.case, **(base or {})), t.mechanism, t.least) for t in SUITES[name]()]
    records, timings = [_machine(report)], list[Timing]()
    for mechanism in dict.fromkeys(t.mechanism for t in wanted):
        cases = [t.case for t in wanted if t.mechanism == mechanism]
        who = [SDPA, Competitor(label(mechanism), mechanism)]
        timings.extend(measure(cases, who, rounds=rounds, seconds=seconds, report=report))
    records.extend(timing.record() for timing in timings)
    records.extend(floors(timings))
    records.extend(judge(wanted, timings))
    return _write(target, records, output), records


def _machine(report: Report) -> dict[str, Any]:
    record = {"kind": "environment", **environment()}
    report(describe_machine(record))
    if warning := busy(record):
        report(warning)
    return record


def _write(target: Path, records: Sequence[dict[str, Any]], output: Output) -> Path:
    with new_folder(target, overwrite=output.overwrite, mark=MARK) as folder:
        (folder / MARK).write_text("".join(json.dumps(record) + "\n" for record in records))
        verdicts = [r for r in records if r["kind"] == "target"]
        parts = [*verdict_lines(verdicts), ""] if verdicts else []
        (folder / "table.md").write_text("\n".join([*parts, markdown(records)]))
        if output.plots and any(has_lengths(same) for _, same in groups(records)):
            machine = describe_machine(records[0])
            for value in ("time", "memory"):
                plot(records, folder / f"{value}.png", value, machine)
    return target
