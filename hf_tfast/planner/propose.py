"""propose_plan: the fastest mix of mechanisms that keeps a model's outputs within an error budget on this machine.

1. The time of every candidate, and on the first batches the error in every layer of those faster than dense attention
   (measure.py).
2. What an error in a layer does to the end of the model: the end error with the layer's fastest candidate alone.
3. The frontier of mixes by these figures (mix.py), and the fastest of them whose measured end error on the next
   batches is within the budget. Every single mechanism is measured at the end of the model too.
4. The mix, the best single mechanism within the budget and the dense model, timed as whole models by turns: the
   fastest is proposed, so that a plan is never slower than the best single mechanism, and is dense where that is best.
5. Its error on the last batches, which nothing was chosen by.

Where time is short, single mechanisms that another one beats in time and in error of the layers are left out first,
and the fastest within the budget is looked for by halves.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..attention import Mechanism
from ..attention.dense import Dense
from ..benchmarking.fidelity import named
from ..compression._batches import Batch, checked
from ..integration._stamps import NAME, stamped_modules
from ..integration.apply import apply_plan, remove_plan
from ..integration.plan import FastPlan
from .candidates import candidates
from .measure import Layer, Report, Switchboard, layer_errors, layer_times
from .mix import Mix, fastest, frontier

__all__ = ["LayerChoice", "Point", "Proposal", "propose_plan"]


@dataclass(frozen=True)
class Point:
    """One choice for the whole model: `seconds` of its attention layers together, `error` at the end of the model."""

    label: str
    kind: str  # "single", "mix" or "plan"
    seconds: float
    error: float


@dataclass(frozen=True)
class LayerChoice:
    """What a layer runs in the plan, and what it would take dense; times of one call, error of the layer's output."""

    stack: str
    layer: int
    mechanism: str
    error: float
    seconds: float
    dense_seconds: float


@dataclass(frozen=True)
class Proposal:
    """A plan, and why.

    plan           to apply with `apply_plan` or to give to `from_pretrained(quantization_config=...)`; its `attention`
                   is what a model with attention in its config takes, `from_pretrained(folder, attention=...)`.
    kind           of the end error: "kl" (nats per position) or "cosine" (one minus it).
    error          on the text the plan was chosen by; `unseen` on text it was not, which may lie above the budget.
    seconds        of the whole model with the plan, `dense_seconds` densely, `single_seconds` with the best
                   single mechanism within the budget (`single`; None where there is none), by turns in one run.
    slow           candidates that were slower than dense attention in every layer, with the time of all layers.
    left_out       single mechanisms that were not tried in all layers at once, for want of time.
    """

    plan: FastPlan
    kind: str
    max_error: float
    error: float
    unseen: float
    seconds: float
    dense_seconds: float
    single: str | None
    single_seconds: float | None
    layers: tuple[LayerChoice, ...]
    points: tuple[Point, ...]
    slow: tuple[tuple[str, float], ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def speedup(self) -> float:
        return self.dense_seconds / self.seconds

    @property
    def kept(self) -> bool:
        """Is the error within the budget on unseen text too?"""
        return self.unseen <= self.max_error

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {**asdict(self), "plan": self.plan.to_dict(), "speedup": self.speedup, "kept": self.kept}


def propose_plan(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any] | Tensor],
    *,
    max_error: float = 0.01,
    mechanisms: Sequence[str] | None = None,
    rounds: int = 5,
    training: bool = False,
    seconds: float | None = None,
    report: Report = lambda text: None,
) -> Proposal:
    """Measure `model` on this machine and propose a plan for its attention. The model is as before afterwards.

    batches      at least three, as the model is called with, rows of one length without padding: a plan is for the
                 length it was measured at. A third each is for layers, for choosing, and for the last check.
    max_error    of the end of the model: mean KL divergence of logits in nats, or one minus the cosine of embeddings.
    mechanisms   names to choose from; all by default.
    rounds       timed calls of each candidate.
    training     weigh the time of forward and backward, instead of forward alone.
    seconds      about what it may take: single mechanisms are left out then, and named. Times and errors of layers,
                 the search for a mix and the last check are always made. None: everything is tried.
    Raises       ValueError for fewer batches, a budget below 0, names that cannot be used, a model that has a plan.
    """
    began, given = time.monotonic(), checked(model, batches)
    if len(given) < 3:
        raise ValueError(f"three batches of different text are needed (layers, choice, last check), got {len(given)}")
    if not max_error >= 0 or rounds < 1:
        raise ValueError(f"expected max_error >= 0 and rounds >= 1, got {max_error} and {rounds}")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds must be more than 0, or None for all the time it takes, got {seconds}")
    until = float("inf") if seconds is None else began + seconds
    _check_dense(model)
    third = len(given) // 3
    first, chosen_by, last = given[:third], given[third:-third], given[-third:]
    length = _length(given[0])
    who = _who(model, length, mechanisms)
    layers = layer_times(model, first[0], who, rounds, training, report)
    slow = [n for n in range(len(who)) if all(layer.seconds[n] >= layer.dense_seconds for layer in layers)]
    timed = tuple((named(who[n]), sum(layer.seconds[n] for layer in layers)) for n in slow)
    quick = [n for n in range(len(who)) if n not in slow]
    layer_errors(model, layers, first, [who[n] for n in quick], report)
    everything: list[Mechanism] = [Dense(), *(who[n] for n in quick)]
    for layer in layers:
        layer.errors = [0.0, *layer.errors]
        layer.seconds = [layer.dense_seconds, *(layer.seconds[n] for n in quick)]
    with _switchboard(model, layers) as board:
        wish = _Wish(max_error, rounds, training, until, report)
        return replace(_choose(board, layers, everything, _Texts(chosen_by, last), wish), slow=timed)


