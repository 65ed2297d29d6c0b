"""The contract of an attention mechanism as plain functions: each raises AssertionError where a mechanism breaks it.

Used on every mechanism that exists (test_contract*.py) and on faulty ones on purpose (test_seeded_faults.py). What
differs between mechanisms is read from them: small, causal, dropout, full(), whether they define `allowed`.
"""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_tfast.attention import Mask, Mechanism, Score, attend
from hf_tfast.testing import (
    Shape,
    assert_near,
    cast,
    generator,
    naive_attention,
    naive_same_dtype,
    qkv,
    with_gradients,
)

MASKS = ("none", "right", "left", "holes", "segments", "interleaved", "padded_segments", "start", "starts")
SCORES = ("plain", "scaled", "softcap", "sinks", "dropout", "everything")


@dataclass(frozen=True)
class Case:
    """One call of the grid in which fast and reference are compared."""

    i: int
    j: int
    causal: bool
    mask: str
    score: str
    g: int

    def __str__(self) -> str:
        return f"{'causal' if self.causal else 'both'}-{self.i}of{self.j}-{self.mask}-{self.score}-g{self.g}"


def grid() -> list[Case]:
    """Every mask with every score, length and direction; the number of key heads turns with them."""
    cases = []
    for length, (i, j) in enumerate([(1, 1), (65, 65), (130, 200)]):
        for m, mask in enumerate(MASKS):
            for causal in (False, True):
                score, g = SCORES[(m + 2 * length + causal) % 6], (2, 1, 4)[(m + length + causal) % 3]
                cases.append(Case(i, j, causal, mask, score, g))
    return cases


def small(cls: type[Mechanism]) -> Mechanism:
    return cls(**cls.small)


def usual(cls: type[Mechanism]) -> Mechanism:
    """The mechanism as a user gets it without arguments; as in `small` where it has none."""
    needed = [f for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]  # type: ignore[arg-type]
    return small(cls) if needed else cls()


def directions(mechanism: Mechanism) -> tuple[bool, ...]:
    """The values of `causal` that the mechanism has a form for."""
    return (False, True) if mechanism.causal else (False,)


def is_pattern(mechanism: Mechanism) -> bool:
    return type(mechanism).allowed is not Mechanism.allowed


