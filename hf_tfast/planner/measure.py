"""The figures a plan is made from: time and error of every candidate in every layer, and errors of whole models.

Layer time    one call of `attend` on a layer's own tensors against SDPA, by turns, medians. Layers of one shape share
              what was timed on one of them, in the middle of the model.
Layer error   ||o - dense|| / ||dense|| of the attention's output before its projection, on the queries, keys and
              values that the dense model makes of calibration text.
End error     on text: mean KL divergence (nats per position) of the model's logits from the dense ones, at most
              POSITIONS evenly spaced positions of a batch; for models without logits one minus the cosine of
              the mean of their last hidden states with that of the dense model, mean over rows.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from ..attention import Mask, Mechanism, attend
from ..attention.dense import Dense
from ..benchmarking.captured import Call, heard, listening
from ..benchmarking.fidelity import named
from ..compression._batches import Batch, evaluating, forward
from ..integration._modules import survey
from ..integration._stamps import set_stamp, stamped_modules

__all__ = ["Layer", "Switchboard", "in_turns", "layer_errors", "layer_times"]

POSITIONS = 512
Report = Callable[[str], None]
Place = tuple[str, int]  # stack, layer


@dataclass
class Layer:
    """One self-attention layer, and figures of every candidate, in their order: infinite where it cannot run."""

    stack: str
    layer: int
    causal: bool
    shape: tuple[int, ...]
    errors: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    dense_seconds: float = 0.0

    @property
    def place(self) -> Place:
        return self.stack, self.layer


def layer_times(
    model: PreTrainedModel, batch: Batch, who: Sequence[Mechanism], rounds: int, both: bool, report: Report
) -> list[Layer]:
    """Every layer with the time of each candidate; `both`: of forward and backward."""
    layers: list[Layer] = []
    kept: dict[tuple[bool, tuple[int, ...]], Call] = {}
    middle = len({f.layer for f in survey(model).found if f.kind == "self"}) // 2

    def note(call: Call) -> None:
        shape = (*call.q.shape[1:], call.k.shape[1], call.v.shape[-1])
        layers.append(Layer(call.stack, call.layer, call.causal, shape))
        if call.layer <= middle or (call.causal, shape) not in kept:  # one call of a kind: they are whole rows
            kept[call.causal, shape] = call

    with evaluating(model), heard(model), listening(model, note):
        forward(model, batch)
    if not layers:
        raise ValueError(
            "no self-attention layer ran over a whole row without padding: give batches of rows of equal length"
        )
    for (causal, shape), call in kept.items():
        same = [layer for layer in layers if (layer.causal, layer.shape) == (causal, shape)]
        able = [n for n, mechanism in enumerate(who) if mechanism.causal or not causal]
        report(f"times of {len(able)} candidates, {len(same)} layers like {call.stack} layer {call.layer}")
        runs = [_run(call, mechanism, both) for mechanism in (Dense(), *(who[n] for n in able))]
        dense, *found = in_turns(runs, rounds, call.q.device, give_up=1.5)
        seconds = [float("inf")] * len(who)
        for n, taken in zip(able, found, strict=True):
            seconds[n] = taken
        for layer in same:
            layer.seconds, layer.dense_seconds = list(seconds), dense
    return layers


def layer_errors(
    model: PreTrainedModel, layers: Sequence[Layer], batches: Sequence[Batch], who: Sequence[Mechanism], report: Report
) -> None:
    """Fill in the error of each candidate, root mean square over batches."""
    squares: dict[Place, list[list[float]]] = {layer.place: [] for layer in layers}

    def note(call: Call) -> None:
        report(f"errors of {len(who)} candidates, {call.stack} layer {call.layer}")
        squares[call.stack, call.layer].append([_error(call, mechanism) ** 2 for mechanism in who])

    with evaluating(model), heard(model), listening(model, note):
        for batch in batches:
            forward(model, batch)
    for layer in layers:
        columns = zip(*squares[layer.place], strict=True)
        layer.errors = [(sum(column) / len(column)) ** 0.5 for column in columns]


def _error(call: Call, mechanism: Mechanism) -> float:
    if call.causal and not mechanism.causal:
        return float("inf")
    o = attend(call.q, call.k, call.v, mechanism, Mask(causal=call.causal), call.score)
    return float((o - call.o).float().norm() / call.o.float().norm())


def _run(call: Call, mechanism: Mechanism, both: bool) -> Callable[[], Any]:
    """One attention call; dense runs SDPA, as a model's own layer does, where nothing of its score is beyond SDPA."""
    q, k, v = (x.detach().requires_grad_(both) for x in (call.q, call.k, call.v))
    plain = call.score.softcap is None and call.score.sinks is None

    def run() -> None:
        with torch.set_grad_enabled(both):
            if isinstance(mechanism, Dense) and plain:
                o = F.scaled_dot_product_attention(
                    q, k, v, is_causal=call.causal, scale=call.score.scale, enable_gqa=q.shape[1] != k.shape[1]
                )
            else:
                o = attend(q, k, v, mechanism, Mask(causal=call.causal), call.score)
            if both:
                torch.autograd.grad(o.sum(), (q, k, v))

    return run


