"""Tables, figure and report of a run: everything said in words is computed from the figures beside it."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..benchmarking.environment import describe
from .planning import PARETO, TABLE, words
from .saving import FRESH, FRESH_SENTENCES

FIGURE = "quality_over_speed.png"
MIB = 2**20

Rows = tuple[list[str], list[list[str]]]  # header, rows


def retrieval_rows(results: dict[str, Any]) -> Rows:
    header = ["whole documents", "MRR", "recall@1", "documents/s", "peak memory"]
    return header, [
        [r["label"], f"{r['mrr']:.3f}", f"{r['recall_at_1']:.3f}", *_speed(r)] for r in results["retrieval"]
    ]


def passage_rows(results: dict[str, Any]) -> Rows:
    exact = results["passages"][0]["passage"] is not None
    header = ["passages", *(["passage MRR", "passage recall@1"] if exact else [])]
    header += ["document MRR", "document recall@1", "documents/s", "peak memory"]
    rows = []
    for r in results["passages"]:
        scores = [r["passage"], r["document"]] if exact else [r["document"]]
        rows.append([r["label"], *(f"{s[k]:.3f}" for s in scores for k in ("mrr", "recall_at_1")), *_speed(r)])
    return header, rows


def training_rows(results: dict[str, Any]) -> Rows:
    header = ["training", "seconds", "steps", "tokens seen", "tokens/s", "held-out bits/byte"]
    return header, [
        [
            r["label"],
            f"{r['seconds']:.1f}",
            str(r["steps"]),
            f"{r['tokens']:,}",
            f"{r['tokens_per_second']:,.0f}",
            f"{r['held_out_bits_per_byte']:.3f}",
        ]
        for r in results["training"]
    ]


def _speed(row: dict[str, Any]) -> list[str]:
    return [f"{row['documents_per_second']:.2f}", f"{row['peak_bytes'] / MIB:,.0f} MiB"]


def tables(results: dict[str, Any]) -> list[Rows]:
    found = [retrieval_rows(results), passage_rows(results)]
    return [*found, training_rows(results)] if results["training"] else found


def show(console: Console, rows: Rows) -> None:
    """Print one table."""
    table = Table()
    for n, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if n else "left", no_wrap=False)
    for row in rows[1]:
        table.add_row(*row)
    console.print(table)


def markdown(rows: Rows) -> str:
    header, body = rows
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *body))


def verdicts(results: dict[str, Any]) -> list[str]:
    """What the figures say, wins and losses alike, the fast plan's first."""
    by = {r["key"]: r for r in results["retrieval"]}
    fast, said = by["fast"], []
    for key in ("dense", "chunked", "truncated"):
        rival = by[key]
        ratio = fast["documents_per_second"] / rival["documents_per_second"]
        said.append(
            f"The fast plan reads {ratio:.2f}x as many documents a second as “{rival['label']}”; "
            f"{_compared('MRR', fast['mrr'], rival['mrr'])}."
        )
    ways = {r["key"]: r for r in results["passages"]}
    what = "passage" if ways["fast"]["passage"] else "document"
    late, alone = ways["fast"][what]["mrr"], ways["alone"][what]["mrr"]
    said.append(
        f"Late chunking with the fast plan against each passage alone: {_compared(f'{what} MRR', late, alone)}."
    )
    best = max(results["passages"], key=lambda r: r["document"]["mrr"])
    said.append(
        f"Documents found by their best passage: MRR {best['document']['mrr']:.3f} with “{best['label']}”, against "
        f"{max(r['mrr'] for r in results['retrieval']):.3f} with the best whole-document vectors."
    )
    if results["training"]:
        sdpa, plan = results["training"]
        bits = plan["held_out_bits_per_byte"], sdpa["held_out_bits_per_byte"]
        winner = "the plan" if bits[0] < bits[1] else "sdpa" if bits[1] < bits[0] else "neither"
        said.append(
            f"In the same time the plan saw {plan['tokens'] / sdpa['tokens']:.2f}x the tokens of sdpa; held-out bits "
            f"per byte {bits[0]:.3f} with the plan, {bits[1]:.3f} with sdpa: {winner} wins."
        )
    return said


def _compared(name: str, mine: float, other: float) -> str:
    if mine == other:
        return f"{name} is equal ({mine:.3f})"
    return f"{name} is {'higher' if mine > other else 'lower'} ({mine:.3f} against {other:.3f})"


