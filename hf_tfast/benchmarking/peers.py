"""The suite `peers`: Transformers' own efficient attention modules, each against the mechanism that does its job.

Longformer      the same window of 128 on each side: the same pairs, the same numbers
BigBird         blocks of 64, 3 random: Random with as many pairs
Reformer        1 and 4 hashes: Hashed that finds at least as much of the dense weight on the same queries and keys
Nystromformer   64 landmarks: Nystrom after 6 steps, the same numbers, and after up to 64
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..attention import mechanism_from_dict
from ..attention.nystrom import Nystrom
from ..attention.random import Random
from ..attention.window import Window
from . import peer_modules as modules
from .campaign import Record, Report, Suite, same_case
from .peer_modules import bigbird_density, peer
from .peer_pages import draw, markdown
from .recall import density, match, shared_module
from .workload import SDPA, CannotRun, Case, Competitor, label, make_inputs, workload

WINDOW, BLOCK, BLOCKS, LANDMARKS, HASHES = 128, 64, 3, 64, (1, 4)


@dataclass(frozen=True)
class Pair:
    """A peer and what does its job here. `equal`: the same mathematics, so that outputs can be compared."""

    peer: Competitor
    ours: Competitor
    equal: bool = False


def pairs(case: Case, records: Sequence[Record]) -> list[Pair]:
    """All pairs; Hashed as `match` found it for the case's length."""
    longformer = _peer(f"Longformer, window {WINDOW}", modules.longformer, window=WINDOW)
    bigbird = _peer(f"BigBird, {BLOCKS} random blocks of {BLOCK}", modules.bigbird, block=BLOCK, blocks=BLOCKS)
    nystromformer = _peer(f"Nystromformer, {LANDMARKS} landmarks", modules.nystromformer, landmarks=LANDMARKS)
    found = [
        Pair(longformer, _own("Window", Window(window=WINDOW)), equal=True),
        Pair(bigbird, _own("Random", Random(window=64, sinks=128, blocks=2, block=BLOCK))),
        Pair(nystromformer, _own("Nystrom, 6 steps", Nystrom(landmarks=LANDMARKS, iterations=6)), equal=True),
        Pair(nystromformer, _own("Nystrom, 64 steps", Nystrom(landmarks=LANDMARKS, iterations=64))),
    ]
    for hashes in HASHES:
        who = _peer(f"Reformer, {hashes} {'hash' if hashes == 1 else 'hashes'}", modules.reformer, hashes=hashes)
        found.append(Pair(who, _hashed(case, records, hashes)))
    return found


def _peer(name: str, build: Any, **options: Any) -> Competitor:
    return Competitor(name, series=name, build=peer(build, **options))


def _own(name: str, mechanism: Any) -> Competitor:
    return Competitor(label(mechanism), mechanism, series=name)


def _hashed(case: Case, records: Sequence[Record], hashes: int) -> Competitor:
    series = f"Hashed for {hashes}"
    matched = [r for r in records if r["kind"] == "match" and r["hashes"] == hashes and r["length"] == case.length]
    if not matched or matched[-1]["mechanism"] is None:

        def refuse(case: Case, inputs: Any) -> Any:
            raise CannotRun("no setting of the grid reaches the recall" if matched else "not matched at this length")

        return Competitor(series, series=series, build=refuse)
    mechanism = mechanism_from_dict(matched[-1]["mechanism"])
    build = partial(shared_module, mechanism=mechanism)
    return Competitor(f"{label(mechanism)} for {hashes}", mechanism, series=series, build=build)


def competitors(case: Case, records: Sequence[Record]) -> list[Competitor]:
    """SDPA, then every peer and what stands against it."""
    return list({who.series: who for pair in pairs(case, records) for who in (SDPA, pair.peer, pair.ours)}.values())


def prepare(case: Case, records: Sequence[Record], report: Report) -> list[Record]:
    """Matched settings of Hashed and densities, once a length; the differences of outputs, once a length and dtype."""
    made: list[Record] = []
    plain = replace(case, dtype="fp32", passes="forward")
    for hashes in HASHES:
        if not any(r["kind"] == "match" and r["hashes"] == hashes and r["length"] == case.length for r in records):
            report(f"matching Hashed with Reformer's {hashes} hashes at L={case.length}")
            made.append(match(plain, hashes))
    if not any(r["kind"] == "density" and r["length"] == case.length for r in records):
        figures = {who.series: density(plain, who.mechanism) for pair in pairs(plain, [*records, *made])
                   if (who := pair.ours).mechanism is not None and who.build is None}  # fmt: skip
        figures[f"BigBird, {BLOCKS} random blocks of {BLOCK}"] = bigbird_density(case.length, BLOCK, BLOCKS)
        made += [{"kind": "density", "series": series, "length": case.length, "density": value}
                 for series, value in figures.items() if value is not None]  # fmt: skip
    told = [r for r in records if r["kind"] == "difference" and same_case(r, case, "length", "dtype")]
    if not told:
        report(f"comparing outputs at L={case.length}, {case.dtype}")
        for pair in pairs(case, []):
            if pair.equal:
                made.append(difference(replace(case, passes="forward"), pair))
    return made


def difference(case: Case, pair: Pair) -> Record:
    """The largest difference between outputs of a pair of equal mathematics, beside the largest output."""
    record = {"kind": "difference", "series": pair.ours.series, "peer": pair.peer.series, "length": case.length,
              "dtype": case.dtype, "difference": None, "largest": None}  # fmt: skip
    inputs = make_inputs(case)
    try:
        theirs, mine = (workload(case, who, inputs)().float() for who in (pair.peer, pair.ours))
    except CannotRun as error:
        return {**record, "why": str(error)}
    torch._check(theirs.shape == mine.shape)
    return {**record, "difference": (theirs - mine).abs().max().item(), "largest": theirs.abs().max().item()}


SUITE = Suite("peers", (False,), competitors, prepare, markdown, draw, content="topics", patience=10.0)
