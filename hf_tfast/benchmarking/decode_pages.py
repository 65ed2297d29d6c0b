"""Tables and the plot of the suite `decode`."""

from collections.abc import Sequence
from pathlib import Path

from .pages import Record, find, foot, ms, spread, table, times
from .plot import COLOURS

RIVALS = ("SDPA", "SDPA, DynamicCache")
TITLES = {"attention": "Attention of one layer", "model": "Llama-like model"}


def split(series: str) -> tuple[str, str]:
    """ "attention, SDPA, DynamicCache" -> ("attention", "SDPA, DynamicCache")"""
    what, _, who = series.partition(", ")
    return what, who


def kinds(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Pairs of what is measured and dtype."""
    found = [(split(r["series"])[0], r["dtype"]) for r in records if r["kind"] == "timing"]
    return sorted(set(found), key=lambda kind: (kind[0], kind[1] != "fp32"))


def of(records: Sequence[Record], what: str, dtype: str) -> list[Record]:
    """The timings of one kind, short ones first."""
    mine = [r for r in records if r["kind"] == "timing" and split(r["series"])[0] == what and r["dtype"] == dtype]
    return sorted(mine, key=lambda r: r["length"])


def markdown(records: Sequence[Record]) -> str:
    """A table for what is measured in each dtype."""
    parts = [f"### {TITLES[what]}, {dtype}\n\n{_table(records, what, dtype)}" for what, dtype in kinds(records)]
    return "\n".join([*parts, foot(records)])


def _table(records: Sequence[Record], what: str, dtype: str) -> str:
    mine = of(records, what, dtype)
    head = ["cached tokens", "who", "p50, ms", "quartiles", "p99, ms", "n", "cache MiB",
            *(f"against {name}" for name in RIVALS)]  # fmt: skip
    rows = []
    for r in mine:
        if "skipped" in r:
            rows.append([str(r["length"]), split(r["series"])[1], "-", r["skipped"], *[""] * 5])
            continue
        held = find(records, kind="cache", series=r["series"], length=r["length"], dtype=dtype)
        size = "-" if held is None else f"{held['bytes'] / 2**20:.2f}"
        late = ms(r["p99"]) if "p99" in r else "-"
        faster = []
        for rival in RIVALS:
            base = find(mine, series=f"{what}, {rival}", length=r["length"]) or {}
            faster.append(times(base["seconds"] / r["seconds"]) if "seconds" in base else "-")
        name, count = split(r["series"])[1], str(len(r["samples"]))
        rows.append([str(r["length"]), name, ms(r["seconds"]), spread(r), late, count, size, *faster])
    return table(head, rows, 2)


def draw(records: Sequence[Record], folder: Path, subtitle: str) -> None:
    """decode.png: a step's time over the tokens cached, p50 as a line and p99 above it; and what the cache takes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = kinds(records)
    dtypes = list(dict.fromkeys(dtype for _, dtype in panels))
    if not panels:
        return
    whats = list(dict.fromkeys(what for what, _ in panels))
    names = list(dict.fromkeys(split(r["series"])[1] for r in records if r["kind"] == "timing"))
    others = [name for name in names if name not in RIVALS]
    colour = {name: COLOURS[n % len(COLOURS)] for n, name in enumerate(others)} | dict.fromkeys(RIVALS, "black")
    figure = Figure(figsize=(5.0 * len(dtypes), 3.8 * (len(whats) + 1) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(whats) + 1, len(dtypes), squeeze=False, sharex=True, sharey="row")
    for column, dtype in enumerate(dtypes):
        for row, what in enumerate(whats):
            _times(axes[row][column], of(records, what, dtype), colour)
            axes[row][column].set_title(f"{TITLES[what]}, {dtype}", loc="left", fontsize=10)
        held = [r for r in records if r["kind"] == "cache" and split(r["series"])[0] == whats[0]]
        _bytes(axes[-1][column], [r for r in held if r["dtype"] == dtype], colour)
        axes[-1][column].set_title(f"cache of one layer, {dtype}", loc="left", fontsize=10)
        axes[-1][column].set_xlabel("tokens cached", fontsize=9)
    for each in axes[:, 0]:
        each.set_ylabel("ms a step: p50, and p99 above", fontsize=9)
    axes[-1][0].set_ylabel("MiB", fontsize=9)
    lengths = sorted({r["length"] for r in records if r["kind"] == "timing"})
    for each in axes.flat:
        each.set_xscale("log", base=2)
        each.set_yscale("log")
        each.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
        each.yaxis.set_major_formatter(lambda y, _: f"{y:,.10g}")
        each.grid(True, color="0.9", linewidth=0.8)
        each.set_axisbelow(True)
        each.tick_params(labelsize=8)
        for side in ("top", "right"):
            each.spines[side].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=7.5)
    figure.suptitle("one step of generation", x=0.01, ha="left", fontweight="bold")
    figure.supxlabel(subtitle, x=0.01, ha="left", fontsize=7, color="0.4")
    figure.savefig(folder / "decode.png", dpi=130)


def _times(axes: "object", records: Sequence[Record], colour: dict[str, str]) -> None:
    for name, paint in colour.items():
        mine = [r for r in records if split(r["series"])[1] == name and "skipped" not in r]
        x, y = [r["length"] for r in mine], [r["seconds"] * 1e3 for r in mine]
        if not mine:
            continue
        late = [(r["p99"] if "p99" in r else r["seconds"]) * 1e3 for r in mine]
        style = "o--" if name == RIVALS[1] else "o-"
        axes.plot(x, y, style, color=paint, markersize=4, label=name)  # type: ignore[attr-defined]
        axes.vlines(x, y, late, color=paint, alpha=0.35, linewidth=1.2)  # type: ignore[attr-defined]
        axes.plot(x, late, "_", color=paint, alpha=0.6, markersize=7)  # type: ignore[attr-defined]


def _bytes(axes: "object", records: Sequence[Record], colour: dict[str, str]) -> None:
    for name, paint in colour.items():
        mine = sorted((r["length"], r["bytes"] / 2**20) for r in records if split(r["series"])[1] == name)
        if mine:
            style = "o--" if name == RIVALS[1] else "o-"
            axes.plot(*zip(*mine, strict=True), style, color=paint, markersize=4)  # type: ignore[attr-defined]
