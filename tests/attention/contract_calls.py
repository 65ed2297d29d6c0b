"""The rest of the contract as plain functions: padding and segments, no state, dropout, worst cases, the file itself.

See contract.py. Nothing here names a mechanism.
"""

import json
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hf_tfast.attention import Mask, Mechanism, Score, attend, mechanism_from_dict
from hf_tfast.testing import Shape, assert_near, generator, qkv, with_gradients
from tests.attention.contract import is_pattern, make_mask, supported, through_attend

HEADINGS = ("Shapes", "Cost", "Exact", "Source", "Padding", "Causal", "Differs")


# --- rule 6: padding and segments ------------------------------------------------------------------------------------


def check_poison(mechanism: Mechanism, kind: str, causal: bool, path: str) -> None:
    """Rule 6: whatever stands at invalid keys and queries, valid rows keep every bit, and no gradient goes there."""
    shape = Shape(b=3, i=50, j=61)
    mask = make_mask(kind, causal, shape.b, shape.j, "poison")
    if kind == "holes":
        mask.valid[1] = False  # and one row without anything
    there = mask.valid if mask.segments is None else mask.segments != 0
    there = there if mask.valid is None else there & mask.valid
    gone, queries_gone = ~there[:, None, :, None], ~there[:, None, -shape.i :, None]
    q, k, v = qkv(shape, "poison", kind)
    q, k, v = q.masked_fill(queries_gone, 0.0), k.masked_fill(gone, 0.0), v.masked_fill(gone, 0.0)
    clean = with_gradients(through_attend(mechanism, mask, path), q, k, v, Score())
    assert not clean["o"].masked_fill(~queries_gone, 0.0).any(), "rows of invalid queries are not zeros"
    for poison in (float("nan"), float("inf"), -1e30):
        bad = q.masked_fill(queries_gone, poison), k.masked_fill(gone, poison), v.masked_fill(gone, poison)
        result = with_gradients(through_attend(mechanism, mask, path), *bad, Score())
        for name, got in result.items():
            assert bool(got.isfinite().all()), f"{poison} at invalid places reaches {name}"
            assert torch.equal(got, clean[name]), f"{poison} at invalid places changes {name}"
    for name, where in (("q", queries_gone), ("k", gone), ("v", gone)):
        assert not clean[name].masked_fill(~where, 0.0).any(), f"invalid {name} has a gradient"


