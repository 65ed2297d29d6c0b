"""`tfast card`."""

from pathlib import Path
from typing import Annotated

import typer

from ._app import app


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="Saved model; its weights are not read.")],
    results: Annotated[
        list[Path] | None,
        typer.Option(help="What quickstart, fidelity, bench or a training wrote: file or folder. Repeatable."),
    ] = None,
    licence: Annotated[str | None, typer.Option("--license", help="As the Hub names it: apache-2.0, mit, ...")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the model that this one was made from.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the model on the Hub; the folder's name by default.")] = None,
    description: Annotated[str, typer.Option(help="Sentences of yours about the model.")] = "",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the card and config.json; default: the model's.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a README.md that is there.")] = False,
) -> None:
    """Write the model card of a saved model: what it runs, layer by layer, and what was measured of it."""
    from ..hub.folder import write_card

    given = {"license": licence, "base_model": base_model}
    path = write_card(
        folder, out=out, name=name, results=results or [], overwrite=overwrite, description=description,
        **{key: value for key, value in given.items() if value},
    )  # fmt: skip
    print(path)
