"""Tables and the plot of the suite `peers`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .pages import Record, find, foot, mib, ms, share, spread, table, times
from .plot import COLOURS
from .table import PASSES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# series of the peer, series of what stands against it here
AGAINST = (
    ("Longformer, window 128", "Window"),
    ("BigBird, 3 random blocks of 64", "Random"),
    ("Reformer, 1 hash", "Hashed for 1"),
    ("Reformer, 4 hashes", "Hashed for 4"),
    ("Nystromformer, 64 landmarks", "Nystrom, 6 steps"),
    ("Nystromformer, 64 landmarks", "Nystrom, 64 steps"),
)


def sizes(records: Sequence[Record]) -> tuple[list[int], list[tuple[str, str]]]:
    """Lengths, and pairs of dtype and passes, of the timings."""
    timings = [r for r in records if r["kind"] == "timing"]
    return sorted({r["length"] for r in timings}), list(dict.fromkeys((r["dtype"], r["passes"]) for r in timings))


def ratio(records: Sequence[Record], peer: str, ours: str, **case: Any) -> float | None:
    """How many times as fast as the peer; None where one of them has no figures."""
    them, us = (find(records, kind="timing", series=name, **case) for name in (peer, ours))
    return them["seconds"] / us["seconds"] if them and us and "seconds" in them and "seconds" in us else None


def markdown(records: Sequence[Record]) -> str:
    """All tables: speed first, then what makes the comparison a fair one."""
    lengths, kinds = sizes(records)
    parts = [_overview(records, lengths, kinds), _matched(records), _differences(records), _densities(records)]
    parts += [_detail(records, lengths, dtype, passes) for dtype, passes in kinds]
    return "\n".join([*filter(None, parts), foot(records)])


def _overview(records: Sequence[Record], lengths: Sequence[int], kinds: Sequence[tuple[str, str]]) -> str:
    head = ["peer", "here", *(f"{t} {PASSES[p]}, L={n}" for t, p in kinds for n in lengths)]
    rows = []
    for peer, ours in AGAINST:
        cells = [ratio(records, peer, ours, dtype=t, passes=p, length=n) for t, p in kinds for n in lengths]
        rows.append([peer, ours, *("-" if cell is None else times(cell) for cell in cells)])
    return f"Times as fast as the peer:\n\n{table(head, rows, 2)}"


def _matched(records: Sequence[Record]) -> str:
    rows = []
    for r in sorted((r for r in records if r["kind"] == "match"), key=lambda r: (r["hashes"], r["length"])):
        form = r["mechanism"]
        said = "none reaches it" if form is None else ", ".join(f"{k}={form[k]}" for k in ("bits", "rounds", "cap"))
        theirs = (share(r["peer_recall"]), share(r["peer_density"]))
        rows.append([f"{r['hashes']}", str(r["length"]), *theirs, said, share(r["recall"]), share(r["density"])])
    head = ["hashes", "L", "Reformer: recall", "density", "Hashed", "recall", "density"]
    return (
        f"Hashed matched with Reformer, recall of the weight on other tokens:\n\n{table(head, rows, 0)}"
        if rows
        else ""
    )


def _differences(records: Sequence[Record]) -> str:
    rows = []
    for r in (r for r in records if r["kind"] == "difference"):
        cells = ["-", "-"] if r["difference"] is None else [f"{r['difference']:.1e}", f"{r['largest']:.2f}"]
        rows.append([r["peer"], r["series"], str(r["length"]), r["dtype"], *cells, r.get("why", "")])
    head = ["peer", "here", "L", "dtype", "largest difference", "largest output", ""]
    return f"Outputs where the mathematics is the same:\n\n{table(head, rows, 2)}" if rows else ""


def _densities(records: Sequence[Record]) -> str:
    found = [r for r in records if r["kind"] == "density"]
    lengths = sorted({r["length"] for r in found})
    rows = []
    for series in dict.fromkeys(r["series"] for r in found):
        cells = [find(found, series=series, length=n) for n in lengths]
        rows.append([series, *(share(r["density"]) if r else "-" for r in cells)])
    return f"Density, share of all pairs:\n\n{table(['', *(f'L={n}' for n in lengths)], rows)}" if rows else ""


def _detail(records: Sequence[Record], lengths: Sequence[int], dtype: str, passes: str) -> str:
    head = ["L", "module", "setting", "ms", "quartiles", "n", "peak MiB", "against SDPA"]
    rows = []
    for n in lengths:
        for r in (r for r in records if r["kind"] == "timing"):
            if (r["length"], r["dtype"], r["passes"]) != (n, dtype, passes):
                continue
            name = r.get("series") or r["label"]
            setting = "" if r["mechanism"] is None else f"`{r['label'].split(' for ')[0]}`"
            if "skipped" in r:
                rows.append([str(n), name, setting, "-", r["skipped"], "", "", ""])
                continue
            faster = "" if r["speedup"] is None else times(r["speedup"])
            count = str(len(r["samples"]) * r["repeats"])
            rows.append([str(n), name, setting, ms(r["seconds"]), spread(r), count, mib(r), faster])
    return f"### {dtype}, {PASSES[passes]}, module, bidirectional\n\n{table(head, rows, 3)}"


def draw(records: Sequence[Record], folder: Path, subtitle: str) -> None:
    """peers.png: how many times as fast as each peer, bars from 1 on a logarithmic axis, a panel a dtype and pass."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths, kinds = sizes(records)
    if not kinds:
        return
    columns = min(2, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(7.4 * columns, (0.9 + 0.24 * len(AGAINST) * (len(lengths) + 0.6)) * rows + 0.7),
                    layout="constrained")  # fmt: skip
    FigureCanvasAgg(figure)
    for n, (dtype, passes) in enumerate(kinds):
        axes = figure.add_subplot(rows, columns, n + 1)
        found = [[ratio(records, p, o, dtype=dtype, passes=passes, length=length) for length in lengths]
                 for p, o in AGAINST]  # fmt: skip
        _bars(axes, lengths, found)
        axes.set_title(f"{dtype}, {PASSES[passes]}", loc="left", fontsize=10)
    figure.suptitle("times as fast as the peer, whole module; red: slower", x=0.01, ha="left", fontweight="bold")
    figure.supxlabel(subtitle, x=0.01, ha="left", fontsize=7, color="0.4")
    figure.savefig(folder / "peers.png", dpi=130)


