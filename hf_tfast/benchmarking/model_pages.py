"""Tables and the plot of the suites `models` and `exported`.

A model with a fast attention is held against the sum of its parts, the same model without attention and the attention
of its layers alone.
"""

from collections.abc import Sequence
from pathlib import Path

from .pages import Record, find, foot, mib, ms, spread, table, times
from .plot import COLOURS
from .table import PASSES

# What each is held against first, in this order, where it has figures.
RIVALS = ("SDPA", "OpenVINO", "OpenVINO int8", "ONNX Runtime")
FLOOR, FAST, ALONE = "no attention", "Window", "attention of Window alone"


def families(records: Sequence[Record]) -> list[str]:
    """The models: what stands in front of the comma in the names of their timings."""
    return list(dict.fromkeys(r["series"].split(", ")[0] for r in records if r["kind"] == "timing"))


def kinds(records: Sequence[Record], family: str) -> list[tuple[str, str]]:
    """Pairs of dtype and passes in which something of a model has figures."""
    mine = [r for r in records if r["kind"] == "timing" and r["series"].startswith(family) and "skipped" not in r]
    return list(dict.fromkeys((r["dtype"], r["passes"]) for r in mine))


def markdown(records: Sequence[Record]) -> str:
    """A table for each model, dtype and pass."""
    parts = [
        f"### {family}, {dtype}, {PASSES[passes]}\n\n{_table(records, family, dtype, passes)}"
        for family in families(records)
        for dtype, passes in kinds(records, family)
    ]
    return "\n".join([*parts, foot(records)])


def _table(records: Sequence[Record], family: str, dtype: str, passes: str) -> str:
    mine = [r for r in records if r["kind"] == "timing" and r["series"].startswith(f"{family}, ")]
    mine = [r for r in mine if (r["dtype"], r["passes"]) == (dtype, passes)]
    rivals = [name for name in RIVALS if any(r["series"] == f"{family}, {name}" and "skipped" not in r for r in mine)]
    head = ["L", "model", "ms", "quartiles", "n", "peak MiB", *(f"against {name}" for name in rivals)]
    parted = any(r["series"] == f"{family}, {ALONE}" for r in mine)
    head += ["of its parts"] * parted
    rows = []
    for r in sorted(mine, key=lambda r: r["length"]):
        name = r["series"].removeprefix(f"{family}, ")
        if "skipped" in r:
            rows.append([str(r["length"]), name, "-", r["skipped"], "", "", *("" for _ in head[6:])])
            continue
        faster = []
        for rival in rivals:
            base = {} if name == ALONE else find(mine, series=f"{family}, {rival}", length=r["length"]) or {}
            faster.append(times(base["seconds"] / r["seconds"]) if "seconds" in base else "-")
        if parted:
            faster.append(_of_parts(mine, family, r) if name == FAST else "")
        count = str(len(r["samples"]) * r["repeats"])
        rows.append([str(r["length"]), name, ms(r["seconds"]), spread(r), count, mib(r), *faster])
    return table(head, rows, 2)


def _of_parts(records: Sequence[Record], family: str, r: Record) -> str:
    """How long a model takes, in terms of the sum of its parts."""
    parts = [find(records, series=f"{family}, {part}", length=r["length"]) or {} for part in (FLOOR, ALONE)]
    known = all("seconds" in part for part in parts)
    return times(r["seconds"] / sum(part["seconds"] for part in parts)) if known else "-"


def draw(records: Sequence[Record], folder: Path, subtitle: str) -> None:
    """models.png: time of one call over the length, a panel a model, dtype and pass."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    panels = [(family, *kind) for family in families(records) for kind in kinds(records, family)]
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.0 * columns, 3.9 * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    for n, (family, dtype, passes) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, n + 1)
        mine = [r for r in records if r["kind"] == "timing" and r["series"].startswith(f"{family}, ")]
        mine = [r for r in mine if (r["dtype"], r["passes"]) == (dtype, passes) and "skipped" not in r]
        others = 0
        for name in dict.fromkeys(r["series"] for r in mine):
            points = sorted((r["length"], r["seconds"]) for r in mine if r["series"] == name)
            short = name.removeprefix(f"{family}, ")
            dashed = ("OpenVINO" in short or "ONNX" in short) or short in (FLOOR, ALONE)
            colour = {"SDPA": "black", FLOOR: "0.55", ALONE: "0.75"}.get(short, COLOURS[others])
            others += colour == COLOURS[others]
            axes.plot(*zip(*points, strict=True), "o--" if dashed else "o-", color=colour, markersize=4, label=short)
        lengths = sorted({r["length"] for r in mine})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=12))
        axes.yaxis.set_major_formatter(lambda y, _: f"{y * 1e3:,.0f}")
        axes.minorticks_off()
        axes.set_ylabel("ms", fontsize=9)
        axes.set_title(f"{family}, {dtype}, {PASSES[passes]}", loc="left", fontsize=10)
        axes.grid(True, color="0.9", linewidth=0.8)
        axes.tick_params(labelsize=8)
        axes.legend(frameon=False, fontsize=7.5)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.suptitle("whole models, one call", x=0.01, ha="left", fontweight="bold")
    figure.supxlabel(subtitle, x=0.01, ha="left", fontsize=7, color="0.4")
    figure.savefig(folder / "models.png", dpi=130)
