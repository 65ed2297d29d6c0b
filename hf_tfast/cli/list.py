"""`tfast list`."""

from pathlib import Path
from typing import Annotated

import typer

from ._app import Json, app, print_json


@app.command("list")
def list_mechanisms(
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of the README.")] = False,
    update: Annotated[Path | None, typer.Option(help="Renew the table between the markers of this README.")] = None,
) -> None:
    """Show the attention mechanisms: what each does, what it costs, and where it comes from."""
    from ..benchmarking.catalogue import catalogue, markdown_table, renew
    from ..benchmarking.terminal import show_catalogue

    if update is not None:
        text = update.read_text(encoding="utf-8")
        renewed = renew(text)
        if renewed != text:
            update.write_text(renewed, encoding="utf-8")
    elif as_json:
        print_json(catalogue())
    elif markdown:
        print(markdown_table(), end="")
    else:
        show_catalogue(catalogue())
