"""What a proposal shows: a table of layers, the plan as JSON, and the plot of error over speed-up."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..benchmarking.environment import describe
from ..benchmarking.plot import COLOURS, need_matplotlib

if TYPE_CHECKING:
    from .propose import Point, Proposal

__all__ = ["MARK", "markdown", "plot", "write"]

MARK = "proposal.json"
ERRORS = {
    "kl": "KL divergence of the logits from the dense ones, mean over positions, nats",
    "cosine": "one minus the cosine of the mean hidden states with the dense ones, mean over rows",
}


def write(proposal: "Proposal", folder: Path, about: dict[str, Any], plots: bool = True) -> None:
    """proposal.json, plan.json (for `tfast convert --plan` and `FastPlan`), table.md and pareto.png into a folder."""
    (folder / MARK).write_text(json.dumps({**about, **proposal.to_dict()}, indent=2, default=str) + "\n")
    plan = {k: v for k, v in proposal.plan.to_dict().items() if k == "attention"}
    (folder / "plan.json").write_text(json.dumps(plan, indent=2) + "\n")
    (folder / "table.md").write_text(markdown(proposal, about))
    if plots:
        plot(proposal, folder / "pareto.png", about)


def markdown(proposal: "Proposal", about: dict[str, Any] | None = None) -> str:
    """The plan layer by layer, whole models by time, and every choice that was measured at the end of the model."""
    lines = [
        "| layer | mechanism | error of its output | ms | ms dense | times as fast |",
        "|---|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.stack} {row.layer} | `{row.mechanism}` | {row.error:.3f} | {row.seconds * 1e3:.1f} "
        f"| {row.dense_seconds * 1e3:.1f} | {row.dense_seconds / row.seconds:.2f} |"
        for row in proposal.layers
    ]
    lines += ["", "| whole model | ms | times as fast | end error |", "|---|---:|---:|---:|"]
    whole = [("dense", proposal.dense_seconds, 0.0), ("the plan", proposal.seconds, proposal.error)]
    if proposal.single is not None and proposal.single_seconds is not None:
        error = min(p.error for p in proposal.points if p.kind == "single" and p.label == proposal.single)
        whole.insert(1, (f"`{proposal.single}` in all layers", proposal.single_seconds, error))
    lines += [f"| {name} | {s * 1e3:,.0f} | {proposal.dense_seconds / s:.2f} | {e:.3g} |" for name, s, e in whole]
    verdict = "within" if proposal.kept else "**above**"
    lines += [
        "",
        f"End error: {ERRORS[proposal.kind]}. Budget {proposal.max_error:g}; on text that the plan was not chosen by "
        f"{proposal.unseen:.3g}, {verdict} the budget.",
        "" if proposal.single is not None else "No single mechanism tried in all layers is within the budget.",
        "",
        "| choice | attention, ms | times as fast | end error |",
        "|---|---:|---:|---:|",
    ]
    dense = sum(row.dense_seconds for row in proposal.layers)
    points = sorted({(p.seconds, p.error, p.label) for p in proposal.points if p.kind in ("single", "mix")})
    lines += [f"| {label} | {s * 1e3:.0f} | {dense / s:.2f} | {error:.3g} |" for s, error, label in points]
    if proposal.slow:
        slow = ", ".join(f"{label} ({dense / s:.2f}x)" for label, s in proposal.slow)
        lines += ["", f"Slower than dense attention here, and so not considered: {slow}."]
    if proposal.left_out:
        lines += ["", f"Not tried in all layers, for want of time: {', '.join(proposal.left_out)}."]
    if about is not None:
        lines += ["", _foot(about), f"Command: `{about['environment']['command']}`"]
    return "\n".join(lines) + "\n"


def _foot(about: dict[str, Any]) -> str:
    passes = "forward and backward" if about["training"] else "forward"
    return (
        f"{about['model']}, {about['dtype']}, {about['device']}, {about['length']} tokens of {about['corpus']}, "
        f"{passes}: {about['batches']} rows. Attention times are sums over layers of single calls by turns, whole "
        f"models one pass by turns, medians of {about['rounds']}. Machine: {describe(about['environment'])}."
    )


def plot(proposal: "Proposal", path: Path, about: dict[str, Any] | None = None) -> None:
    """PNG: end error over the speed-up of attention; single mechanisms by name, mixes, the budget and the plan."""
    need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    dense = sum(row.dense_seconds for row in proposal.layers)
    floor = min([p.error for p in proposal.points if p.error > 0] + [proposal.max_error or 1.0]) / 3

    def at(p: "Point") -> tuple[float, float]:
        return dense / p.seconds, max(p.error, floor)  # a logarithmic axis has no zero

    names = dict.fromkeys(p.label.split("(")[0] for p in proposal.points if p.kind == "single")
    colour = {name: COLOURS[n % len(COLOURS)] for n, name in enumerate(names)}
    for name in names:
        mine = sorted(at(p) for p in proposal.points if p.kind == "single" and p.label.split("(")[0] == name)
        label = f"{name} in all layers"
        axes.plot(*zip(*mine, strict=True), "o-", color=colour[name], markersize=5, linewidth=1.2, label=label)
    mixes = sorted({at(p) for p in proposal.points if p.kind == "mix"})
    axes.plot(*zip(*mixes, strict=True), "s--", color="0.45", markersize=4, linewidth=1.2, label="mixes")
    best = at(next(p for p in proposal.points if p.kind == "plan"))
    axes.plot(*([x] for x in best), "*", color="black", markersize=15, label="the plan", zorder=5)
    if proposal.max_error > 0:
        axes.axhline(proposal.max_error, color="0.6", linewidth=1, linestyle=":")
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        axes.annotate("budget", (1, proposal.max_error), fontsize=8, color="0.4", **place)
    axes.set_yscale("log")
    axes.set_xlabel("attention, times as fast as dense (sum over layers)", fontsize=9)
    axes.set_ylabel(f"end error ({'KL, nats' if proposal.kind == 'kl' else '1 - cosine'})", fontsize=9)
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if about is not None:
        axes.set_title(f"{about['model']}, {about['length']} tokens", loc="left", fontsize=11, fontweight="bold")
    figure.savefig(path, dpi=130)
