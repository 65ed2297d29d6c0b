"""PNG of a conversion: bytes, error and time of every feed-forward, before and after."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..benchmarking.plot import COLOURS, need_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .report import Conversion, Converted

__all__ = ["plot"]


def plot(report: "Conversion", path: Path) -> None:
    """One row of panels for feed-forwards and one for attention; panels of what was not measured are left out."""
    need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = [p for p in ("feed_forward", "attention") if any(r.part == p for r in report.layers)]
    panels = [(p, what) for p in parts for what in ("bytes", "seconds", "error") if _has(report, p, what)]
    columns = max((sum(p == part for p, _ in panels) for part in parts), default=1) or 1
    figure = Figure(figsize=(5.2 * columns, 3.4 * len(parts) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    for row, part in enumerate(parts):
        mine = [what for p, what in panels if p == part]
        for column, what in enumerate(mine):
            axes = figure.add_subplot(len(parts), columns, row * columns + column + 1)
            _panel(axes, [r for r in report.layers if r.part == part], what)
            axes.set_title(f"{part.replace('_', '-')}: {TITLES[what][0]}", loc="left", fontsize=10)
    figure.suptitle(f"{report.model}: {report.facts}", x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.savefig(path, dpi=130)


TITLES = {"bytes": ("size", "MB", 1e-6), "seconds": ("time of one forward", "ms", 1e3), "error": ("error", "%", 1e2)}


def _has(report: "Conversion", part: str, what: str) -> bool:
    if what == "bytes" and part == "attention":
        return any(r.bytes_before != r.bytes_after for r in report.layers if r.part == part)
    name = "error" if what == "error" else f"{what}_after"
    return any(getattr(r, name) is not None for r in report.layers if r.part == part)


def _panel(axes: "Axes", rows: "list[Converted]", what: str) -> None:
    _, unit, scale = TITLES[what]
    labels = [f"{r.stack}.{r.layer}" for r in rows]
    x = list(range(len(rows)))

    def heights(name: str) -> list[Any]:
        return [(getattr(r, name) or 0) * scale for r in rows]

    if what == "error":
        axes.bar(x, heights("error"), width=0.6, color=COLOURS[1])
    else:
        axes.bar([n - 0.2 for n in x], heights(f"{what}_before"), width=0.4, color="0.6", label="before")
        axes.bar([n + 0.2 for n in x], heights(f"{what}_after"), width=0.4, color=COLOURS[0], label="after")
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    step = max(1, len(x) // 12)
    axes.set_xticks(x[::step], labels[::step], rotation=45 if len(x) > 4 else 0, fontsize=8)
    axes.set_ylabel(unit, fontsize=9)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(True, axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
