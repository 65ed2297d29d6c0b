"""One training, or the same training for several mechanisms: from arguments to saved models, metrics and curves.

output_dir/arguments.json     the settings; a folder with it is a training, and only such a folder is ever replaced
output_dir/tokenizer/
output_dir/model/             the model and its tokenizer, as from_pretrained reads them
output_dir/metrics.json       settings, data, machine, every figure and the curve; written last, so it says "done"
output_dir/curve.png
output_dir/checkpoints/       of Trainer, to resume from
output_dir/<mechanism>/...    the last four of each, when several are compared; and the comparison beside them
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..benchmarking.environment import environment
from ..benchmarking.folder import check_new, new_folder
from ..models.configuration_tfast import TFastConfig
from ..models.modeling_tfast import TFastForCausalLM, TFastForMaskedLM
from .arguments import DataArguments, ModelArguments, PretrainingArguments, read_attention
from .compare import RESULTS, compare
from .data import Data, prepare
from .faults import Terminated
from .guards import check_launch
from .launch import check_sizes
from .piped import PipelineTrainer
from .plot import need_matplotlib, plot_curves
from .sample import sample
from .scaled import cut_model
from .trainer import PretrainingTrainer

MARK, DONE = "arguments.json", "metrics.json"
Record = dict[str, Any]


def pretrain(
    data: DataArguments,
    model: ModelArguments,
    args: PretrainingArguments,
    *,
    two_way: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[Record]:
    """Train what the arguments say and return a record of metrics for each model; two_way: masked language modelling.

    callbacks  of Trainer, for whoever watches a training.
    ValueError for arguments that do not fit each other or this machine, FileExistsError for an output folder that
    holds something, Diverged (see `trainer`) for a training that comes to nothing.
    """
    check_launch(args)
    if args.plot:
        need_matplotlib()
    choices = {
        _key(n, given, model): read_attention(given) for n, given in enumerate(model.compare or [model.attention])
    }
    configs = [
        _config(model, choice, data.length, two_way) for choice in choices.values()
    ]  # refuse before reading texts
    for config in configs:
        check_sizes(args.layout, config, data.length)
    folder = Path(args.output_dir or "")
    if args.report is not None:
        _check_report(Path(args.report), model, args)
    with args.main_process_first(local=False, desc="folder"):
        if args.process_index == 0:
            _open(folder, data, model, args, two_way)
    prepared = prepare(data, args, folder, two_way)
    records = []
    for key, config in zip(choices, configs, strict=True):
        place = folder / key if model.compare else folder
        records.append(_train(prepared, config, args, place, two_way, callbacks))
    if model.compare and args.process_index == 0:
        compare(records, Path(args.report) if args.report else folder, draw=args.plot)
    return records


def _check_report(report: Path, model: ModelArguments, args: PretrainingArguments) -> None:
    if not model.compare:
        raise ValueError(
            "--report is the folder of a comparison: name what to compare with --compare, or leave it out"
        )
    if (report / RESULTS).exists() and not (args.overwrite or args.resume_from_checkpoint):
        raise FileExistsError(
            f"{report} holds results; name another folder with --report, or replace them with --overwrite"
        )


def _key(n: int, given: str, model: ModelArguments) -> str:
    """The mechanism's name, numbered where a comparison has it more than once; its folder."""
    choice = read_attention(given)
    name = choice.get("mechanism", "layers")
    same = [read_attention(other).get("mechanism", "layers") for other in model.compare]
    return name if same.count(name) < 2 else f"{name}-{same[: n + 1].count(name)}"


def _config(model: ModelArguments, attention: dict[str, Any], length: int, two_way: bool) -> TFastConfig:
    fields = {"max_position_embeddings": length, **model.fields()}
    if fields["max_position_embeddings"] < length:
        raise ValueError(
            f"--length {length} is beyond the model's {fields['max_position_embeddings']} positions "
            "(max_position_embeddings in --model): shorten the sequences or give the model more"
        )
    return TFastConfig(**{"attention": attention, **fields, "causal": not two_way})


def _open(folder: Path, data: DataArguments, model: ModelArguments, args: PretrainingArguments, two_way: bool) -> None:
    """Make the folder, or enter the one that is to be resumed. Errors say what differs or what is in the way."""
    settings = {"data": vars(data), "model": model.fields(), "training": args.fixed(), "two_way": two_way}
    if not model.compare:
        settings["attention"] = read_attention(model.attention)
    enter(folder, settings, args, _forget_shares)


def enter(
    folder: Path, settings: Record, args: Any, forget: Callable[[Record, Record], None] = lambda before, now: None
) -> None:
    """Make the folder of a training with its `settings`, or enter the one that is to be resumed.

    forget   changes both settings, earlier and present ones, where a difference does not matter.
    Raises   FileExistsError for a folder that is in the way, ValueError naming every setting that differs.
    """
    settings = json.loads(json.dumps(settings))
    if folder.exists() and args.resume_from_checkpoint:
        if not (folder / MARK).is_file():
            raise FileExistsError(f"{folder} holds no {MARK}, so there is no training in it to resume")
        before = json.loads((folder / MARK).read_text(encoding="utf-8"))
        forget(before, settings)
        if differences := list(_differences(before, settings)):
            raise ValueError(f"{folder} holds another training, which cannot be resumed so: {'; '.join(differences)}")
        return
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()
    check_new(folder, args.overwrite, MARK)
    if folder.exists():
        shutil.rmtree(folder)
    with new_folder(folder, mark=MARK) as working:
        write_json(settings, working / MARK)


