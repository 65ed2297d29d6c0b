"""`tfast inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from ._app import Json, app, print_json


@app.command()
def inspect(
    text: Annotated[str, typer.Option(help="What the model reads; @file reads a file.")],
    out: Annotated[Path, typer.Option(help="PNG to make.")],
    model: Annotated[str | None, typer.Argument(help="Hub id or folder; default: a small real encoder.")] = None,
    layer: Annotated[int, typer.Option(help="Number of the layer, from 0.")] = 0,
    head: Annotated[int, typer.Option(help="Number of the head, from 0.")] = 0,
    stack: Annotated[str | None, typer.Option(help="encoder or decoder, where a model has both.")] = None,
    mechanism: Annotated[str, typer.Option(help="A pattern of pairs, such as window, topk or hashed.")] = "window",
    field: Annotated[list[str] | None, typer.Option(help="Of the mechanism: window=64. Repeatable.")] = None,
    as_json: Json = False,
) -> None:
    """Draw a head's dense attention weights beside the pairs that a mechanism reads."""
    from ..benchmarking.fidelity import parse
    from ..benchmarking.inspect import inspect as picture
    from ..quickstart.encoder import demo_folder

    chosen = parse([f"{mechanism}:{','.join(field or [])}"], 0)[0]
    read = Path(text[1:]).read_text(encoding="utf-8") if text.startswith("@") else text
    figures = picture(model or str(demo_folder()), read, chosen, out, layer=layer, head=head, stack=stack)
    if as_json:
        print_json({"file": str(out), **figures})
    else:
        print(f"{out}: {figures['tokens']} tokens, {figures['density']:.1%} of the pairs are read, "
              f"with {figures['recall']:.1%} of the dense weight")  # fmt: skip
