"""A saved model on rows it has not seen: metrics, and what it says of each row."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer

from ...benchmarking.environment import environment
from ...integration.plan import FastPlan
from ..arguments import _option
from ..guards import check_launch
from ..launch import check_sizes
from ..run import write_json
from ._base import Task
from .arguments import TaskDataArguments, TaskTrainingArguments, read_choice
from .run import check_cut, read_parts
from .trainer import TaskTrainer

__all__ = ["EvaluationArguments", "evaluate_model"]


@dataclass
class EvaluationArguments:
    """The model, and where the results go."""

    task: str = _option("", "translation, summarization, dialogue, sequence, token or qa")
    model: str = _option("", "Hub id or folder of a trained model")
    attention: str | None = _option(None, "evaluate a dense model with this mechanism, untrained: name or JSON")
    predictions: str | None = _option(None, "file for what the model says: JSON lines with the row and `prediction`")
    metrics: str | None = _option(None, "file for the metrics, JSON")


def evaluate_model(
    task: Task, given: EvaluationArguments, data: TaskDataArguments, args: TaskTrainingArguments
) -> dict[str, Any]:
    """Metrics of --model on --test_file (or --dataset with --test_split).

    The predictions of a teacher on training sources are the targets of a student (sequence-level distillation: Kim and
    Rush, https://arxiv.org/abs/1606.07947). ValueError for a model without classes that the rows have.
    """
    if not given.model:
        raise ValueError("name a trained model with --model")
    check_launch(args)
    rows = read_parts(task, data, args.seed, train=False)["test"]
    check_cut(given.model, args)
    config = AutoConfig.from_pretrained(given.model)
    names = getattr(config, "id2label", None)
    if names and task.kind != "span" and not task.generates:
        task.labels = [names[n] for n in sorted(names)]
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    task.decoder_only = task.generates and not config.is_encoder_decoder
    plan = {} if given.attention is None else read_choice(given.attention)
    options: dict[str, Any] = {"quantization_config": FastPlan(**plan)} if plan else {}
    check_sizes(args.layout, config, data.source_length)
    if (cut := args.layout.distributed_config()) is not None:
        options["distributed_config"] = cut
    model = getattr(transformers, task.auto).from_pretrained(given.model, **options)
    trainer = TaskTrainer(
        task=task, model=model, args=args, train=None, validation=task.examples(rows, tokenizer, data, config),
        tokenizer=tokenizer, new_tokens=data.target_length,
    )  # fmt: skip
    examples: Any = trainer.eval_dataset
    found = trainer.evaluate(metric_key_prefix="test")
    record = {"task": task.name, "model": given.model, "examples": len(examples), "test": found,
              "environment": environment()}  # fmt: skip
    if args.process_index == 0:
        if given.metrics:
            write_json(record, Path(given.metrics))
        if given.predictions:
            write_predictions(Path(given.predictions), task, examples.rows, trainer.made)
    return record


def write_predictions(path: Path, task: Task, rows: list[dict[str, Any]], made: list[Any]) -> None:
    """JSON lines: the columns of the task, and `prediction`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    with open(new, "w", encoding="utf-8") as file:
        for row, one in zip(rows, made, strict=True):
            wanted = {name: row[name] for name in task.needed if name in row}
            file.write(json.dumps({**wanted, "prediction": one}, ensure_ascii=False) + "\n")
    new.replace(path)
