"""`tfast convert`."""

from pathlib import Path
from typing import Annotated

import typer

from ._app import Json, app, print_json


@app.command("convert")
def convert_model(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a dense model.")],
    out: Annotated[Path, typer.Option(help="Folder to make: model, tokenizer and conversion/, the report.")],
    attention: Annotated[
        str | None, typer.Option(help="Mechanism for all layers: window:window=256,sinks=4. See `tfast list`.")
    ] = None,
    feed_forward: Annotated[
        str | None,
        typer.Option(
            help="Forms for all layers, in this order: pruned:ratio=0.75 + low_rank:ratio=0.5 + activation + int8."
        ),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="JSON instead: a plan as config.json has it, with layers of its own.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text like what the model will read. Forms made from data need it, and so do the figures."),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of a calibration row.")] = 512,
    tokens: Annotated[int, typer.Option(help="Calibration tokens at most.")] = 32768,
    recovery_steps: Annotated[
        int,
        typer.Option(help="Steps of fitting each feed-forward to the dense one's outputs on the calibration text."),
    ] = 0,
    rounds: Annotated[int, typer.Option(help="Timed forwards of the dense and of the converted model.")] = 5,
    dtype: Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")] = "auto",
    as_json: Json = False,
) -> None:
    """Convert a model into a fast, small one, and report bytes, error and time of every layer before and after.

    The folder loads with plain AutoModel once hf_tfast is imported: tfast convert gpt2 --feed-forward
    low_rank:ratio=0.5,method=activation --calibration text.txt --out fast
    """
    from ..benchmarking.terminal import progress
    from ..compression.folder import Request, convert_folder, read_plan

    request = Request(
        model=model, plan=read_plan(plan, attention, feed_forward), out=out, calibration=calibration,
        length=length, tokens=tokens, rounds=rounds, dtype=dtype, recovery_steps=recovery_steps,
    )  # fmt: skip
    with progress(as_json) as report:
        found = convert_folder(request, report)
    if as_json:
        print_json({"folder": str(out), **found.to_dict()})
    else:
        print(f"{found}Written to {out}")