def in_turns(
    runs: Sequence[Callable[[], Any]], rounds: int, device: torch.device, give_up: float = float("inf")
) -> list[float]:
    """Median seconds of each, called by turns after one call that is not counted. A run that takes more than `give_up`
    times as long as the first one in the first counted turn is not called again."""
    taken: list[list[float]] = [[] for _ in runs]
    racing = list(range(len(runs)))
    for turn in range(rounds + 1):
        at = turn % len(racing)
        for n in racing[at:] + racing[:at]:
            began = _now(device)
            runs[n]()
            if turn:
                taken[n].append(_now(device) - began)
        if turn == 1:
            racing = [n for n in racing if taken[n][0] <= give_up * taken[0][0]]
    return [median(samples) for samples in taken]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Switchboard:
    """A model with a plan whose layers can be given other mechanisms at once, and what that does at its end."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[Layer]) -> None:
        self.model = model
        self.places = [layer.place for layer in layers]
        self._stamps = {
            (stamp.stack, stamp.layer): (module, stamp)
            for module, stamp in stamped_modules(model)
            if stamp.kind == "self"
        }
        self.kind = ""  # of the end error, once it was measured
        self._dense: dict[int, Tensor] = {}
        self._known: dict[tuple[tuple[str, ...], tuple[int, ...]], float] = {}

    def put(self, mechanisms: Sequence[Mechanism]) -> None:
        """One mechanism a layer, in the order of `layers`."""
        for place, mechanism in zip(self.places, mechanisms, strict=True):
            module, stamp = self._stamps[place]
            set_stamp(module, replace(stamp, mechanism=mechanism))

    def error(self, mechanisms: Sequence[Mechanism], batches: Sequence[Batch]) -> float:
        """The end error with these mechanisms, mean over batches; remembered."""
        key = tuple(map(named, mechanisms)), tuple(map(id, batches))
        if key not in self._known:
            with evaluating(self.model):
                dense = [self._reference(batch) for batch in batches]
                self.put(mechanisms)
                found = [
                    end_error(self.kind, ends(self.model, batch)[1], y)
                    for batch, y in zip(batches, dense, strict=True)
                ]
            self._known[key] = sum(found) / len(found)
        return self._known[key]

    def _reference(self, batch: Batch) -> Tensor:
        if id(batch) not in self._dense:
            self.put([Dense()] * len(self.places))
            self.kind, self._dense[id(batch)] = ends(self.model, batch)
        return self._dense[id(batch)]

    def times(self, choices: Sequence[Sequence[Mechanism]], batch: Batch, rounds: int, both: bool) -> list[float]:
        """Seconds of a forward of the whole model (`both`: and of its backward) with each choice, by turns."""

        def run(mechanisms: Sequence[Mechanism]) -> Callable[[], None]:
            def call() -> None:
                self.put(mechanisms)
                with torch.set_grad_enabled(both):
                    output = ends(self.model, batch)[1]
                    if both:
                        output.float().sum().backward()

            return call

        with evaluating(self.model):
            try:
                return in_turns([run(choice) for choice in choices], rounds, self.model.device)
            finally:
                if both:
                    self.model.zero_grad(set_to_none=True)


def ends(model: PreTrainedModel, batch: Batch) -> tuple[str, Tensor]:
    """What the end error is measured on: "kl" and logits [n vocabulary] of some positions, or "cosine" and mean hidden
    states [b d] in fp32."""
    output = forward(model, batch)
    logits = getattr(output, "logits", None)
    if logits is not None:
        rows = logits.reshape(-1, logits.shape[-1])
        valid = batch.get("decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask")
        if isinstance(valid, Tensor) and valid.numel() == len(rows):
            rows = rows[valid.flatten().bool().to(rows.device)]
        step = -(-len(rows) // POSITIONS)
        return "kl", rows[::step]
    states = output.last_hidden_state
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != states.shape[:2]:
        return "cosine", states.float().flatten(1, -2).mean(1)
    weights = mask.to(states.device, torch.float32)[..., None]
    return "cosine", (states.float() * weights).sum(1) / weights.sum(1)


def end_error(kind: str, y: Tensor, dense: Tensor) -> float:
    """Mean KL divergence of rows of logits, "kl", or one minus the mean cosine of rows, "cosine"."""
    if kind == "cosine":
        return max(0.0, float(1 - F.cosine_similarity(y.double(), dense.double(), dim=-1).mean()))
    y, dense = y.double().log_softmax(-1), dense.double().log_softmax(-1)
    return max(0.0, float((dense.exp() * (dense - y)).sum(-1).mean()))
