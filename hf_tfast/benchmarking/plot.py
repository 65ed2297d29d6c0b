"""PNG plots over the length, log-log: one panel a group of timings, one line a competitor, SDPA in black."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .table import PASSES, Record, groups, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its black and its pale yellow.
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#7F7F7F",
    "#8C564B",
    "#5E3C99",
    "#1B7837",
    "#B8860B",
    "#00A3A3",
    "#C2185B",
    "#455A64",
)
VALUES: dict[str, tuple[str, Callable[[Record], float | None]]] = {
    "time": ("ms per call", lambda r: r["seconds"] * 1e3),
    "memory": ("peak MiB", lambda r: r["peak_bytes"] / 2**20 if r["peak_bytes"] else None),
}


def need_matplotlib() -> None:
    """ImportError that names the extra, before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'plots need matplotlib: pip install "hf_tfast[plots]", or leave them out: --no-plot'
        ) from error


def plot(records: Sequence[Record], path: Path, value: str = "time", subtitle: str = "") -> None:
    """Write the PNG of `value` ("time" or "memory"). Skipped cases have no point, and one length no panel."""
    need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(title, same) for title, same in groups(records) if has_lengths(same)]
    columns = min(len(panels), 2)
    rows = -(-len(panels) // max(columns, 1))
    figure = Figure(figsize=(7.0 * columns, 4.6 * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    mechanisms = [r["label"] for r in records if r.get("kind") == "timing" and r["mechanism"] is not None]
    colour = {name: COLOURS[n % len(COLOURS)] for n, name in enumerate(dict.fromkeys(mechanisms))}
    for n, (heading, same) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, n + 1)
        _panel(axes, same, value, colour)
        if value == "time":
            _floor(axes, [r for r in records if r.get("kind") == "floor" and title(r) == heading], colour)
    if panels:
        figure.suptitle(_common_title(panels), x=0.01, ha="left", fontsize=12, fontweight="bold")
    if subtitle:
        figure.supxlabel(subtitle, x=0.01, ha="left", fontsize=7, color="0.4")
    figure.savefig(path, dpi=130)


def has_lengths(records: Sequence[Record]) -> bool:
    """Is there more than one length to draw a line over?"""
    return len({r["length"] for r in records if r.get("kind") == "timing"}) > 1


def _common_title(panels: list[tuple[str, list[Record]]]) -> str:
    r = panels[0][1][0]
    heads = f"{r['heads']}" if r["heads"] == r["kv_heads"] else f"{r['heads']} query, {r['kv_heads']} key/value"
    kind = "causal" if r["causal"] else "bidirectional"
    return f"{kind} attention, {heads} heads x {r['width']}, batch {r['batch']}, {r['level']}, {r['device']}"


def _panel(axes: "Axes", records: list[Record], value: str, colour: dict[str, str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    name, read = VALUES[value]
    ends: list[tuple[float, float, str, str]] = []
    lengths = sorted({r["length"] for r in records})
    for label in dict.fromkeys(r["label"] for r in records):
        points = [(r, read(r)) for r in records if r["label"] == label and "skipped" not in r]
        x = [r["length"] for r, y in points if y]
        y = [y for _, y in points if y]
        if not x:
            continue
        dense = label not in colour
        paint = "black" if dense else colour[label]
        style: dict[str, Any] = {
            "linewidth": 2.4 if dense else 1.8,
            "zorder": 3 if dense else 2,
            "marker": "o",
            "markersize": 4,
        }
        axes.plot(x, y, color=paint, linestyle="--" if label == "SDPA masked" else "-", **style)
        if value == "time":
            spread = [r["quartiles"] for r, y in points if y]
            axes.fill_between(
                x, [q[0] * 1e3 for q in spread], [q[1] * 1e3 for q in spread], color=paint, alpha=0.15, lw=0
            )
        ends.append((x[-1], y[-1], label, paint))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))
    axes.minorticks_off()
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_title(f"{records[0]['dtype']}, {PASSES[records[0]['passes']]}", loc="left", fontsize=10)
    axes.set_xlabel("length L, tokens", fontsize=9)
    axes.set_ylabel(name, fontsize=9)
    axes.tick_params(labelsize=8)
    _label_ends(axes, ends)


def _floor(axes: "Axes", floors: Sequence[Record], colour: dict[str, str]) -> None:
    """The arithmetic floor of a mechanism, dotted in its colour."""
    for label in dict.fromkeys(r["label"] for r in floors):
        points = sorted((r["length"], r["seconds"] * 1e3) for r in floors if r["label"] == label)
        axes.plot(*zip(*points, strict=True), ":", color=colour[label], linewidth=1.4, label=f"matmuls of {label}")
    if floors:
        axes.legend(frameon=False, fontsize=8, loc="upper left")


def _label_ends(axes: "Axes", ends: list[tuple[float, float, str, str]]) -> None:
    """Names beside the last points, moved apart where they would overlap: no legend to look up."""
    if not ends:
        return
    right = axes.get_xlim()[1]
    axes.set_xlim(axes.get_xlim()[0], right * (right / axes.get_xlim()[0]) ** 0.04)
    transform = axes.transData
    longest = max(x for x, *_ in ends)
    placed: list[float] = []
    for x, y, label, paint in sorted(ends, key=lambda end: end[1]):
        pixel = wanted = transform.transform((x, y))[1]
        if x < longest:  # a line that ends early is steep: the place above its end, on the left, is free
            offset, align = (-6.0, 7.0), "right"
        else:
            wanted = max(pixel, placed[-1] + 16) if placed else pixel
            placed.append(wanted)
            offset, align = (8.0, (wanted - pixel) * 72 / axes.figure.dpi), "left"
        axes.annotate(
            label, (x, y), xytext=offset, textcoords="offset points", fontsize=8, color=paint,
            ha=align, va="center", annotation_clip=False,
        )  # fmt: skip