def check_padding(mechanism: Mechanism, causal: bool, path: str) -> None:
    """Rule 6: a row alone, padded on the left, on the right, on both sides or with holes gives one result."""
    sizes, j = (61, 1, 40), 61
    rows = [qkv(Shape(b=1, j=n), "padded", n) for n in sizes]
    alone = [attend(*row, mechanism, Mask(causal=causal), backend=path)[0] for row in rows]
    holes = torch.randperm(j, generator=generator("places"))
    places = {
        "left": [torch.arange(j - n, j) for n in sizes],
        "right": [torch.arange(n) for n in sizes],
        "middle": [torch.arange(n) + (j - n) // 2 for n in sizes],
        "holes": [holes[:n].sort().values for n in sizes],
    }
    for name, place in places.items():
        valid = torch.zeros(3, j, dtype=torch.bool)
        padded = tuple(torch.full((3, x.shape[1], j, x.shape[3]), 9.0, dtype=x.dtype) for x in rows[0])
        for b, row in enumerate(rows):
            valid[b, place[b]] = True
            for x, whole in zip(row, padded, strict=True):
                whole[b, :, place[b]] = x[0]
        o = attend(*padded, mechanism, Mask(causal=causal, valid=valid), backend=path)
        for b in range(3):
            assert_near(o[b, :, place[b]], alone[b], f"{name}, row {b} against itself unpadded")


def check_packing(mechanism: Mechanism, causal: bool, path: str) -> None:
    """Rule 6: documents packed one after another, or interleaved, equal each document alone; gradients too."""
    sizes = (20, 33, 1, 12)
    numbers = torch.arange(1, 5).repeat_interleave(torch.tensor(sizes))
    mixed = numbers[torch.randperm(len(numbers), generator=generator("mixed"))]
    q, k, v = qkv(Shape(b=1, j=len(numbers)), "packed")
    for name, segments in {"packed": numbers, "interleaved": mixed, "renamed": 9 - numbers}.items():
        mask = Mask(causal=causal, segments=segments[None])
        packed = with_gradients(through_attend(mechanism, mask, path), q, k, v, Score())
        upstream = torch.randn(q.shape, generator=generator("upstream"), dtype=torch.float64)
        for n in segments.unique():
            at = (segments == n).nonzero().flatten()
            document = [x[:, :, at].requires_grad_() for x in (q, k, v)]
            o = attend(*document, mechanism, Mask(causal=causal), backend=path)
            gradients = torch.autograd.grad(o, document, upstream[:, :, at])
            for field, got in zip("oqkv", (o.detach(), *gradients), strict=True):
                assert_near(packed[field][:, :, at], got, f"{name}, document {n} against itself, {field}")


def check_nothing_valid(mechanism: Mechanism, causal: bool, path: str) -> None:
    """Rules 6 and 10: a batch of padding alone gives zeros, and zeros as gradients."""
    q, k, v = (x.fill_(float("nan")).requires_grad_() for x in qkv(Shape(j=12), "nothing"))
    for mask in (
        Mask(causal=causal, valid=torch.zeros(2, 12, dtype=torch.bool)),
        Mask(causal=causal, segments=torch.zeros(2, 12, dtype=torch.int64)),
    ):
        o = attend(q, k, v, mechanism, mask, backend=path)
        assert not o.any(), "a batch without valid keys is not zeros"
        assert o.requires_grad, "a batch without valid keys is cut from the graph"
        for gradient in torch.autograd.grad(o.sum(), (q, k, v)):
            assert not gradient.any(), "a batch without valid keys has gradients"


# --- rule 8: no state ------------------------------------------------------------------------------------------------


def check_no_state(mechanism: Mechanism, path: str) -> None:
    """Rule 8: other calls, before or in another thread, and torch's generator change nothing and are not changed."""
    shape, score = Shape(j=70), supported(mechanism, Score(dropout=0.2, seed=5))
    run = lambda n, length=70: with_gradients(  # noqa: E731
        through_attend(mechanism, Mask(), path), *qkv(replace(shape, j=length), "state", n), score
    )
    before, drawn = vars(mechanism).copy(), torch.random.get_rng_state()
    first = [run(n) for n in range(3)]
    run(7, 31)
    run(8, 90)
    torch.rand(3)
    moved = torch.random.get_rng_state()
    again = [run(n) for n in reversed(range(3))][::-1]
    with ThreadPoolExecutor(2) as threads:
        threaded = list(threads.map(run, [0, 1, 2]))
    for n, result in enumerate(again + threaded):
        for name in result:
            assert torch.equal(result[name], first[n % 3][name]), f"call {n} gives another {name} than before"
    there = qkv(shape, "state", 0)
    o, flipped = (
        attend(*(turn(x) for x in there), mechanism, backend=path) for turn in (lambda x: x, lambda x: x.flip(0))
    )
    assert_near(flipped.flip(0), o, "a call of the same shape with the rows in another order")
    assert vars(mechanism) == before, "the mechanism is not what it was before the call"
    assert torch.equal(moved, torch.random.get_rng_state()), "the call draws from torch's global generator"
    assert not torch.equal(moved, drawn)


def check_rows_apart(mechanism: Mechanism, causal: bool, path: str) -> None:
    """Rule 8: the rows of a batch do not meet: each alone gives what it gives in the batch."""
    q, k, v = qkv(Shape(b=3, j=50), "apart")
    o = attend(q, k, v, mechanism, Mask(causal=causal), backend=path)
    for b in range(3):
        alone = attend(*(x[b : b + 1] for x in (q, k, v)), mechanism, Mask(causal=causal), backend=path)
        assert_near(alone, o[b : b + 1], f"row {b} alone")


def check_heads_apart(mechanism: Mechanism, causal: bool, path: str) -> None:
    """Rule 8: heads in two calls with `first_head`, as on two ranks, equal all at once; draws follow the head."""
    q, k, v = qkv(Shape(b=1, h=6, g=3, j=80), "heads")
    q, k, v = (x[:, :1].expand_as(x) if x is not q else x for x in (q, k, v))
    score = supported(mechanism, Score(dropout=0.2, seed=5, first_head=2, sinks=torch.arange(6.0, dtype=q.dtype)))
    sinks = score.sinks
    o = attend(q, k, v, mechanism, Mask(causal=causal), score, backend=path)
    for low, high in ((0, 2), (2, 6)):
        part = replace(score, first_head=2 + low, sinks=None if sinks is None else sinks[low:high])
        keys = slice(low // 2, high // 2)
        some = attend(q[:, low:high], k[:, keys], v[:, keys], mechanism, Mask(causal=causal), part, backend=path)
        assert_near(some, o[:, low:high], f"heads {low} to {high} alone")


def check_every_length(mechanism: Mechanism, path: str) -> None:
    """Rule 8: a causal row is the beginning of every longer one, dropout included."""
    q, k, v = qkv(Shape(b=1, j=150), "prefix")
    score = supported(mechanism, Score(dropout=0.2, seed=5))
    o = attend(q, k, v, mechanism, Mask(causal=True), score, backend=path)
    for n in (1, 17, 64, 65, 127, 149):
        short = attend(q[:, :, :n], k[:, :, :n], v[:, :, :n], mechanism, Mask(causal=True), score, backend=path)
        assert_near(short, o[:, :, :n], f"the first {n} of 150")


def check_checkpointing(mechanism: Mechanism, path: str) -> None:
    """Rule 8: a call recomputed in backward, with dropout drawn from torch's generator, gives the same gradients."""
    q, k, v = qkv(Shape(j=50), "checkpoint", grad=True)
    score = supported(mechanism, Score(dropout=0.4))
    run = lambda q, k, v: attend(q, k, v, mechanism, Mask(), score, backend=path).square()  # noqa: E731
    results = []
    for call in (run, lambda *x: checkpoint(run, *x, use_reentrant=False)):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            o = call(q, k, v)
            torch.rand(5)  # what the rest of the network draws
            results.append((o.detach(), *torch.autograd.grad(o.sum(), (q, k, v))))
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again), "gradient checkpointing changes the numbers"


# --- rule 9: dropout -------------------------------------------------------------------------------------------------


def check_dropout(mechanism: Mechanism, causal: bool, path: str, rows: int = 20, seeds: int = 3) -> None:
    """Rule 9: the mean over rows and seeds is the undropped output, weights are dropped at the rate asked for."""
    q, k, _ = (x.expand(rows, -1, -1, -1) for x in qkv(Shape(b=1, h=2, g=1, j=40), "dropout"))
    v = torch.eye(40, dtype=q.dtype).expand(rows, 1, 40, 40)  # so that a pattern's output is its weights
    mask, rate = Mask(causal=causal), 0.3
    plain = attend(q, k, v, mechanism, mask, backend=path)
    draws = torch.stack(
        [attend(q, k, v, mechanism, mask, Score(dropout=rate, seed=n), backend=path) for n in range(seeds)]
    )
    assert not torch.equal(draws[0], draws[1]), "two seeds drop the same weights"
    assert not torch.equal(draws[0, 0], draws[0, 1]), "two rows drop the same weights"
    assert not torch.equal(draws[0, 0, 0] == 0, draws[0, 0, 1] == 0), "two heads drop the same weights"
    again = attend(q, k, v, mechanism, mask, Score(dropout=rate, seed=0), backend=path)
    assert torch.equal(again, draws[0]), "one seed drops different weights from call to call"
    error = (draws.mean((0, 1)) - plain[0]).norm() / plain[0].norm()
    spread = draws.flatten(0, 1).std(0).norm() / plain[0].norm() / (rows * seeds) ** 0.5
    assert error < 2 * spread, f"the mean over draws is off by {error:.3g}, expected {spread:.3g}"
    if is_pattern(mechanism):
        weights = draws[:, plain > 1e-12]
        assert_near(weights, (weights != 0) * plain[plain > 1e-12] / (1 - rate), "kept weights")
        share = (weights == 0).double().mean().item()
        assert abs(share - rate) < 5 * (rate / weights.numel()) ** 0.5, f"drops {share:.4f} instead of {rate}"


def check_refuses_dropout(mechanism: Mechanism) -> None:
    """Rule 9 where dropout has no meaning: refused, naming the fields of a model's config to set."""
    for path in ("auto", "reference", "torch"):
        with pytest.raises(ValueError, match="(?s)dropout.*config.attention_dropout"):
            attend(*qkv(Shape(j=9), "refused"), mechanism, score=Score(dropout=0.1), backend=path)


# --- rule 10: worst cases --------------------------------------------------------------------------------------------


def check_worst_content(mechanism: Mechanism, causal: bool, path: str) -> None:
    """Rule 10: equal tokens, zeros, one huge outlier: finite, and equal values stay what they are."""
    shape, mask = Shape(j=90), Mask(causal=causal)
    q, k, v = qkv(shape, "worst", dtype=torch.float32)
    same = [x[:, :, :1].expand_as(x) for x in (q, k, v)]
    huge = [x.clone() for x in (q, k, v)]
    for x in huge:
        x[:, :, 41] *= 1e4
    cases = {"equal tokens": same, "zeros": [x * 0 for x in (q, k, v)], "an outlier": huge}
    cases["large scores"] = [q * 300, k * 300, v]
    for name, inputs in cases.items():
        result = with_gradients(through_attend(mechanism, mask, path), *inputs, Score())
        for field, x in result.items():
            assert bool(x.isfinite().all()), f"{name}: {field} is not finite"
        if name == "equal tokens" and is_pattern(mechanism) and type(mechanism).reference is Mechanism.reference:
            assert_near(result["o"], inputs[2].repeat_interleave(2, dim=1), "an average of equal values")


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes while active, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor) and not func.is_view:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


