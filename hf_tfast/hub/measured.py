"""What was measured of a model, for its card: read from the files that the measuring commands write.

    quickstart   results.json     settings, retrieval, passages, environment
    healing      results.json     of recipes/distill_encoder.py: quality, speed, training
    training     metrics.json of one model, or results.json with the records of several; the same of tasks
    fidelity     results.jsonl    records of kind "fidelity"
    bench        results.jsonl    records of kind "timing"

A file belongs to a model or it does not: one of another model, another plan or other fields is refused.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..benchmarking import fidelity_pages, table
from ..benchmarking.environment import describe

__all__ = ["Facts", "Measured", "read_results"]

Record = dict[str, Any]
FILES = ("results.json", "results.jsonl", "metrics.json")


@dataclass(frozen=True)
class Facts:
    """What a file must agree with. `attention` and `feed_forward`: the plan's or config's, as saved (no feed-forward:
    None); `names`: of the model and its base.

    mechanisms   every mechanism that self-attention runs, as its dict.
    """

    attention: Any
    mechanisms: list[Record]
    names: list[str]
    parameters: int
    feed_forward: Any = None


@dataclass(frozen=True)
class Measured:
    """A section of a card: Markdown with the machine and the command, and figures that the Hub understands."""

    title: str
    text: str
    figures: list[EvalResult] = field(default_factory=list)


def read_results(path: str | Path, facts: Facts) -> Measured:
    """The section that a file, or the folder that holds it, makes. ValueError for a file that is not known, or holds
    what was measured of another model."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if len(found) != 1:
            raise ValueError(f"expected one of {', '.join(FILES)} in {path}, found {len(found)}")
        path = found[0]
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".jsonl":
            return _lines([json.loads(line) for line in text.splitlines() if line], facts, path)
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if isinstance(content, dict):
        if "retrieval" in content and "settings" in content:
            return _quickstart(content, facts, path)
        if {"training", "quality", "speed"} <= set(content):
            return _healing(content, facts, path)
        records = content.get("records", [content] if "attention" in content else [])
        if records and "task" in records[0]:
            return _tasks(records, facts, path)
        if records and "final" in records[0]:
            return _training(records, facts, path)
    raise ValueError(f"{path} is no result of tfast quickstart, fidelity or bench, nor of a training")


def _lines(records: list[Record], facts: Facts, path: Path) -> Measured:
    kinds = {record.get("kind") for record in records}
    if "fidelity" in kinds:
        return _fidelity(records, facts, path)
    if "timing" in kinds:
        return _timings(records, facts, path)
    raise ValueError(f"{path} holds neither fidelity nor timings, but {', '.join(sorted(map(str, kinds)))}")


def _fidelity(records: list[Record], facts: Facts, path: Path) -> Measured:
    about = next(record for record in records if record["kind"] == "input")
    _check_name(about["model"], facts, path)
    mine = [r for r in records if r["kind"] != "fidelity" or _is_ours(r, facts)]
    _check_any([r for r in mine if r["kind"] == "fidelity"], facts, path)
    kept = [record for record in mine if record["kind"] != "skipped"]
    return Measured("How near to dense attention, layer by layer", fidelity_pages.markdown(kept))


def _timings(records: list[Record], facts: Facts, path: Path) -> Measured:
    ours = [r for r in records if r["kind"] == "timing" and r["mechanism"] and _is_ours(r["mechanism"], facts)]
    _check_any(ours, facts, path)
    rivals = [r for r in records if r["kind"] != "timing" or r["mechanism"] is None]
    kept = [r for r in records if any(r is other for other in (*ours, *rivals))]
    return Measured("Speed of one attention call, against SDPA of the same dtype", table.markdown(kept))


def _is_ours(record: Record, facts: Facts) -> bool:
    """Has the record every field of a mechanism that the model runs?"""
    return any(all(record.get(name) == value for name, value in m.items()) for m in facts.mechanisms)


def _check_any(found: Sequence[Record], facts: Facts, path: Path) -> None:
    if not found:
        raise ValueError(f"{path} has nothing about what this model runs: {facts.mechanisms}")


def _check_name(name: str, facts: Facts, path: Path) -> None:
    if name not in facts.names:
        raise ValueError(
            f"{path} was measured on {name!r}, but this is {' from '.join(map(repr, facts.names))}: leave it out, or "
            "give base_model if it is the same model"
        )


