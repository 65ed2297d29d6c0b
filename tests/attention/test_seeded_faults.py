"""The checks checked: mechanisms with one fault each, and the contract check that must find it.

Faults in the cutting of rows and in files: test_seeded_faults_around.py.
"""

import random
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_tfast.attention import Mask, Mechanism
from hf_tfast.attention.window import Window
from hf_tfast.backends.score import softmax_attention
from hf_tfast.testing import Shape
from tests.attention import contract, contract_calls, contract_ways

pytestmark = pytest.mark.usefixtures("poisoned_memory")
FOUND = (AssertionError, pytest.fail.Exception)


class Healthy(Window):
    """The window by its reference: keeps every rule, except that its memory is not linear."""

    def fast(self, q, k, v, mask, score, backend="torch", choice=None):
        return self.reference(q, k, v, mask, score, choice)


def make(**methods: Any) -> Mechanism:
    return type("Broken", (Healthy,), methods)(window=8, sinks=2)


def fast(change):
    """A mechanism whose fast path is `change(self, q, k, v, mask, score)`."""
    return make(
        fast=lambda self, q, k, v, mask, score, backend="torch", choice=None: change(self, q, k, v, mask, score)
    )


def altered(**inputs):
    """A fast path that is the reference of altered inputs."""

    def change(self, *call):
        named = dict(zip(("q", "k", "v", "mask", "score"), call, strict=True))
        return self.reference(**{**named, **{name: edit(named[name]) for name, edit in inputs.items()}})

    return fast(change)


class Backward(torch.autograd.Function):
    """`x`, with a gradient edited on its way back."""

    @staticmethod
    def forward(ctx, x, edit):
        ctx.edit = edit
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.edit(gradient), None


class Redrawn(torch.autograd.Function):
    """A forward pass with one seed and a backward pass that draws with the next."""

    @staticmethod
    def forward(ctx, run, score, *inputs):
        ctx.save_for_backward(*inputs)
        ctx.run, ctx.score = run, score
        return run(*inputs, score)

    @staticmethod
    def backward(ctx, gradient):
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            o = ctx.run(*inputs, replace(ctx.score, seed=ctx.score.seed + 1))
        return None, None, *torch.autograd.grad(o, inputs, gradient)


def unwritten(self, q, k, v, mask, score):
    o = torch.empty_like(v[:, :1].expand(-1, q.shape[1], -1, -1)[:, :, : q.shape[2]])
    o[:, :, 1:] = self.reference(q, k, v, mask, score)[:, :, 1:]
    return o


def border(self, q, k, v, mask, score):
    """Loses one key at the border of a tile."""
    o, part = self.reference(q, k, v, mask, score), slice(128, None)
    lost = self.reference(q[:, :, part], k[:, :, 1:], v[:, :, 1:], replace(mask, start=1), score)
    return torch.cat([o[:, :, :128], lost], dim=2)


def first_positions(self, q, k, v, mask, score):
    """Takes the queries for the first positions."""
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    pairs = self.allowed(None, i, i, i, j, causal=mask.causal)
    return softmax_attention(q, k, v, pairs & (j <= i) if mask.causal else pairs, score)


def no_maximum(self, q, k, v, mask, score):
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    pairs = self.allowed(None, i, i, i, j, causal=mask.causal)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    weights = (q @ k.mT * score.factor(q.shape[-1])).exp() * (pairs & (j <= i) if mask.causal else pairs)
    return weights @ v / weights.sum(-1, keepdim=True)


def rounded(dtype):
    return lambda x: x.to(dtype).to(x.dtype)


def case(causal=True, length=(65, 65), mask="none", score="plain", g=2):
    return lambda m: contract.check_fast_is_reference(m, contract.Case(*length, causal, mask, score, g))


def scaled_gradient(x):
    return Backward.apply(x, lambda gradient: gradient * 1.0001)


