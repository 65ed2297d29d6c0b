"""Bands and lists in C are what the definition says, on what models give them, and stand aside where C has no word."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from hf_tfast.attention import Mask, Score, attend
from hf_tfast.attention.graph import Graph
from hf_tfast.attention.random import Random
from hf_tfast.attention.window import Window
from hf_tfast.backends import fused
from hf_tfast.backends.blocks import Layout, attend_tiles
from hf_tfast.backends.tiles import Call
from hf_tfast.testing import Shape, assert_near, generator, naive_attention, qkv, with_gradients
from tests.attention.contract import MASKS, make_mask, make_score
from tests.backends.broken_compiler import broken_compiler

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 8e-3}
SHAPES = {  # name: shape, window, sinks
    "one token": (Shape(h=2, g=1, j=1), 4, 2),
    "odd": (Shape(b=2, h=4, g=2, i=130, j=200, d=17, e=33), 16, 3),
    "itself": (Shape(h=3, g=3, j=50, d=32), 1, 0),
    "everything": (Shape(h=2, g=1, j=90, d=16), 300, 4),
    "many chunks": (Shape(h=2, g=1, j=900, d=48, e=80), 40, 40),
    "wide": (Shape(h=1, g=1, i=400, j=500, d=64), 230, 0),
}
LISTS = {  # name: shape, keys that the band reaches on either side, sinks, block, length of the lists
    "one token": (Shape(b=1, h=2, g=1, j=1), 4, 2, 16, 2),
    "odd": (Shape(b=2, h=4, g=2, i=130, j=200, d=17, e=33), 16, 35, 20, 3),
    "bigbird": (Shape(b=1, h=3, g=3, j=330, d=32), 64, 128, 64, 3),
    "no band": (Shape(b=2, h=2, g=1, i=150, j=170, d=16, e=48), None, 0, 32, 2),
    "tiny blocks": (Shape(b=1, h=4, g=2, i=90, j=110), 5, 9, 3, 9),
    "many chunks": (Shape(b=1, h=2, g=1, j=1200, d=16), 30, 5, 48, 4),
    "nothing listed": (Shape(b=1, h=2, g=2, j=100), 3, 4, 16, 0),
}
PATTERNS = (
    Window(window=33, sinks=3),
    Random(window=20, sinks=3, blocks=2, block=24),
    Graph(blocks=tuple((a, a // 2, 0) for a in range(40)), block=20),
)


@pytest.fixture
def ran(monkeypatch):
    """How often the C ran; skips where there is none."""
    if fused._library() is None:
        pytest.skip("this machine has no C compiler, or no wide vectors")
    calls = []
    run = fused._run
    monkeypatch.setattr(fused, "_run", lambda *given: (calls.append(int(given[0].backward)), run(*given))[1])
    return calls


def compare(mechanism, mask, score, q, k, v, *seed):
    """Outputs and gradients of the fast path against those of the definition in double precision."""
    fast = with_gradients(lambda *x: attend(*x[:3], mechanism, mask, x[3], backend="torch"), q, k, v, score, *seed)
    wide = [x.double() for x in (q, k, v)]
    if score.sinks is not None:
        score = replace(score, sinks=score.sinks.double())
    exact = with_gradients(lambda *x: attend(*x[:3], mechanism, mask, x[3], backend="reference"), *wide, score, *seed)
    check(fast, exact, q.dtype)


def check(fast, exact, dtype):
    for name, x in fast.items():
        tolerance = TOLERANCE[dtype] * (exact[name].norm() / x.numel() ** 0.5 + 1).item()
        assert_near(x.double(), exact[name].double(), name, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_c_is_the_definition(ran, name, causal, dtype):
    shape, window, sinks = SHAPES[name]
    q, k, v = qkv(shape, name, causal, dtype=dtype, transposed=causal)
    score = Score(scale=0.3, sinks=torch.randn(shape.h, generator=generator(name))) if causal else Score()
    compare(Window(window=window, sinks=sinks), Mask(causal=causal), score, q, k, v, name)
    assert set(ran) == (
        set() if causal and shape.j == 1 else {0, 1}
    )  # one query under causality is a step of decoding


def listed(name, causal, shared):
    """A layout with random lists, holes, repetitions and numbers of no block in them; the pairs that it reads."""
    shape, reach, sinks, block, most = LISTS[name]
    i, count, draws = shape.i or shape.j, -(-shape.j // block), generator("lists", name, causal, shared)
    lists = torch.randint(-1, count + 1, (1 if shared else shape.h, count + shared, most), generator=draws)
    lists[:, torch.rand(count + shared, generator=draws) < 0.2] = -1
    after = reach or 0  # causality hides what lies behind, whatever the band holds
    near = None if reach is None else lambda i, j: (i - j <= reach) & (j - i <= after)
    layout = Layout(
        near=near, before=reach or 0, after=after, sinks=sinks, open_sinks=not causal, lists=lists, block=block,
        causal=causal, solid=near is not None,
    )  # fmt: skip
    row, key = torch.arange(shape.j - i, shape.j)[:, None], torch.arange(shape.j)
    seen = (lists[:, row // block, :, None] == (key // block)).any(-2).flatten(1, -2) | (key < sinks)
    seen = seen if near is None else seen | near(row, key)
    return layout, seen & (key <= row) if causal else seen | (row < sinks)


def compare_lists(layout, seen, score, q, k, v, *seed):
    fast = with_gradients(lambda *x: attend_tiles(*x[:3], layout, x[3]), q, k, v, score, *seed)
    wide = [x.double() for x in (q, k, v)]
    if score.sinks is not None:
        score = replace(score, sinks=score.sinks.double())
    check(fast, with_gradients(lambda *x: naive_attention(*x[:3], seen, x[3]), *wide, score, *seed), q.dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", LISTS)
def test_lists_are_the_definition(ran, name, causal, shared, dtype):
    """Blocks that the band or the sinks hold too, wholly or in part, are read once; empty lists give zeros."""
    layout, seen = listed(name, causal, shared)
    shape = LISTS[name][0]
    q, k, v = qkv(shape, name, causal, shared, dtype=dtype, transposed=shared)
    score = Score(scale=0.3, sinks=torch.randn(shape.h, generator=generator(name))) if shared else Score()
    compare_lists(layout, seen, score, q, k, v, name)
    assert set(ran) == {0, 1}


@pytest.mark.parametrize("i", [60, 100])
def test_queries_that_read_everything_obey_causality(ran, i):
    layout = Layout(near=lambda i, j: i - j <= 7, before=7, sinks=50, open_sinks=True, solid=True)
    q, k, v = qkv(Shape(h=4, g=2, i=i, j=100, d=16), "open sinks", i, dtype=torch.float32)
    seen = ~layout.hidden(torch.arange(100 - i, 100)[:, None], torch.arange(100))
    compare_lists(layout, seen, Score(), q, k, v)
    assert set(ran) == {0, 1}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_sinks_of_no_weight_change_nothing(ran, dtype):
    """Neither where a row reads something nor where it reads nothing."""
    layout, seen = listed("no band", True, False)
    q, k, v = qkv(LISTS["no band"][0], "no weight", dtype=dtype)
    assert not seen.any(-1).all()
    score = Score(sinks=torch.full((q.shape[1],), float("-inf")))
    fast = with_gradients(lambda *x: attend_tiles(*x[:3], layout, x[3]), q, k, v, score, "none")
    without = with_gradients(lambda *x: attend_tiles(*x[:3], layout, x[3]), q, k, v, Score(), "none")
    assert all(torch.equal(fast[name], x) for name, x in without.items())
    assert all(not x.any() for name, x in fast.items() if name not in without)
    assert set(ran) == {0, 1}


def test_threads_share_a_bounded_room(ran, monkeypatch):
    made, threads = fused._Call, []
    monkeypatch.setattr(fused, "_Call", lambda **given: (threads.append(given["threads"]), made(**given))[1])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    q, k, v = qkv(Shape(h=8, g=8, j=90, d=16), "room", dtype=torch.float32)
    first = attend(q, k, v, Window(window=8), Mask(causal=True), backend="torch")
    monkeypatch.setattr(fused, "ROOM", 1)
    assert torch.equal(first, attend(q, k, v, Window(window=8), Mask(causal=True), backend="torch"))
    assert threads == [7, 1]


@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("name", ["bigbird", "many chunks"])
def test_no_two_chunks_add_to_the_same_gradients(name, lists):
    """Unless they take turns: every other one has keys of its own."""
    layout, _ = listed(name, False, True)
    q, k, v = qkv(LISTS[name][0], "apart", dtype=torch.float32)
    call = Call(q, k, layout if lists else replace(layout, lists=None), Score(), 0, 0)
    everything, rest = fused._parts(call, True)
    assert (everything.low, everything.high, rest.high) == (0, layout.sinks, q.shape[2])
    assert rest.low == layout.sinks
    assert everything.chunks == 1
    assert rest.chunks == 1 if lists else rest.chunk >= rest.before + rest.after


def test_lists_have_to_fit(ran):
    layout, _ = listed("odd", True, True)
    q, k, v = qkv(LISTS["odd"][0], "fit", dtype=torch.float32)
    with pytest.raises(ValueError, match="the lists cover 180 positions, but there are 200"):
        attend_tiles(q, k, v, replace(layout, lists=layout.lists[:, :9]), Score())
    with pytest.raises(ValueError, match="for 1 or for all 4 heads, got lists of 3"):
        attend_tiles(q, k, v, replace(layout, lists=layout.lists.expand(3, -1, -1)), Score())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("pattern", [Window(window=8, sinks=2), PATTERNS[1]], ids=lambda x: x.name)
def test_masks(ran, pattern, kind, causal):
    """Padding and packing are rows of their own; those of a cache that dropped keys stay with the tiles."""
    shape = Shape(b=2, h=4, g=2, i=130, j=200)
    q, k, v = qkv(shape, kind, causal, dtype=torch.float32)
    mask = make_mask(kind, causal, 2, 200)
    compare(pattern, mask, make_score("sinks", 4), q, k, v, kind, causal)
    assert bool(ran) is not kind.startswith("start")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda x: x.name)
def test_what_makes_no_difference(ran, pattern, dtype):
    """Threads, strides, and what the environment switches off."""
    q, k, v = qkv(Shape(h=4, g=2, j=700, d=32), "same", dtype=dtype)
    mask = Mask(causal=pattern.name != "random")

    def run(*x):
        return with_gradients(lambda *y: attend(*y[:3], pattern, mask, backend="torch"), *x, Score()).values()

    first, threads = list(run(q, k, v)), torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert all(map(torch.equal, first, run(q, k, v)))
    finally:
        torch.set_num_threads(threads)
    spread = [x.mT.contiguous().mT for x in (q, k, v)]
    assert all(map(torch.equal, first, run(*spread)))
    with ThreadPoolExecutor(3) as pool:
        for others in pool.map(lambda _: list(run(q, k, v)), range(6)):
            assert all(map(torch.equal, first, others))
    count = len(ran)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(fused.SWITCH, "0")
        for x, y in zip(first, run(q, k, v), strict=True):
            assert not torch.equal(x, y)
            assert_near(x, y, "tiles", 4 * TOLERANCE[dtype])
    assert len(ran) == count


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda x: x.name)
def test_never_reads_the_future(ran, pattern, dtype):
    q, k, v = qkv(Shape(h=2, g=1, j=600, d=16), "future", dtype=dtype)
    mask = Mask(causal=True)
    before = attend(q, k, v, pattern, mask, backend="torch")
    for x in (q, k, v):
        x[:, :, 311:] = torch.randn(x[:, :, 311:].shape, generator=generator("other")) * 9
    after = attend(q, k, v, pattern, mask, backend="torch")
    assert torch.equal(before[:, :, :311], after[:, :, :311])
    assert not torch.equal(before[:, :, 311:], after[:, :, 311:])
    assert ran == [0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_lost(ran, bad):
    q, k, v = qkv(Shape(h=1, g=1, j=200, d=16), "bad", dtype=torch.float32)
    k[0, 0, 90, 3] = bad
    o = attend(q, k, v, Window(window=10), Mask(causal=True), backend="torch")
    hit = ~o.isfinite().all(-1)[0, 0]
    assert hit[90:100].any()  # an infinite score of the right sign
    assert bad == float("inf") or hit[90:100].all()
    assert not hit[:66].any()
    assert not hit[124:].any()
    assert ran == [0]


@pytest.mark.parametrize("scale", [0.0, -0.7, 300.0])
def test_large_scores_and_odd_scales(ran, scale):
    q, k, v = qkv(Shape(h=2, g=2, j=120, d=16), scale, dtype=torch.float32)
    q = q.clamp(-2, 2).bfloat16().float()
    k = k.clamp(-2, 2).bfloat16().float()
    o = attend(q, k, v, Window(window=20), Mask(causal=True), Score(scale=scale), backend="torch")
    exact = attend(q.double(), k.double(), v.double(), Window(window=20), Mask(causal=True), Score(scale=scale))
    assert_near(o.double(), exact, "o", 2e-4 if scale > 1 else 5e-6)


def test_it_stands_aside(ran):
    """Where the C has no form, tiles run: double precision, softcaps, dropout, a gap, a very wide band, a trace."""
    window, mask = Window(window=8, sinks=1), Mask(causal=True)
    inputs = qkv(Shape(j=40), "aside", dtype=torch.float32)
    for score in (Score(softcap=3.0), Score(dropout=0.1, seed=3)):
        attend(*inputs, window, mask, score, backend="torch")
    attend(*inputs, window, Mask(causal=True, start=9, kept=4), backend="torch")
    attend(*inputs, Window(window=fused.WIDEST + 1), mask, backend="torch")
    attend(*inputs, Random(blocks=fused.LISTED[0] + 1, block=8), mask, backend="torch")
    attend(*inputs, Random(blocks=2, block=1 + fused.LISTED[1] // 2), mask, backend="torch")
    few = [x[:, :, -4:] if n == 0 else x for n, x in enumerate(inputs)]  # for which packing every key costs more
    attend(*few, Random(blocks=2, block=8), mask, backend="torch")
    attend(*(x.double() for x in inputs), window, mask, backend="torch")
    assert ran == []
    exported = torch.export.export(_Attends(), inputs)
    assert ran == []
    assert_near(exported.module()(*inputs), _Attends()(*inputs), "exported", 1e-5)
    assert ran == [0]


class _Attends(torch.nn.Module):
    def forward(self, q, k, v):
        return attend(q, k, v, Window(window=8, sinks=1), Mask(causal=True), backend="torch")


@pytest.mark.parametrize(("compiler", "words"), [(None, "there is no C compiler"), ("exit 1", "exit status 1")])
def test_without_a_compiler_that_works_it_says_so_once(monkeypatch, caplog, tmp_path, compiler, words):
    with broken_compiler(monkeypatch, tmp_path, compiler, fused._library, capability="AVX2") as said:
        q, k, v = qkv(Shape(j=40), "none", dtype=torch.float32)
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                compare(Window(window=8), Mask(causal=True), Score(), q, k, v)
        assert words in said(caplog, "attention in a window")


@pytest.mark.parametrize("wrong", ["before", "after", "offset", "scale", "first"])
def test_faults_are_found(ran, monkeypatch, wrong):
    """The comparison sees a call that says something else."""
    made = fused._Call

    def faulty(**given):
        given[wrong] = given[wrong] * 1.1 if wrong == "scale" else given[wrong] - (1 if given[wrong] else -1)
        return made(**given)

    monkeypatch.setattr(fused, "_Call", faulty)
    q, k, v = qkv(Shape(h=2, g=1, i=100, j=150), "faults", dtype=torch.float32)
    with pytest.raises(AssertionError, match="off by"):
        compare(Window(window=9, sinks=2), Mask(causal=True), Score(), q, k, v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("wrong", ["before", "after", "offset", "first", "list", "most", "banded", "causal"])
def test_faults_in_lists_are_found(ran, monkeypatch, wrong, causal):
    made = fused._Call

    def faulty(**given):
        return made(**given | {wrong: given[wrong] - 1 if given[wrong] else 1})

    monkeypatch.setattr(fused, "_Call", faulty)
    name = "odd" if causal else "bigbird"  # in which the first queries read everything
    layout, seen = listed(name, causal, False)
    q, k, v = qkv(LISTS[name][0], "faults", dtype=torch.float32)
    with pytest.raises(AssertionError, match="off by"):
        compare_lists(layout, seen, Score(), q, k, v)
