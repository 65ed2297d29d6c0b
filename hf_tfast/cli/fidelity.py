"""`tfast fidelity`."""

from pathlib import Path
from typing import Annotated

import typer

from ._app import Json, Out, Overwrite, app, print_json


@app.command()
def fidelity(
    model: Annotated[str | None, typer.Argument(help="Hub id or folder; default: a small real encoder.")] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Text file, or JSONL of documents; default: Python's documentation.")
    ] = None,
    mechanism: Annotated[
        list[str] | None,
        typer.Option(help="window, over its budgets, or window:window=64,sinks=1. Repeatable; all by default."),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of a document; positions are extended to it.")] = 4096,
    documents: Annotated[int, typer.Option(help="The longest documents are taken.")] = 4,
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run of the same --out.")] = False,
    minutes: Annotated[float | None, typer.Option(help="End after so many minutes; --resume goes on.")] = None,
    update: Annotated[Path | None, typer.Option(help="Renew the tables between the markers of this page.")] = None,
    plots: Annotated[bool, typer.Option("--plot/--no-plot", help="PNG plots of error and recall.")] = True,
    as_json: Json = False,
) -> None:
    """Measure how near mechanisms come to dense attention, in every layer of a model on real text."""
    from ..benchmarking import fidelity as measured
    from ..benchmarking.pages import renew
    from ..benchmarking.terminal import progress, show_fidelity
    from ..quickstart.corpus import load_corpus
    from ..quickstart.encoder import DEMO_NAME, demo_folder

    if corpus is not None and corpus.suffix != ".jsonl":
        texts, source = [corpus.read_text(encoding="utf-8")], corpus.name
    else:
        found = load_corpus(corpus)
        texts, source = [document.text for document in found.documents], found.source
    request = measured.Request(
        model=model or str(demo_folder()), name=model or DEMO_NAME, texts=texts, corpus=source,
        who=measured.parse(mechanism or [], length), length=length, documents=documents,
        out=out, overwrite=overwrite, plots=plots, resume=resume, minutes=minutes,
    )  # fmt: skip
    with progress(as_json) as report:
        folder, records = measured.fidelity(request, report)
    if update is not None:
        renew(update, "fidelity", measured.markdown(records))
    if as_json:
        print_json({"folder": str(folder), "records": records})
    else:
        show_fidelity(records, folder)