def _foot(environment: Record, *more: str) -> str:
    return "\n\n".join([*more, f"Machine: {describe(environment)}", f"Made by: `{environment['command']}`"]) + "\n"


def _rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    ruler = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, ruler, *rows))


def _quickstart(content: Record, facts: Facts, path: Path) -> Measured:
    settings, corpus = content["settings"], content["corpus"]
    _check_name(settings["model"], facts, path)
    _check_plan(settings["plan"], facts, path)
    documents = _rows(
        ("whole documents", "MRR", "recall@1", "documents/s", "peak memory"),
        [
            (r["label"], f"{r['mrr']:.3f}", f"{r['recall_at_1']:.3f}", f"{r['documents_per_second']:.2f}", _mib(r))
            for r in content["retrieval"]
        ],
    )
    passages = _rows(
        ("passages", "passage MRR", "passage recall@1", "document MRR"),
        [
            (
                r["label"],
                f"{r['passage']['mrr']:.3f}",
                f"{r['passage']['recall_at_1']:.3f}",
                f"{r['document']['mrr']:.3f}",
            )
            for r in content["passages"]
        ],
    )
    about = (
        f"{corpus['source']}: {corpus['documents']} documents of {corpus['shortest']} to {corpus['longest']} tokens, "
        f"{corpus['queries']} queries, {corpus['beyond']:.0%} of them about a passage beyond the "
        f"{settings['native']} tokens of the base model. {settings['dtype']}, one document at a time, rivals in turns."
    )
    fast = next(r for r in content["retrieval"] if r["key"] == "fast")
    figures = [
        EvalResult("sentence-similarity", _slug(corpus["source"]), corpus["source"], metric, round(fast[key], 4), name)
        for metric, key, name in (("mrr", "mrr", "Retrieval of long documents"),
                                  ("recall", "recall_at_1", "Retrieval of long documents"))
    ]  # fmt: skip
    return Measured("Finding long documents", f"{documents}\n\n{passages}\n\n{_foot(content['environment'], about)}",
                    figures)  # fmt: skip


def _check_plan(plan: Record, facts: Facts, path: Path) -> None:
    """ValueError where a file was measured with other attention or other feed-forwards than the model runs."""
    for name, runs in (("attention", facts.attention), ("feed_forward", facts.feed_forward)):
        if plan.get(name) != runs:
            raise ValueError(f"{path} was measured with {name}={plan.get(name)}, this model runs {name}={runs}")


def _healing(content: Record, facts: Facts, path: Path) -> Measured:
    """Everybody's rankings on every corpus; the healed model's by its own queries are its figures."""
    training, quality = content["training"], content["quality"]["quality"]
    _check_name(training["model"], facts, path)
    _check_plan(training["plan"], facts, path)
    speed = {row["key"]: row["documents_per_second"] for row in content["speed"]["speed"]}
    first = next(iter(quality.values()))["documents"]
    rows, figures = [], []
    for n, row in enumerate(first):
        cells = [f"{t['documents'][n]['mrr']:.3f} ({t['documents'][n]['recall_at_1']:.3f})" for t in quality.values()]
        by = "teacher" if row["queries_by"] == "teacher" else "itself"
        rows.append((row["label"], by, *cells, f"{speed[row['key']]:.2f}"))
    for name, corpus in quality.items():
        own = next(r for r in corpus["documents"] if r["key"] == r["queries_by"] == "healed")
        figures += [EvalResult("sentence-similarity", _slug(name), f"{name} ({corpus['source']})", metric,
                               round(own[key], 4), "Retrieval of long documents")
                    for metric, key in (("mrr", "mrr"), ("recall", "recall_at_1"))]  # fmt: skip
    columns = ("whole documents", "queries by", *quality, "documents/s")
    about = "MRR and, in brackets, recall@1. " + " ".join(
        f"{name}: {c['count']} documents of {c['mean_tokens']:.0f} tokens read, {c['queries']} queries."
        for name, c in quality.items()
    )
    text = f"{_rows(columns, rows)}\n\n{_foot(content['speed']['environment'], about)}"
    return Measured("Finding long documents, after healing", text, figures)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _mib(record: Record) -> str:
    return "-" if record["peak_bytes"] is None else f"{record['peak_bytes'] / 2**20:.0f} MiB"


