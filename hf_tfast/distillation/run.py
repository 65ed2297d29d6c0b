"""One teacher, its students, two stages: from arguments to saved models, metrics, a table and a plot.

output_dir/arguments.json            the settings
output_dir/tokenizer/, teacher.json  the teacher's tokenizer, and its evaluation
output_dir/<student>/layers/, logits/   checkpoints of each stage, its model when it is done, and stage.json
output_dir/<student>/model/          the student, as from_pretrained reads it
output_dir/<student>/metrics.json    written last, so it says "done"

Stopped and started again with --resume_from_checkpoint last it goes on at the last checkpoint, to the same losses.
"""

import json
from copy import copy
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, PreTrainedModel, set_seed

from ..benchmarking.environment import environment
from ..benchmarking.folder import check_new, new_folder
from ..training.arguments import BYTES, LEARNED, DataArguments, read_attention
from ..training.data import Data, prepare
from ..training.faults import Terminated
from ..training.guards import check_launch
from ..training.packing import collate
from ..training.plot import need_matplotlib
from ..training.run import _checkpoint, _differences, _last_evaluation, write_json
from ..training.tokens import byte_tokenizer, known_tokenizer
from .arguments import DistillationArguments, StudentArguments
from .cache import INDEX, CachedTeacher, cache_logits
from .layerwise import LayerMatching
from .report import speeds, write_report
from .sharpness import sharpness
from .students import fast_copy, load_teacher, smaller
from .trainer import DistillationTrainer
from .whole import LogitMatching, check_vocabularies

__all__ = ["distill"]

MARK, DONE, STAGE = "arguments.json", "metrics.json", "stage.json"
Record = dict[str, Any]


def distill(data: DataArguments, student: StudentArguments, args: DistillationArguments) -> list[Record]:
    """Distil what the arguments say; a record of each student.

    ValueError for arguments that do not fit each other or this machine, FileExistsError for an output folder that
    holds something, Diverged for a stage that comes to nothing.
    """
    check_launch(args)
    if args.plot:
        need_matplotlib()
    if data.tokenizer == LEARNED:  # the default: students read as their teacher does
        data.tokenizer = student.teacher
    teacher = load_teacher(student.teacher, student.teacher_int8)
    most = getattr(teacher.config.get_text_config(), "max_position_embeddings", data.length)
    if data.length > most:
        raise ValueError(f"--length {data.length} is beyond the teacher's {most} positions")
    if data.tokenizer != student.teacher:
        _check_tokens(data, teacher, student.teacher)
    folder = Path(args.output_dir or "")
    with args.main_process_first(local=False, desc="folder"):
        if args.process_index == 0:
            _open(folder, data, student, args)
    prepared = prepare(data, args, folder, two_way=False)
    theirs: Any = _cached(teacher, prepared, student, folder) if student.cache else teacher
    records = [
        _student(prepared, student, theirs, read_attention(given), folder / _key(n, student.students), args)
        for n, given in enumerate(student.students)
    ]
    if args.process_index == 0:
        about = _teacher_record(teacher, prepared, folder, args)
        _measure_speeds(about, records, student, prepared, folder, args)
        write_report(about, records, Path(args.report) if args.report else folder, draw=args.plot)
    return records


def _key(n: int, students: list[str]) -> str:
    """The mechanism's name, numbered where several students have it."""
    names = [read_attention(given).get("mechanism", "layers") for given in students]
    return names[n] if names.count(names[n]) < 2 else f"{names[n]}-{names[: n + 1].count(names[n])}"


def _open(folder: Path, data: DataArguments, student: StudentArguments, args: DistillationArguments) -> None:
    """Make the folder, or enter the one that is to be resumed."""
    about = {name: getattr(student, name) for name in ("teacher", "smaller", "teacher_int8", "cache")}
    settings = json.loads(json.dumps({"data": vars(data), "student": about, "training": args.fixed()}))
    if folder.exists() and args.resume_from_checkpoint:
        if not (folder / MARK).is_file():
            raise FileExistsError(f"{folder} holds no {MARK}, so there is no distillation in it to resume")
        before = json.loads((folder / MARK).read_text(encoding="utf-8"))
        if differences := list(_differences(before, settings)):
            raise ValueError(f"{folder} holds another distillation: {'; '.join(differences)}")
        return
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()
    check_new(folder, args.overwrite, MARK)
    with new_folder(folder, overwrite=args.overwrite, mark=MARK) as working:
        write_json(settings, working / MARK)


