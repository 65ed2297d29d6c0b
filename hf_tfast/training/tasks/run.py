"""One task from arguments to saved models and figures; several choices of attention or optimiser side by side.

output_dir/arguments.json   the settings; a folder with it is a training, and only such a folder is ever replaced
output_dir/tokenizer/
output_dir/LABEL/model/     the best checkpoint and its tokenizer, as from_pretrained reads them
output_dir/LABEL/metrics.json, predictions.jsonl   figures, and what the model said of every test row
output_dir/LABEL/checkpoints/
"""

import json
import os
from collections.abc import Callable, Iterable
from copy import copy
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase, set_seed

from ...benchmarking.environment import environment
from ...benchmarking.folder import new_folder
from ..faults import Terminated
from ..guards import check_launch
from ..launch import check_sizes
from ..run import DONE, _checkpoint, enter, write_json
from ..scaled import cut_model
from ._base import Task
from .arguments import TaskDataArguments, TaskModelArguments, TaskTrainingArguments
from .examples import Examples
from .models import describe_choice, find_tokenizer, make_config, make_model
from .report import write_report
from .search import search
from .tables import Row, hub_rows, read_rows, renamed, split_rows, text_of
from .trainer import TaskTrainer

__all__ = ["finetune", "read_parts"]

Record = dict[str, Any]
Parts = dict[str, list[Row]]


def finetune(
    task: Task,
    data: TaskDataArguments,
    model: TaskModelArguments,
    args: TaskTrainingArguments,
    *,
    rewrite: Callable[[list[str]], Iterable[str]] | None = None,
) -> list[Record]:
    """Train what the arguments say, keep the best checkpoint, score it on the test rows; a record for each model.

    rewrite  sources of the training rows -> the targets that are learned instead of those in the file.

    ValueError for data that the task cannot use and arguments that do not fit; FileExistsError for an output folder
    that holds something else; Diverged (see `..trainer`) for a training that comes to nothing.
    """
    check_launch(args)
    variants = _variants(model, args)
    check_cut(model.model, args)
    folder = Path(args.output_dir or "")
    again = args.overwrite or args.resume_from_checkpoint
    if args.report is not None and (Path(args.report) / "results.json").exists() and not again:
        raise FileExistsError(f"{args.report} holds results; name another folder, or replace them with --overwrite")
    parts = read_parts(task, data, args.seed)
    with args.main_process_first(local=False, desc="folder"):
        if args.process_index == 0:
            _open(folder, task, data, model, args)
    if rewrite is not None:
        with args.main_process_first(local=False, desc="targets"):
            parts["train"] = _rewritten(task, parts["train"], rewrite, folder / "targets.json")
    with args.main_process_first(local=False, desc="tokenizer"):
        tokenizer = _tokenizer(task, data, model, parts["train"], folder / "tokenizer")
    records = []
    for label, (choice, options) in variants.items():
        place = folder / label
        records.append(
            _train(task, data, model, _for_variant(args, place, options), (tokenizer, parts, choice, label))
        )
    if args.process_index == 0:
        write_report(task, records, Path(args.report) if args.report else folder)
    return records


def check_cut(name: str | None, args: TaskTrainingArguments) -> None:
    """ValueError where heads of another family would be cut, whose modules no plan here names."""
    if name is None or args.layout.tensor == 1 or AutoConfig.from_pretrained(name).model_type.startswith("tfast"):
        return
    raise ValueError(
        f"{name} is no TFast model, and recipes of tasks cut only the heads of these over processes (layout: "
        f"{args.layout}): shard its weights (--shard, recipes/accelerate/fsdp2.yaml), or train it data parallel"
    )


