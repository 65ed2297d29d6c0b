"""`tfast plan`."""

from pathlib import Path
from typing import Annotated

import typer

from ._app import Json, Out, Overwrite, app, print_json


@app.command("plan")
def plan_model(
    model: Annotated[str | None, typer.Argument(help="Hub id or folder; default: a small real encoder.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of an input: the plan is for inputs about as long.")] = 4096,
    max_error: Annotated[
        float, typer.Option(help="Budget: KL divergence of the logits in nats, or one minus a cosine of embeddings.")
    ] = 0.01,
    corpus: Annotated[
        Path | None, typer.Option(help="Text file, or JSONL of documents; default: Python's documentation.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Inputs to measure on: a third each for layers, choice and check.")] = 6,
    mechanism: Annotated[
        list[str] | None, typer.Option(help="Choose among these only. Repeatable; all by default.")
    ] = None,
    training: Annotated[bool, typer.Option("--training", help="Weigh forward and backward.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")] = "auto",
    rounds: Annotated[int, typer.Option(help="Timed calls of each candidate.")] = 5,
    seconds: Annotated[
        float | None, typer.Option(help="About what it may take; what was left out is said. All it needs by default.")
    ] = None,
    out: Out = None,
    overwrite: Overwrite = False,
    plots: Annotated[bool, typer.Option("--plot/--no-plot", help="PNG of error over speed-up.")] = True,
    as_json: Json = False,
) -> None:
    """Measure every mechanism on this machine and this model, and propose the fastest plan within an error budget.

    The folder holds plan.json, which `tfast convert MODEL --plan` and `FastPlan(**json.load(...))` take.
    """
    from ..benchmarking.terminal import progress, show_page
    from ..planner.folder import Request, plan_folder
    from ..planner.report import markdown
    from ..quickstart.corpus import load_corpus
    from ..quickstart.encoder import DEMO_NAME, demo_folder

    if corpus is not None and corpus.suffix != ".jsonl":
        text = corpus.read_text(encoding="utf-8")
        texts, source = [text[n : n + 4000] for n in range(0, len(text), 4000)], corpus.name
    else:
        found = load_corpus(corpus)
        texts, source = [document.text for document in found.documents], found.source
    request = Request(
        model=model or str(demo_folder()), name=model or DEMO_NAME, texts=texts, corpus=source, length=length,
        max_error=max_error, rows=rows, mechanisms=mechanism, device=device, dtype=dtype, rounds=rounds,
        training=training, seconds=seconds, out=out, overwrite=overwrite, plots=plots,
    )  # fmt: skip
    with progress(as_json) as report:
        folder, proposal = plan_folder(request, report)
    if as_json:
        print_json({"folder": str(folder), **proposal.to_dict()})
    else:
        show_page(markdown(proposal), folder)
