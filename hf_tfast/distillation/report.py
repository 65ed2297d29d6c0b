"""Teacher and students in one table and one plot, and how fast each reads."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..benchmarking.environment import describe
from ..benchmarking.plot import COLOURS, need_matplotlib
from ..training.plot import label

__all__ = ["RESULTS", "plot_students", "speeds", "table", "write_report"]

RESULTS = "results.json"
STAGES = {"swapped": "swapped, not trained", "layers": "after stage 1", "logits": "after stage 2"}
Record = dict[str, Any]


@torch.no_grad()
def speeds(models: dict[str, Any], batch: dict[str, Any], rounds: int, context: Any) -> dict[str, float]:
    """Tokens a second that each model reads: medians of whole forwards, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    size = batch["input_ids"].numel()
    for n in range(rounds + 1):  # the first round warms up
        for name, model in models.items():
            start = time.perf_counter()
            with context():
                model.eval()(**batch, use_cache=False)
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            if n:
                seconds[name].append(time.perf_counter() - start)
    return {name: size / median(given) for name, given in seconds.items() if given}


def write_report(teacher: Record, records: Sequence[Record], folder: Path, draw: bool) -> None:
    """results.json, table.md and curves.png in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = table(teacher, records)
    whole = json.dumps({"teacher": teacher, "students": list(records)}, indent=1)
    for name, content in ((RESULTS, whole), ("table.md", text)):
        new = folder / f".{name}.new"
        new.write_text(content + "\n", encoding="utf-8")
        new.replace(folder / name)
    if draw:
        new = folder / ".curves.new.png"
        plot_students(teacher, records, new)
        new.replace(folder / "curves.png")
    print(text)


def table(teacher: Record, records: Sequence[Record]) -> str:
    """Markdown: the teacher, and each student before and after each stage."""
    columns = ["model", "stage", "loss", "perplexity", "to teacher", "loss near", "loss far", "loss new"]
    columns += ["steps", "seconds", "tokens/s"]
    lines = ["| " + " | ".join(columns) + " |", "|---|---|" + "---:|" * (len(columns) - 2)]
    base = teacher["final"]["eval_perplexity"]
    lines.append(_row("teacher: " + label(teacher), "", teacher["final"], base, teacher.get("tokens_per_second")))
    for record in records:
        stages = [name for name in STAGES if name in record["stages"]]
        for name in stages:
            stage = record["stages"][name]
            speed = record.get("tokens_per_second") if name == stages[-1] else None
            lines.append(_row(label(record), STAGES[name], stage["final"], base, speed, stage))
    return "\n".join([*lines, "", *_foot(teacher, records)])


def _row(name: str, stage: str, final: Record, base: float, speed: float | None, about: Record | None = None) -> str:
    share = final["eval_perplexity"] / base - 1.0
    cells = [f"{final['eval_loss']:.4f}", f"{final['eval_perplexity']:.2f}", f"{share:+.2%}" if stage else "-"]
    cells += [f"{final[k]:.3f}" if (k := f"eval_loss_{kind}") in final else "-" for kind in ("near", "far", "new")]
    steps = about.get("steps") if about else None
    cells += [f"{steps}", f"{about['seconds']:.0f}"] if about and steps else ["-", "-"]
    cells.append("-" if speed is None else f"{speed:,.0f}")
    return "| " + " | ".join([name, stage, *cells]) + " |"


def _foot(teacher: Record, records: Sequence[Record]) -> list[str]:
    data, final, first = teacher["data"], teacher["final"], records[0]
    training = first["training"]
    shares = ", ".join(f"{final[f'eval_share_{name}']:.1%} {name}" for name in ("near", "far", "new"))
    sharp = teacher.get("sharpness")
    attends = [
        "Teacher's attention, by layer: a query divides it among "
        + ", ".join(f"{one['keys']:.1f}" for one in sharp)
        + " keys (exp of entropy); mean scale |q|^2 and scale |k|^2 "
        + ", ".join(f"{one['norm']:.0f}" for one in sharp)
        + "."
    ] if sharp else []  # fmt: skip
    return [
        f"Losses are nats per token on {final['eval_targets']:,.0f} targets of held-out documents, in sequences of "
        f"{data['length']}. Far: the token last occurred in the same document more than {data['far']} tokens ago; "
        f"new: it did not. Targets: {shares}.",
        f"Stage 1: {training['match']} outputs of layers on the teacher's inputs, {training['layer_steps']} steps;"
        f" stage 2: {training['divergence']} KL of logits, temperature {training['temperature']:g}, weight of labels "
        f"{training['labels_weight']:g}, {training['max_steps']} steps; steps of "
        f"{training['per_device_train_batch_size'] * training['gradient_accumulation_steps'] * training['world_size']}"
        f" sequences. Mixed precision: {training['mixed_precision']}. Teacher: {teacher['parameters']:,} parameters.",
        *attends,
        "Seconds are of training steps, teacher included. tokens/s: one forward of a held-out sequence, medians of "
        "calls in turns.",
        f"Machine: {describe(first['environment'])}; processor in use by others before: "
        f"{first['environment']['cpu_in_use']:.0%}.",
        f"Command: `{first['environment']['command']}`",
    ]


def plot_students(teacher: Record, records: Sequence[Record], path: Path) -> None:
    """Loss over the tokens of both stages, in all and of far tokens: students as lines, the teacher as a level."""
    need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    far = f"tokens that last occurred more than {teacher['data']['far']} tokens ago"
    figure = Figure(figsize=(12.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for n, (value, title) in enumerate((("eval_loss", "held-out texts"), ("eval_loss_far", far))):
        axes = figure.add_subplot(1, 2, n + 1)
        if value in teacher["final"]:
            axes.axhline(teacher["final"][value], color="black", linewidth=1, label="teacher")
        for record, colour in zip(records, COLOURS, strict=False):
            x, y, breaks = _curve(record, value)
            axes.plot(x, y, color=colour, marker="o", markersize=3, label=label(record))
            for place, level in breaks:
                axes.plot([place], [level], color=colour, marker="s", markersize=7, fillstyle="none")
        axes.set_title(f"loss on {title}", loc="left", fontsize=10)
        axes.set_xlabel("tokens seen in both stages (square: stage 2 begins)", fontsize=9)
        axes.set_ylabel("nats per token", fontsize=9)
        axes.grid(True, color="0.9", linewidth=0.8)
        axes.tick_params(labelsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.supxlabel(describe(records[0]["environment"]), x=0.01, ha="left", fontsize=7, color="0.4")
    figure.savefig(path, dpi=130, format="png")


def _curve(record: Record, value: str) -> tuple[list[float], list[float], list[tuple[float, float]]]:
    """Tokens, losses, and where stage 2 begins."""
    x, y, breaks, seen = [0.0], [record["stages"]["swapped"]["final"].get(value, float("nan"))], [], 0.0
    for name in ("layers", "logits"):
        stage = record["stages"].get(name)
        if stage is None:
            continue
        if name == "logits":
            breaks.append((x[-1], y[-1]))
        for entry in stage["history"]:
            if value in entry:
                x.append(seen + entry["num_input_tokens_seen"])
                y.append(entry[value])
        seen += stage["tokens_seen"]
    return x, y, breaks