def _variants(model: TaskModelArguments, args: TaskTrainingArguments) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Label -> (choice, training arguments that differ) of every model that is trained."""
    choices, optimisers = model.choices(), args.optimisers()
    if not optimisers:
        return {label: (choice, {}) for label, choice in choices.items()}
    if len(choices) > 1:
        raise ValueError("compare either choices (--compare) or optimisers (--compare_optim), not both at once")
    (choice,) = choices.values()
    return {name: (choice, {"optim": name, "learning_rate": rate}) for name, rate in optimisers.items()}


def _for_variant(args: TaskTrainingArguments, place: Path, options: dict[str, Any]) -> TaskTrainingArguments:
    changed = copy(args)  # made anew they would be checked and derived twice
    for name, value in {**options, "output_dir": str(place / "checkpoints")}.items():
        setattr(changed, name, value)
    return changed


def read_parts(task: Task, data: TaskDataArguments, seed: int, *, train: bool = True) -> Parts:
    """train, validation and test rows under the names of the task; without train, test rows alone."""
    names = data.column_names()
    known = {*task.needed, *([task.unrolls] if task.unrolls else [])}
    if unknown := sorted(set(names) - known):
        raise ValueError(f"{task.name} has no column {unknown[0]!r}; it has {', '.join(sorted(known))}")
    parts: Parts = {}
    for part in ("train", "validation", "test") if train else ("test",):
        files, split = getattr(data, f"{part}_file"), getattr(data, f"{part}_split")
        if files:
            parts[part] = read_rows(files, list(names.values()))
        elif data.dataset is not None and split is not None:
            parts[part] = hub_rows(data.dataset, data.dataset_config, split)
    first = "train" if train else "test"
    if first not in parts:
        raise ValueError(f"no rows: name --{first}_file FILE, or --dataset NAME with --{first}_split")
    for part, rows in parts.items():
        where = f"the {part} rows"
        if task.unrolls and rows and _unrolls(task, names, rows[0]):
            column = {task.unrolls: names.get(task.unrolls, task.unrolls)}
            parts[part] = task.unroll(renamed(rows, column, [task.unrolls], where), data)
        else:
            parts[part] = renamed(rows, names, task.needed, where)
    if train and "validation" not in parts:
        parts["train"], parts["validation"] = split_rows(
            parts["train"], data.validation_share, seed, data.group_column
        )
    return {part: _some(rows, getattr(data, f"{part}_rows"), seed) for part, rows in parts.items()}


def _unrolls(task: Task, names: dict[str, str], row: Row) -> bool:
    """Are the rows to be made from the column that the task unrolls? Not where they are there already."""
    if all(names.get(name, name) in row for name in task.needed):
        return False
    return names.get(task.unrolls or "", task.unrolls) in row


def _some(rows: list[Row], most: int | None, seed: int) -> list[Row]:
    """At most so many, drawn by a hash, in their order."""
    if most is None or most >= len(rows):
        return rows
    import random

    chosen = sorted(random.Random(seed).sample(range(len(rows)), most))
    return [rows[n] for n in chosen]


def _open(folder: Path, task: Task, data: Any, model: Any, args: TaskTrainingArguments) -> None:
    """Make the folder, or enter the one that is to be resumed. Errors say what differs or what is in the way."""
    kept = {name: value for name, value in args.to_dict().items() if name in FIXED}
    enter(folder, {"task": task.name, "data": vars(data), "model": vars(model), "training": kept}, args)


def _rewritten(task: Task, rows: list[Row], rewrite: Callable[..., Iterable[str]], kept: Path) -> list[Row]:
    """Rows with other targets, which are kept in a file, so that a training that is resumed has the same."""
    if not kept.is_file():
        sources = [text_of(row, "source", task.name) for row in rows]
        write_json(list(rewrite(sources)), kept)
    targets = json.loads(kept.read_text(encoding="utf-8"))
    if len(targets) != len(rows):
        raise ValueError(f"{kept} holds {len(targets)} targets for {len(rows)} training rows; remove it")
    made = [{**row, "target": target} for row, target in zip(rows, targets, strict=True) if target.strip()]
    if not made:
        raise ValueError("the teacher says nothing of any training row, so there is nothing to learn")
    return made


FIXED = (
    "optim", "compare_optim", "learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs",
    "per_device_train_batch_size", "gradient_accumulation_steps", "weight_decay", "label_smoothing_factor", "l1",
    "r_drop", "token_dropping", "token_masking", "grow_batch_to", "seed", "bf16", "max_grad_norm", "search_trials",
)  # fmt: skip


def _tokenizer(task: Task, data: Any, model: Any, rows: list[Row], kept: Path) -> PreTrainedTokenizerBase:
    if not kept.is_dir():
        made = find_tokenizer(task, data, model, rows)
        with new_folder(kept, mark="tokenizer_config.json") as working:
            made.save_pretrained(working)
    return find_tokenizer(task, data, model, rows, kept)


def _train(task: Task, data: Any, model: Any, args: TaskTrainingArguments, given: tuple[Any, ...]) -> Record:
    """One model from its beginning to its record; the record alone where it is already there."""
    tokenizer, parts, choice, label = given
    place = Path(args.output_dir or "").parent
    if (place / DONE).is_file():
        print(f"{place}: already trained, kept")
        return json.loads((place / DONE).read_text(encoding="utf-8"))
    task.learn_labels(parts["train"], data)
    config = make_config(task, data, model, tokenizer, choice)
    examples = {part: task.examples(rows, tokenizer, data, config) for part, rows in parts.items()}
    check_sizes(args.layout, config, data.source_length)
    groups = args.world_size if args.layout.plain else args.layout.data_ranks  # that have rows of their own
    step = args.train_batch_size * args.gradient_accumulation_steps * groups
    if len(examples["train"]) < step:
        raise ValueError(
            f"{len(examples['train'])} training examples do not fill one step of {step}: give more rows, or a smaller "
            "--per_device_train_batch_size"
        )

    def make() -> Any:
        set_seed(args.seed)
        return make_model(task, model, make_config(task, data, model, tokenizer, choice), choice)

    _best(task, args)
    found = search(task, args, examples, tokenizer, make) if args.search_trials else {}
    for name, value in found.items():
        setattr(args, name, value)
    start = place / f".start-{os.environ.get('GROUP_RANK', '0')}"
    whole = cut_model(make(), args.layout, start, args.local_process_index)
    trainer = TaskTrainer(
        task=task, model=whole, args=args, train=examples["train"], validation=examples["validation"],
        tokenizer=tokenizer, new_tokens=data.target_length,
    )  # fmt: skip
    checked: Any = args
    trainer.train(resume_from_checkpoint=_checkpoint(checked, Path(args.output_dir or "")))
    if trainer.terminate.stopped:
        raise Terminated(args.output_dir or "", trainer.state.global_step)
    validation = trainer.evaluate() if "test" in examples else {}
    scored = examples.get("test", examples["validation"])
    test = trainer.evaluate(scored, metric_key_prefix="test")  # type: ignore[arg-type]
    inner: Any = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(inner.config, "use_cache"):
        inner.config.use_cache = task.generates  # Trainer has switched it off for training
    trainer.save_whole(place / "model", tokenizer)
    record: Record = {}
    if args.process_index == 0:
        record = _record(task, trainer, examples, describe_choice(model, config, choice))
        record |= {"label": label, "validation": validation, "test": test, "found": found}
        _save(trainer, record, scored, place)
    trainer.accelerator.wait_for_everyone()
    return record


def _best(task: Task, args: TaskTrainingArguments) -> None:
    """Which checkpoint is the best: by the task's metric unless another was named."""
    if args.load_best_model_at_end and args.metric_for_best_model in (None, "loss", "eval_loss"):
        args.metric_for_best_model, args.greater_is_better = task.best, task.greater
    elif args.load_best_model_at_end and args.greater_is_better is None:
        args.greater_is_better = "loss" not in (args.metric_for_best_model or "")


def _record(task: Task, trainer: TaskTrainer, examples: dict[str, Examples], choice: Record) -> Record:
    args, state = trainer.args, trainer.state
    return {
        "task": task.name,
        **choice,
        "optim": str(getattr(args.optim, "value", args.optim)),
        "parameters": trainer.model.num_parameters(),  # type: ignore[union-attr, operator]
        "steps": state.global_step,
        "training_seconds": trainer.clock.seconds,
        "epochs": state.epoch,
        "best_step": state.best_global_step,
        "examples": {part: len(e) for part, e in examples.items()},
        "training": {name: value for name, value in args.to_dict().items() if name in FIXED},
        "environment": environment(),
        "history": state.log_history,
    }


def _save(trainer: TaskTrainer, record: Record, scored: Examples, place: Path) -> None:
    with open(place / "predictions.jsonl", "w", encoding="utf-8") as file:
        for row, made in zip(scored.rows, trainer.made, strict=False):
            wanted = {name: row[name] for name in trainer.task.needed if name in row}
            file.write(json.dumps({**wanted, "prediction": made}, ensure_ascii=False) + "\n")
    write_json(record, place / DONE)