# How many rows a step has is settled; how processes share them may change.
SHARES = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")


def _forget_shares(before: Record, now: Record) -> None:
    """Where a step has as many rows as before, let it not matter how they are shared."""
    rows = [math.prod(part["training"].get(name, 0) for name in SHARES) for part in (before, now)]
    if rows[0] == rows[1]:
        for name in SHARES:
            before["training"].pop(name, None)
            now["training"].pop(name, None)


def _differences(before: Any, now: Any, path: str = "") -> Any:
    """Words for every setting that is not what it was."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}):
            yield from _differences(before.get(name), now.get(name), f"{path}.{name}" if path else name)
    elif before != now:
        yield f"{path} was {before!r} and is {now!r}"


def _train(
    data: Data,
    config: TFastConfig,
    args: PretrainingArguments,
    place: Path,
    two_way: bool,
    callbacks: Sequence[TrainerCallback],
) -> Record:
    """One model from random weights to its record; the record alone where it is already there and may be kept."""
    if (place / DONE).is_file():
        return _finished(place, data)
    tokenizer = data.tokenizer
    config.vocab_size = len(tokenizer)
    for role in ("pad", "bos", "eos", "mask"):
        setattr(config, f"{role}_token_id", getattr(tokenizer, f"{role}_token_id"))
    set_seed(args.seed)
    model: PreTrainedModel = (TFastForMaskedLM if two_way else TFastForCausalLM)(config)
    checkpoints = place / "checkpoints"
    args = _for_folder(args, checkpoints)
    node = os.environ.get("GROUP_RANK", "0")
    model = cut_model(model, args.layout, place / f".start-{node}", args.local_process_index)
    config = model.config  # type: ignore[assignment]
    parameters = model.num_parameters()
    trainer = (PipelineTrainer if args.layout.pipeline > 1 else PretrainingTrainer)(
        model=model,
        args=args,
        train_dataset=data.train,
        evaluation=data.evaluation,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    start = _checkpoint(args, checkpoints)
    trainer.train(resume_from_checkpoint=start)
    if trainer.terminate.stopped:
        raise Terminated(str(checkpoints), trainer.state.global_step)
    final = _last_evaluation(trainer) or trainer.evaluate()
    peak = trainer.step_memory()
    config.use_cache = not two_way  # Trainer has switched it off for training
    trainer.save_whole(place / "model", tokenizer)
    record: Record = {}
    if args.process_index == 0:
        record = {
            "attention": config.attention or {"mechanism": "dense"},
            "final": {name: value for name, value in final.items() if name.startswith("eval_")},
            "tokens_per_second": trainer.state.num_input_tokens_seen / max(trainer.clock.seconds, 1e-9),
            "training_seconds": trainer.clock.seconds,
            "tokens_seen": trainer.state.num_input_tokens_seen,
            "steps": trainer.state.global_step,
            "step_peak_bytes": peak,
            "parameters": parameters,
            "resumed_at": None if start is None else int(Path(start).name.rsplit("-", 1)[1]),
            "sample": sample(place / "model", data.sample, args, two_way),
            "data": data.report,
            "training": args.fixed(),
            "environment": environment(),
            "history": trainer.state.log_history,
        }
        if args.plot:
            _atomically(place / "curve.png", lambda path: plot_curves([record], path))
        write_json(record, place / DONE)
    trainer.accelerator.wait_for_everyone()
    return record


def _last_evaluation(trainer: PretrainingTrainer) -> Record | None:
    """The metrics of the evaluation after the last step, where the schedule had one there."""
    entries = [h for h in trainer.state.log_history if "eval_loss" in h and h["step"] == trainer.state.global_step]
    return {name: value for name, value in entries[-1].items() if name.startswith("eval_")} if entries else None


def _finished(place: Path, data: Data) -> Record:
    record: Record = json.loads((place / DONE).read_text(encoding="utf-8"))
    if record["data"]["digest"] != data.report["digest"]:
        raise ValueError(f"{place} holds a training on other texts than there are now; name another --output_dir")
    print(f"{place}: already trained, kept")
    return record


def _for_folder(args: PretrainingArguments, checkpoints: Path) -> PretrainingArguments:
    """The same arguments with another folder for checkpoints; made anew they would be checked and derived twice."""
    from copy import copy

    changed = copy(args)
    changed.output_dir = str(checkpoints)
    return changed


def _checkpoint(args: PretrainingArguments, checkpoints: Path) -> str | None:
    """Where to go on: the checkpoint that was named, or the last whole one (Trainer writes its state last)."""
    asked = args.resume_from_checkpoint
    if asked is None:
        return None
    if asked != "last":
        if not (Path(asked) / "trainer_state.json").is_file():
            raise ValueError(f"{asked} is no checkpoint of a training: it has no trainer_state.json")
        return asked
    while checkpoints.is_dir() and (found := get_last_checkpoint(str(checkpoints))) is not None:
        if _whole(Path(found)):
            return found
        if args.process_index == 0:
            shutil.rmtree(found)  # a kill came while it was written
        args.distributed_state.wait_for_everyone()
    return None


def _whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def write_json(value: Any, path: Path) -> None:
    """All of the file or nothing."""
    _atomically(path, lambda new: new.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8"))


def _atomically(path: Path, write: Callable[[Path], Any]) -> None:
    new = path.with_name(f".{path.name}.new{path.suffix}")
    write(new)
    new.replace(path)