def _check_tokens(data: DataArguments, teacher: PreTrainedModel, name: str) -> None:
    """ValueError where texts would be cut into tokens that mean something else to the teacher, or nothing."""
    given = byte_tokenizer(data.length, False) if data.tokenizer == BYTES else known_tokenizer(data.tokenizer)
    size, tokens = teacher.config.get_text_config().vocab_size, given.get_vocab()
    try:
        own = AutoTokenizer.from_pretrained(name).get_vocab()
    except (OSError, ValueError):  # it came without one: nobody knows what its tokens mean
        own = tokens
    if tokens != own:
        check_vocabularies(teacher, size, LogitMatching(), (tokens, own))
    if (most := max(tokens.values())) >= size:
        raise ValueError(
            f"--tokenizer {data.tokenizer} has a token {most}, and the teacher's are 0 to {size - 1}: leave "
            "--tokenizer out, and texts are cut as the teacher's were"
        )


def _cached(teacher: PreTrainedModel, data: Data, student: StudentArguments, folder: Path) -> CachedTeacher:
    """The teacher's logits on disk, from before or made now."""
    place = folder / "logits"
    if (place / INDEX).is_file():
        return CachedTeacher(place)
    return cache_logits(teacher, data.train, place, collate=collate, k=student.cache)  # type: ignore[arg-type]


def _student(
    data: Data, student: StudentArguments, teacher: Any, attention: Record, place: Path, args: DistillationArguments
) -> Record:
    """One student through its stages; its record alone where that is there."""
    if (place / DONE).is_file():
        record: Record = json.loads((place / DONE).read_text(encoding="utf-8"))
        if record["data"]["digest"] != data.report["digest"]:
            raise ValueError(f"{place} holds a student of other texts than there are now; name another --output_dir")
        print(f"{place}: already distilled, kept")
        return record
    set_seed(args.seed)
    place.mkdir(parents=True, exist_ok=True)
    model = _begin(student, attention)
    stages: Record = {}
    plan: list[tuple[str, Any, int, float]] = [
        ("layers", args.layers, args.layer_steps, args.layer_learning_rate),
        ("logits", args.whole, args.max_steps, args.learning_rate),
    ]
    for name, objective, steps, rate in plan:
        if not steps or (name == "layers" and student.sizes):  # a student of other widths has no layers to match
            continue
        model = _stage(name, model, teacher, objective, data, _for_stage(args, place / name, steps, rate), stages)
    if args.process_index == 0:
        with new_folder(place / "model", overwrite=True, mark="config.json") as working:
            model.config.use_cache = True  # Trainer has switched it off for training
            model.save_pretrained(working)
            data.tokenizer.save_pretrained(working)
    record = {
        "attention": attention,
        "stages": stages,
        "parameters": model.num_parameters(),
        "data": data.report,
        "training": args.fixed(),
        "environment": environment(),
    }
    if args.process_index == 0:
        write_json(record, place / DONE)
    return record


def _begin(student: StudentArguments, attention: Record) -> PreTrainedModel:
    if not student.sizes:
        return fast_copy(student.teacher, attention)
    return smaller(load_teacher(student.teacher).config, attention, student.sizes)


def _for_stage(args: DistillationArguments, place: Path, steps: int, rate: float) -> DistillationArguments:
    """The same arguments for one stage; made anew they would be checked and derived twice."""
    changed = copy(args)
    changed.output_dir, changed.max_steps, changed.learning_rate = str(place / "checkpoints"), steps, rate
    return changed


