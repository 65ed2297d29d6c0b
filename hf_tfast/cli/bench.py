"""`tfast bench`: a grid of cases, or a suite."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ._app import Json, Out, Overwrite, app, print_json, refuse_given, was_given, whole_numbers

GRID_OPTIONS = (
    "mechanism", "field", "lengths", "dtypes", "passes", "causal", "heads", "kv_heads", "width", "batch",
    "left_padding",
)  # fmt: skip

LONG_OPTIONS = ("resume", "minutes", "quick", "update")


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
        typer.Option(
            help="Instead of a grid: targets, modules (every mechanism), models, peers, decode, exported, "
            "feed_forward, h200."
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(help="Samples of each competitor at most, taken in turns; suites say themselves.")
    ] = 7,
    seconds: Annotated[
        float | None,
        typer.Option(help="Budget of one competitor in one case: 5, in a suite 60. What is over is skipped."),
    ] = None,
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Long suites: go on with the folder of an earlier session.")
    ] = False,
    minutes: Annotated[
        float | None, typer.Option(help="Long suites: begin no race after so many; --resume goes on.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Long suites: short lengths, to see that it runs.")] = False,
    update: Annotated[
        Path | None, typer.Option(help="Long suites: renew the tables between their markers on this page.")
    ] = None,
    plots: Annotated[bool, typer.Option("--plot/--no-plot", help="PNG plots over the length.")] = True,
    compare: Annotated[
        Path | None, typer.Option(help="Earlier results of the same: say what got slower or faster beyond noise.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time mechanisms against SDPA of the same dtype, in turns, with peak memory; losses are left in."""
    from ..benchmarking.compare import read_records
    from ..benchmarking.suites import LONG

    before = None if compare is None else read_records(compare)
    if suite in LONG:
        found = _long_suite(context, suite)
    elif suite == "feed_forward":
        found = _feed_forward_suite(context)
    elif suite == "h200":
        found = _h200_suite(context)
    else:
        refuse_given(context, LONG_OPTIONS, f"only --suite {', '.join([*LONG, 'feed_forward', 'h200'])} take")
        found = _grid(context) if suite is None else _targets(context, suite)
    _show(*found, before, as_json)


Found = tuple[Path, list[dict[str, Any]], str | None]  # folder, records, and the page where there is one


def _show(folder: Path, records: list[dict[str, Any]], page: str | None, before: Any, as_json: bool) -> None:
    """Print the results, and what changed since the records `before`, where there are some."""
    from ..benchmarking.compare import compared, lines
    from ..benchmarking.terminal import show_page, show_timings

    changes = None if before is None else compared(before, records)
    if as_json:
        print_json({"folder": str(folder), "records": records, **({} if changes is None else {"compared": changes})})
        return
    if page is None:
        show_timings(records, folder)
    else:
        show_page(page, folder)
    if changes is not None:
        print(f"\n{lines(changes, before, records)}", end="")


def _targets(context: typer.Context, suite: str) -> Found:
    """`tfast bench --suite targets`."""
    from ..benchmarking import bench as runs
    from ..benchmarking.terminal import progress

    refuse_given(context, GRID_OPTIONS, f"--suite {suite} brings its own cases; leave out")
    said = context.params
    budget, given = (
        60.0 if said["seconds"] is None else said["seconds"],
        {name: said[name] for name in ("device", "level")},
    )
    output = runs.Output(**{name: said[name] for name in ("out", "overwrite", "plots")})
    with progress(said["as_json"]) as report:
        folder, records = runs.bench_suite(
            suite, output, rounds=said["rounds"], seconds=budget, report=report, base=given
        )
    return folder, records, None


