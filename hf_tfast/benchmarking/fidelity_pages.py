"""Tables and plots of what `tfast fidelity` measures."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .budgets import TURNED
from .environment import describe
from .pages import share, table
from .plot import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXACT = 1e-4  # errors below come from rounding in fp32
FIGURES = ("error", "cosine", "recall", "density", "far", "found")


@dataclass(frozen=True)
class Summary:
    """One mechanism at one budget over all layers; the figures are those of fidelity.py."""

    mechanism: str
    label: str
    worst: float
    error: float
    cosine: float
    recall: float | None
    density: float | None
    far: float | None = None
    found: float | None = None
    rounds: int | None = None


def mean(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of the figures; None where one of them has none."""
    return {name: None if any(r.get(name) is None for r in found) else sum(r[name] for r in found) / len(found)
            for name in FIGURES}  # fmt: skip


def summaries(records: Sequence[dict[str, Any]], kind: str = "fidelity") -> list[Summary]:
    """Means over layers, in the order of the records; `worst` is the largest error of a layer."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["kind"] == kind:
            groups.setdefault(record["label"], []).append(record)
    return [
        Summary(
            same[0]["mechanism"], name, worst=max(r["error"] for r in same), rounds=same[0].get("rounds"), **mean(same)
        )
        for name, same in groups.items()
    ]


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """All tables, with what they were measured on."""
    parts = [_main(records)]
    if any(r["kind"] == "made up" for r in records):
        parts += [_rounds(records), _far(records)]
    about = next(r for r in records if r["kind"] == "input")
    layers = len({(r["stack"], r["layer"]) for r in records if r["kind"] == "fidelity"})
    tokens = ", ".join(map(str, about["tokens"]))
    parts.append(
        f"Model: {about['model']}, {layers} layers, dense inputs to each, fp32. "
        f"Text: {about['corpus']}, documents of {tokens} tokens.\n"
    )
    machines = [r for r in records if r["kind"] == "environment"]
    for machine in machines:
        parts.append(f"Machine: {describe(machine)}\n\nMade by: `{machine['command']}`\n")
    return "\n".join(parts)


def _main(records: Sequence[dict[str, Any]]) -> str:
    head = [
        "mechanism",
        "density",
        "recall of attention mass",
        "relative error, mean of layers",
        "worst layer",
        "cosine",
    ]
    rows = [
        [f"`{s.label}`", share(s.density), share(s.recall), f"{s.error:.3g}", f"{s.worst:.3g}", f"{s.cosine:.4f}"]
        for s in summaries(records)
    ]
    rows += [[f"`{r['label']}`", f"skipped: {r['why']}", "", "", "", ""] for r in records if r["kind"] == "skipped"]
    return table(head, rows)


def _rounds(records: Sequence[dict[str, Any]]) -> str:
    """How recall grows with the rounds of Hashed."""
    made_up = {s.label: s for s in summaries(records, "made up")}
    mine = [s for s in summaries(records) if s.mechanism == "hashed" and s.label in made_up]
    if not mine:
        return ""
    head = [
        "",
        "density on text",
        "recall",
        "relative error",
        "density on the made-up pattern",
        "recall",
        "relative error",
    ]
    rows = []
    for s in mine:
        other = made_up[s.label]
        cells = [cell for x in (s, other) for cell in (share(x.density), share(x.recall), f"{x.error:.3g}")]
        rows.append([f"`{s.label}`", *cells])
    return f"Recall of attention mass over rounds of hashing:\n\n{table(head, rows)}"


def _far(records: Sequence[dict[str, Any]]) -> str:
    """What patterns find outside a window that is as dense as they are."""
    made_up = {s.label: s for s in summaries(records, "made up")}
    head = ["", "density on text", "mass beyond the window", "of it found", "density on the made-up pattern",
            "mass beyond the window", "of it found"]  # fmt: skip
    rows = []
    for s in summaries(records):
        other = made_up.get(s.label)
        if s.density is not None and other is not None:
            cells = [share(x) for y in (s, other) for x in (y.density, y.far, y.found)]
            rows.append([f"`{s.label}`", *cells])
    return f"Far keys, those beyond a window of the same density:\n\n{table(head, rows)}" if rows else ""


def draw(records: Sequence[dict[str, Any]], folder: Path) -> None:
    """error.png, and hashed.png where Hashed was measured on the made-up pattern too."""
    error_plot(records, folder / "error.png")
    if any(r["kind"] == "made up" and r["mechanism"] == "hashed" for r in records):
        hashed_plot(records, folder / "hashed.png")


def _without_budget(s: Summary) -> str:
    """The label without the field that is turned for more or fewer pairs: what one line of the plot has in common."""
    field = TURNED.get(s.mechanism)
    return s.label if field is None else re.sub(rf"(?<=[(\s]){field}=[^,)]*(, )?", "", s.label).replace(", )", ")")


def _short(label: str) -> str:
    return label if len(label) <= 52 else f"{label[:49]}..."


def error_plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Left: error over density for patterns, a line a mechanism. Right: the others, a point a budget."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = summaries(records)
    colour = {name: COLOURS[n % len(COLOURS)] for n, name in enumerate(dict.fromkeys(s.mechanism for s in found))}
    sparse = [s for s in found if s.density is not None]
    other = sorted((s for s in found if s.density is None), key=lambda s: (s.mechanism, -s.error))
    figure = Figure(figsize=(14, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1), sharey=False)
    lines: dict[str, list[Summary]] = {}
    for s in sparse:
        lines.setdefault(_without_budget(s), []).append(s)
    styles = {name: iter(("-", "--", ":", "-.")) for name in colour}
    for name, same in lines.items():
        points = sorted((s.density or 0.0, s.error) for s in same)
        style = {"linestyle": next(styles[same[0].mechanism], "-"), "color": colour[same[0].mechanism]}
        left.plot(*zip(*points, strict=True), marker="o", label=_short(name), markersize=4, linewidth=1.6, **style)
    if inexact := [s.error for s in sparse if s.error > EXACT]:
        left.set_ylim(min(inexact) / 2, max(inexact) * 1.5)  # points of the full budget lie far below
    left.set(xscale="log", yscale="log", xlabel="density: share of the pairs read", ylabel="relative error")
    left.set_title("patterns of pairs", loc="left", fontsize=10)
    if sparse:
        left.legend(frameon=False, fontsize=8)
    right.scatter([s.error for s in other], range(len(other)), color=[colour[s.mechanism] for s in other], s=26)
    right.set_yticks(range(len(other)), [_short(s.label) for s in other], fontsize=8)
    right.set(xscale="log", xlabel="relative error")
    right.set_title("approximations of all pairs", loc="left", fontsize=10)
    for axes in (left, right):
        axes.grid(True, which="major", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    about = next(r for r in records if r["kind"] == "input")
    figure.suptitle(
        f"attention outputs against dense, mean over layers: {about['model']}, {max(about['tokens'])} tokens",
        x=0.01, ha="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    figure.savefig(path, dpi=130)


def hashed_plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Above: recall over the rounds of Hashed. Below: far keys found over density, beside a window and chance."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2)
    about = next(r for r in records if r["kind"] == "input")
    kinds = {"fidelity": f"{about['model']}, {max(about['tokens'])} tokens", "made up": "made up: one key sought"}
    for column, (kind, title) in enumerate(kinds.items()):
        found = [s for s in summaries(records, kind) if s.density is not None]
        _growth(panels[0, column], [s for s in found if s.mechanism == "hashed"])
        _distance(panels[1, column], found)
        panels[0, column].set_title(title, loc="left", fontsize=10)
    for axes in panels.flat:
        axes.grid(True, color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=7.5)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.suptitle(
        "Hashed: recall over rounds, and far keys found", x=0.01, ha="left", fontsize=12, fontweight="bold"
    )
    figure.savefig(path, dpi=130)


def _growth(axes: "Axes", hashed: Sequence[Summary]) -> None:
    """Recall (line) and density (dots) over rounds."""
    lines: dict[str, list[Summary]] = {}
    for s in hashed:
        lines.setdefault(_without_budget(s), []).append(s)
    for n, (name, same) in enumerate(lines.items()):
        same = sorted(same, key=lambda s: s.rounds or 0)
        at, paint = [s.rounds or 0 for s in same], COLOURS[n]
        axes.plot(
            at, [100 * (s.recall or 0) for s in same], marker="o", markersize=4, color=paint, label=f"{name}: recall"
        )
        axes.plot(at, [100 * (s.density or 0) for s in same], linestyle=":", color=paint, label="its density")
    axes.set_xscale("log", base=2)
    ticks = sorted({s.rounds or 0 for s in hashed})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.set_ylim(bottom=0)
    axes.set(xlabel="rounds", ylabel="% of attention mass, % of pairs")


def _distance(axes: "Axes", found: Sequence[Summary]) -> None:
    """Share of the mass beyond a window of the same density that is found, over density."""
    lines: dict[str, list[Summary]] = {}
    for s in found:
        if s.mechanism in ("hashed", "random", "window", "topk") and s.found is not None:
            lines.setdefault(_without_budget(s), []).append(s)
    families = list(dict.fromkeys(same[0].mechanism for same in lines.values()))
    styles = {name: iter(("-", "--", ":")) for name in families}
    for name, same in lines.items():
        points = sorted((100 * (s.density or 0), 100 * (s.found or 0)) for s in same)
        family = same[0].mechanism
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name,
                  color=COLOURS[families.index(family)], linestyle=next(styles[family], "-"))  # fmt: skip
    if lines:
        known = [100 * (s.density or 0) for same in lines.values() for s in same]
        chance = [min(known) * (max(known) / min(known)) ** (n / 50) for n in range(51)]
        axes.plot(chance, chance, color="0.6", linewidth=1, linestyle=(0, (2, 2)), label="by chance")
    axes.set(xscale="log", xlabel="density, % of pairs", ylabel="% found of what an equally dense window misses")
