"""The table and the plot of a study."""

from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..benchmarking.environment import busy, describe
from ..benchmarking.pages import table
from ..benchmarking.plot import COLOURS, need_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw", "markdown"]

FAMILIES = {  # what a row's point is drawn as: the first form that it has
    "dense": "dense",
    "int8": "int8",
    "low_rank": "low rank",
    "pruned": "pruned",
    "tensor_train": "tensor train",
    "activation": "rounded activations",
}


def markdown(results: dict[str, Any]) -> str:
    """The table, and under it what the figures rest on."""
    rows = results["rows"]
    dense, timed = rows[0], "seconds" in rows[0]
    names = list(dense["quality"])
    header = ["feed-forwards", "MB of them", "", "MB of the model", "error of a layer", "of the output", *names]
    header += ["ms in them", "", "ms of a forward", ""] if timed else []
    lines = []
    for row in rows:
        cells = [f"`{row['label']}`" if row["forms"] else row["label"]]
        cells += [_mb(row["feed_forward_bytes"]), _times(row, dense, "feed_forward_bytes"), _mb(row["bytes"])]
        cells += [f"{row['feed_forward_error']:.2%}", f"{row['error']:.2%}"] if row["forms"] else ["", ""]
        cells += [f"{row['quality'][name]:.{3 if row['quality'][name] < 10 else 1}f}" for name in names]
        for name in ("feed_forward_seconds", "seconds") if timed else ():
            cells += [f"{row[name] * 1e3:.0f}", _times(row, dense, name)]
        lines.append(cells)
    return "\n\n".join([table(header, lines).rstrip(), *_words(results, timed)]) + "\n"


def _words(results: dict[str, Any], timed: bool) -> list[str]:
    about, environment = results["about"], results["environment"]
    rounds = results["rows"][0].get("rounds", 0)
    said = [
        " ".join(about.values()),
        f"Forms that are made from data saw {results['calibration_tokens']:,} tokens of calibration, and steps are "
        "those of fitting every feed-forward to the dense one's outputs on them. Errors are |y' - y| / |y| on "
        f"{results['measured_tokens']:,} tokens of the evaluated texts: of a layer on the dense model's input, mean "
        "of all; of the model's output with all that adds up. Nothing was trained after conversion.",
    ]
    if timed:
        said.append(
            f"Times are medians of {rounds} forwards of {results['measured_tokens']:,} tokens, all rows by turns in "
            "one process, each loaded from its saved folder; a number behind is the share of dense."
        )
        if warning := busy(environment):
            said.append(f"Note: {warning}.")
    return [*said, f"Machine: {describe(environment)}", f"Made by: `{environment['command']}`"]


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f}"


def _times(row: dict[str, Any], dense: dict[str, Any], name: str) -> str:
    return f"{row[name] / dense[name]:.2f}x"


def draw(results: dict[str, Any], path: Path) -> None:
    """PNG: every quality over the bytes of the feed-forwards, and their error over the bytes."""
    need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = results["rows"]
    names = list(rows[0]["quality"])
    figure = Figure(figsize=(6.4 * (len(names) + 1), 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(names) + 1, squeeze=False)[0]
    numbers = {row["label"]: str(n) for n, row in enumerate(rows)}
    for axes, name in zip(panels, names, strict=False):
        lower = name in results["lower"]
        _points(axes, [(row, row["quality"][name]) for row in rows], numbers)
        axes.axhline(rows[0]["quality"][name], color="0.6", linewidth=1, linestyle="--", zorder=1)
        axes.set_ylabel(f"{name} ({'lower' if lower else 'higher'} is better)", fontsize=9)
        if lower:
            axes.set_yscale("log")
    _points(panels[-1], [(row, 100 * row["feed_forward_error"]) for row in rows if row["forms"]], numbers)
    panels[-1].set_ylabel("error of a feed-forward, %, mean of layers", fontsize=9)
    panels[0].legend(fontsize=8, frameon=False)
    listed = [f"{n:2}  {row['label']}" for n, row in enumerate(rows)]
    half = (len(listed) + 1) // 2  # two columns under the panels
    wide = max(map(len, listed[:half])) + 4
    lines = [a.ljust(wide) + b for a, b in zip_longest(listed[:half], listed[half:], fillvalue="")]
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=6, color="0.25", family="monospace")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _points(axes: "Axes", rows: list[tuple[dict[str, Any], float]], numbers: dict[str, str]) -> None:
    kinds = list(FAMILIES)
    for kind in kinds:
        mine = [(row, y) for row, y in rows if _family(row) == kind]
        if not mine:
            continue
        x = [row["feed_forward_bytes"] / 1e6 for row, _ in mine]
        paint = "black" if kind == "dense" else COLOURS[kinds.index(kind) - 1]
        axes.plot(x, [y for _, y in mine], "o", color=paint, markersize=6, label=FAMILIES[kind])
        for (row, y), at in zip(mine, x, strict=True):
            axes.annotate(
                numbers[row["label"]], (at, y), xytext=(5, 4), textcoords="offset points", fontsize=7, color=paint
            )
    axes.set_xlabel("MB of the feed-forwards", fontsize=9)
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _family(row: dict[str, Any]) -> str:
    return row["forms"][0]["form"] if row["forms"] else "dense"