def check_memory(mechanism: Mechanism, causal: bool, alike: bool, path: str = "torch", j: int = 2048) -> None:
    """Rule 10: no tensor of the size of all pairs, on random tokens and on equal ones, forward and backward."""
    q, k, v = qkv(Shape(b=1, h=2, g=1, j=j), "memory", dtype=torch.float32)
    if alike:
        q, k, v = (x[:, :, :1].repeat(1, 1, j, 1) for x in (q, k, v))
    with Largest() as largest:
        result = with_gradients(through_attend(mechanism, Mask(causal=causal), path), q, k, v, Score())
    assert all(bool(x.isfinite().all()) for x in result.values())
    assert largest.elements <= j * j // 2, (
        f"one tensor holds {largest.elements} numbers; all pairs of a head are {j * j}"
    )


# --- rule 11: the file -----------------------------------------------------------------------------------------------


def check_docstring(cls: type[Mechanism]) -> None:
    """Rule 11: the module's docstring has the one form that tables are made from."""
    text = sys.modules[cls.__module__].__doc__ or ""
    first, *rest = text.split("\n")
    assert first.startswith(f"{cls.__name__}: "), f"the first line is not '{cls.__name__}: what it does.': {first!r}"
    assert first.endswith(".") and len(first) > len(cls.__name__) + 10, first  # noqa: PT018
    formula = text.split("\n\n")[1]
    assert formula.startswith("    ") and "=" in formula, f"no formula after the first line: {formula!r}"  # noqa: PT018
    starts = [n for n, line in enumerate(rest) if line.split(" ")[0] in HEADINGS]
    assert [rest[n].split(" ")[0] for n in starts] == list(HEADINGS), f"expected the headings {HEADINGS} in this order"
    for n in starts:
        assert rest[n].split(maxsplit=1)[1:], f"nothing after {rest[n]!r}"
    assert "http" in text, "Source has no address"
    assert (cls.__doc__ or "").strip() and not (cls.__doc__ or "").startswith(f"{cls.__name__}("), "no class docstring"  # noqa: PT018


