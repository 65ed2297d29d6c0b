"""How fast the models of a finished training read, and in how much memory: in turns, on the same rows.

    python -m hf_tfast.training.tasks.speeds runs/qa --report docs/results/qa

Trainings come one after the other, on a machine that others may use meanwhile; so their seconds do not compare. This
loads every model that the training in a folder has saved, and times its forward on the same test rows, one model after
the other in each round. Figures go into results.json, and the table is written anew with them.
"""

import argparse
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer

from ...benchmarking.environment import environment
from ...benchmarking.memory import peak_memory
from ..run import DONE, MARK, write_json
from ._base import Task
from .arguments import TaskDataArguments
from .examples import Collator
from .names import named_task
from .objective import LABELS
from .report import write_report
from .run import read_parts

__all__ = ["main", "measure"]

Batch = dict[str, Tensor]


def measure(folder: Path, labels: Sequence[str], count: int, size: int, rounds: int) -> dict[str, dict[str, Any]]:
    """label -> tokens_per_second, seconds of every round, peak_bytes, of forwards over the `count` longest test rows.

    Rows come in batches of `size`, in fp32, or in the bf16 of autocast where the training had it.
    """
    saved = json.loads((folder / MARK).read_text(encoding="utf-8"))
    data = TaskDataArguments(**saved["data"])
    task = named_task(saved["task"], saved["model"].get("decoder_only", False))
    models = {label: _model(task, folder / label / "model") for label in labels}
    batches = {label: _batches(task, data, folder / label / "model", models[label], count, size) for label in labels}
    half = bool(saved["training"]["bf16"])
    seconds: dict[str, list[float]] = {label: [] for label in labels}
    for n in range(rounds + 1):  # the first round warms up
        for label, model in models.items():
            start = time.perf_counter()
            _read(model, batches[label], half)
            if n:
                seconds[label].append(time.perf_counter() - start)
    found = {}
    for label, model in models.items():
        tokens = sum(_tokens(batch) for batch in batches[label])
        peak = peak_memory(partial(_read, model, batches[label][:1], half))
        found[label] = {
            "tokens_per_second": tokens / median(seconds[label]),
            "seconds": seconds[label],
            "tokens": tokens,
            "batch": size,
            "peak_bytes": peak.bytes,
            "peak_method": peak.method,
            "environment": environment(),
        }
    return found


def _model(task: Task, place: Path) -> Any:
    return getattr(transformers, task.auto).from_pretrained(place).eval()


def _batches(task: Task, data: TaskDataArguments, place: Path, model: Any, count: int, size: int) -> list[Batch]:
    """Batches of what the model is called with, of the longest rows, the longest first."""
    parts = read_parts(task, data, 42)
    names = getattr(model.config, "id2label", None)
    if names and task.kind != "span" and not task.generates:
        task.labels = [names[n] for n in sorted(names)]
    tokenizer: Any = AutoTokenizer.from_pretrained(place)
    examples = task.examples(parts.get("test", parts["validation"]), tokenizer, data, model.config)
    chosen = sorted(examples.features, key=lambda one: -len(one["input_ids"]))[:count]
    collate = Collator(tokenizer.pad_token_id)
    batches = []
    for start in range(0, len(chosen), size):
        batch = collate(chosen[start : start + size])
        given = {name: x for name, x in batch.items() if name not in LABELS}
        if task.generates:
            given["use_cache"] = False  # type: ignore[assignment]
        if task.generates and model.config.is_encoder_decoder:
            given["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
            given["decoder_attention_mask"] = (batch["labels"] >= 0).long()
        batches.append(given)
    return batches


def _tokens(batch: Batch) -> int:
    """That count: padding does not."""
    return sum(int(x.sum()) for name, x in batch.items() if name in ("attention_mask", "decoder_attention_mask"))


@torch.no_grad()
def _read(model: Any, batches: Sequence[Batch], half: bool) -> None:
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=half):
        for batch in batches:
            model(**batch)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Time the models of a training, and write its records and its table anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what a recipe has left: its --output_dir")
    parser.add_argument("--report", type=Path, help="folder of results.json and table.md; default: the same folder")
    parser.add_argument("--rows", type=int, default=32, help="test rows, the longest")
    parser.add_argument("--batch", type=int, default=8, help="rows at once")
    parser.add_argument("--rounds", type=int, default=5, help="timed forwards over all rows, of each model")
    given = parser.parse_args(arguments)
    report = given.report or given.folder
    path = report / "results.json"
    if not path.is_file():
        raise ValueError(f"{path} is not there: the training comes first, with --report {report}")
    records = json.loads(path.read_text(encoding="utf-8"))["records"]
    if missing := [r["label"] for r in records if not (given.folder / r["label"] / DONE).is_file()]:
        raise ValueError(f"{given.folder} has not finished {', '.join(missing)}, which {path} has: another training?")
    for name in ("rows", "batch", "rounds"):
        if getattr(given, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(given, name)}")
    found = measure(given.folder, [r["label"] for r in records], given.rows, given.batch, given.rounds)
    for record in records:
        record["speed"] = found[record["label"]]
        write_json(record, given.folder / record["label"] / DONE)
    task = named_task(records[0]["task"])
    write_report(task, records, report)
    return records


if __name__ == "__main__":
    main()