def _grid(context: typer.Context) -> Found:
    """`tfast bench` without a suite: every mechanism asked for in every case asked for."""
    from ..benchmarking import bench as runs
    from ..benchmarking.terminal import progress
    from ..benchmarking.workload import Case

    said = context.params
    who = runs.parse_mechanisms(said["mechanism"] or [], said["field"] or [], said["causal"])
    tokens = whole_numbers(said["lengths"])
    same = ("causal", "heads", "width", "batch", "level", "left_padding", "device")
    groups = said["heads"] if said["kv_heads"] is None else said["kv_heads"]
    base = Case(length=tokens[0], kv_heads=groups, **{name: said[name] for name in same})
    cases = runs.grid(base, tokens, said["dtypes"].split(","), said["passes"].split(","))
    output = runs.Output(**{name: said[name] for name in ("out", "overwrite", "plots")})
    with progress(said["as_json"]) as report:
        budget = 5.0 if said["seconds"] is None else said["seconds"]
        folder, records = runs.bench(cases, who, output, rounds=said["rounds"], seconds=budget, report=report)
    return folder, records, None


def _page(context: typer.Context, name: str, page: str) -> str:
    """The page of a suite, put between its markers on the page that --update names."""
    from ..benchmarking.pages import renew

    if context.params["update"] is not None:
        renew(context.params["update"], name, page)
    return page


def _long_suite(context: typer.Context, name: str) -> Found:
    """`tfast bench --suite` of a suite that takes minutes; options are read from the context, as they were given."""
    from ..benchmarking.campaign import LENGTHS, QUICK, Run, conduct
    from ..benchmarking.suites import long_suite
    from ..benchmarking.terminal import progress

    unused = set(GRID_OPTIONS) - {"lengths", "dtypes", "passes"} | {"level"}
    refuse_given(context, tuple(sorted(unused)), f"--suite {name} brings its own cases; leave out")
    said = context.params
    if said["overwrite"]:
        raise ValueError(f"--suite {name} overwrites nothing: name another folder with --out, or go on with --resume")
    if said["quick"] and was_given(context, "lengths"):
        raise ValueError("--quick brings its own lengths; leave out --lengths")
    given: dict[str, Any] = {"lengths": QUICK if said["quick"] else LENGTHS}
    if was_given(context, "lengths"):
        given["lengths"] = whole_numbers(said["lengths"])
    for option in ("dtypes", "passes"):
        if was_given(context, option):
            given[option] = said[option].split(",")
    given |= {option: said[option] for option in ("rounds", "seconds") if was_given(context, option)}
    given |= {option: said[option] for option in ("out", "resume", "minutes", "plots")}
    chosen = long_suite(name)
    with progress(said["as_json"]) as report:
        folder, records = conduct(chosen, Run(**given, base={"device": said["device"]}), report)
    return folder, records, _page(context, name, chosen.markdown(records))


def _feed_forward_suite(context: typer.Context) -> Found:
    """`tfast bench --suite feed_forward`; --lengths are numbers of rows."""
    from ..benchmarking.feed_forward import NAME, QUICK, ROWS, Run, conduct
    from ..benchmarking.feed_forward_pages import markdown
    from ..benchmarking.terminal import progress

    unused = (*sorted(set(GRID_OPTIONS) - {"lengths"}), "level", "device", "seconds", "overwrite")
    refuse_given(context, unused, f"--suite {NAME} takes rows as --lengths and no")
    said = context.params
    if said["quick"] and was_given(context, "lengths"):
        raise ValueError("--quick brings its own lengths; leave out --lengths")
    rows = whole_numbers(said["lengths"]) if was_given(context, "lengths") else QUICK if said["quick"] else ROWS
    run = Run(**{option: said[option] for option in ("out", "resume", "rounds", "minutes", "plots")}, rows=rows)
    with progress(said["as_json"]) as report:
        folder, records = conduct(run, report)
    return folder, records, _page(context, NAME, markdown(records))


def _h200_suite(context: typer.Context) -> Found:
    """`tfast bench --device cuda --suite h200`."""
    from ..benchmarking.h200 import NAME, Run, conduct
    from ..benchmarking.h200_pages import markdown
    from ..benchmarking.terminal import progress

    unused = (*GRID_OPTIONS, "level", "overwrite")
    refuse_given(context, unused, f"--suite {NAME} brings its own cases; leave out")
    said = context.params
    given = {option: said[option] for option in ("rounds", "seconds") if was_given(context, option)}
    run = Run(**{option: said[option] for option in ("device", "quick", "out", "resume", "minutes", "plots")}, **given)
    with progress(said["as_json"]) as report:
        folder, records = conduct(run, report)
    return folder, records, _page(context, NAME, markdown(records))