def check_config(cls: type[Mechanism]) -> None:
    """Rule 11: fields are the config: through JSON and back, hashable, frozen, by keyword, checked on the way in."""
    mechanism = cls(**cls.small)
    again = mechanism_from_dict(json.loads(json.dumps(mechanism.to_dict())))
    assert again == mechanism, "to_dict through JSON gives another mechanism"
    assert hash(again) == hash(mechanism)
    assert pickle.loads(pickle.dumps(mechanism)) == mechanism
    assert mechanism.to_dict()["mechanism"] == cls.name
    assert cls.__name__.lower() == cls.name == cls.__module__.rsplit(".", 1)[1], "file, name and class are one word"
    with pytest.raises(ValueError, match=f"{cls.__name__} has no field 'nonsense'"):
        mechanism_from_dict({**mechanism.to_dict(), "nonsense": 1})
    with pytest.raises((FrozenInstanceError, TypeError)):
        mechanism.nonsense = 1  # type: ignore[attr-defined]
    for field in fields(cls):  # type: ignore[arg-type]
        with pytest.raises(FrozenInstanceError):
            setattr(mechanism, field.name, 3)
        if field.type in (int, "int"):
            for wrong in ("8", 1.5, None, True, *(() if field.name == "seed" else (-1,))):
                with pytest.raises(ValueError, match=field.name):
                    cls(**{**cls.small, field.name: wrong})
    with pytest.raises(TypeError):
        cls(1)  # type: ignore[call-arg]
