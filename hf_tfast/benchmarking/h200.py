"""The suite `h200`: what this project holds itself to on an NVIDIA H200, each goal a factor over a rival in one race.

bf16, 16 heads of width 128, rivals on the same tensors, in turns. SDPA flash is SDPA held to its flash kernel; SDPA is
what torch chooses by itself. On another device the same races run, and the table says which device it was.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..attention import Mask, attend, choose_backend
from ..attention.nystrom import Nystrom
from ..attention.performer import Performer
from ..attention.quantized import Quantized
from ..attention.window import Window
from . import h200_pages as pages
from .budgets import speed_budget
from .environment import busy, environment
from .environment import describe as describe_machine
from .folder import fresh_name
from .h200_rivals import FLASH, ours, rival, sliding
from .ledger import Ledger, begin, resume
from .pages import Record
from .plot import need_matplotlib
from .speed import Meter, describe
from .workload import SDPA, Case, Competitor, make_inputs

NAME = "h200"
WINDOW, LANDMARKS, FEATURES = 512, 64, 256
SHRINK = 128  # of every length in a quick run
ERROR, BYTES = 0.02, 0.55  # most of Quantized: relative error; bytes of codes, scales and means over those of bf16
Report = Callable[[str], None]


@dataclass(frozen=True)
class Goal:
    """The line `mine` has to be `least` times as fast as the line `over`."""

    mine: str
    over: str
    least: float


@dataclass(frozen=True)
class Race:
    case: Case
    who: tuple[Competitor, ...]
    goals: tuple[Goal, ...]

    @property
    def name(self) -> str:
        mine = dict.fromkeys(who.series.partition(",")[0] for who in self.who if who.mechanism is not None)
        return f"{' and '.join(mine)}: {describe(self.case)}"


@dataclass(frozen=True, kw_only=True)
class Run:
    """How the suite is run.

    quick     lengths divided by SHRINK and small heads, on any device: shows that everything runs, and judges nothing.
    seconds   an entry whose single call would take longer is skipped. rounds: samples of an entry at most.
    minutes   no race is begun after so many; the suite can be continued with `resume`.
    """

    device: str = "cuda"
    quick: bool = False
    out: Path | None = None
    resume: bool = False
    plots: bool = True
    rounds: int = 9
    seconds: float = 30.0
    minutes: float | None = None

    def __post_init__(self) -> None:
        if torch.device(self.device).type != "cuda" and not self.quick:
            raise ValueError(
                f"the suite {NAME} is about a GPU, and the device is {self.device!r}: add --device cuda, or --quick "
                "to try it at short lengths"
            )


def races(run: Run) -> list[Race]:
    """All races, short ones first. ValueError where the device is not there."""
    heads, width, part = (2, 16, SHRINK) if run.quick else (16, 128, 1)
    base = Case(dtype="bf16", heads=heads, kv_heads=heads, width=width, passes="both", device=run.device)
    at = lambda length, **given: replace(base, length=length // part, **given)  # noqa: E731
    found = [_window(at(32768))]
    found += [_topk(at(length, passes="forward"), least) for length, least in ((4096, 1.0), (32768, 5.0))]
    found += [_topk(at(length, level="module"), 1.0) for length in (8192, 16384, 32768)]
    performer = tuple(ours("Performer", Performer(features=FEATURES), backend) for backend in ("torch", "auto"))
    found.append(_over_flash(at(16384), performer, 5.0, judged=performer[-1:]))
    nystrom = ours("Nystrom", Nystrom(landmarks=LANDMARKS))
    found.append(_over_flash(at(16384, causal=False), (nystrom, *performer), 5.0, judged=(nystrom, performer[-1])))
    codes = (
        ours("Quantized", Quantized(bits=8)),
        ours("Quantized", Quantized(bits=8), "torch"),
        ours("Quantized with queries", Quantized(bits=8, queries=True)),
    )
    goals = tuple(Goal(who.series, FLASH.series, 1.0) for who in (codes[0], codes[2]))
    found += [Race(at(length, passes="forward"), (SDPA, FLASH, *codes), goals) for length in (4096, 16384, 32768)]
    return sorted(found, key=lambda race: race.case.length)


def _window(case: Case) -> Race:
    own, mechanism = rival("FlexAttention, sliding window", partial(sliding, window=WINDOW)), Window(window=WINDOW)
    ways = tuple(ours("Window", mechanism, backend) for backend in ("flex", "flash", "auto"))
    goals = (Goal("Window", own.series, 1.0), Goal("Window", FLASH.series, 10.0))
    return Race(case, (SDPA, FLASH, own, *ways), goals)


def _topk(case: Case, least: float) -> Race:
    """A tenth of the pairs."""
    mechanism = speed_budget("topk", case.length, case.causal)
    if mechanism is None:
        raise ValueError("TopK has no budget under causality")
    ways = tuple(ours("TopK", mechanism, backend) for backend in ("flex", "torch", "auto"))
    return _over_flash(case, ways, least, judged=ways[-1:])


def _over_flash(
    case: Case, who: tuple[Competitor, ...], least: float, judged: tuple[Competitor, ...] | None = None
) -> Race:
    goals = tuple(Goal(one.series, FLASH.series, least) for one in (who if judged is None else judged))
    return Race(case, (SDPA, FLASH, *who), goals)


def conduct(run: Run, report: Report) -> tuple[Path, list[Record]]:
    """Run what is not measured yet; write table and plot of all there is. Returns the folder and its records."""
    every = races(run)
    if run.plots:
        need_matplotlib()
    folder = run.out or fresh_name(f"bench-{NAME}")
    about = {"suite": NAME, "rounds": run.rounds, "quick": run.quick, "device": run.device}
    ledger = resume(folder, about) if run.resume else begin(folder, about)
    machine = {"kind": "environment", **environment()}
    report(describe_machine(machine))
    if warning := busy(machine):
        report(warning)
    left = [race for race in every if not any(r["race"] == race.name for r in ledger.of("timing"))]
    if left:
        ledger.add([machine])
    _run(left, run, ledger, report)
    (folder / "table.md").write_text(pages.markdown(ledger.records), encoding="utf-8")
    if run.plots:
        pages.draw(ledger.records, folder, describe_machine(machine))
    return folder, ledger.records


def _run(left: Sequence[Race], run: Run, ledger: Ledger, report: Report) -> None:
    meter, began = Meter(rounds=run.rounds, seconds=run.seconds, patience=4.0, baseline=3), time.monotonic()
    for number, race in enumerate(left, 1):
        if run.minutes is not None and time.monotonic() - began > 60 * run.minutes:
            report(f"{run.minutes:g} minutes are over before race {number} of {len(left)}: continue with --resume")
            return
        report(f"race {number} of {len(left)}: {race.name}")
        meter.report = lambda text, n=number: report(f"[{n}/{len(left)}] {text}")  # type: ignore[misc]
        timings = [{**timing.record(), "race": race.name} for timing in meter.race(race.case, race.who)]
        made = [*timings, *verdicts(race, timings), *_chosen(race), *_codes(race, run.quick)]
        ledger.add(made)


def verdicts(race: Race, timings: Sequence[Record]) -> list[Record]:
    """One record a goal: what was asked and what was reached, None where a side has no figure, with the reason."""
    found = []
    for goal in race.goals:
        mine, over = (_line(timings, series) for series in (goal.mine, goal.over))
        reached = None if "seconds" not in mine or "seconds" not in over else over["seconds"] / mine["seconds"]
        note = next((f"{r.get('series')}: {r['skipped']}" for r in (mine, over) if "skipped" in r), None)
        met = reached is not None and reached >= goal.least
        found.append({"kind": "goal", "race": race.name, "mine": goal.mine, "over": goal.over, "least": goal.least,
                      "reached": reached, "met": met, "note": note})  # fmt: skip
    return found


def _line(timings: Sequence[Record], series: str) -> Record:
    return next((r for r in timings if (r.get("series") or r["label"]) == series), {"skipped": "not run"})


def _chosen(race: Race) -> list[Record]:
    """The backend that each line of ours ran on: what `auto` chose after its own race, where that was asked for."""
    if race.case.level != "kernel":
        return []
    found, mask = [], Mask(causal=race.case.causal)
    q, k, v = make_inputs(race.case).tensors
    for who in race.who:
        if who.mechanism is not None and who.backend == "auto":
            try:
                backend = choose_backend(who.mechanism, "auto", q, k, v, mask)
            except RuntimeError as error:
                backend = f"none: {str(error).splitlines()[0][:200]}"
            found.append({"kind": "backend", "race": race.name, "series": who.series, "backend": backend})
    return found


@torch.no_grad()
def _codes(race: Race, quick: bool) -> list[Record]:
    """Of Quantized: the error against attention in fp32, and the bytes of a cache over those of bf16."""
    lines = [who for who in race.who if isinstance(who.mechanism, Quantized) and who.backend == "auto"]
    if not lines:
        return []
    case, found = race.case, list[Record]()
    q, k, v = make_inputs(case).tensors
    exact = scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=case.causal)
    for who in lines:
        line: dict[str, Any] = {"kind": "codes", "race": race.name, "series": who.series, "quick": quick}
        line |= {"most_error": ERROR, "most_bytes": BYTES, "error": None}
        store = who.mechanism.store()  # type: ignore[union-attr]
        store.append(k, v)
        line["bytes"] = store.nbytes / (k.nbytes + v.nbytes)
        try:
            o = attend(q, k, v, who.mechanism, Mask(causal=case.causal))  # type: ignore[arg-type]
            line["error"] = ((o.float() - exact).norm() / exact.norm()).item()
        except RuntimeError as error:
            line["note"] = str(error).splitlines()[0][:200]
        found.append(line)
    return found
