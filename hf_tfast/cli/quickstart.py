"""`tfast quickstart`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ._app import Json, Out, app, print_json, to_stderr


@app.command()
def quickstart(
    out: Out = None,
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder of an encoder; default: a small real one.")
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(help='JSONL of {"document": text, "queries": [...]}; default: Python\'s documentation.'),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens that the dense and the fast model read.")] = 4096,
    plan: Annotated[
        str, typer.Option(help="window, or auto: measured and chosen per layer, about two minutes more.")
    ] = "window",
    window: Annotated[
        int | None, typer.Option(help="With --plan window, keys that a query reads on each side: 128.")
    ] = None,
    sinks: Annotated[
        int | None, typer.Option(help="With --plan window, first tokens that read and are read by everything: 4.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="With --plan auto, budget of 1 - cosine with dense embeddings: 0.05.")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8/--no-int8", help="Int8 feed-forwards in the fast model.")] = True,
    seconds: Annotated[float, typer.Option(help="Training budget of each model; 0 leaves training out.")] = 60.0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    as_json: Json = False,
) -> None:
    """Make a real encoder fast on long documents, measure it against its rivals, save it and check it."""
    from ..quickstart import run

    options: dict[str, Any] = {"model": model, "corpus": corpus, "length": length, "plan": plan, "window": window}
    options |= {"sinks": sinks, "max_error": max_error, "int8": int8, "seconds": seconds, "dtype": dtype}
    with to_stderr(as_json):
        result = run(out, **options)
    if as_json:
        print_json(result)
