"""convert: a plan put on a model with calibration data, and a report of what it did to every layer.

    model, report = convert(model, plan, calibration=batches)
    print(report)
    model.save_pretrained("fast")

Order    attention first, so that calibration sees what the layers will read; then, per layer, Pruned, LowRank or
         TensorTrain, Activation, each made from what the ones before left, recovery, Int8.
Memory   the moments of calibration (see moments.py), and the dense feed-forwards until the report is made.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..attention.dense import Dense
from ..benchmarking.plot import need_matplotlib
from ..feed_forward import Block, Moments
from ..feed_forward._fused import unfuse
from ..integration._basis import lacking
from ..integration._forms import planned_blocks
from ..integration._stamps import stamped_modules
from ..integration.apply import check_new_plan, put_plan, take_off
from ..integration.calibrate import calibrate
from ..integration.plan import FastPlan
from ._batches import Batch, checked, cropped, evaluating
from ._measure import Measured, Span, measure
from ._twin import Twin
from .moments import Planned, gather
from .recovery import Recovery
from .report import Basis, Before, Conversion, converted

__all__ = ["convert"]

MEASURED_TOKENS = 2048  # of the batch on which errors and times are measured


def convert(
    model: PreTrainedModel,
    plan: FastPlan,
    calibration: Iterable[Mapping[str, Any] | Tensor] | None = None,
    *,
    recovery_steps: int = 0,
    rounds: int = 5,
    report_to: str | Path | None = None,
) -> tuple[PreTrainedModel, Conversion]:
    """Make a loaded dense model run the plan, in place; the model, and a report of what that did.

    calibration   what the model is called with: dicts (input_ids, attention_mask, ...) or tensors of input_ids; some
                  thousand tokens of the kind that it will read. Forms made from data and causal SVD need it; errors
                  and times are measured on it, of several batches on the last, which is then used for nothing else.
                  None: no error and no time is measured.
    recovery_steps   steps of fitting each converted feed-forward to the dense one's outputs on the calibration data,
                  before Int8 stores it (see recovery.py); 0: none.
    rounds        forwards of the dense and of the converted model, by turns, that are timed; 0 times nothing.
    report_to     folder to make for the report: report.json, report.md, plot.png. It must not exist.

    ValueError, with the model as it was, for a plan that does not fit (see `apply_plan`), for calibration that is
    empty, not finite or too short, and where anything else than the planned layers would change.
    """
    check_new_plan(model, plan)
    for name, given in (("rounds", rounds), ("recovery_steps", recovery_steps)):
        if isinstance(given, bool) or not isinstance(given, int) or given < 0:
            raise ValueError(f"{name} is a whole number of at least 0, got {given!r}")
    if report_to is not None:
        need_matplotlib()
        if Path(report_to).exists():
            raise FileExistsError(f"{report_to} exists: name another folder for the report")
    batches = None if calibration is None else checked(model, calibration)
    planned = planned_blocks(model, plan)
    held = None if batches is None else cropped(batches[-1], MEASURED_TOKENS)
    used = batches[:-1] if batches is not None and len(batches) > 1 else batches
    before = Before(model)
    with _undone_on_failure(model, before), evaluating(model):
        moments, recovery = _seen(model, plan, planned, used, recovery_steps)
        put_plan(model, plan, moments, None if recovery is None else recovery.fit)
        twin = Twin(model, before.modules, before.stamped)
        twin.check([path for block, _ in planned for path in block.paths], before.types)
        if lacking(model):
            calibrate(model, _needed(used, "SVD of causal layers is"))
        spans = [*map(_feed_forward, [block for block, _ in planned]), *_attention(model, before)]
        found, whole = [Measured() for _ in spans], Measured()
        if held is not None:
            found, whole = measure(model, spans, twin, held, rounds)
        for path in twin.changed:  # what is new is in the mode of what it replaces
            model.get_submodule(path).train(before.training[path])
        layers = [converted(model, before, planned, *each) for each in zip(spans, found, strict=True)]
        basis = None if batches is None or held is None else Basis.of(model, held, len(batches) > 1, rounds)
        report = Conversion.of(model, before, planned, layers, whole, basis)
        if recovery is not None:
            report = replace(report, recovery_steps=recovery_steps)
    if report_to is not None:
        report.write(report_to)
    return model, report


def _seen(
    model: PreTrainedModel, plan: FastPlan, planned: Planned, used: list[Batch] | None, steps: int
) -> tuple[dict[str, Moments], Recovery | None]:
    """What the plan takes from data, under its attention, which is taken off again: moments of the inputs that forms
    ask for, and rows for recovery."""
    form = next((form for _, forms in planned for form in forms if form.calibrated), None)
    if form is None and not steps:
        return {}, None
    batches = _needed(used, "recovery is" if form is None else f"{form!r} is")

    def read() -> tuple[dict[str, Moments], Recovery | None]:
        return gather(model, planned, batches), Recovery(model, planned, batches, steps) if steps else None

    if plan.attention is None:
        return read()
    put_plan(model, FastPlan(attention=plan.attention))
    try:
        if lacking(model):
            calibrate(model, batches)
        return read()
    finally:
        take_off(model)


def _needed(batches: list[Batch] | None, who: str) -> list[Batch]:
    if batches is None:
        raise ValueError(f"{who} made from data: give calibration=batches of what the model will read")
    return batches


def _feed_forward(block: Block) -> Span:
    return Span("feed_forward", block.stack, block.layer, block.ups, block.down)


def _attention(model: PreTrainedModel, before: Before) -> list[Span]:
    """Attention that the plan has changed; what the model's own config has stamped is none of it."""
    return [
        Span("attention", stamp.stack, stamp.layer, (stamp.path,), stamp.path)
        for module, stamp in stamped_modules(model)
        if not isinstance(stamp.mechanism, Dense) and module not in before.stamped
    ]


@contextmanager
def _undone_on_failure(model: PreTrainedModel, before: Before) -> Iterator[None]:
    """Whatever goes wrong inside, Ctrl-C too: the model is dense again."""
    try:
        yield
    except BaseException:
        twin = Twin(model, before.modules, before.stamped)
        twin.dense()
        for path in twin.changed:
            unfuse(model.get_submodule(path.rpartition(".")[0]))
        if isinstance(getattr(model.config, "quantization_config", None), FastPlan):
            take_off(model)
        for name in set(vars(model)) - before.attributes:
            delattr(model, name)
        raise