RULE_1 = {
    "a window one key wider": (fast(lambda self, *x: replace(self, window=9).reference(*x)), case()),
    "a gradient with another scale": (altered(q=scaled_gradient), case()),
    "no gradient for one key": (altered(k=lambda k: torch.cat([k[:, :, :-1], k[:, :, -1:].detach()], 2)), case()),
    "float32 inside": (altered(k=rounded(torch.float32)), case()),
    "sink logits ignored": (altered(score=lambda s: replace(s, sinks=None)), case(score="sinks")),
    "softcap ignored": (altered(score=lambda s: replace(s, softcap=None)), case(score="softcap")),
    "scale ignored": (altered(score=lambda s: replace(s, scale=None)), case(score="scaled")),
    "dropout ignored": (altered(score=lambda s: replace(s, dropout=0.0)), case(score="dropout")),
    "dropout of another seed": (altered(score=lambda s: s.seed and replace(s, seed=1)), case(score="dropout")),
    "dropout drawn anew in backward": (
        fast(lambda self, q, k, v, m, s: Redrawn.apply(lambda q, k, v, s: self.reference(q, k, v, m, s), s, q, k, v)),
        case(score="dropout"),
    ),
    "key heads in another order": (
        altered(k=lambda k: k.repeat(1, 2, 1, 1), v=lambda v: v.repeat(1, 2, 1, 1)),
        case(),
    ),
    "a row that is never written": (fast(unwritten), case()),
    "the gap of a cache ignored": (altered(mask=lambda m: Mask(causal=m.causal)), case(mask="start")),
    "queries as the first positions": (fast(first_positions), case(length=(130, 200))),
    "a key lost at a tile's border": (fast(border), lambda m: contract.check_long(m, Shape(b=1, j=200), True)),
    "causal mask ignored": (altered(mask=lambda m: replace(m, causal=False)), case()),
    "strides ignored": (
        altered(q=lambda q: q.as_strided(q.shape, torch.empty(q.shape).stride())),
        lambda m: contract.check_layouts(m, True),
    ),
    "a gradient written in place": (
        fast(lambda self, *x: Backward.apply(self.reference(*x), lambda gradient: gradient.mul_(1.0))),
        lambda m: contract.check_layouts(m, True),
    ),
    "bfloat16 inside float32": (
        altered(q=rounded(torch.bfloat16)),
        lambda m: contract.check_low_precision(m, torch.float32, True),
    ),
    "eight bits inside bfloat16": (
        altered(k=rounded(torch.float8_e4m3fn)),
        lambda m: contract.check_low_precision(m, torch.bfloat16, True),
    ),
    "float32 given back": (
        fast(lambda self, *x: self.reference(*x).float()),
        lambda m: contract.check_low_precision(m, torch.float16, True),
    ),
}


