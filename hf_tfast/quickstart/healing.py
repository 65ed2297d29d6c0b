"""Heals the encoder that the quick start makes, by training, and measures it against everybody else.

output_dir/arguments.json   what was asked for; a folder with it is such a healing, and only that is resumed
output_dir/checkpoints/     of Trainer, to resume from
output_dir/model/           the healed encoder, as sentence-transformers and AutoModel read it
output_dir/training.json    data, settings and curve of the training
output_dir/baselines.json   rankings of teacher, dense and untrained plan on all corpora; kept where it exists
output_dir/read/            vectors that the baselines made so far
output_dir/quality.json     rankings of the healed encoder
output_dir/speed.json       documents a second of all rivals, in turns
"""

import json
from copy import copy, deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import set_seed
from transformers.trainer_utils import IntervalStrategy, get_last_checkpoint

from ..attention.window import Window
from ..benchmarking.environment import environment
from ..distillation.encoder import EncoderArguments, EncoderTrainer
from ..distillation.encoder_pairs import Example, Query, cloze, pieces, read_pairs, without
from ..distillation.encoder_rows import Rows
from ..integration.apply import remove_plan
from ..training.faults import Terminated
from ..training.guards import check_launch
from ..training.run import write_json
from ..training.sources import documents
from .corpus import Corpus, Document, load_corpus, python_corpus
from .encoder import Encoder, lengthened, load_encoder, planned
from .healing_contest import TEACHER, Contestant, measure_quality, measure_speed, metrics_of
from .healing_report import write_pages
from .saving import save_encoder

PYTHON = "python"
CLOZES = 8  # queries made from a piece of text
MARK = "arguments.json"
STAGES = ("baselines", "train", "quality", "speed")
CHARACTERS = 4  # of a token, about: as long are the pieces of a long text, for each token that a step reads