def make_mask(kind: str, causal: bool, b: int, j: int, *seed: Any) -> Mask:
    """A mask of one of the MASKS, random within its kind; every row keeps at least one valid key."""
    random = generator("mask", kind, j, *seed)
    at = torch.arange(j)
    size = torch.randint(1, j + 1, (b, 1), generator=random)
    mask = Mask(causal=causal)
    if kind == "right":
        return replace(mask, valid=at < size)
    if kind == "left":
        return replace(mask, valid=at >= j - size)
    if kind == "holes":
        valid = torch.rand(b, j, generator=random) < 0.7
        valid[:, -1] = True
        return replace(mask, valid=valid)
    documents = (torch.rand(b, j, generator=random) < 4 / j).long().cumsum(-1) + 1
    if kind == "segments":
        return replace(mask, segments=documents)
    if kind == "interleaved":
        return replace(mask, segments=torch.randint(0, 4, (b, j), generator=random))
    if kind == "padded_segments":
        return replace(mask, segments=documents, valid=(at >= j - size) & (at < j - j // 8))
    if kind == "start":
        return replace(mask, start=int(size[0]) + 3, kept=5) if j > 5 else mask
    if kind == "starts":
        return replace(mask, start=torch.arange(b) * 5 + 2, kept=torch.arange(b) + 4) if j > 5 else mask
    return mask


def make_score(kind: str, h: int, *seed: Any) -> Score:
    sinks = torch.randn(h, generator=generator("sinks", *seed), dtype=torch.float64)
    return {
        "plain": Score(),
        "scaled": Score(scale=0.5),
        "softcap": Score(softcap=0.7),
        "sinks": Score(sinks=sinks),
        "dropout": Score(dropout=0.3, seed=11),
        "everything": Score(scale=0.6, softcap=1.5, sinks=sinks, dropout=0.2, seed=-5, first_head=3),
    }[kind]


def supported(mechanism: Mechanism, score: Score) -> Score:
    """`score` without what the mechanism refuses; what it ignores without a word stays, and then shows."""
    if not mechanism.dropout:
        score = replace(score, dropout=0.0, seed=None)
    if is_pattern(mechanism):
        return score  # a pattern of softmax weights carries every score
    for name in ("softcap", "sinks"):
        if getattr(score, name) is not None and _refuses(mechanism, replace(Score(), **{name: getattr(score, name)})):
            score = replace(score, **{name: None})
    return score


def _refuses(mechanism: Mechanism, score: Score) -> bool:
    """Does the mechanism raise, on both paths and by the argument's name, for the one thing set in `score`?"""
    name = "softcap" if score.softcap is not None else "sinks"
    h = 4 if score.sinks is None else score.sinks.shape[0]
    q, k, v = qkv(Shape(h=h, g=1, j=9), "refuses")
    answers = []
    for backend in ("reference", "torch"):
        try:
            attend(q, k, v, mechanism, score=score, backend=backend)
            answers.append(False)
        except ValueError as error:
            if name not in str(error):
                raise AssertionError(f"refuses {name} without naming it: {error}") from error
            answers.append(True)
    assert answers[0] == answers[1], f"{name} is refused on one path only (reference, torch): {answers}"
    return answers[0]


def at_choice(mechanism: Mechanism, mask: Mask, path: str, choice: Any) -> Callable[..., Tensor]:
    """The path of the mechanism itself, given its choice; for full rows."""
    if path == "reference":
        return lambda q, k, v, score: mechanism.reference(q, k, v, mask, score, choice)
    return lambda q, k, v, score: mechanism.fast(q, k, v, mask, score, path, choice)


def through_attend(mechanism: Mechanism, mask: Mask, path: str) -> Callable[..., Tensor]:
    return lambda q, k, v, score: attend(q, k, v, mechanism, mask, score, backend=path)


def same(one: dict[str, Tensor], other: dict[str, Tensor], what: str) -> None:
    for name in other:
        assert_near(one[name], other[name], f"{what}, {name}")


# --- rule 1: fast is reference ---------------------------------------------------------------------------------------


def check_fast_is_reference(mechanism: Mechanism, case: Case, path: str = "torch") -> None:
    """Rule 1 through `attend`, and, on full rows, once more with one choice given to both paths."""
    shape = Shape(b=3 if case.mask == "holes" else 2, g=case.g, i=case.i, j=case.j, e=12)
    q, k, v = qkv(shape, str(case))
    mask = make_mask(case.mask, case.causal, shape.b, case.j)
    score = supported(mechanism, make_score(case.score, shape.h))
    expected = with_gradients(through_attend(mechanism, mask, "reference"), q, k, v, score)
    try:
        fast = with_gradients(through_attend(mechanism, mask, path), q, k, v, score)
    except ValueError as error:  # a pattern may need keys that the cache of this mask has dropped: refused aloud
        if "start" in case.mask and "dropped" in str(error):
            return
        raise
    same(fast, expected, str(case))
    if case.mask in ("none", "start"):
        choice = mechanism.choose(q, k, mask)
        expected = with_gradients(at_choice(mechanism, mask, "reference", choice), q, k, v, score)
        same(with_gradients(at_choice(mechanism, mask, path, choice), q, k, v, score), expected, f"{case}, one choice")


def check_layouts(mechanism: Mechanism, causal: bool, path: str = "torch") -> None:
    """Strided inputs, a gradient without memory of its own (from a sum), one tensor thrice: the same numbers."""
    shape = Shape(i=70, j=90, e=5)
    q, k, v = qkv(shape, "layouts", grad=True)
    mask, score = Mask(causal=causal), Score()
    expected = attend(q, k, v, mechanism, mask, score, backend="reference")
    gradients = torch.autograd.grad(expected.sum(), (q, k, v))
    for name, change in {
        "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "sliced": lambda x: torch.cat([x, x + 1.0], dim=-1)[..., : x.shape[-1]],
        "reversed memory": lambda x: x.mT.contiguous().mT,
    }.items():
        o = attend(change(q), change(k), change(v), mechanism, mask, score, backend=path)
        assert_near(o.detach(), expected.detach(), name)
        for got, want in zip(torch.autograd.grad(o.sum(), (q, k, v)), gradients, strict=True):
            assert_near(got, want, f"{name}, gradient")
    shared = k.detach().requires_grad_()  # one tensor in all three places
    one, other = (attend(shared, shared, shared, mechanism, mask, score, backend=p) for p in (path, "reference"))
    assert_near(torch.autograd.grad(one.sum(), shared)[0], torch.autograd.grad(other.sum(), shared)[0], "one tensor")


def check_long(mechanism: Mechanism, shape: Shape, causal: bool, path: str = "torch") -> None:
    """Rule 1 at lengths that cross the borders of tiles."""
    q, k, v = qkv(shape, "long", causal)
    score, mask = supported(mechanism, Score(dropout=0.1, seed=3)), Mask(causal=causal)
    expected = with_gradients(through_attend(mechanism, mask, "reference"), q, k, v, score)
    same(with_gradients(through_attend(mechanism, mask, path), q, k, v, score), expected, f"{shape}")


def check_low_precision(mechanism: Mechanism, dtype: torch.dtype, causal: bool, path: str = "torch") -> None:
    """Rule 1 below float64: at most twice the error of plain torch in that dtype, three times for gradients."""
    shape = Shape(i=100, j=130)
    q, k, v = qkv(shape, "low", dtype=dtype)
    mask, score = Mask(causal=causal), Score()
    choice = mechanism.choose(q, k, mask)
    exact = with_gradients(
        at_choice(mechanism, mask, "reference", cast(choice, torch.float64)), q.double(), k.double(), v.double(), score
    )
    plain = naive_same_dtype(mechanism, q, k, v, mask, score, choice)
    fast = with_gradients(at_choice(mechanism, mask, path, choice), q, k, v, score)
    for name, want in exact.items():
        size = want.abs().max().item()
        allowed = (plain[name].double() - want).abs().max().item()
        assert allowed <= 0.3 * size, f"plain torch is too far off to judge by: {allowed:.3g} of {size:.3g} in {name}"
        allowed = (2 if name == "o" else 3) * allowed + torch.finfo(dtype).eps * size
        assert fast[name].dtype == dtype, f"{name} is {fast[name].dtype} for inputs of {dtype}"
        off = (fast[name].double() - want).abs().max().item()
        assert off <= allowed, f"{dtype} {name}: off by {off:.3g}, allowed {allowed:.3g}"


# --- rule 3: one predicate -------------------------------------------------------------------------------------------


def check_pattern(mechanism: Mechanism, mask: Mask) -> None:
    """Rule 3: the reference reads exactly the pairs of `allowed`, which is one function however it is asked."""
    shape = Shape(i=41, j=57)
    q, k, v = qkv(shape, "pattern", mask.causal)
    choice = mechanism.choose(q, k, mask)
    at = mask.positions(shape.j)
    rows, heads = torch.arange(shape.b).view(-1, 1, 1, 1), torch.arange(shape.h).view(-1, 1, 1)
    ask = lambda b, h, i, j: mechanism.allowed(choice, b, h, i, j, causal=mask.causal)  # noqa: E731
    pairs = ask(rows, heads, at[shape.j - shape.i :, None], at)
    assert pairs.dtype == torch.bool, f"allowed gives {pairs.dtype}, not bool"
    pairs = pairs.expand(shape.b, shape.h, shape.i, shape.j)
    few = [torch.randint(n, (40,), generator=generator(n)) for n in pairs.shape]
    for b, h, i, j in zip(*few, strict=True):
        alone = ask(b, h, at[shape.j - shape.i + i], at[j])
        assert bool(alone) == bool(pairs[b, h, i, j]), f"allowed differs when asked for one pair: {b, h, i, j}"
    together = ask(few[0], few[1], at[shape.j - shape.i + few[2]], at[few[3]])
    assert torch.equal(together.expand(40), pairs[tuple(few)]), "allowed differs when asked for a list of pairs"
    if mask.causal:
        pairs = pairs & (at <= at[shape.j - shape.i :, None])
    assert bool(pairs.any(-1).all()), "a query may read nothing, not even itself"
    ones = torch.eye(shape.j, dtype=q.dtype).expand(shape.b, shape.g, -1, -1)  # the output is the weights
    weights = mechanism.reference(q, k, ones, mask, Score(), choice)
    assert not weights.masked_fill(pairs, 0.0).any(), "the reference reads a pair that allowed forbids"
    share = weights.sum(-1, keepdim=True)  # below 1 where the mechanism counts weights that it does not read
    assert_near(weights, share * naive_attention(q, k, ones, pairs, Score()), "the reference against its pattern")
    assert bool((share > 0).all() & (share < 1 + 1e-9).all()), "weights do not add up to a share of one"
    if type(mechanism).reference is Mechanism.reference:
        assert_near(share, torch.ones_like(share), "the sum of weights")


# --- rule 4: never reads the future ----------------------------------------------------------------------------------


def check_future(mechanism: Mechanism, shape: Shape, times: tuple[int, ...], path: str) -> None:
    """Rule 4: whatever comes after position t, large or small, outputs up to t stay bit-equal; gradients stay zero."""
    q, k, v = qkv(shape, "future", grad=True)
    first = shape.j - q.shape[2]
    run = lambda *x: attend(*x, mechanism, Mask(causal=True), backend=path)  # noqa: E731
    o = run(q, k, v)
    for t in times:
        for size in (1.0, 1000.0):
            other = [x.detach() * size for x in qkv(shape, "another future", t)]
            now = [torch.cat([x[:, :, : t + 1 - skip], y[:, :, t + 1 - skip :]], dim=2) for x, y, skip in
                   zip((q, k, v), other, (first, 0, 0), strict=True)]  # fmt: skip
            past = slice(0, t + 1 - first)
            changed = (run(*now)[:, :, past] != o[:, :, past]).any(-1).nonzero()
            assert not len(changed), (
                f"what comes after {t} (times {size:g}) changes past outputs (b, h, i): {changed[:3]}"
            )
        gradients = torch.autograd.grad(o[:, :, : t + 1 - first].square().sum(), (q, k, v), retain_graph=True)
        for name, gradient, skip in zip("qkv", gradients, (first, 0, 0), strict=True):
            assert not gradient[:, :, t + 1 - skip :].any(), f"outputs up to {t} have a gradient in later {name}"


# --- rule 5: decoding continues prefill ------------------------------------------------------------------------------


def check_decoding(mechanism: Mechanism, mask: Mask, path: str, j: int = 97) -> None:
    """Rule 5: the last rows of a prefill equal calls with one query, a few, and one after the other."""
    q, k, v = qkv(Shape(j=j), "decoding")
    o = attend(q, k, v, mechanism, mask, backend=path)
    for i in (1, 3, 17, j - 1):
        few = attend(q[:, :, j - i :], k, v, mechanism, mask, backend=path)
        assert_near(few, o[:, :, j - i :], f"the last {i} queries alone")
    if not mask.causal:
        return
    for n in (n for n in (1, 2, 8, 33, 64, 65, 96) if n <= j):
        cut = replace(mask, valid=None if mask.valid is None else mask.valid[:, :n],
                      segments=None if mask.segments is None else mask.segments[:, :n])  # fmt: skip
        step = attend(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n], mechanism, cut, backend=path)
        assert_near(step, o[:, :, n - 1 : n], f"the query at {n - 1} with the keys so far")


def check_dropped_keys(mechanism: Mechanism, path: str, j: int = 90) -> None:
    """Rule 5 with a cache that has dropped keys which no query reads: `start` and `kept` say where the rest is."""
    q, k, v = qkv(Shape(j=j), "dropped")
    if not (is_pattern(mechanism) and mechanism.choose(q, k, Mask(causal=True)) is None):
        return
    at = torch.arange(j)
    for i in (1, 4):
        pairs = mechanism.allowed(None, at[:1], torch.arange(4).view(-1, 1, 1), at[j - i :, None], at, causal=True)
        read = (pairs & (at <= at[j - i :, None])).expand(4, i, j).any(0).any(0)
        unread = (~read).nonzero().flatten().tolist()
        if not unread:
            return
        kept = unread[0]
        gap = next((n for n in range(kept, j) if bool(read[n])), j) - kept
        rest = torch.cat([at[:kept], at[kept + gap :]])
        o = attend(q[:, :, j - i :], k, v, mechanism, Mask(causal=True), backend=path)
        mask = Mask(causal=True, start=gap, kept=kept)
        fewer = attend(q[:, :, j - i :], k[:, :, rest], v[:, :, rest], mechanism, mask, backend=path)
        assert_near(fewer, o, f"{gap} unread keys dropped after {kept}")


# --- rule 7: the full budget -----------------------------------------------------------------------------------------


def check_full_budget(mechanism: Mechanism, causal: bool, i: int, path: str, j: int = 75) -> None:
    """Rule 7: with a budget for every key the mechanism is softmax attention; a larger budget changes nothing."""
    q, k, v = qkv(Shape(i=i, j=j), "full")
    score = supported(mechanism, make_score("sinks", 4))
    at, mask = torch.arange(j), Mask(causal=causal)
    pairs = at <= at[j - i :, None] if causal else torch.ones(i, j, dtype=torch.bool)
    expected = with_gradients(lambda q, k, v, s: naive_attention(q, k, v, pairs, s), q, k, v, score)
    for length in (j, 2 * j):
        full = mechanism.full(length)
        assert full is not None
        assert type(full) is type(mechanism)
        same(
            with_gradients(through_attend(full, mask, path), q, k, v, score),
            expected,
            f"full({length})",
        )


def check_refuses_causal(mechanism: Mechanism) -> None:
    """Rule 4 where there is no causal form: refused, naming mechanisms that have one."""
    q, k, v = qkv(Shape(j=9), "refused")
    for path in ("auto", "reference", "torch"):
        with pytest.raises(ValueError, match="(?s)causal.*window"):
            attend(q, k, v, mechanism, Mask(causal=True), backend=path)
