"""The order of the quick start: check the request, measure, train, save, reload, report."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging

from ..attention.window import Window
from ..benchmarking.environment import environment
from ..benchmarking.folder import fresh_name, new_folder
from ..feed_forward.int8 import Int8, int8_layer
from ..planner import Proposal
from .corpus import Corpus, load_corpus
from .encoder import CHUNK, DTYPES, Encoder, lengthened, load_encoder, planned
from .planning import AUTO, SECONDS, choose, draw_choice, words
from .progress import steps
from .report import (
    FIGURE,
    draw,
    markdown,
    passage_rows,
    reload_words,
    retrieval_rows,
    show,
    tables,
    verdicts,
    write_report,
)
from .retrieval import Record, Text, document_table, passage_table, read_all, rivals, tokenized
from .saving import check_reload, save_encoder, write_card
from .training import (
    LENGTH,
    SLICE,
    byte_model,
    learners,
    python_bytes,
    train_in_turns,
    training_table,
)

WINDOW = {"window": 128, "sinks": 4}
MAX_ERROR = 0.05


@dataclass
class Contest:
    """What the retrieval part has made."""

    chunk: int
    teacher: Encoder
    fast: Encoder
    texts: list[Text]
    records: list[Record]
    asked: torch.Tensor  # [q d] vectors of the queries
    proposal: Proposal | None  # of the planner, where it was asked


def run_all(out: str | Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """See `hf_tfast.quickstart.run`."""
    console, start = Console(), time.perf_counter()
    if not console.is_terminal:
        console = Console(width=140)  # tables of a log file are not folded to 80 columns
    target = fresh_name("quickstart") if out is None else Path(out)
    window = _checked(target, settings)
    try:
        with _quiet_loading(), new_folder(target, mark="results.json") as folder:
            results = _measure(console, folder, settings, window, start)
    except KeyboardInterrupt:
        console.print(f"Interrupted: nothing was written to {target}.", highlight=False)
        raise
    console.print(f"\nThe report, the figure and the fast model are in {target} ({results['seconds']:.0f} s).")
    _check(results["reload"], target)
    return {**results, "folder": str(target)}


def _checked(target: Path, settings: dict[str, Any]) -> Window:
    """Everything that can be said before any work is done."""
    if target.exists():
        raise FileExistsError(f"{target} exists and is left as it is; name a new folder with --out")
    if settings["dtype"] not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {settings['dtype']!r}")
    if not settings["seconds"] >= 0:
        raise ValueError(f"seconds of training must be 0 (none) or more, got {settings['seconds']}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError('the figure needs matplotlib: pip install "hf_tfast[plots]"') from None
    if settings["int8"]:
        int8_layer()  # raises, and names the extra, where bitsandbytes is missing
    return _window(settings)


def _window(settings: dict[str, Any]) -> Window:
    """The window that was asked for, or the default one. ValueError for options that would be ignored."""
    if settings["plan"] not in ("window", AUTO):
        raise ValueError(f"plan must be 'window' or '{AUTO}', got {settings['plan']!r}")
    auto = settings["plan"] == AUTO
    for name in ("window", "sinks") if auto else ("max_error",):
        if settings[name] is not None:
            raise ValueError(f"{name} has no meaning with plan={settings['plan']!r}: leave it out")
    if auto and settings["max_error"] is not None and not settings["max_error"] >= 0:
        raise ValueError(f"max_error must be 0 or more, got {settings['max_error']}")
    given = {name: settings[name] for name in ("window", "sinks") if settings[name] is not None}
    return Window(**{**WINDOW, **given})


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Transformers' own bars for loading weights say nothing here; they are as before afterwards."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _measure(console: Console, folder: Path, settings: dict[str, Any], window: Window, start: float) -> dict[str, Any]:
    corpus = load_corpus(settings["corpus"])
    contest = _contest(console, corpus, settings, window)
    results: dict[str, Any] = {
        "settings": {
            **settings,
            "model": _shown(contest.teacher.name),
            "corpus": None if settings["corpus"] is None else Path(settings["corpus"]).name,
            "native": contest.teacher.native,
            "chunk": contest.chunk,
            **({} if contest.proposal else {"window": window.window, "sinks": window.sinks}),
            "plan": contest.fast.model.config.quantization_config.to_dict(),
        },
        "proposal": None if contest.proposal is None else contest.proposal.to_dict(),
        "corpus": _corpus_facts(corpus, contest),
        "retrieval": document_table(contest.records, corpus, contest.asked),
        "passages": passage_table(contest.records, corpus, contest.texts, contest.asked),
    }
    show(console, retrieval_rows(results))
    show(console, passage_rows(results))
    results["training"], results["training_setup"] = _train(console, settings, window)
    if results["training"]:
        show(console, tables(results)[-1])
    for line in verdicts(results):
        console.print(f"  {line}", highlight=False)
    longest = max(range(len(contest.texts)), key=lambda n: len(contest.texts[n].ids))  # in tokens, cut at `length`
    with steps(console, "saving the fast model and loading it in a fresh process", 1) as bar:
        save_encoder(contest.fast, folder / "model")
        texts = [corpus.documents[longest].text, corpus.documents[0].text, corpus.queries[0][0]]
        results["reload"] = check_reload(contest.fast, folder / "model", texts)
        bar.to(1)
    _say_reload(console, results["reload"])
    results["environment"] = environment()
    measured = "\n\n".join(markdown(rows) for rows in (retrieval_rows(results), passage_rows(results)))
    write_card(contest.fast, folder / "model", results, measured)
    draw(results, folder / FIGURE)
    if contest.proposal is not None:
        draw_choice(contest.proposal, folder)
    results["seconds"] = time.perf_counter() - start
    write_report(results, folder)
    return results


def _contest(console: Console, corpus: Corpus, settings: dict[str, Any], window: Window) -> Contest:
    length = settings["length"]
    teacher = load_encoder(settings["model"], settings["dtype"])
    chunk = min(CHUNK, teacher.native)
    if length <= chunk:
        raise ValueError(f"length must be more than the {chunk} tokens that the teacher reads at once, got {length}")
    dense = lengthened(teacher, length)
    texts = [tokenized(teacher, document, length) for document in corpus.documents]
    for document, text in zip(corpus.documents, texts, strict=True):
        if not text.ids:
            raise ValueError(f"the document of {document.name} holds nothing that the tokenizer reads")
    proposal = _proposal(console, dense, texts, settings) if settings["plan"] == AUTO else None
    attention = window if proposal is None else proposal.plan.attention
    fast = planned(dense, attention, Int8() if settings["int8"] else None)
    label = f"reading {len(texts)} documents with {_shown(teacher.name)}"
    with steps(console, label, len(texts)) as bar, torch.inference_mode():
        asked = torch.stack([teacher.vectors([teacher.content(q)[0][: chunk - teacher.special]])[0].cpu()
                             for q, _, _ in corpus.queries])  # fmt: skip
        records = read_all(rivals(teacher, dense, fast, chunk, length), texts, bar)
    return Contest(chunk, teacher, fast, texts, records, asked, proposal)


def _proposal(console: Console, dense: Encoder, texts: list[Text], settings: dict[str, Any]) -> Proposal:
    budget = MAX_ERROR if settings["max_error"] is None else settings["max_error"]
    began = time.perf_counter()
    with steps(console, "choosing a plan on this machine", SECONDS) as bar:

        def report(note: str) -> None:
            bar.to(min(time.perf_counter() - began, SECONDS), f"s, {note}")

        found = choose(dense, texts, settings["length"], budget, report)
    for line in words(found.to_dict()):
        console.print(f"  {line}", highlight=False)
    return found


def _corpus_facts(corpus: Corpus, contest: Contest) -> dict[str, Any]:
    whole = [len(contest.teacher.content(d.text)[0]) + contest.teacher.special for d in corpus.documents]
    exact = all(at is not None for _, _, at in corpus.queries)
    room = contest.chunk - contest.teacher.special
    beyond = 0
    for _, n, at in corpus.queries:
        text = contest.texts[n]
        beyond += at is not None and (at not in text.passages or text.spans[text.passages.index(at)][0] >= room)
    return {
        "source": corpus.source,
        "fingerprint": corpus.fingerprint,
        "documents": len(whole),
        "queries": len(corpus.queries),
        "passages": sum(len(text.passages) for text in contest.texts),
        "shortest": min(whole),
        "longest": max(whole),
        "mean": sum(whole) / len(whole),
        "exact": exact,
        "beyond": beyond / len(corpus.queries) if exact else None,
    }


def _train(console: Console, settings: dict[str, Any], window: Window) -> tuple[Any, Any]:
    """Rows and setup of the training comparison; (None, None) where no time is given to it."""
    seconds, dtype = settings["seconds"], DTYPES[settings["dtype"]]
    if not seconds:
        return None, None
    data, model = python_bytes(), byte_model()
    # As many keys as the encoder's window has, all of them in the past.
    pair = learners(model, Window(window=2 * window.window, sinks=window.sinks))
    with steps(console, f"training two byte-level models for {seconds:.0f} s each", 2 * seconds) as bar:
        train_in_turns(pair, data.train, seconds, dtype=dtype, steps=bar)
    rows = training_table(pair, data, dtype)
    setup = {
        "layers": model.config.num_hidden_layers,
        "width": model.config.hidden_size,
        "parameters": model.num_parameters(),
        "length": LENGTH,
        "held_out": len(data.held_out),
        "slice": SLICE,
        "dtype": settings["dtype"] if dtype == torch.float32 else f"float32 weights, {settings['dtype']} autocast",
    }
    return rows, setup


def _say_reload(console: Console, reload: dict[str, Any]) -> None:
    for line in reload_words(reload):
        console.print(f"  {line}", highlight=False)


def _check(reload: dict[str, Any], target: Path) -> None:
    """The run is written by now, so that nothing measured is lost to a defect."""
    sentences = reload["sentence_transformers"]
    if not reload["equal"] or (sentences is not None and not sentences["same"]):
        raise RuntimeError(
            f"the saved model differs after reloading (see {target / 'report.md'}): do not use it; a defect of "
            "hf_tfast, please report it with the versions of torch and transformers"
        )


def _shown(name: str) -> str:
    """A Hub id as it is; of a folder the last part, since reports get published."""
    return Path(name).resolve().name if Path(name).exists() else name