def _option(default: Any, text: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class HealingArguments:
    """The encoder, its plan, what it learns from and what it is measured on."""

    model: str | None = _option(None, "Hub id or folder of an encoder; none: all-MiniLM-L6-v2 of the package demo")
    length: int = _option(4096, "tokens that the long encoder reads")
    window: int = _option(128, "keys that a query reads on each side")
    sinks: int = _option(4, "first tokens that read everything and are read by everything")
    pairs: list[str] = _option([], "JSONL files of {query, document} or {queries, document}")
    documents: list[str] = _option([PYTHON], "texts without queries: files, globs, folders, or Python's documentation")
    validation: list[str] = _option(
        [], "JSONL files of {document, queries}: the checkpoint that is best there is kept"
    )
    evaluate: list[str] = _option([PYTHON], "name=file of {document, queries} each, or python")
    evaluated_documents: int = _option(32, "Python's own documents that are evaluated, the longest")
    train: str = _option("last:3", "what learns: lora:RANK, last:LAYERS, or all")
    train_length: int = _option(2048, "tokens of a document that a step reads")
    query_length: int = _option(96, "tokens of a query that a step reads")
    queries: int = _option(4, "queries of a document in a step, at most")
    passages: int = _option(2, "passages of a document that the teacher reads too")
    pieces: int = _option(400, "pieces of a source of --documents, at most, evenly from all of it")
    int8: bool = _option(
        True, "measure the healed encoder with int8 feed-forwards too, where bitsandbytes is installed"
    )
    timed_documents: int = _option(6, "documents on which every rival is timed")
    stages: list[str] = _option(list(STAGES), "which of baselines, train, quality and speed to do now")
    report: str | None = _option(None, "folder for results.json, table.md and healing.png, when all stages are done")

    def __post_init__(self) -> None:
        for stage in self.stages:
            if stage not in STAGES:
                raise ValueError(f"stages are {', '.join(STAGES)}, got {stage!r}")
        kind, _, size = self.train.partition(":")
        if (kind, bool(size)) not in {("lora", True), ("last", True), ("all", False)} or (size and int(size) < 1):
            raise ValueError(f"train is lora:RANK, last:LAYERS or all, got {self.train!r}")


@dataclass(frozen=True)
class Party:
    """The four encoders before training, and the corpora."""

    teacher: Encoder
    dense: Encoder
    untrained: Encoder
    validation: dict[str, Corpus]
    evaluated: dict[str, Corpus]

    @property
    def baselines(self) -> list[Contestant]:
        return [
            Contestant("dense", "dense", self.dense, self.teacher),
            Contestant("untrained", "untrained plan", self.untrained, self.teacher),
        ]


def heal(data: HealingArguments, args: EncoderArguments) -> dict[str, Any]:
    """Do the stages that were asked for; what the last of them wrote."""
    check_launch(args)
    folder = Path(args.output_dir or "")
    party = _party(data)
    record: dict[str, Any] = {}
    opened = _open(folder, data, args)
    if "train" in data.stages:
        if opened:
            print(f"{folder}: already trained, kept")
        else:
            record = _train(data, args, party, folder)
    done = {"arguments": vars(data), "environment": environment()}
    if "baselines" in data.stages and not (folder / "baselines.json").is_file():
        before = measure_quality(
            party.teacher, party.baselines, party.evaluated, data.length, TEACHER, folder / "read"
        )
        record = {"quality": before, **done}
        write_json(record, folder / "baselines.json")
    healed = _healed(data, party, folder / "model") if {"quality", "speed"} & set(data.stages) else []
    if "quality" in data.stages:
        record = {"quality": measure_quality(party.teacher, healed, party.evaluated, data.length), **done}
        write_json(record, folder / "quality.json")
    if "speed" in data.stages:
        corpus = max(party.evaluated.values(), key=lambda c: sum(len(d.text) for d in c.documents) / len(c.documents))
        everybody = [*party.baselines, *healed]
        speed = measure_speed(party.teacher, everybody, corpus, data.length, data.timed_documents)
        record = {"speed": speed, **done}
        write_json(record, folder / "speed.json")
    if data.report is not None:
        write_pages(folder, Path(data.report))
    return record


def _open(folder: Path, data: HealingArguments, args: EncoderArguments) -> bool:
    """Make the folder or enter the one that is to be resumed; is its training done? Errors say what is in the way."""
    names = ("model", "length", "window", "sinks", "pairs", "documents", "pieces", "validation", "evaluate", "train",
             "train_length", "query_length", "queries", "passages")  # fmt: skip
    own = ("temperature", "passage_weight", "keep_weight", "max_steps", "learning_rate", "per_device_train_batch_size",
           "gradient_accumulation_steps", "seed")  # fmt: skip
    settings = {name: getattr(data, name) for name in names} | {name: getattr(args, name) for name in own}
    if not folder.exists() or not any(folder.iterdir()):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(settings, folder / MARK)
        return False
    if not args.resume_from_checkpoint:
        raise FileExistsError(
            f"{folder} holds something; name another --output_dir, or go on in it with --resume_from_checkpoint last"
        )
    if not (folder / MARK).is_file():
        raise FileExistsError(f"{folder} holds no {MARK}, so there is no training in it to resume")
    before = json.loads((folder / MARK).read_text(encoding="utf-8"))
    if different := [f"{n} was {before.get(n)!r} and is {v!r}" for n, v in settings.items() if before.get(n) != v]:
        raise ValueError(f"{folder} holds another training, which cannot be resumed so: {'; '.join(different)}")
    return (folder / "training.json").is_file()


def _party(data: HealingArguments) -> Party:
    teacher = load_encoder(data.model)
    dense = lengthened(teacher, data.length)
    untrained = planned(dense, Window(window=data.window, sinks=data.sinks))
    evaluated = {}
    for given in data.evaluate:
        name, _, path = given.partition("=")
        evaluated[name] = load_corpus(path or None, data.evaluated_documents)
    validation = {Path(path).stem: load_corpus(path) for path in data.validation}
    return Party(teacher, dense, untrained, validation, evaluated)


def training_examples(data: HealingArguments, party: Party, seed: int) -> tuple[list[Example], dict[str, Any]]:
    """What is learned from, without anything that shares text with what is evaluated; and a report of both.

    Every source has its examples so often that all are met about equally.
    """
    found: dict[str, list[Example]] = {}
    for path in data.pairs:
        found[Path(path).name] = read_pairs(path)
    for source in data.documents:
        if source == PYTHON:
            found[PYTHON] = [_example(d) for d in python_corpus(10_000, 12).documents]
        else:
            size = CHARACTERS * data.train_length
            texts = [(f"{d.name}:{n}", piece) for d in documents([source])
                     for n, piece in enumerate(pieces(d.text, size, size // 3))]  # fmt: skip
            texts = texts[:: -(-len(texts) // data.pieces)]
            made = (cloze(name, text, CLOZES, seed) for name, text in texts)
            found[Path(source).name] = [example for example in made if example is not None]
    watched = {**party.evaluated, **party.validation}
    texts_of = [d.text for corpus in watched.values() for d in corpus.documents]
    texts_of += [query for corpus in watched.values() for query, _, _ in corpus.queries]
    kept: list[list[Example]] = []
    report: dict[str, Any] = {}
    for name, examples in found.items():
        good, out = without(examples, texts_of)
        kept.append(good)
        report[name] = {
            "documents": len(good),
            "queries": sum(len(e.queries) for e in good),
            "characters": sum(len(e.text) for e in good),
            "left_out": sorted(out),
        }
    most = max(map(len, kept), default=0)
    return [example for part in kept if part for example in part * round(most / len(part))], report


def _example(document: Document) -> Example:
    queries = [Query(text, None if at is None else document.passages[at]) for text, at in document.queries]
    return Example(document.name, document.text, tuple(queries))


def trainable(model: Any, what: str) -> Any:
    """Say which weights learn, in place; the model that the Trainer takes. Dropout is off: the teacher has none."""
    kind, _, size = what.partition(":")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if kind == "lora":
        from peft import LoraConfig, TaskType, get_peft_model

        linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and "pooler" not in name]
        config = LoraConfig(
            r=int(size), lora_alpha=2 * int(size), target_modules=linear, task_type=TaskType.FEATURE_EXTRACTION
        )
        return get_peft_model(model, config)
    if kind == "last":
        layers: list[nn.ModuleList] = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
        stack = max(layers, key=len)
        if int(size) > len(stack):
            raise ValueError(f"the encoder has {len(stack)} layers, got {what}")
        model.requires_grad_(False)
        for layer in stack[len(stack) - int(size) :]:
            layer.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if "pooler" in name:  # what no vector is made from has no gradient
            parameter.requires_grad_(False)
    return model


def _train(data: HealingArguments, args: EncoderArguments, party: Party, folder: Path) -> dict[str, Any]:
    examples, report = training_examples(data, party, args.seed)
    rows = Rows(
        examples,
        party.untrained,
        length=data.train_length,
        query=data.query_length,
        queries=data.queries,
        passages=data.passages,
        seed=args.seed,
    )
    args = copy(args)
    args.output_dir = str(folder / "checkpoints")
    start = args.resume_from_checkpoint
    if start == "last":
        start = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    if not party.validation:  # nothing says which checkpoint is best: the last one is kept
        args.eval_strategy, args.load_best_model_at_end = IntervalStrategy.NO, False
    set_seed(args.seed)
    student = replace(party.untrained, model=deepcopy(party.untrained.model))
    model = trainable(student.model, data.train)

    def evaluate() -> dict[str, float]:
        return metrics_of(student, party.validation, data.length)

    trainer = EncoderTrainer(
        student=student,
        teacher=party.teacher,
        rows=rows,
        args=args,
        model=model,
        evaluate=evaluate if party.validation else None,
    )
    trainer.train(resume_from_checkpoint=start)
    if trainer.terminate.stopped:
        raise Terminated(args.output_dir or "", trainer.state.global_step)
    healed = replace(student, model=model.merge_and_unload() if hasattr(model, "merge_and_unload") else model)
    healed.model.eval()
    save_encoder(healed, folder / "model")
    record = {
        "model": party.teacher.name,
        "plan": healed.model.config.quantization_config.to_dict(),
        "arguments": vars(data),
        "training": args.to_dict(),
        "data": report,
        "history": trainer.state.log_history,
        "seconds": trainer.clock.seconds,
        "steps": trainer.state.global_step,
        "seed": args.seed,
        "best": trainer.state.best_metric,
        "environment": environment(),
    }
    write_json(json.loads(json.dumps(record, default=str)), folder / "training.json")
    return record


def _healed(data: HealingArguments, party: Party, folder: Path) -> list[Contestant]:
    from transformers import AutoModel

    healed = replace(party.untrained, model=AutoModel.from_pretrained(folder).eval().to(party.teacher.model.device))
    found = [Contestant("healed", "healed plan", healed, healed)]
    if data.int8:
        from ..feed_forward.int8 import Int8
        from ..integration.apply import apply_plan
        from ..integration.plan import FastPlan

        dense = remove_plan(deepcopy(healed.model))
        window = Window(window=data.window, sinks=data.sinks)
        small = replace(healed, model=apply_plan(dense, FastPlan(attention=window, feed_forward=Int8())))
        found.append(Contestant("int8", "healed plan, int8 feed-forwards", small, small))
    return found
