"""The pages of a healing: results.json, table.md and healing.png, from what its stages wrote."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..benchmarking.environment import describe
from ..benchmarking.plot import COLOURS, need_matplotlib
from ..training.run import write_json

FIGURE = "healing.png"
Row = dict[str, Any]


def write_pages(folder: Path, report: Path) -> None:
    """Make or renew the pages in `report`. ValueError names the stage that has not run."""
    need_matplotlib()
    stages = {}
    for name in ("training", "baselines", "quality", "speed"):
        if not (folder / f"{name}.json").is_file():
            raise ValueError(f"{folder} has no {name}.json: run that stage before the report")
        stages[name] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    report.mkdir(parents=True, exist_ok=True)
    for stage in stages.values():
        stage["arguments"] = {k: _public(v) for k, v in stage["arguments"].items()}
        stage["environment"]["command"] = " ".join(_public(stage["environment"]["command"].split()))
    stages["training"].pop("training")
    stages["training"]["model"] = _public(stages["training"]["model"])
    for name, table in stages["baselines"]["quality"].items():
        healed = stages["quality"]["quality"][name]
        if healed["fingerprint"] != table["fingerprint"]:
            raise ValueError(f"baselines.json and quality.json are of different texts called {name}")
        for part in ("documents", "passages"):
            healed[part] = table[part] + healed[part]
    write_json(stages, report / "results.json")
    (report / "table.md").write_text(page(stages), encoding="utf-8")
    draw(stages, report / FIGURE)


def _public(value: Any) -> Any:
    """Of a path its last two parts: results get published."""
    if isinstance(value, list):
        return [_public(v) for v in value]
    if isinstance(value, str) and "/" in value and (value.startswith("/") or "=/" in value):
        name, _, path = value.rpartition("=")
        return (f"{name}=" if name else "") + "/".join(Path(path).parts[-2:])
    return value


def page(stages: dict[str, Any]) -> str:
    """table.md."""
    quality, speed = stages["quality"]["quality"], {row["key"]: row for row in stages["speed"]["speed"]}
    names = list(quality)
    parts = [
        _table(_document_rows(quality, speed), ["whole documents", "queries by", *names, "documents/s", "peak MiB"])
    ]
    parts.append("MRR and, in brackets, recall@1. " + " ".join(_facts(name, quality[name]) for name in names))
    for name in names:
        if rows := _passage_rows(quality[name]["passages"]):
            parts.append(f"Passages of {name}, cut out of the states of the whole document (late chunking):")
            parts.append(_table(rows, ["passages", "queries by", "right passage", "its document"]))
    training = stages["training"]
    parts.append(_training(training))
    rows = [[name, *(f"{part[key]:,}" for key in ("documents", "queries", "characters")), str(len(part["left_out"]))]
            for name, part in training["data"].items()]  # fmt: skip
    parts.append(_table(rows, ["learned from", "documents", "queries", "characters", "left out: evaluated text"]))
    for name in ("training", "quality", "speed"):
        machine = stages[name]["environment"]
        parts.append(f"{name.capitalize()}: {describe(machine)}. `{machine['command']}`")
    return "\n\n".join(parts) + "\n"


def _document_rows(quality: dict[str, Any], speed: dict[str, Row]) -> list[list[str]]:
    first = next(iter(quality.values()))["documents"]
    found = []
    for n, row in enumerate(first):
        cells = [_cell(table["documents"][n]) for table in quality.values()]
        fast = speed.get(row["key"])
        times = [f"{fast['documents_per_second']:.2f}", f"{fast['peak_bytes'] / 2**20:.0f}"] if fast else ["", ""]
        found.append([row["label"], _by(row), *cells, *times])
    return found


def _passage_rows(rows: Sequence[Row]) -> list[list[str]]:
    return [
        [row["label"].removeprefix("late chunking: "), _by(row), _cell(row["passage"]), _cell(row["document"])]
        for row in rows
        if row["passage"] is not None
    ]


def _by(row: Row) -> str:
    return "the teacher" if row["queries_by"] == "teacher" else "itself"


def _cell(row: Row) -> str:
    return f"{row['mrr']:.3f} ({row['recall_at_1']:.3f})"


def _facts(name: str, table: dict[str, Any]) -> str:
    return f"{name}: {table['count']} documents of {table['mean_tokens']:.0f} tokens read, {table['queries']} queries."


def _scores(training: dict[str, Any]) -> list[dict[str, Any]]:
    """Evaluations while healing, one a step: a training that is resumed evaluates where it was stopped once more."""
    return list({h["step"]: h for h in training["history"] if "eval_mrr" in h}.values())


def _training(training: dict[str, Any]) -> str:
    scores = _scores(training)
    curve = ", ".join(f"{h['eval_mrr']:.3f} at step {h['step']}" for h in scores)
    return (
        f"Training: {training['steps']} steps in {training['seconds'] / 60:.1f} minutes, seed {training['seed']}, "
        f"`--train {training['arguments']['train']}`; MRR of validation: {curve or 'none'}. The best is kept."
    )


def _table(rows: Sequence[Sequence[str]], heads: Sequence[str]) -> str:
    left = sum(h in ("whole documents", "passages", "queries by", "learned from") for h in heads)
    lines = [" | ".join(heads), " | ".join("---" if n < left else "---:" for n in range(len(heads)))]
    return "\n".join(f"| {line} |" for line in [*lines, *(" | ".join(row) for row in rows)])


def draw(stages: dict[str, Any], path: Path) -> None:
    """A panel for each corpus, MRR over documents/s, and one of validation over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    quality, speed = stages["quality"]["quality"], {row["key"]: row for row in stages["speed"]["speed"]}
    scores = _scores(stages["training"])
    figure = Figure(figsize=(4.4 * (len(quality) + bool(scores)), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for n, (name, table) in enumerate(quality.items()):
        axes = figure.add_subplot(1, len(quality) + bool(scores), n + 1)
        own = [row for row in table["documents"] if row["queries_by"] == _asker(row["key"])]
        for row, colour in zip(own, COLOURS, strict=False):
            rate = speed[row["key"]]["documents_per_second"]
            axes.plot(rate, row["mrr"], "o", color=colour, label=row["label"])
        axes.set_xscale("log")
        _dress(axes, f"{name}: finding documents", "documents a second", "MRR")
        if n == 0:
            axes.legend(frameon=False, fontsize=7)
    if scores:
        axes = figure.add_subplot(1, len(quality) + 1, len(quality) + 1)
        axes.plot([h["step"] for h in scores], [h["eval_mrr"] for h in scores], "o-", color="black", markersize=3)
        _dress(axes, "validation while healing", "steps", "MRR")
    figure.savefig(path, dpi=130, format="png")


def _asker(key: str) -> str:
    return key if key in ("healed", "int8") else "teacher"


def _dress(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