@contextmanager
def _switchboard(model: PreTrainedModel, layers: list[Layer]) -> Iterator[Switchboard]:
    """Every layer ready to be given mechanisms; afterwards the model is as before."""
    if getattr(model, "attention_in_config", False):  # its layers are ready as they are made
        board = Switchboard(model, layers)
        try:
            yield board
        finally:
            board.put([Dense()] * len(layers))
        return
    apply_plan(model, FastPlan(attention=Dense()))
    try:
        yield Switchboard(model, layers)
    finally:
        remove_plan(model)


def _check_dense(model: PreTrainedModel) -> None:
    """ValueError for a model that has its attention in its config, where that is not dense, or not read at all."""
    if not getattr(model, "attention_in_config", False):
        return
    if model.config._attn_implementation != NAME:
        raise ValueError(
            f"{type(model).__name__} runs attn_implementation={model.config._attn_implementation!r}, which no choice "
            f"would change: load it with attn_implementation={NAME!r}"
        )
    stamps = (stamp for _, stamp in stamped_modules(model) if stamp.kind == "self")
    if fast := [named(stamp.mechanism) for stamp in stamps if not isinstance(stamp.mechanism, Dense)]:
        raise ValueError(f"{type(model).__name__} runs {fast[0]} by its config: load it with attention=Dense()")


@dataclass(frozen=True)
class _Texts:
    chosen_by: Sequence[Batch]
    last: Sequence[Batch]


@dataclass(frozen=True)
class _Wish:
    """What was asked for; `until` on the clock of time.monotonic."""

    max_error: float
    rounds: int
    training: bool
    until: float
    report: Report


def _length(batch: Batch) -> int:
    lead = next((x for x in batch.values() if isinstance(x, Tensor) and x.ndim > 1), None)
    if lead is None:
        raise ValueError("the batches hold no tensor of [rows, tokens]")
    return lead.shape[1]


def _who(model: PreTrainedModel, length: int, names: Sequence[str] | None) -> list[Mechanism]:
    causal = getattr(model, "can_generate", bool)() and not model.config.is_encoder_decoder
    who = candidates(length, causal, names)
    if not who:
        raise ValueError(
            f"no mechanism to choose from has a budget for {length} tokens: dense attention is best there"
        )
    return who


def _choose(board: Switchboard, layers: list[Layer], who: list[Mechanism], texts: _Texts, wish: _Wish) -> Proposal:
    """Steps 2 to 5 on a model whose layers are switched by `board`; `who` begins with Dense."""
    count, report = len(layers), wish.report
    seconds = [layer.seconds for layer in layers]

    def measured(picks: Sequence[int], batches: Sequence[Batch] = texts.chosen_by) -> float:
        return board.error([who[c] for c in picks], batches)

    singles, left_out = _singles(layers, who, measured, wish)
    report(f"what an error in each of {count} layers does to the end")
    mixes = frontier(seconds, [_costs(n, layers, measured) for n in range(count)])
    report(f"end errors of mixes, {len(mixes)} on the frontier")
    seen: dict[tuple[int, ...], Mix] = {}

    def end(mix: Mix) -> float:
        found = measured(mix.picks)
        seen[mix.picks] = Mix(mix.picks, mix.seconds, found)
        return found

    mix = fastest(mixes, end, wish.max_error)
    single = min((s for s in singles if s.error <= wish.max_error), key=lambda s: s.seconds, default=None)
    dense = Mix((0,) * count, sum(row[0] for row in seconds), 0.0)
    entrants = {m.picks: m for m in (dense, single, mix and seen[mix.picks]) if m is not None}
    report("whole models by turns: " + ", ".join(_words(m.picks, who) for m in entrants.values()))
    taken = board.times(
        [[who[c] for c in m.picks] for m in entrants.values()], texts.chosen_by[0], wish.rounds, wish.training
    )
    clock = dict(zip(entrants, taken, strict=True))
    best = entrants[min(clock, key=lambda picks: clock[picks])]
    report("the last check, on text that nothing was chosen by")
    points = [
        *(Point(_words(m.picks, who), "single", m.seconds, m.error) for m in singles),
        *(Point(_words(m.picks, who), "mix", m.seconds, m.error) for m in {dense.picks: dense, **seen}.values()),
        Point(_words(best.picks, who), "plan", best.seconds, best.error),
    ]
    return Proposal(
        plan=plan_of(layers, [who[c] for c in best.picks]),
        kind=board.kind,
        max_error=wish.max_error,
        error=best.error,
        unseen=measured(best.picks, texts.last),
        seconds=clock[best.picks],
        dense_seconds=clock[dense.picks],
        single=None if single is None else named(who[single.picks[0]]),
        single_seconds=None if single is None else clock[single.picks],
        layers=tuple(
            LayerChoice(*layer.place, named(who[c]), layer.errors[c], layer.seconds[c], layer.dense_seconds)
            for layer, c in zip(layers, best.picks, strict=True)
        ),
        points=tuple(points),
        left_out=tuple(named(who[c]) for c in left_out),
    )


