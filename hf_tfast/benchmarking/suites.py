"""Named sets of cases, each with the speed-up over SDPA of the same dtype that it has to reach."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..attention import Mechanism
from ..attention.window import Window
from .speed import Timing, describe
from .workload import Case

if TYPE_CHECKING:
    from .campaign import Suite


@dataclass(frozen=True)
class Target:
    """`mechanism` has to be at least `least` times as fast as SDPA in `case`."""

    case: Case
    mechanism: Mechanism
    least: float


def targets() -> list[Target]:
    """Causal Window(256) at 8 heads x 64: long, short, and everything awkward at once.

    The awkward case (left padding, 8 query on 2 key/value heads, sinks, an odd length) has to keep 0.85 of the factor
    that the plain one has; it is held against SDPA that ignores the padding, the fastest one there is. The padding is
    short, so that leaving it out, which SDPA then does not do, is worth nothing.
    """
    base = Case(length=16384, heads=8, kv_heads=8, width=64, causal=True)
    plain, awkward = Window(window=256), Window(window=256, sinks=4)
    found = []
    for passes, dtype, factor in (
        ("forward", "fp32", 13.0),
        ("forward", "bf16", 30.0),
        ("both", "fp32", 14.0),
        ("both", "bf16", 16.0),
    ):
        case = replace(base, dtype=dtype, passes=passes)
        found.append(Target(replace(case, length=1024), plain, 0.95))
        if passes == "both":
            found.append(Target(replace(case, length=4096), plain, 4.0))
        found.append(Target(case, plain, factor))
        found.append(Target(replace(case, length=16385, kv_heads=2, left_padding=37), awkward, 0.85 * factor))
    return found


SUITES = {"targets": targets}
LONG = ("modules", "models", "peers", "decode", "exported")  # suites that take minutes and can be continued


def long_suite(name: str) -> "Suite":
    """The suite `name` of LONG, which is a file of that name."""
    return import_module(f".{name}", __package__).SUITE


def judge(wanted: Sequence[Target], timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """One record a target: what was asked, what was reached (None where it was not measured, with the reason)."""
    verdicts = []
    for target in wanted:
        form = target.mechanism.to_dict()
        timing = next((t for t in timings if t.case == target.case and t.mechanism == form), None)
        reached = None if timing is None else timing.speedup
        note = "not run" if timing is None else timing.skipped
        if note is None and reached is None:
            note = "SDPA was skipped: " + _why_no_baseline(target.case, timings)
        verdicts.append(
            {
                "kind": "target",
                "case": describe(target.case),
                "mechanism": form,
                "target": round(target.least, 4),
                "reached": reached,
                "met": reached is not None and reached >= target.least,
                "note": note,
            }
        )
    return verdicts


def _why_no_baseline(case: Case, timings: Sequence[Timing]) -> str:
    baseline = next((t for t in timings if t.case == case and t.label == "SDPA"), None)
    return "not run" if baseline is None or baseline.skipped is None else baseline.skipped


def verdict_lines(verdicts: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown table of targets."""
    lines = ["| case | target | reached | |", "|---|---:|---:|---|"]
    for v in verdicts:
        reached = "-" if v["reached"] is None else f"{v['reached']:.2f}x"
        mark = v["note"] or ("met" if v["met"] else "missed")
        lines.append(f"| {v['case']} | {v['target']:g}x | {reached} | {mark} |")
    return lines
