"""Curves of trainings as PNG: loss over tokens and over seconds, one line a model, names beside their ends."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..benchmarking.plot import COLOURS, need_matplotlib

__all__ = ["label", "need_matplotlib", "plot_curves"]


def label(record: dict[str, Any]) -> str:
    """The attention of a record in one word or a few: window (window=256, sinks=0)."""
    given = record["attention"]
    if isinstance(given, list) or "mechanism" not in given:
        return "by layer"
    fields = ", ".join(f"{name}={value}" for name, value in given.items() if name not in ("mechanism", "seed"))
    return f"{given['mechanism']} ({fields})" if fields else given["mechanism"]


def points(record: dict[str, Any], value: str, over: str) -> tuple[list[float], list[float]]:
    """The entries of a training's history that hold both."""
    found = [h for h in record["history"] if value in h and over in h]
    return [h[over] for h in found], [h[value] for h in found]


def plot_curves(records: Sequence[dict[str, Any]], path: Path, subtitle: str = "") -> None:
    """One model: its training and evaluation loss. Several: the loss in all and of far tokens, and loss over time."""
    need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    far = f"loss on tokens that last occurred more than {records[0]['data']['far']} tokens away"
    panels = [("eval_loss", "num_input_tokens_seen", "loss on held-out texts", "tokens seen")]
    if len(records) > 1:
        panels.append(("eval_loss_far", "num_input_tokens_seen", far, "tokens seen"))
        panels.append(("eval_loss", "seconds", "loss on held-out texts", "seconds of training"))
    figure = Figure(figsize=(6.2 * len(panels), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for n, (value, over, title, axis) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), n + 1)
        if len(records) == 1:
            axes.plot(*points(records[0], "loss", over), color="0.75", linewidth=1, label="training")
        for record, colour in zip(records, ("black", *COLOURS) if len(records) > 1 else COLOURS, strict=False):
            axes.plot(*points(record, value, over), color=colour, marker="o", markersize=3, label=label(record))
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel(axis, fontsize=9)
        axes.set_ylabel("nats per token", fontsize=9)
        axes.grid(True, color="0.9", linewidth=0.8)
        axes.tick_params(labelsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    if subtitle:
        figure.supxlabel(subtitle, x=0.01, ha="left", fontsize=7, color="0.4")
    figure.savefig(path, dpi=130, format="png")
