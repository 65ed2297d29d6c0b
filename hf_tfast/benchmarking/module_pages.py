"""Tables and plots of the suite `modules`."""

from collections.abc import Sequence
from pathlib import Path

from .pages import Record, find, foot, mib, ms, share, spread, table, times, wins_from
from .plot import has_lengths, plot
from .table import PASSES

Kind = tuple[bool, str, str]  # causal, dtype, passes


def kinds(records: Sequence[Record]) -> list[Kind]:
    """Groups of timings that differ in length and mechanism only: bidirectional first."""
    found = {(r["causal"], r["dtype"], r["passes"]) for r in records if r["kind"] == "timing"}
    return sorted(found, key=lambda kind: (kind[0], kind[1] != "fp32", kind[1], kind[2] != "forward"))


def of(records: Sequence[Record], kind: Kind) -> list[Record]:
    """The timings of one kind."""
    return [r for r in records if r["kind"] == "timing" and (r["causal"], r["dtype"], r["passes"]) == kind]


def names(records: Sequence[Record]) -> list[str]:
    """Mechanisms, in the order of the records."""
    return list(dict.fromkeys(r["series"] for r in records if r["kind"] == "timing" and r.get("series")))


def title(kind: Kind) -> str:
    return f"{'causal' if kind[0] else 'bidirectional'}, {kind[1]}, {PASSES[kind[2]]}"


def winning(records: Sequence[Record], kind: Kind, name: str) -> tuple[str, int | None]:
    """From which length on a mechanism is faster than SDPA."""
    mine = [r for r in of(records, kind) if r.get("series") == name]
    if not mine:
        return "no such form", None
    points = [(r["length"], r["speedup"]) for r in mine if r.get("speedup")]
    words, number = wins_from(points)
    skipped = [r["length"] for r in mine if "skipped" in r]
    return (f"{words}; not run at {max(skipped)}" if skipped else words), number


def markdown(records: Sequence[Record]) -> str:
    """From which length each mechanism wins; speed-ups; what was measured with; then every figure."""
    every, who = kinds(records), names(records)
    parts = []
    for causal in sorted({kind[0] for kind in every}):
        mine = [kind for kind in every if kind[0] == causal]
        rows = [[name, *(winning(records, kind, name)[0] for kind in mine)] for name in who
                if any(r.get("series") == name for kind in mine for r in of(records, kind))]  # fmt: skip
        head = ["mechanism", *(f"{kind[1]} {PASSES[kind[2]]}" for kind in mine)]
        word = "causal" if causal else "bidirectional"
        parts.append(f"### Faster than SDPA from which length on: {word}\n\n{table(head, rows, len(head))}")
    parts.append(_budgets(records, who))
    parts += [f"### {title(kind)}\n\n{_times(of(records, kind), who)}" for kind in every]
    return "\n".join([*parts, foot(records)])


def _budgets(records: Sequence[Record], who: Sequence[str]) -> str:
    """What each mechanism was measured with, and how many pairs that is."""
    found = [r for r in records if r["kind"] == "density"]
    columns = sorted({(r["causal"], r["length"]) for r in found})
    rows = []
    for name in who:
        labels = dict.fromkeys(
            r["label"] for r in sorted((r for r in records if r.get("series") == name and "label" in r),
                                       key=lambda r: (r["causal"], r["length"]))
        )  # fmt: skip
        cells = [find(found, series=name, causal=causal, length=n) for causal, n in columns]
        said = "<br>".join(f"`{text}`" for text in labels)
        rows.append([name, said, *("" if r is None else share(r["density"]) for r in cells)])
    head = ["mechanism", "measured with, shorter lengths first",
            *(f"{'causal' if causal else 'density'}, L={n}" for causal, n in columns)]  # fmt: skip
    return f"### Budgets and densities\n\n{table(head, rows, 2)}"


def _times(records: Sequence[Record], who: Sequence[str]) -> str:
    """One kind: ms, quartiles, number of calls and peak at every length, SDPA first."""
    lengths = sorted({r["length"] for r in records})
    head = ["mechanism", *(f"L={n}: {what}" for n in lengths for what in ("ms (quartiles)", "n", "MiB", "speed-up"))]
    rows = []
    for name in ("", *who):
        mine = [find(records, series=name or None, length=n) for n in lengths]
        if any(mine):
            rows.append([name or "SDPA", *(cell for r in mine for cell in _cells(r))])
    skipped = [f"- {r.get('series') or 'SDPA'} at L={r['length']}: {r['skipped']}" for r in records if "skipped" in r]
    return table(head, rows) + ("\n" + "\n".join(skipped) + "\n" if skipped else "")


