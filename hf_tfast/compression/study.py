"""A study: many ways to make one model small, each converted, judged and timed, in one table.

    bytes    of the feed-forwards and of the model, as they are saved
    error    |y' - y| / |y| on a held-out batch: of every feed-forward on the dense model's input (mean of layers), and
             of the model's output; dense is the same model with the same attention and no form
    time     median seconds of the feed-forwards and of a forward, all cases by turns in one process
    quality  whatever the caller's `judge` says

Every case is saved, and loaded again before it is timed. What is measured is kept case by case beside the result
folder until all of it is there: an interrupted study can be continued, and one that was paused before its timing can
be timed when the machine is quiet.
"""

import gc
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from ..attention import Mechanism
from ..benchmarking.environment import environment
from ..benchmarking.folder import check_new, fresh_name, new_folder
from ..benchmarking.ledger import Ledger, begin, resume
from ..benchmarking.plot import need_matplotlib
from ..feed_forward import Form
from ..integration._feed_forwards import feed_forwards
from ..integration.apply import apply_plan
from ..integration.plan import FastPlan
from ._batches import Batch, evaluating
from ._measure import Span, error_of, output_of, seconds_of
from .convert import convert
from .folder import read_forms
from .report import saved_bytes, short
from .study_pages import draw, markdown

__all__ = ["STANDARD", "Case", "Paused", "Request", "parse", "study"]

MARK = "results.json"

STANDARD = (
    "dense",
    "int8",
    *(f"low_rank:ratio={ratio}" for ratio in (0.75, 0.5, 0.35)),
    *(f"low_rank:ratio={ratio},method=activation" for ratio in (0.75, 0.5, 0.35)),
    "low_rank:ratio=0.5,recover=true",
    "low_rank:ratio=0.5,method=activation + recovery:steps=200",
    *(f"pruned:ratio={ratio},method=activation,recover=true" for ratio in (0.75, 0.5)),
    "pruned:ratio=0.5,method=activation,recover=true + recovery:steps=200",
    "tensor_train:ratio=0.5",
    "activation:bits=8",
    "activation:bits=4",
    "low_rank:ratio=0.75,method=activation + recovery:steps=200 + int8",
    *(f"pruned:ratio={ratio},method=activation,recover=true + recovery:steps=200 + int8" for ratio in (0.75, 0.5)),
    "pruned:ratio=0.75,method=activation,recover=true + low_rank:ratio=0.75,method=activation + recovery:steps=200"
    " + int8",
)


@dataclass(frozen=True)
class Case:
    """One way: forms in their order, and steps of recovery before Int8. No forms: the dense model."""

    forms: tuple[Form, ...] = ()
    recovery_steps: int = 0

    @property
    def label(self) -> str:
        forms = [short(form) for form in self.forms if form.name != "int8"]
        forms += [f"{self.recovery_steps} steps"] if self.recovery_steps else []
        return " + ".join([*forms, *(short(form) for form in self.forms if form.name == "int8")]) or "dense"


@dataclass(frozen=True, kw_only=True)
class Request:
    """make         gives the dense model, anew each time.
    judge        quality figures of a model by name, higher is better unless the name is in `lower`.
    calibration  batches that forms are made from; held_out: the batch on which errors and times are measured.
    attention    a plan's mechanism that all cases run, the dense one too; None: as the model has it.
    about        words on model, texts and quality for the page; a study is continued only with the same ones.
    rounds       forwards of each case that are timed; 0: none.
    pause        stop before the timing; minutes: stop after the case in which so many are over. `resume` goes on.
    """

    make: Callable[[], PreTrainedModel]
    judge: Callable[[PreTrainedModel], dict[str, float]]
    calibration: Sequence[Batch]
    held_out: Batch
    about: dict[str, str]
    cases: Sequence[Case] = field(default_factory=lambda: parse(STANDARD))
    attention: Mechanism | None = None
    lower: Sequence[str] = ()
    rounds: int = 5
    pause: bool = False
    resume: bool = False
    minutes: float | None = None
    out: Path | None = None
    overwrite: bool = False
    plots: bool = True


class Paused(Exception):  # noqa: N818
    """The study stands where it was to be paused, with the command to go on in its words."""


def parse(said: Sequence[str]) -> list[Case]:
    """ "dense", or forms as `tfast convert` reads them, with "recovery:steps=200" as one of them."""
    found = []
    for text in said:
        parts = [part.strip() for part in text.split("+") if part.strip() != "dense"]
        fits = [part for part in parts if part.startswith("recovery:")]
        steps = [part.removeprefix("recovery:steps=") for part in fits]
        if len(fits) > 1 or any(not step.isdigit() or int(step) < 1 for step in steps):
            raise ValueError(f"recovery is said once, as recovery:steps=200, got {text!r}")
        forms = read_forms(" + ".join(part for part in parts if part not in fits))
        if steps and not forms:
            raise ValueError(f"{text!r} recovers nothing: name the forms too")
        found.append(Case(tuple(forms), int(steps[0]) if steps else 0))
    if len(set(found)) < len(found) or not found:
        raise ValueError("a study takes one case or more, each once")
    return found