def _singles(
    layers: list[Layer], who: list[Mechanism], measured: Callable[[Sequence[int]], float], wish: _Wish
) -> tuple[list[Mix], list[int]]:
    """Each candidate in all layers, with its end error; and those that no time was left for.

    Those that no other beats in time and in error of the layers come first, and of them, by halves, those that tell
    the fastest within the budget. Time is kept for what must follow: one forward a layer, a search, the models by
    turns and the last check.
    """
    count = len(layers)
    able = [c for c in range(1, len(who)) if all(layer.seconds[c] < float("inf") for layer in layers)]
    time_of = {c: sum(layer.seconds[c] for layer in layers) for c in able}
    error_of = {c: sum(layer.errors[c] ** 2 for layer in layers) for c in able}
    beaten = {c for c in able for o in able if o != c and (time_of[o], error_of[o]) < (time_of[c], error_of[c])
              and error_of[o] <= error_of[c]}  # fmt: skip
    left = sorted(able, key=lambda c: (c in beaten, time_of[c]))
    unbeaten = [c for c in left if c not in beaten]
    began, rest = time.monotonic(), count + 10 + 3 * (wish.rounds + 1) * (3 if wish.training else 1)
    found: dict[int, float] = {}
    while left:
        spent, done = time.monotonic() - began, len(found)
        if done and time.monotonic() + (rest + 1) * spent / done > wish.until:
            break
        c = _halving(unbeaten, found, wish.max_error)
        c = left[0] if c is None else c
        left.remove(c)
        wish.report(f"end error of {named(who[c])} in all layers, {done + 1} of {len(able)}")
        found[c] = measured((c,) * count)
    return [Mix((c,) * count, time_of[c], error) for c, error in found.items()], left


def _halving(row: Sequence[int], found: Mapping[int, float], within: float) -> int | None:
    """Of a row whose errors should fall, as those of its layers do, the one to measure next to know the first that is
    `within`; None once that is known."""
    low, high = 0, len(row)
    while low < high:
        middle = (low + high) // 2
        if row[middle] not in found:
            return row[middle]
        low, high = (low, middle) if found[row[middle]] <= within else (middle + 1, high)
    return None


def _costs(n: int, layers: list[Layer], measured: Callable[[Sequence[int]], float]) -> list[float]:
    """What each candidate in layer n is taken to add to the end error: in proportion to the square of its error in the
    layer, by what the fastest of them adds alone."""
    errors, seconds = layers[n].errors, layers[n].seconds
    able = [c for c in range(1, len(errors)) if seconds[c] < float("inf")]
    if not able:
        return [0.0] + [float("inf")] * (len(errors) - 1)
    probe = min(able, key=lambda c: seconds[c])
    picks = [0] * len(layers)
    picks[n] = probe
    weight = measured(picks) / errors[probe] ** 2 if errors[probe] else 0.0
    return [weight * error**2 if error < float("inf") else float("inf") for error in errors]


def _words(picks: Sequence[int], who: Sequence[Mechanism]) -> str:
    """A mix in few words: "Window(...)" or "3 of 6 Window(...), 3 of 6 Dense()"."""
    count = {c: picks.count(c) for c in dict.fromkeys(picks)}  # type: ignore[attr-defined]
    if len(count) == 1:
        return named(who[picks[0]])
    return ", ".join(f"{times} of {len(picks)} {named(who[c])}" for c, times in count.items())


def plan_of(layers: Sequence[Layer], mechanisms: Sequence[Mechanism]) -> FastPlan:
    """The plan that gives each layer its mechanism: ranges of equal neighbours, by stack where there are several."""
    if len(set(mechanisms)) == 1:
        return FastPlan(attention=mechanisms[0])
    several = len({layer.stack for layer in layers}) > 1
    ranges: list[tuple[str, int, int, Mechanism]] = []
    for layer, mechanism in sorted(zip(layers, mechanisms, strict=True), key=lambda pair: pair[0].place):
        if ranges and ranges[-1][0] == layer.stack and ranges[-1][3] == mechanism and ranges[-1][2] == layer.layer - 1:
            ranges[-1] = (*ranges[-1][:2], layer.layer, mechanism)
        else:
            ranges.append((layer.stack, layer.layer, layer.layer, mechanism))
    return FastPlan(
        attention={
            (f"{stack}." if several else "") + (f"{low}-{high}" if high > low else f"{low}"): mechanism
            for stack, low, high, mechanism in ranges
        }
    )
