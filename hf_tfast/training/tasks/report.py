"""results.json and table.md of trainings that are to be compared: quality, time, size, and what made them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...benchmarking.environment import busy, describe
from ._base import Task

__all__ = ["table", "write_report"]

Record = dict[str, Any]


def write_report(task: Task, records: Sequence[Record], folder: Path) -> None:
    """Write both files and print the table. Models come in the order given."""
    folder.mkdir(parents=True, exist_ok=True)
    text = table(task, records)
    for name, content in (("results.json", json.dumps({"records": list(records)}, indent=1)), ("table.md", text)):
        new = folder / f".{name}.new"
        new.write_text(content + "\n", encoding="utf-8")
        new.replace(folder / name)
    print(text)


def table(task: Task, records: Sequence[Record]) -> str:
    """Markdown: a row a model; below it what was trained on what, on which machine, by which command."""
    shown = [name for name in ("loss", *task.shown) if any(f"test_{name}" in r["test"] for r in records)]
    timed = ["tokens/s", "peak MiB"] if all("speed" in r for r in records) else []
    columns = ["model", "parameters", *shown, "steps", "training s", "evaluation s", *timed]
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    for r in records:
        cells = [named(r), f"{r['parameters']:,}"]
        cells += [_figure(name, r["test"].get(f"test_{name}")) for name in shown]
        cells += [str(r["steps"]), f"{r['training_seconds']:.0f}", f"{r['test'].get('test_runtime', 0):.0f}"]
        if timed:
            cells += [f"{r['speed']['tokens_per_second']:,.0f}", f"{r['speed']['peak_bytes'] / 2**20:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_foot(task, records), *(_speed(records) if timed else [])])


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if abs(value) >= 2 and name != "loss" else f"{value:.3f}"


def named(record: Record) -> str:
    """What distinguishes a model, with its fields: window (window=8), low_rank (ratio=0.5)."""
    label = record["label"]
    given = [record["attention"], *(_listed(record["feed_forward"]))]
    fields = [
        ", ".join(f"{name}={value}" for name, value in one.items() if name not in ("mechanism", "form", "seed"))
        for one in given
        if isinstance(one, dict) and ("mechanism" in one or "form" in one)
    ]
    said = "; ".join(field for field in fields if field)
    return f"{label} ({said})" if said else label


def _listed(forward: Any) -> list[Any]:
    return [] if forward is None else forward if isinstance(forward, list) else [forward]


def _speed(records: Sequence[Record]) -> list[str]:
    first = records[0]["speed"]
    machine = first["environment"]
    warning = busy(machine)
    return [
        f"tokens/s, peak MiB: forwards of all models in turns, medians of {len(first['seconds'])}, on the longest "
        f"test examples, {first['tokens']:,} tokens in batches of {first['batch']}; memory of the first batch. "
        f"{describe(machine)}." + (f" Warning: {warning}." if warning else ""),
        f"Command: `{machine['command']}`",
    ]


def _foot(task: Task, records: Sequence[Record]) -> list[str]:
    first = records[0]
    examples, training = first["examples"], first["training"]
    scored = examples.get("test", examples["validation"])
    loads = sorted({record["environment"]["cpu_in_use"] for record in records})
    budget = (
        f"{examples['train']:,} training examples, {first['epochs']:.2f} epochs in batches of "
        f"{training['per_device_train_batch_size'] * training['gradient_accumulation_steps']}, the same for every row "
        f"(seed {training['seed']}); validated on {examples['validation']:,}, the best checkpoint scored on "
        f"{scored:,} {'test' if 'test' in examples else 'validation'} examples, which no training saw."
    )
    return [
        f"Task: {task.name}. {budget}",
        "Loss: nats per label. Seconds are of a machine that others used too; processor in use right after a "
        f"training: {min(loads):.0%} to {max(loads):.0%}.",
        f"Machine: {describe(first['environment'])}.",
        f"Command: `{first['environment']['command']}`",
    ]