def study(request: Request, report: Callable[[str], None] = lambda text: None) -> tuple[Path, dict[str, Any]]:
    """Measure, and write results.json, table.md and quality.png to a new folder: its path, and what the first holds.

    Paused where that was asked for; FileExistsError where `out` exists; ValueError for a case that does not fit.
    """
    if request.plots:
        need_matplotlib()
    began = time.monotonic()
    if (request.resume or request.pause or request.minutes is not None) and request.out is None:
        raise ValueError("a study that is paused or resumed goes by the name of its folder: give it as out")
    cases = [Case(), *(case for case in request.cases if case.forms)]
    target = request.out or fresh_name("study")
    check_new(target, request.overwrite, MARK)
    ledger = _ledger(request, target)
    reference = request.make()
    if request.attention is not None:
        apply_plan(reference, FastPlan(attention=request.attention))
    with evaluating(reference):
        y = output_of(reference, request.held_out)
    for case in cases:
        if request.minutes is not None and time.monotonic() - began > 60 * request.minutes:
            raise Paused(f"{request.minutes:g} minutes are over; go on with --resume --out {target}")
        if case.label not in {record["label"] for record in ledger.of("case")}:
            report(case.label)
            with torch.no_grad():
                ledger.add([_converted(request, case, y, ledger.folder)])
    if request.pause:
        raise Paused(f"converted and judged; the timing is left for a quiet machine: --resume --out {target}")
    if request.rounds:
        report(f"timing {len(cases)} cases by turns")
        ledger.add([{"kind": "environment", **environment()}])
        ledger.add(_timed(request, cases, ledger.folder, type(reference)))
    results = _results(request, cases, ledger)
    with new_folder(target, overwrite=request.overwrite, mark=MARK) as folder:
        (folder / MARK).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (folder / "table.md").write_text(markdown(results), encoding="utf-8")
        if request.plots:
            draw(results, folder / "quality.png")
    shutil.rmtree(ledger.folder)
    return target, results


def _ledger(request: Request, target: Path) -> Ledger:
    partial = target.with_name(f".{target.name}.part")
    about = {"suite": "compression", **request.about, "attention": repr(request.attention)}
    if request.resume and partial.exists():
        return resume(partial, about)
    if partial.exists() and request.overwrite:
        shutil.rmtree(partial)
    ledger = begin(partial, about)
    ledger.add([{"kind": "environment", **environment()}])
    return ledger


def _converted(request: Request, case: Case, y: torch.Tensor, folder: Path) -> dict[str, Any]:
    """One case, converted, judged and saved."""
    model, layers = request.make().eval(), []
    if case.forms:
        plan = FastPlan(attention=request.attention, feed_forward=list(case.forms))
        batches = [*request.calibration, request.held_out]  # the last is for measuring alone
        model, found = convert(model, plan, batches, rounds=0, recovery_steps=case.recovery_steps)
        layers = [row.error for row in found.layers if row.part == "feed_forward" and row.error is not None]
    elif request.attention is not None:
        apply_plan(model, FastPlan(attention=request.attention))
    with evaluating(model):
        error = error_of(y, output_of(model, request.held_out))
        quality = request.judge(model)
    model.save_pretrained(folder / "models" / _file(case))
    made = {
        "kind": "case", "label": case.label, "forms": [form.to_dict() for form in case.forms],
        "recovery_steps": case.recovery_steps, "feed_forward_bytes": _feed_forward_bytes(model),
        "bytes": saved_bytes(model), "layer_errors": layers,
        "feed_forward_error": sum(layers) / len(layers) if layers else 0.0, "error": error, "quality": quality,
    }  # fmt: skip
    del model
    gc.collect()
    return made


def _file(case: Case) -> str:
    return "".join(c if c.isalnum() else "-" for c in case.label)


def _feed_forward_bytes(model: PreTrainedModel) -> int:
    return sum(saved_bytes(block.get(path)) for block in feed_forwards(model) for path in block.paths)


def _timed(request: Request, cases: Sequence[Case], folder: Path, cls: Any) -> list[dict[str, Any]]:
    """Every case as it loads from its folder, by turns; each round begins with another one."""
    models = [cls.from_pretrained(folder / "models" / _file(case)).eval() for case in cases]
    spans = [[Span("feed_forward", b.stack, b.layer, b.ups, b.down) for b in feed_forwards(model)] for model in models]
    seconds: list[list[list[float]]] = [[] for _ in cases]
    with torch.no_grad():
        for turn in range(request.rounds + 1):
            order = list(range(len(cases)))
            for n in order[turn % len(order) :] + order[: turn % len(order)]:
                found = seconds_of(models[n], spans[n], request.held_out)
                if turn:  # the first round is to warm up
                    seconds[n].append([sum(found[:-1]), found[-1]])
    return [
        {
            "kind": "time", "label": case.label, "rounds": request.rounds,
            "feed_forward_seconds": median(row[0] for row in rows), "seconds": median(row[1] for row in rows),
            "every_second": rows,
        }
        for case, rows in zip(cases, seconds, strict=True)
    ]  # fmt: skip


def _results(request: Request, cases: Sequence[Case], ledger: Ledger) -> dict[str, Any]:
    by = {record["label"]: record for record in ledger.of("case")}
    times = {record["label"]: record for record in ledger.of("time")}  # the last session's, where there are several
    rows = [{**by[case.label], **times.get(case.label, {})} for case in cases]
    for row in rows:
        del row["kind"]
    lead = next(x for x in request.held_out.values() if isinstance(x, torch.Tensor) and x.ndim > 1)
    return {
        "about": request.about,
        "attention": None if request.attention is None else request.attention.to_dict(),
        "lower": list(request.lower),
        "calibration_tokens": sum(
            next(x for x in b.values() if isinstance(x, torch.Tensor)).numel() for b in request.calibration
        ),
        "measured_tokens": lead.shape[:2].numel(),
        "rows": rows,
        "environment": ledger.of("environment")[-1],
    }
