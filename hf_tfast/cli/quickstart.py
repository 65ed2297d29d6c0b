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
    window: Annotated[int, typer.Option(help="Keys that a query reads on each side.")] = 128,
    sinks: Annotated[int, typer.Option(help="First tokens that read and are read by everything.")] = 4,
    int8: Annotated[bool, typer.Option("--int8/--no-int8", help="Int8 feed-forwards in the fast model.")] = True,
    seconds: Annotated[float, typer.Option(help="Training budget of each model; 0 leaves training out.")] = 60.0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    as_json: Json = False,
) -> None:
    """Make a real encoder fast on long documents, measure it against its rivals, save it and check it."""
    from ..quickstart import run

    options: dict[str, Any] = {"model": model, "corpus": corpus, "length": length, "window": window, "sinks": sinks}
    options["int8"] = int8
    with to_stderr(as_json):
        result = run(out, **options, seconds=seconds, dtype=dtype)
    if as_json:
        print_json(result)
