"""The suite `decode`: one step of generation over a cache of `length` tokens, by attention alone and by a whole model.

SDPA                 keys and values where they lie: no step of dense attention does less
SDPA, DynamicCache   what `generate` does without a plan: the cache is copied at every step
the others           a mechanism with the cache layer that a plan gives it

A sample is a single call, and TURN of them are made in a row before the next one's turn, as layers of one kind follow
each other in a model: the first of them finds the processor's caches filled by others. p99 is among all of them.
"""

from collections.abc import Sequence
from functools import partial

from ..attention import Mechanism
from ..attention.hashed import Hashed
from ..attention.performer import Performer
from ..attention.quantized import Quantized
from ..attention.topk import TopK
from ..attention.window import Window
from .campaign import Record, Report, Suite
from .decode_pages import draw, markdown
from .decode_steps import bytes_held, forget, run, steps
from .workload import Case, Competitor

ROUNDS, TURN = 400, 10
WHO: dict[str, Mechanism] = {
    "Window": Window(window=256),
    "TopK": TopK(k=512),
    "Hashed": Hashed(bits=8, rounds=2, cap=64, window=32),
    "Performer": Performer(features=256),
    "Quantized": Quantized(bits=8),
}
MODEL = ("Window", "TopK")  # those that a whole model is measured with


def competitors(case: Case, records: Sequence[Record]) -> list[Competitor]:
    """Dense attention in both its caches, then ours; the same for the whole model."""
    found = []
    for what, names in (("attention", tuple(WHO)), ("model", MODEL)):
        found.append(_one(f"{what}, SDPA", None, what=what, in_place=True))
        found.append(_one(f"{what}, SDPA, DynamicCache", None, what=what))
        found += [_one(f"{what}, {name}", WHO[name], what=what, fast=WHO[name]) for name in names]
    return found


def _one(name: str, mechanism: Mechanism | None, **options: object) -> Competitor:
    return Competitor(name, mechanism, series=name, build=partial(run, **options))  # type: ignore[arg-type]


def prepare(case: Case, records: Sequence[Record], report: Report) -> list[Record]:
    """Bytes of every cache; the race then steps through the same ones."""
    forget()
    made = []
    for who in competitors(case, records):
        report(f"filling the cache of {who.series} with {case.length} tokens")
        options = who.build.keywords  # type: ignore[union-attr]
        held = steps(options["what"], case, options.get("fast"), options.get("in_place", False))
        made.append({"kind": "cache", "series": who.series, "length": case.length, "dtype": case.dtype,
                     "bytes": bytes_held(held)})  # fmt: skip
    return made


SUITE = Suite(
    "decode", (True,), competitors, prepare, markdown, draw,
    patience=10.0, level="model", passes=("forward",), rounds=ROUNDS, turn=TURN, sample=0.0,
)  # fmt: skip
