"""Table and plot of the suite `h200`."""

from collections.abc import Sequence
from pathlib import Path

from .pages import Record, find, foot, mib, ms, share, spread, table, times

QUICK = "A quick run, at short lengths: it shows that everything runs, and its factors mean nothing.\n"


def quick(records: Sequence[Record]) -> bool:
    return any(r["kind"] == "suite" and r.get("quick") for r in records)


def markdown(records: Sequence[Record]) -> str:
    """Goals, what Quantized keeps, then every line of every race."""
    goals = [r for r in records if r["kind"] == "goal"]
    parts = [QUICK] if quick(records) else []
    if goals:
        rows = [[r["race"], r["mine"], r["over"], f"{r['least']:g}x", *_reached(r)] for r in goals]
        parts.append("### Goals\n\n" + table(["race", "who", "over", "goal", "reached", ""], rows, 3))
    if codes := [r for r in records if r["kind"] == "codes"]:
        rows = [[r["race"], r["series"], share(r["error"]), share(r["most_error"]), share(r["bytes"]),
                 share(r["most_bytes"])] for r in codes]  # fmt: skip
        head = ["race", "who", "relative error", "at most", "bytes of the cache, of bf16", "at most"]
        parts.append("### Codes\n\n" + table(head, rows, 2))
    parts += [f"### {name}\n\n{_race(records, name)}" for name in _names(records)]
    return "\n".join([*parts, foot(records)])


def _names(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(r["race"] for r in records if r["kind"] == "timing"))


def _reached(goal: Record) -> tuple[str, str]:
    if goal["reached"] is None:
        return "-", goal["note"] or "not run"
    return times(goal["reached"]), "met" if goal["met"] else "missed"


def _race(records: Sequence[Record], name: str) -> str:
    mine = [r for r in records if r["kind"] == "timing" and r["race"] == name]
    flash = find(mine, series="SDPA flash") or {}
    rows = []
    for r in mine:
        who = r.get("series") or r["label"]
        if "skipped" in r:
            rows.append([who, "-", "", "", "", "", r["skipped"]])
            continue
        ran = find(records, kind="backend", race=name, series=who)
        faster = times(flash["seconds"] / r["seconds"]) if "seconds" in flash else "-"
        note = "" if ran is None else f"auto chose {ran['backend']}"
        rows.append([who, ms(r["seconds"]), spread(r), str(len(r["samples"]) * r["repeats"]), mib(r), faster, note])
    return table(["who", "ms", "quartiles", "n", "MiB", "against SDPA flash", "note"], rows)


def draw(records: Sequence[Record], folder: Path, subtitle: str) -> None:
    """h200.png: what every goal reached, as a part of what it asks, a bar each; below 1 is missed, and red."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    goals = [r for r in records if r["kind"] == "goal" and r["reached"] is not None]
    if not goals:
        return
    names = [f"{r['mine']} over {r['over']}, {r['race'].partition(': ')[2]}" for r in goals]
    parts = [r["reached"] / r["least"] for r in goals]
    figure = Figure(figsize=(9.5, 0.36 * len(goals) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.barh(range(len(goals)), parts, color=["#0B4F8A" if part >= 1 else "#C0392B" for part in parts], height=0.6)
    axes.axvline(1.0, color="0.3", linewidth=1.0)
    for at, (goal, part) in enumerate(zip(goals, parts, strict=True)):
        axes.text(part, at, f" {goal['reached']:.2f}x of {goal['least']:g}x", va="center", fontsize=8)
    axes.set_yticks(range(len(goals)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(1.0, *parts))
    axes.set_xlabel("reached / goal", fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    title = "quick run, no figures" if quick(records) else "goals for an H200"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    figure.supxlabel(subtitle, x=0.01, ha="left", fontsize=6.5, color="0.4")
    figure.savefig(folder / "h200.png", dpi=130)