def draw(results: dict[str, Any], path: Path) -> None:
    """PNG: quality over speed of the whole-document vectors; where there was training, its progress over seconds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    training = results["training"]
    figure = Figure(figsize=(11 if training else 6, 4.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    left, *right = figure.subplots(1, 2 if training else 1, squeeze=False)[0]
    colours = {"truncated": "#8c8c8c", "chunked": "#d08a2e", "dense": "#3b6fb6", "fast": "#c2293d"}
    for row in results["retrieval"]:
        x, y = row["documents_per_second"], row["mrr"]
        left.plot(x, y, "o", ms=9, color=colours[row["key"]], label=row["label"])
    left.set_xscale("log")
    left.xaxis.set_major_formatter("{x:g}")
    left.margins(x=0.2, y=0.25)
    left.set_xlabel("documents per second (log scale)")
    left.set_ylabel("mean reciprocal rank")
    left.set_title(f"Finding documents: {results['corpus']['source']}", fontsize=10)
    left.legend(fontsize=8, loc="best")
    for axes in right:
        for row, colour in zip(training, (colours["dense"], colours["fast"]), strict=True):
            seconds, _, bits = zip(*row["curve"], strict=True)
            label = f"{row['key']}: {row['tokens']:,} tokens, held-out {row['held_out_bits_per_byte']:.2f}"
            axes.plot(seconds, bits, color=colour, lw=1.4, marker="." if len(bits) < 40 else None, label=label)
        axes.set_xlim(left=0)
        axes.set_xlabel("seconds of training")
        axes.set_ylabel("bits per byte of the step")
        axes.set_title("The same wall-clock budget of training", fontsize=10)
        axes.legend(fontsize=8)
    for axes in (left, *right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})


def write_report(results: dict[str, Any], folder: Path) -> None:
    """report.md and results.json into `folder`; the figure is drawn before."""
    settings, corpus, reload = results["settings"], results["corpus"], results["reload"]
    parts = [f"# Quick start: {settings['model']} at {settings['length']} tokens", f"![quality over speed]({FIGURE})"]
    parts += ["\n".join(f"- {line}" for line in verdicts(results))]
    if results["proposal"]:
        parts += ["## The plan, chosen by measurement", "\n".join(f"- {line}" for line in words(results["proposal"]))]
        parts += [f"[Every layer, and all that was tried]({TABLE})", f"![error over speed-up]({PARETO})"]
    parts += ["## Finding documents", markdown(retrieval_rows(results)), _corpus_words(corpus, settings)]
    parts += ["## Finding passages", markdown(passage_rows(results)), _passage_words(results)]
    if results["training"]:
        parts += ["## The same time of training", markdown(training_rows(results)), _training_words(results)]
    plain, sentences = reload_words(reload)
    parts += ["## Saved and reloaded", f"{plain}:", f"```python\n{FRESH}```", f"{sentences}:"]
    parts += [f"```python\n{FRESH_SENTENCES}```", "## Measured on", describe(results["environment"])]
    parts += [f"`{results['environment']['command']}`, {results['seconds']:.0f} s in all."]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def reload_words(reload: dict[str, Any]) -> tuple[str, str]:
    """What was found of the saved folder in fresh processes: with plain AutoModel, and with SentenceTransformer."""
    lengths = ", ".join(map(str, reload["tokens"]))
    equal = "equal to the last bit" if reload["equal"] else f"NOT equal: off by {reload['largest_difference']:.3g}"
    plain = f"Loaded in a fresh process with plain AutoModel, on texts of {lengths} tokens, all states are {equal}"
    if (found := reload["sentence_transformers"]) is None:
        return (
            plain,
            "sentence-transformers is not installed, so its way to load the folder was not checked in this run",
        )
    same = "the same" if found["same"] else "NOT the same"
    version, gap = found["version"], found["largest_difference"]
    return plain, f"With sentence-transformers {version} the vectors are {same} (largest difference {gap:.1e})"


def _corpus_words(corpus: dict[str, Any], settings: dict[str, Any]) -> str:
    deep = (
        f", {corpus['beyond']:.0%} of them about a passage beyond token {settings['chunk']}" if corpus["exact"] else ""
    )
    return (
        f"{corpus['source']}: {corpus['documents']} documents of {corpus['shortest']} to {corpus['longest']} tokens "
        f"(mean {corpus['mean']:.0f}; what is beyond {settings['length']} is not read), {corpus['queries']} queries"
        f"{deep}. Vectors in {settings['dtype']}; every rival reads one document at a time, in turns; documents/s is "
        "from the median time of a document. Peak memory is what a call on the longest document needs above what the "
        "process holds already. Queries are embedded by the teacher for all."
    )


def _passage_words(results: dict[str, Any]) -> str:
    exact = results["passages"][0]["passage"] is not None
    first = results["passages"][0]
    return (
        f"Late chunking pools a passage's vector from the states of the whole text; the rival embeds each passage by "
        f"itself. {results['corpus']['passages']} passages, {first['queries']} queries. "
        + ("Passage: the right one among all. " if exact else "")
        + "Document: the right one, each scored by its best passage. Times are those of the same run as above."
    )


def _training_words(results: dict[str, Any]) -> str:
    made = results["training_setup"]
    return (
        f"A random byte-level Llama ({made['layers']} layers, {made['width']} wide, {made['parameters']:,} weights), "
        f"one sequence of {made['length']:,} bytes of Python's sources a step, AdamW, {made['dtype']}, the same "
        f"weights, seed and order; turns of {made['slice']:.0f} s. A token is a byte. Held out: {made['held_out']} "
        "sequences of other "
        "files, each model with its own attention, outside the budget."
    )