def _own(records: list[Record], facts: Facts, path: Path) -> Record:
    """The model's own record among those of a comparison."""
    mine = [r for r in records if r["attention"] == facts.attention and r["parameters"] == facts.parameters]
    if len(mine) != 1:
        raise ValueError(
            f"{path} holds trainings with {[r['attention'] for r in records]} of {records[0]['parameters']:,} "
            f"parameters, but this model runs {facts.attention} with {facts.parameters:,}: another model"
        )
    return mine[0]


def _training(records: list[Record], facts: Facts, path: Path) -> Measured:
    """All records of a comparison, the model's own in bold; it must be among them."""
    own = _own(records, facts, path)
    masked = "eval_accuracy" in own["final"]
    share = ("accuracy", "eval_accuracy") if masked else ("bits per byte", "eval_bits_per_byte")
    rows = []
    for r in records:
        final, mark = r["final"], "**" if r is own else ""
        shown = [final["eval_loss"], final["eval_perplexity"], final.get(share[1]), final.get("eval_loss_far")]
        cells = [_named(r["attention"]), *("-" if x is None else f"{x:.3f}" for x in shown)]
        cells.append(f"{r['tokens_per_second']:,.0f}")
        rows.append([f"{mark}{cell}{mark}" for cell in cells])
    columns = ("attention", "held-out loss", "perplexity", share[0], "loss on far tokens", "training tokens/s")
    data = own["data"]
    about = (
        f"{own['parameters']:,} parameters, {own['tokens_seen']:,} tokens in {own['steps']} steps of sequences of "
        f"{data['length']}; {own['training_seconds']:.0f} seconds of training. Held out: "
        f"{own['final']['eval_targets']:,.0f} targets. A far token last occurred more than {data['far']} tokens ago."
    )
    task = "fill-mask" if masked else "text-generation"
    figures = [EvalResult(task, "held-out", "held-out texts of the training data", "perplexity",
                          round(own["final"]["eval_perplexity"], 4))]  # fmt: skip
    return Measured("Training", f"{_rows(columns, rows)}\n\n{_foot(own['environment'], about)}", figures)


# task of a training: its task on the Hub, and the metrics that a card shows, each with the factor it is written with
_METRICS = {
    "translation": ("translation", {"bleu": 1, "chrf": 1}),
    "summarization": ("summarization", {"rouge1": 100, "rouge2": 100, "rougeL": 100}),
    "dialogue": ("text-generation", {"perplexity": 1, "bleu": 1}),
    "sequence": ("text-classification", {"accuracy": 100, "f1": 100}),
    "token": ("token-classification", {"f1": 100, "precision": 100, "recall": 100}),
    "qa": ("question-answering", {"exact_match": 100, "f1": 100}),
}


def _tasks(records: list[Record], facts: Facts, path: Path) -> Measured:
    """The test figures of all models of a comparison, the model's own in bold."""
    own = _own(records, facts, path)
    task, metrics = _METRICS[own["task"]]
    rows = []
    for r in records:
        mark, test = "**" if r is own else "", r["test"]
        cells = [_named(r["attention"]) + (f", {json.dumps(r['feed_forward'])}" if r["feed_forward"] else "")]
        cells += [f"{r['parameters']:,}", f"{test['test_loss']:.3f}"]
        cells += [f"{test[f'test_{name}'] * factor:.2f}" for name, factor in metrics.items()]
        rows.append([f"{mark}{cell}{mark}" for cell in (*cells, f"{r['training_seconds']:.0f}")])
    examples = own["examples"]
    scored = "test" if "test" in examples else "validation"
    about = (
        f"Task: {own['task']}. {own['steps']} steps, {own['epochs']:.2f} epochs of {examples['train']:,} examples; "
        f"the best of the checkpoints by {examples['validation']:,} validation examples, scored on "
        f"{examples[scored]:,} {scored} examples. Loss: nats per label."
    )
    columns = ("model", "parameters", "loss", *metrics, "training seconds")
    figures = [
        EvalResult(task, "held-out", "held-out rows of the training data", name,
                   round(own["test"][f"test_{name}"] * factor, 4))
        for name, factor in metrics.items()
    ]  # fmt: skip
    return Measured("Training", f"{_rows(columns, rows)}\n\n{_foot(own['environment'], about)}", figures)


def _named(attention: Any) -> str:
    if isinstance(attention, dict) and "mechanism" in attention:
        fields = ", ".join(f"{name}={value}" for name, value in attention.items() if name != "mechanism")
        return f"{attention['mechanism']}({fields})"
    return json.dumps(attention)
