"""The suite `modules`: every mechanism in the place of SDPA, with the projections of a layer around it."""

from collections.abc import Sequence
from dataclasses import replace

from ..attention import mechanisms
from .budgets import speed_budget
from .campaign import Record, Report, Suite
from .module_pages import draw, markdown
from .recall import density
from .workload import SDPA, Case, Competitor, label


def competitors(case: Case, records: Sequence[Record]) -> list[Competitor]:
    """SDPA and every mechanism that has a form of the case's kind, at its budget for the length."""
    found = [SDPA]
    for name, cls in mechanisms().items():
        mechanism = speed_budget(name, case.length, case.causal)
        if mechanism is not None:
            found.append(Competitor(label(mechanism), mechanism, series=cls.__name__))
    return found


def prepare(case: Case, records: Sequence[Record], report: Report) -> list[Record]:
    """Densities, once a length and kind."""
    size = {"length": case.length, "causal": case.causal}
    if any(r["kind"] == "density" and r.items() >= size.items() for r in records):
        return []
    report(f"densities at L={case.length}, {'causal' if case.causal else 'bidirectional'}")
    plain, made = replace(case, dtype="fp32", passes="forward"), []
    for who in competitors(plain, records):
        if who.mechanism is not None:
            made.append({"kind": "density", "series": who.series, **size, "density": density(plain, who.mechanism)})
    return made


SUITE = Suite("modules", (False, True), competitors, prepare, markdown, draw)
