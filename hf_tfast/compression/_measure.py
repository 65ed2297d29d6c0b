"""What conversion did to each layer, measured: its error on the input of the dense model, and its time in turns.

Error   ||y' - y|| / ||y|| over the tokens of a batch, padding left out: y the layer's output in the dense model, y'
        that of the converted layer on the same input, so that no layer pays for those below it. `whole` is the error
        of the model's own output, with all that adds up.
Time    one forward of dense and converted by turns, the first of a pair changing; medians. A layer's time lasts from
        the call of its first module to the end of its last one.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..feed_forward._fused import FusedInt8
from ._batches import Batch, evaluating, forward, valid_rows
from ._twin import Twin

__all__ = ["Measured", "Span", "error_of", "measure", "output_of", "seconds_of"]


@dataclass(frozen=True)
class Span:
    """A layer of a model: it begins when the first module of `starts` is called, and ends with the module `end`."""

    part: str  # "feed_forward" or "attention"
    stack: str
    layer: int
    starts: tuple[str, ...]
    end: str

    def timed(self, model: PreTrainedModel) -> tuple[tuple[str, ...], str]:
        """Where to listen for its time: at the modules that own its layers, where these compute the whole in one go
        and would not with a hook on a layer."""
        owners = [path.rpartition(".")[0] for path in (*self.starts, self.end)]
        if isinstance(model.get_submodule(owners[0]), FusedInt8):
            return (owners[0],), owners[-1]
        return self.starts, self.end


@dataclass
class Measured:
    """Of one layer or of the whole model; None: not measured."""

    error: float | None = None
    seconds_before: float | None = None
    seconds_after: float | None = None


@dataclass
class _Record:
    """What one span met in one forward: a module that several layers share is called several times."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


def measure(
    model: PreTrainedModel, spans: Sequence[Span], twin: Twin, batch: Batch, rounds: int
) -> tuple[list[Measured], Measured]:
    """Of every span, and of the whole model. The converted model is in place afterwards, in its own training mode.

    rounds   forwards of each of the two that are timed; 0 measures no time.
    """
    found, whole = [Measured() for _ in spans], Measured()
    try:
        with evaluating(model):
            twin.dense()
            before, y = _record(model, spans, batch)
            twin.converted()
            after, _ = _record(model, spans, batch, given=before)
            whole.error = error_of(
                *(_valid(model, batch, _stack(model), each) for each in (y, output_of(model, batch)))
            )
            for n, span in enumerate(spans):
                pair = [[_valid(model, batch, span.stack, o) for o in r[n].outputs] for r in (before, after)]
                if [o.shape for o in pair[0]] == [o.shape for o in pair[1]] and pair[0]:
                    found[n].error = error_of(*(torch.cat(outputs) for outputs in pair))
            del before, after, y
            if rounds:
                _time(model, spans, twin, batch, rounds, found, whole)
    finally:
        twin.converted()
    return found, whole


def _record(
    model: PreTrainedModel, spans: Sequence[Span], batch: Batch, given: list[_Record] | None = None
) -> tuple[list[_Record], Tensor]:
    """Inputs and outputs of every span in one forward, in which spans read the inputs of `given` where they fit."""
    records = [_Record() for _ in spans]
    with ExitStack() as stack:
        for n, span in enumerate(spans):
            forced = given[n].inputs if given is not None else None
            for path in span.starts:
                hook = _reader(records[n] if path == span.starts[0] else _Record(), forced)
                handle = model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            handle = model.get_submodule(span.end).register_forward_hook(_writer(records[n]))
            stack.callback(handle.remove)
        y = output_of(model, batch)
    return records, y


def _reader(record: _Record, forced: list[Tensor] | None) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        n = len(record.inputs)
        record.inputs.append(x.detach())
        if forced is None or n >= len(forced) or forced[n].shape != x.shape:
            return None
        return ((forced[n], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": forced[n]})

    return hook


def _writer(record: _Record) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        record.outputs.append((output[0] if isinstance(output, tuple) else output).detach())

    return hook


def output_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The first thing that a model gives: logits, or hidden states."""
    found = forward(model, batch)
    logits = getattr(found, "logits", None)
    if logits is not None:
        return logits
    states = getattr(found, "last_hidden_state", None)
    return states if states is not None else next(x for x in found.to_tuple() if isinstance(x, Tensor) and x.ndim)


def _stack(model: PreTrainedModel) -> str:
    return "decoder" if model.config.is_encoder_decoder else "text"


def _valid(model: PreTrainedModel, batch: Batch, stack: str, x: Tensor) -> Tensor:
    """Rows [n d] without padding; all of them where x has another number of rows than the batch has tokens."""
    try:
        return valid_rows(model, batch, stack, x)
    except ValueError:
        return x.reshape(-1, x.shape[-1])


def error_of(y: Tensor, other: Tensor) -> float:
    """||other - y|| / ||y||, 0 where both are zero."""
    wide, norm = (other.double() - y.double()).norm(), y.double().norm()
    return float(wide / norm) if norm else float(wide and torch.inf)


def _time(
    model: PreTrainedModel,
    spans: Sequence[Span],
    twin: Twin,
    batch: Batch,
    rounds: int,
    found: list[Measured],
    whole: Measured,
) -> None:
    sides: dict[Callable[[], None], list[list[float]]] = {twin.dense: [], twin.converted: []}
    for n in range(rounds):
        for put in (twin.dense, twin.converted) if n % 2 == 0 else (twin.converted, twin.dense):
            put()
            sides[put].append(seconds_of(model, spans, batch))
    before, after = ([median(column) for column in zip(*rows, strict=True)] for rows in sides.values())
    for row, was, now in zip([*found, whole], before, after, strict=True):
        row.seconds_before, row.seconds_after = was, now


def seconds_of(model: PreTrainedModel, spans: Sequence[Span], batch: Batch) -> list[float]:
    """Seconds of each span in one forward, and of the forward."""
    seconds, began = [0.0] * len(spans), [0.0] * len(spans)

    def start(n: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if not began[n]:
                began[n] = _now(model)

        return hook

    def stop(n: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seconds[n] += _now(model) - began[n]
            began[n] = 0.0

        return hook

    with ExitStack() as stack:
        for n, span in enumerate(spans):
            starts, end = span.timed(model)
            for path in starts:
                stack.callback(model.get_submodule(path).register_forward_pre_hook(start(n)).remove)
            stack.callback(model.get_submodule(end).register_forward_hook(stop(n)).remove)
        first = _now(model)
        forward(model, batch)
        return [*seconds, _now(model) - first]


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