def _bars(axes: "Axes", lengths: Sequence[int], found: Sequence[Sequence[float | None]]) -> None:
    """One panel: a group of bars a pair, one bar a length, longer lengths darker."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    height, known = 0.84 / len(lengths), [x for row in found for x in row if x is not None]
    least, most = min([0.9, *known]), max([1.1, *known])
    axes.set_xscale("log", base=2)
    for m, row in enumerate(found):
        for k, (length, x) in enumerate(zip(lengths, row, strict=True)):
            y = m + (k - (len(lengths) - 1) / 2) * height
            if x is None:
                axes.text(1.02, y, f"L={length}: no figure", va="center", fontsize=7, color="0.5")
                continue
            paint, shade = COLOURS[0] if x >= 1 else "#C0392B", 0.45 + 0.55 * k / max(len(lengths) - 1, 1)
            axes.barh(y, x - 1, height * 0.9, left=1, color=paint, alpha=shade)
            text, place = f"{times(x)}  L={length}", x if x >= 1 else 1.0
            axes.annotate(text, (place, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=1)
    names = [f"{peer.replace(',', '')}\nagainst {ours}" for peer, ours in AGAINST]
    axes.set_yticks(range(len(AGAINST)), names, fontsize=8)
    axes.set_ylim(len(AGAINST) - 0.45, -0.55)
    axes.set_xlim(least / 1.1, most * 1.12 * (most / least) ** 0.25)
    axes.xaxis.set_major_locator(FixedLocator([2.0**n for n in range(-5, 8)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x" if x >= 1 else f"1/{1 / x:g}"))
    axes.minorticks_off()
    axes.tick_params(labelsize=8, length=0)
    axes.grid(True, axis="x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
