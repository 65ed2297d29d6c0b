"""`tfast study`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ._app import Json, Out, Overwrite, app, print_json, refuse_given


@app.command()
def study(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="Hub id or folder of an encoder; default: a small real one.")
    ] = None,
    training: Annotated[
        Path | None,
        typer.Option(help="Instead of an encoder: a causal model's folder that recipes/pretrain_clm.py has written."),
    ] = None,
    form: Annotated[
        list[str] | None,
        typer.Option(
            help="One way to convert, as `tfast convert` reads it, with recovery:steps=200 as a form. Repeatable; a "
            "standard list by default."
        ),
    ] = None,
    attention: Annotated[
        str | None, typer.Option(help="Mechanism of all rows; `none` leaves the model's. Encoders only.")
    ] = "window:window=128,sinks=4",
    corpus: Annotated[
        Path | None, typer.Option(help="JSONL as of `tfast quickstart`; default: Python's documentation.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text that forms are made from; default: documents that are not evaluated."),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens that the encoder reads at once.")] = 4096,
    tokens: Annotated[int, typer.Option(help="Calibration tokens, about.")] = 24576,
    rounds: Annotated[int, typer.Option(help="Timed forwards of every row, by turns; 0 times nothing.")] = 5,
    out: Out = None,
    overwrite: Overwrite = False,
    pause: Annotated[
        bool, typer.Option("--pause", help="Stop before the timing; --resume does it when the machine is quiet.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished study in --out.")] = False,
    minutes: Annotated[float | None, typer.Option(help="End after so many minutes; --resume goes on.")] = None,
    update: Annotated[
        Path | None, typer.Option(help="Renew the table of this page between the markers named like the folder.")
    ] = None,
    plots: Annotated[bool, typer.Option("--plot/--no-plot", help="PNG of quality over bytes.")] = True,
    as_json: Json = False,
) -> None:
    """Compare ways to make a model's feed-forwards small: bytes, error, time and quality of each, in one table.

    An encoder is judged by retrieval on the quick start's corpus, a causal model by the perplexity of texts that were
    held out of its training: tfast study --training runs/pretrain_clm/dense --out runs/small
    """
    from ..benchmarking.pages import renew
    from ..benchmarking.terminal import progress, show_page
    from ..compression import study as studied
    from ..compression.study_pages import markdown
    from ..quickstart.quality import Retrieval
    from ..training.perplexity import Perplexity

    if training is not None:
        refuse_given(context, ("attention", "corpus", "calibration", "length"), "a trained model brings its own")
        if model is not None:
            raise ValueError("name an encoder or --training, not both")
        given = Perplexity(training).subject(tokens)
    else:
        given = Retrieval(model, corpus, length).subject(_mechanism(attention), calibration, tokens)
    request = studied.Request(
        **given, cases=studied.parse(form or studied.STANDARD), rounds=rounds, pause=pause, resume=resume,
        minutes=minutes, out=out, overwrite=overwrite, plots=plots,
    )  # fmt: skip
    with progress(as_json) as report:
        try:
            folder, results = studied.study(request, report)
        except studied.Paused as paused:
            report(str(paused))
            return
    if update is not None:
        renew(update, folder.name, markdown(results))
    if as_json:
        print_json({"folder": str(folder), **results})
    else:
        show_page(markdown(results), folder)


def _mechanism(said: str | None) -> Any:
    from ..compression.folder import read_plan

    return None if said in (None, "none") else read_plan(None, said, None).mechanism(0)