def shared_choice(self, q, k, mask):
    """Each block of 16 queries reads the earlier key block that suits the mean of its queries: leaks twice over."""
    (h, i), (g, j) = q.shape[1:3], k.shape[1:3]
    pad = lambda x, front, back: torch.nn.functional.pad(x, (0, 0, front, back))  # noqa: E731
    means = pad(q, j - i, -j % 16).unflatten(2, (-1, 16)).mean(3)
    keys = pad(k, 0, -j % 16).unflatten(2, (-1, 16)).mean(3).repeat_interleave(h // g, 1)
    scores = (means @ keys.mT).tril(-1)
    return scores.masked_fill(scores == 0, -1e9).argmax(-1).detach()


def shared_allowed(self, choice, b, h, i, j, *, causal=False):
    return Window.allowed(self, None, b, h, i, j, causal=causal) | (j // 16 == choice[b, h, i // 16])


SHARED = {"choose": shared_choice, "allowed": shared_allowed}


def shape_dependent(self, choice, b, h, i, j, *, causal=False):
    return Window.allowed(self, choice, b, h, i, j, causal=causal) | (j < j.min() + 3)


def leaky_reference(self, q, k, v, mask, score, choice=None):
    return Mechanism.reference(self, q, k, v, mask, score) + 1e-6 * v.mean((1, 2), keepdim=True)


def sharper_reference(self, q, k, v, mask, score, choice=None):
    return Mechanism.reference(self, 1.001 * q, k, v, mask, score)


def future(m, path="torch"):
    contract.check_future(m, Shape(j=97), (31, 40), path)


def one_query(self, q, k, v, mask, score):
    return replace(self, window=7 if q.shape[2] == 1 else 8).reference(q, k, v, mask, score)


RULES_3_TO_7 = {
    "a predicate that looks at its arguments' shape": (
        make(allowed=shape_dependent),
        lambda m: contract.check_pattern(m, Mask()),
    ),
    "a predicate of numbers": (
        make(allowed=lambda self, *x, causal=False: Window.allowed(self, *x, causal=causal).long()),
        lambda m: contract.check_pattern(m, Mask()),
    ),
    "a reference beside the predicate": (
        make(reference=leaky_reference),
        lambda m: contract.check_pattern(m, Mask(causal=True)),
    ),
    "a reference with other weights": (
        make(reference=sharper_reference),
        lambda m: contract.check_pattern(m, Mask(causal=True)),
    ),
    "a stabiliser over all keys": (
        fast(lambda self, q, k, v, m, s: self.reference(q, k, v, m, s) * k.amax() / k.amax()),
        future,
    ),
    "keys chosen by the mean of a block of queries": (make(**SHARED), lambda m: future(m, "reference")),
    "the future in the gradient": (
        fast(lambda self, q, k, v, m, s: self.reference(q, k, v, m, s) + (k - k.detach()).mean()),
        future,
    ),
    "a choice shared by a block of queries": (
        make(**SHARED),
        lambda m: contract.check_decoding(m, Mask(causal=True), "reference"),
    ),
    "another window when decoding": (
        fast(one_query),
        lambda m: contract.check_decoding(m, Mask(causal=True), "torch"),
    ),
    "kept keys ignored": (
        altered(mask=lambda m: replace(m, kept=0)),
        lambda m: contract.check_dropped_keys(m, "torch"),
    ),
    "a full budget one short": (
        make(full=lambda self, length: replace(self, window=length - 1, sinks=0)),
        lambda m: contract.check_full_budget(m, True, 75, "torch"),
    ),
    "a causal form where none is declared": (make(causal=True), contract.check_refuses_causal),
}

MEMORY: dict[Any, Any] = {}


def counted(self, q, k, v, mask, score):
    MEMORY["calls"] = MEMORY.get("calls", 0) + 1
    return self.reference(q, k, v, mask, score) * (1 + 1e-9 * MEMORY["calls"])


def remembered(self, q, k, v, mask, score):
    """Keeps what it made of the first call of this shape."""
    return self.reference(q, k + (MEMORY.setdefault(("k", k.shape), k) - k).detach(), v, mask, score)


def met(self, q, k, v, mask, score):
    """Leaves the keys where another thread finds them."""
    MEMORY["met"] = k
    time.sleep(0.02)
    return self.reference(q, k + (MEMORY["met"] - k).detach(), v, mask, score)


def written(self, q, k, v, mask, score):
    object.__setattr__(self, "last", q.shape[2])
    return self.reference(q, k, v, mask, score)


def drawn(self, q, k, v, mask, score):
    return self.reference(q, k, v, mask, score) + 0.0 * torch.rand(())


def every_path(name, mechanism=None):
    """A check of contract_calls on the fast path, causal where it asks."""
    check = getattr(contract_calls, name)
    causal = "causal" in check.__code__.co_varnames[: check.__code__.co_argcount]
    return lambda m: check(m, True, path="torch") if causal else check(m, path="torch")


reseeded = lambda s: s.seed and replace(s, seed=random.randrange(1 << 30))  # noqa: E731

RULES_8_TO_10 = {
    "a call counter": (fast(counted), every_path("check_no_state")),
    "a result kept by shape": (fast(remembered), every_path("check_no_state")),
    "threads that meet": (fast(met), every_path("check_no_state")),
    "a field written by a call": (fast(written), every_path("check_no_state")),
    "torch's global generator": (fast(drawn), every_path("check_no_state")),
    "rows that meet": (altered(k=lambda k: k + 1e-6 * k.mean(0)), every_path("check_rows_apart")),
    "first_head ignored": (altered(score=lambda s: replace(s, first_head=0)), every_path("check_heads_apart")),
    "a draw by length": (
        fast(lambda self, q, k, v, m, s: self.reference(q, k, v, m, replace(s, seed=s.seed + k.shape[2]))),
        every_path("check_every_length"),
    ),
    "dropout from python's generator": (altered(score=reseeded), every_path("check_checkpointing")),
    "dropped weights not made up for": (
        fast(lambda self, q, k, v, m, s: self.reference(q, k, v, m, s) * (1 - s.dropout)),
        every_path("check_dropout"),
    ),
    "another dropout rate": (
        altered(score=lambda s: replace(s, dropout=s.dropout * 0.9)),
        every_path("check_dropout"),
    ),
    "no dropout": (altered(score=lambda s: replace(s, dropout=0.0)), every_path("check_dropout")),
    "dropout by row only": (
        fast(lambda self, q, k, v, m, s: torch.cat([self.reference(q[:, :1], k, v, m, s)] * q.shape[1], 1)),
        every_path("check_dropout"),
    ),
    "dropout that is not refused": (make(), contract_calls.check_refuses_dropout),
    "a softmax without maximum": (fast(no_maximum), every_path("check_worst_content")),
    "memory for all pairs": (make(), lambda m: contract_calls.check_memory(m, True, False)),
}


def without_autograd(self, q, k, v, mask, score):
    """Another pattern where no gradient is asked for."""
    other = self if torch.is_grad_enabled() else replace(self, window=9)
    return other.reference(q, k, v, mask, score)


class OnlyTogether(torch.autograd.Function):
    """A backward pass that forgets the gradient of q where k has none."""

    @staticmethod
    def forward(ctx, q, k):
        return q.view_as(q), k.view_as(k)

    @staticmethod
    def backward(ctx, dq, dk):
        return dq if ctx.needs_input_grad[1] else torch.zeros_like(dq), dk


def at_extremes(self, q, k, v, mask, score):
    """A window of one key reads two."""
    return replace(self, window=max(self.window, 2)).reference(q, k, v, mask, score)


WAYS = {
    "another path without gradients": (fast(without_autograd), lambda m: contract_ways.check_modes(m, True)),
    "a gradient that needs another": (
        fast(lambda self, q, k, v, m, s: self.reference(*OnlyTogether.apply(q, k), v, m, s)),
        lambda m: contract_ways.check_modes(m, True),
    ),
    "a field's extreme taken for another": (fast(at_extremes), lambda m: contract_ways.check_other_fields(m, True)),
}

FAULTS = RULE_1 | RULES_3_TO_7 | RULES_8_TO_10 | WAYS


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(fault):
    MEMORY.clear()
    mechanism, check = FAULTS[fault]
    with pytest.raises(RuntimeError if fault == "a gradient written in place" else FOUND):
        check(mechanism)


BY_DESIGN = {"memory for all pairs", "dropout that is not refused", "a causal form where none is declared"}


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in BY_DESIGN])
def test_without_the_fault_the_check_passes(fault):
    FAULTS[fault][1](make())