def _cells(r: Record | None) -> list[str]:
    if r is None or "skipped" in r:
        return ["-" if r is None else "skipped", "", "", ""]
    faster = "-" if r["speedup"] is None else times(r["speedup"])
    bold = f"**{faster}**" if r["speedup"] and r["speedup"] >= 1 and r.get("series") else faster
    return [f"{ms(r['seconds'])} ({spread(r)})", str(len(r["samples"]) * r["repeats"]), mib(r), bold]


def draw(records: Sequence[Record], folder: Path, subtitle: str) -> None:
    """speedup.png, and time and memory over the length for each kind of mask."""
    heat_map(records, folder / "speedup.png", subtitle)
    timings = [{**r, "label": r.get("series") or r["label"]} for r in records if r["kind"] == "timing"]
    for causal in {r["causal"] for r in timings}:
        mine = [r for r in timings if r["causal"] == causal]
        if has_lengths(mine):
            for value in ("time", "memory"):
                word = "causal" if causal else "bidirectional"
                plot(mine, folder / f"{value}-{word}.png", value, subtitle)


def heat_map(records: Sequence[Record], path: Path, subtitle: str) -> None:
    """Speed-up over SDPA of the same dtype: mechanism x length, a panel a kind; losses red, the even line white."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
    from matplotlib.figure import Figure
    from numpy import full, log2, nan

    every, who = kinds(records), names(records)
    if not every or not who:
        return
    lengths = sorted({r["length"] for r in records if r["kind"] == "timing"})
    colours = ["#8E1B1B", "#E57368", "#FFFFFF", "#6FB1DE", "#0B4F8A"]
    paint = LinearSegmentedColormap.from_list("speed-up", colours).with_extremes(bad="#EDEDED")
    norm, columns = TwoSlopeNorm(0, -4, 5), min(4, len(every))
    rows = -(-len(every) // columns)
    figure = Figure(figsize=(1.6 + (0.55 * len(lengths) + 0.9) * columns * 1.25, rows * (0.3 * len(who) + 0.9) + 0.8),
                    layout="constrained")  # fmt: skip
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, kind in zip(panels.flat, every, strict=False):
        values = full((len(who), len(lengths)), nan)
        for r in of(records, kind):
            if r.get("series") and r.get("speedup"):
                values[who.index(r["series"]), lengths.index(r["length"])] = r["speedup"]
        image = axes.imshow(log2(values), cmap=paint, norm=norm, aspect="auto")
        for (y, x), value in ((at, values[at]) for at in _places(values)):
            dark = value == value and not -2 < log2(value) < 2.8
            text = "" if value != value else f"{value:.2f}" if value < 10 else f"{value:.0f}"
            axes.text(x, y, text, ha="center", va="center", fontsize=7.5, color="white" if dark else "0.15")
        axes.set_xticks(range(len(lengths)), [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
        axes.set_yticks(range(len(who)), who)
        axes.tick_params(length=0, labelsize=8)
        axes.set_title(title(kind).replace(", ", "\n", 1), loc="left", fontsize=9)
        for side in axes.spines.values():
            side.set_visible(False)
    for axes in panels.flat[len(every) :]:
        axes.set_visible(False)
    bar = figure.colorbar(image, ax=panels, shrink=0.7, pad=0.01, ticks=range(-4, 6))
    bar.ax.set_yticklabels([f"1/{2**-n}" if n < 0 else str(2**n) for n in range(-4, 6)], fontsize=7)
    bar.outline.set_visible(False)
    figure.suptitle("times as fast as SDPA of the same dtype, whole module; red: slower", x=0.01, ha="left",
                    fontsize=11, fontweight="bold")  # fmt: skip
    figure.supxlabel(subtitle, x=0.01, ha="left", fontsize=6.5, color="0.4")
    figure.savefig(path, dpi=140)


def _places(values: "object") -> list[tuple[int, int]]:
    rows, columns = values.shape  # type: ignore[attr-defined]
    return [(y, x) for y in range(rows) for x in range(columns)]
