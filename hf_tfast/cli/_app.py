"""What every verb stands on: the application, shared options, and the ways of printing."""

import json
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Fast attention for any Hugging Face Transformer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of tables.")]
Out = Annotated[Path | None, typer.Option(help="Folder to make; the next free one under runs/ when not given.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result folder.")]


@app.callback()
def tfast() -> None:
    """Fast attention for any Hugging Face Transformer, kept through save, reload and push."""


def was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def refuse_given(context: typer.Context, names: tuple[str, ...], why: str) -> None:
    """ValueError when one of these options was given: it would be ignored."""
    for name in names:
        if was_given(context, name):
            raise ValueError(f"{why} --{name.replace('_', '-')}")


def whole_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"expected whole numbers separated by commas, such as 512,1024, got {text!r}") from None


def to_stderr(wanted: bool) -> AbstractContextManager[Any]:
    """What is printed inside goes to standard error, so that standard output holds the JSON alone."""
    return redirect_stdout(sys.stderr) if wanted else nullcontext()


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))
