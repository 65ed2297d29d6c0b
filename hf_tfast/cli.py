"""The command line: one verb a function. What a verb needs is imported inside it, so that `tfast --help` is quick.

Exit codes   0 done; 2 the input cannot be used, said in one line (HF_TFAST_DEBUG=1 shows where); 130 interrupted.
Output       results on standard output, progress on standard error; --json prints JSON and nothing else.
"""

import json
import os
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Fast attention for any Hugging Face Transformer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of tables.")]
Out = Annotated[Path | None, typer.Option(help="Folder to make; the next free one under runs/ when not given.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result folder.")]


def main() -> None:
    """Entry point of `tfast`: errors of the input become one line and exit code 2."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("HF_TFAST_DEBUG"):
            raise
        print(f"tfast: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("tfast: interrupted; nothing was left half-written", file=sys.stderr)
        raise SystemExit(130) from None


@app.callback()
def tfast() -> None:
    """Fast attention for any Hugging Face Transformer, kept through save, reload and push."""


@app.command("list")
def list_mechanisms(
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of the README.")] = False,
    update: Annotated[Path | None, typer.Option(help="Renew the table between the markers of this README.")] = None,
) -> None:
    """Show the attention mechanisms: what each does, what it costs, and where it comes from."""
    from .benchmarking.catalogue import catalogue, markdown_table, renew
    from .benchmarking.terminal import show_catalogue

    if update is not None:
        text = update.read_text(encoding="utf-8")
        renewed = renew(text)
        if renewed != text:
            update.write_text(renewed, encoding="utf-8")
    elif as_json:
        _print_json(catalogue())
    elif markdown:
        print(markdown_table(), end="")
    else:
        show_catalogue(catalogue())


@app.command()
def bench(
    context: typer.Context,
    mechanism: Annotated[
        list[str] | None,
        typer.Option(help="One, or one with its own fields: window:window=256,sinks=4. Repeatable; all by default."),
    ] = None,
    field: Annotated[list[str] | None, typer.Option(help="Of every mechanism that has it: window=256.")] = None,
    lengths: Annotated[
        str, typer.Option(help="Tokens, comma-separated.")
    ] = "512,1024,2048,4096,8192,16384,32768,65536",
    dtypes: Annotated[str, typer.Option(help="Any of fp32, bf16, fp16, fp64.")] = "fp32,bf16",
    passes: Annotated[str, typer.Option(help="Any of forward, both (forward and backward).")] = "forward,both",
    causal: Annotated[bool, typer.Option("--causal/--bidirectional", help="May a query read what follows?")] = True,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[int | None, typer.Option(help="Key/value heads; as many as query heads by default.")] = None,
    width: Annotated[int, typer.Option(help="Width of a head.")] = 64,
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    level: Annotated[str, typer.Option(help="kernel, or module: with the projections of a layer.")] = "kernel",
    left_padding: Annotated[int, typer.Option(help="Padding tokens in front of every row.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    suite: Annotated[
        str | None,
        typer.Option(help="Instead of a grid: targets, modules (every mechanism), peers (Transformers' own modules)."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Samples of each competitor at most, taken in turns.")] = 7,
    seconds: Annotated[
        float | None,
        typer.Option(help="Budget of one competitor in one case: 5, in a suite 60. What is over is skipped."),
    ] = None,
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="modules, peers: go on with the folder of an earlier session.")
    ] = False,
    minutes: Annotated[
        float | None, typer.Option(help="modules, peers: begin no race after so many; --resume goes on.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="modules, peers: short lengths, to see that it runs.")
    ] = False,
    update: Annotated[
        Path | None, typer.Option(help="modules, peers: renew the tables between their markers on this page.")
    ] = None,
    plots: Annotated[bool, typer.Option("--plot/--no-plot", help="PNG plots over the length.")] = True,
    as_json: Json = False,
) -> None:
    """Time mechanisms against SDPA of the same dtype, in turns, with peak memory; losses are left in."""
    from .benchmarking import bench as runs
    from .benchmarking.suites import LONG
    from .benchmarking.terminal import progress, show_timings
    from .benchmarking.workload import Case

    if suite in LONG:
        _long_suite(context, suite)
        return
    _refuse_given(context, LONG_OPTIONS, f"only --suite {' and --suite '.join(LONG)} take")
    output = runs.Output(out=out, overwrite=overwrite, plots=plots)
    if suite is not None:
        _refuse_given(context, GRID_OPTIONS, f"--suite {suite} brings its own cases; leave out")
        budget = 60.0 if seconds is None else seconds
        with progress(as_json) as report:
            given = {"device": device, "level": level}
            folder, records = runs.bench_suite(suite, output, rounds=rounds, seconds=budget, report=report, base=given)
    else:
        who = runs.parse_mechanisms(mechanism or [], field or [], causal)
        tokens = _whole_numbers(lengths)
        groups = heads if kv_heads is None else kv_heads
        base = Case(
            length=tokens[0], causal=causal, heads=heads, kv_heads=groups, width=width, batch=batch,
            level=level, left_padding=left_padding, device=device,
        )  # fmt: skip
        cases = runs.grid(base, tokens, dtypes.split(","), passes.split(","))
        with progress(as_json) as report:
            folder, records = runs.bench(
                cases, who, output, rounds=rounds, seconds=5.0 if seconds is None else seconds, report=report
            )
    if as_json:
        _print_json({"folder": str(folder), "records": records})
    else:
        show_timings(records, folder)


def _long_suite(context: typer.Context, name: str) -> None:
    """`tfast bench --suite` of a suite that takes minutes; options are read from the context, as they were given."""
    from .benchmarking.campaign import LENGTHS, QUICK, Run, conduct
    from .benchmarking.pages import renew
    from .benchmarking.suites import long_suite
    from .benchmarking.terminal import progress, show_page

    unused = set(GRID_OPTIONS) - {"lengths", "dtypes", "passes"} | {"level"}
    _refuse_given(context, tuple(sorted(unused)), f"--suite {name} brings its own cases; leave out")
    said = context.params
    if said["overwrite"]:
        raise ValueError(f"--suite {name} overwrites nothing: name another folder with --out, or go on with --resume")
    if said["quick"] and _given(context, "lengths"):
        raise ValueError("--quick brings its own lengths; leave out --lengths")
    given: dict[str, Any] = {"lengths": QUICK if said["quick"] else LENGTHS}
    if _given(context, "lengths"):
        given["lengths"] = _whole_numbers(said["lengths"])
    for option in ("dtypes", "passes"):
        if _given(context, option):
            given[option] = said[option].split(",")
    given |= {option: said[option] for option in ("rounds", "seconds") if _given(context, option)}
    given |= {option: said[option] for option in ("out", "resume", "minutes", "plots")}
    chosen = long_suite(name)
    with progress(said["as_json"]) as report:
        folder, records = conduct(chosen, Run(**given, base={"device": said["device"]}), report)
    if said["update"] is not None:
        renew(said["update"], name, chosen.markdown(records))
    if said["as_json"]:
        _print_json({"folder": str(folder), "records": records})
    else:
        show_page(chosen.markdown(records), folder)


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
    seconds: Annotated[float, typer.Option(help="Training budget of each model; 0 leaves training out.")] = 60.0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    as_json: Json = False,
) -> None:
    """Make a real encoder fast on long documents, measure it against its rivals, save it and check it."""
    from .quickstart import run

    options: dict[str, Any] = {"model": model, "corpus": corpus, "length": length, "window": window, "sinks": sinks}
    with _to_stderr(as_json):
        result = run(out, **options, seconds=seconds, dtype=dtype)
    if as_json:
        _print_json(result)


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
    from .benchmarking import fidelity as measured
    from .benchmarking.pages import renew
    from .benchmarking.terminal import progress, show_fidelity
    from .quickstart.corpus import load_corpus
    from .quickstart.encoder import DEMO_NAME, demo_folder

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
        _print_json({"folder": str(folder), "records": records})
    else:
        show_fidelity(records, folder)


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
    from .benchmarking.fidelity import parse
    from .benchmarking.inspect import inspect as picture
    from .quickstart.encoder import demo_folder

    chosen = parse([f"{mechanism}:{','.join(field or [])}"], 0)[0]
    read = Path(text[1:]).read_text(encoding="utf-8") if text.startswith("@") else text
    figures = picture(model or str(demo_folder()), read, chosen, out, layer=layer, head=head, stack=stack)
    if as_json:
        _print_json({"file": str(out), **figures})
    else:
        print(f"{out}: {figures['tokens']} tokens, {figures['density']:.1%} of the pairs are read, "
              f"with {figures['recall']:.1%} of the dense weight")  # fmt: skip


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
    from .hub.folder import write_card

    given = {"license": licence, "base_model": base_model}
    path = write_card(
        folder, out=out, name=name, results=results or [], overwrite=overwrite, description=description,
        **{key: value for key, value in given.items() if value},
    )  # fmt: skip
    print(path)


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
    rounds: Annotated[int, typer.Option(help="Timed forwards of the dense and of the converted model.")] = 5,
    dtype: Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")] = "auto",
    as_json: Json = False,
) -> None:
    """Convert a model into a fast, small one, and report bytes, error and time of every layer before and after.

    The folder loads with plain AutoModel once hf_tfast is imported: tfast convert gpt2 --feed-forward
    low_rank:ratio=0.5,method=activation --calibration text.txt --out fast
    """
    from .benchmarking.terminal import progress
    from .compression.folder import Request, convert_folder, read_plan

    request = Request(
        model=model, plan=read_plan(plan, attention, feed_forward), out=out, calibration=calibration,
        length=length, tokens=tokens, rounds=rounds, dtype=dtype,
    )  # fmt: skip
    with progress(as_json) as report:
        found = convert_folder(request, report)
    if as_json:
        _print_json({"folder": str(out), **found.to_dict()})
    else:
        print(f"{found}Written to {out}")


GRID_OPTIONS = (
    "mechanism", "field", "lengths", "dtypes", "passes", "causal", "heads", "kv_heads", "width", "batch",
    "left_padding",
)  # fmt: skip


LONG_OPTIONS = ("resume", "minutes", "quick", "update")


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _refuse_given(context: typer.Context, names: tuple[str, ...], why: str) -> None:
    """ValueError when one of these options was given: it would be ignored."""
    for name in names:
        if _given(context, name):
            raise ValueError(f"{why} --{name.replace('_', '-')}")


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"expected whole numbers separated by commas, such as 512,1024, got {text!r}") from None


def _to_stderr(wanted: bool) -> AbstractContextManager[Any]:
    """What is printed inside goes to standard error, so that standard output holds the JSON alone."""
    return redirect_stdout(sys.stderr) if wanted else nullcontext()


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))
