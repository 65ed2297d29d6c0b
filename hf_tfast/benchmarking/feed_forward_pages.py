"""Tables and the plot of the suite `feed_forward`."""

from collections.abc import Sequence
from pathlib import Path

from .feed_forward_rivals import BASELINE, FLOOR
from .pages import Record, find, foot, ms, share, spread, table, times
from .plot import COLOURS

INT8 = "Int8"
WANTED = {  # of Int8 in a BERT block: how many times as fast as whom, at how many rows
    "768-3072-768 gelu": {
        BASELINE: {512: 4.0, 4096: 4.0},
        "bf16": {512: 1.1, 4096: 1.1},
        "bitsandbytes": {512: 2.0, 4096: 3.0},
    }
}


def timings(records: Sequence[Record]) -> list[Record]:
    """The last record of every competitor in every race."""
    last = {(r["shape"], r["rows"], r["competitor"]): r for r in records if r["kind"] == "timing"}
    return list(last.values())


def ratio(records: Sequence[Record], than: str, who: str, shape: str, rows: int) -> float | None:
    """How many times as fast as `than`; None where one of them has no figures."""
    them, us = (find(records, kind="timing", competitor=name, shape=shape, rows=rows) for name in (than, who))
    return them["seconds"] / us["seconds"] if them and us and "seconds" in them and "seconds" in us else None


def markdown(records: Sequence[Record]) -> str:
    """What Int8 was to reach; how many times as fast as fp32 everybody is; every figure."""
    found = timings(records)
    shapes = list(dict.fromkeys(r["shape"] for r in found))
    parts = [_wanted(found), *(_shape(found, shape) for shape in shapes), *(_detail(found, shape) for shape in shapes)]
    return "\n".join([*filter(None, parts), foot(records)])


def _wanted(found: Sequence[Record]) -> str:
    rows = []
    for shape, goals in WANTED.items():
        for than, least in goals.items():
            for n, goal in least.items():
                reached = ratio(found, than, INT8, shape, n)
                if reached is not None:
                    floor = ratio(found, than, FLOOR, shape, n)
                    word = "met" if reached >= goal else "missed"
                    cells = ("-" if floor is None else times(floor), f"{goal:g}x", times(reached), word)
                    rows.append([f"{shape}, {n} rows", than, *cells])
    head = ["Int8 at", "times as fast as", "the integer products alone", "wanted", "reached", ""]
    return f"### Int8 against what it was to reach\n\n{table(head, rows, 2)}" if rows else ""


def _shape(found: Sequence[Record], shape: str) -> str:
    """Times as fast as fp32 at every number of rows, bytes, error."""
    mine = [r for r in found if r["shape"] == shape]
    counts = sorted({r["rows"] for r in mine})
    rows, notes = [], []
    for name in dict.fromkeys(r["competitor"] for r in mine):
        its = [r for r in mine if r["competitor"] == name]
        told = [r for r in its if "seconds" in r]
        if not told:
            notes.append(f"- {name}: {its[0]['skipped']}")
            continue
        cells = [ratio(mine, BASELINE, name, shape, n) for n in counts]
        most = max(told, key=lambda r: r["rows"])
        size = "-" if most["bytes"] is None else f"{most['bytes'] / 2**20:.2f}"
        faster = ["-" if x is None else f"**{times(x)}**" if x >= 1 and told[0]["ours"] else times(x) for x in cells]
        rows.append([f"`{name}`" if told[0]["ours"] else name, *faster, size, share(most["error"])])
    head = ["", *(f"{n} {'row' if n == 1 else 'rows'}" for n in counts), "MiB", "error"]
    text = f"### {shape}: times as fast as fp32\n\n{table(head, rows)}"
    return text + ("\nNot run:\n\n" + "\n".join(notes) + "\n" if notes else "")


def _detail(found: Sequence[Record], shape: str) -> str:
    mine = [r for r in found if r["shape"] == shape and "seconds" in r]
    counts = sorted({r["rows"] for r in mine})
    rows = []
    for name in dict.fromkeys(r["competitor"] for r in mine):
        its = [find(mine, competitor=name, rows=n) for n in counts]
        rows.append([name, *("-" if r is None else f"{ms(r['seconds'])} ({spread(r)})" for r in its)])
    head = ["", *(f"{n} {'row' if n == 1 else 'rows'}" for n in counts)]
    return f"### {shape}: ms (quartiles)\n\n{table(head, rows)}"


def draw(records: Sequence[Record], folder: Path, subtitle: str) -> None:
    """feed-forward.png: times as fast as fp32 over the number of rows, a panel a shape, ours drawn thicker."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    found = [r for r in timings(records) if "seconds" in r]
    shapes = list(dict.fromkeys(r["shape"] for r in found))
    if not shapes:
        return
    names = [name for name in dict.fromkeys(r["competitor"] for r in found) if name not in (BASELINE, FLOOR)]
    columns = min(2, len(shapes))
    figure = Figure(figsize=(5.4 * columns + 2.2, 3.6 * -(-len(shapes) // columns) + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(-(-len(shapes) // columns), columns, squeeze=False)
    for axes, shape in zip(panels.flat, shapes, strict=False):
        counts = sorted({r["rows"] for r in found if r["shape"] == shape})
        axes.axhline(1, color="black", lw=1)
        for name, style in [
            (FLOOR, {"color": "0.6", "ls": ":", "lw": 1.4}),
            *((n, _style(n, names, found)) for n in names),
        ]:
            points = [(n, x) for n in counts if (x := ratio(found, BASELINE, name, shape, n)) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", ms=3.5, label=name, **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(counts, [str(n) for n in counts])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}x" if y >= 1 else f"1/{1 / y:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(True, color="0.92")
        axes.set_axisbelow(True)
        axes.set_title(shape, loc="left", fontsize=10)
        axes.set_xlabel("rows", fontsize=9)
        axes.tick_params(labelsize=8)
    for axes in panels.flat[len(shapes) :]:
        axes.set_visible(False)
    lines = {line.get_label(): line for axes in panels.flat for line in axes.get_lines() if line.get_label()[0] != "_"}
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize=8, frameon=False)
    figure.suptitle("times as fast as fp32, whole feed-forward in inference", x=0.01, ha="left", fontweight="bold")
    figure.supxlabel(subtitle, x=0.01, ha="left", fontsize=6.5, color="0.4")
    figure.savefig(folder / "feed-forward.png", dpi=130)


def _style(name: str, names: Sequence[str], found: Sequence[Record]) -> dict[str, object]:
    ours = any(r["ours"] for r in found if r["competitor"] == name)
    return {
        "color": COLOURS[names.index(name) % len(COLOURS)],
        "lw": 2.4 if ours else 1.4,
        "ls": "-" if ours else "--",
    }