def _stage(
    name: str,
    model: PreTrainedModel,
    teacher: Any,
    objective: Any,
    data: Data,
    args: DistillationArguments,
    stages: Record,
) -> PreTrainedModel:
    """Train one stage, or take the one that is done; its figures go into `stages`."""
    place = Path(args.output_dir or "").parent
    if (place / STAGE).is_file():
        stages.update(json.loads((place / STAGE).read_text(encoding="utf-8")))
        return AutoModelForCausalLM.from_pretrained(place / "model")
    lora = _lora(args) if args.lora_rank and not isinstance(objective, LayerMatching) else None
    trainer = DistillationTrainer(
        model=model,
        teacher=teacher,
        objective=objective,
        args=args,
        lora=lora,
        train_dataset=data.train,
        evaluation=data.evaluation,
        processing_class=data.tokenizer,
        callbacks=[EarlyStoppingCallback(args.patience)] if args.patience else None,
    )
    found: Record = {} if "swapped" in stages else {"swapped": {"final": trainer.evaluate()}}
    start = _checkpoint(args, place / "checkpoints")
    trainer.train(resume_from_checkpoint=start)
    if trainer.terminate.stopped:
        raise Terminated(str(place / "checkpoints"), trainer.state.global_step)
    found[name] = {
        "final": _final(trainer, args),
        "steps": trainer.state.global_step,
        "seconds": trainer.clock.seconds,
        "tokens_seen": trainer.state.num_input_tokens_seen,
        "resumed_at": None if start is None else int(Path(start).name.rsplit("-", 1)[1]),
        "history": trainer.state.log_history,
    }
    stages.update(found)
    model = trainer.merged()
    if args.process_index == 0:
        with new_folder(place / "model", overwrite=True, mark="config.json") as working:
            model.save_pretrained(working)
        write_json(found, place / STAGE)
    trainer.accelerator.wait_for_everyone()
    return model


def _final(trainer: DistillationTrainer, args: DistillationArguments) -> Record:
    """The evaluation of the weights that the stage ends with: made already where they are those of the last step."""
    last = None if args.load_best_model_at_end else _last_evaluation(trainer)  # type: ignore[arg-type]
    found = trainer.evaluate() if last is None else last
    return {key: value for key, value in found.items() if key.startswith("eval_")}


def _lora(args: DistillationArguments) -> Any:
    try:
        from peft import LoraConfig
    except ImportError:
        raise ImportError('--lora_rank needs peft: pip install "hf_tfast[lora]"') from None
    return LoraConfig(
        r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def _teacher_record(teacher: PreTrainedModel, data: Data, folder: Path, args: DistillationArguments) -> Record:
    """The teacher's evaluation, of before or of now."""
    path = folder / "teacher.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    from ..training.evaluation import Sums

    sums = data.evaluation.sums(teacher.to(args.device), context=_autocast(args))  # type: ignore[arg-type]
    config: Any = teacher.config
    record = {
        "attention": getattr(config, "attention", None) or {"mechanism": "dense"},
        "final": Sums.of(sums.tensor()).metrics(),
        "parameters": teacher.num_parameters(),
        "sharpness": sharpness(teacher, collate([data.evaluation.rows[0]])["input_ids"]),
        "data": data.report,
    }
    write_json(record, path)
    return record


def _autocast(args: DistillationArguments) -> Any:
    """A new context of the precision that the training has."""
    import torch

    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    kind = kinds.get(str(args.mixed_precision))
    return torch.autocast(args.device.type, dtype=kind or torch.bfloat16, enabled=kind is not None)


def _measure_speeds(
    teacher: Record,
    records: list[Record],
    student: StudentArguments,
    data: Data,
    folder: Path,
    args: DistillationArguments,
) -> None:
    """Time all models in turns, each as it is loaded from disk; figures go into the records."""
    if not args.speed_rounds:
        return
    places = {_key(n, student.students): folder / _key(n, student.students) for n in range(len(records))}
    models: Record = {"teacher": load_teacher(student.teacher)}
    models |= {key: AutoModelForCausalLM.from_pretrained(place / "model") for key, place in places.items()}
    batch = {name: x.to(args.device) for name, x in collate([data.evaluation.rows[0]]).items() if name != "labels"}
    models = {name: model.to(args.device) for name, model in models.items()}
    found = speeds(models, batch, args.speed_rounds, lambda: _autocast(args))
    teacher["tokens_per_second"] = found["teacher"]
    for key, record in zip(places, records, strict=True):
        record["tokens_per_second"] = found[key]
        record["environment"] = {**record["environment"], **environment()}
