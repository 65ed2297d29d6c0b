"""A step of decoding in C and in torch gives what the definition says, and neither touches what it does not read."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hf_tfast.attention import Mask, Score, attend
from hf_tfast.attention.window import Window
from hf_tfast.backends import native, one_query
from hf_tfast.backends.buckets import buckets, directions
from hf_tfast.backends.fused import SWITCH
from hf_tfast.backends.key_blocks import best
from hf_tfast.backends.one_query import (
    Reads,
    attend_one,
    best_blocks,
    box_scores,
    bucket_keys,
    few_buckets,
    near_scores,
)
from hf_tfast.backends.score import softmax_attention
from hf_tfast.testing import assert_near, generator

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
SHAPES = [(1, 1, 1, 16, 16), (2, 6, 2, 17, 33), (3, 4, 4, 64, 80), (1, 8, 1, 40, 128), (2, 2, 1, 5, 3)]  # b h g d e
ROOM = 48


@pytest.fixture(params=["c", "torch"])
def way(request, monkeypatch):
    """Both ways; how often the C ran is its business."""
    if request.param == "torch":
        monkeypatch.setenv(SWITCH, "0")
    elif one_query._library() is None:
        pytest.skip("this machine has no C compiler, or no wide vectors")
    calls = []
    run = one_query._run
    monkeypatch.setattr(one_query, "_run", lambda *given: (calls.append(1), run(*given))[1])
    yield request.param
    assert bool(calls) == (request.param == "c")


def inputs(shape, dtype, *seed, strided=False):
    """q [b h 1 d], k [b g ROOM d], v [b g ROOM e]; strided: as views of more."""
    b, h, g, d, e = shape
    random = generator("one query", shape, str(dtype), *seed)
    more = 3 if strided else 0
    sizes = ((b, h, 1, d), (b, g, ROOM, d + more), (b, g, ROOM, e + more))
    q, k, v = (torch.randn(size, generator=random).to(dtype) for size in sizes)
    return q, k[..., :d], v[..., :e], random


def pairs_of(reads, b, h):
    """[b h 1 ROOM] bool, one slot at a time."""
    pairs = torch.zeros(b, h, 1, ROOM, dtype=torch.bool)
    low, high = (torch.as_tensor(x).expand(b) for x in (reads.low, reads.high))
    for row in range(b):
        pairs[row, :, :, int(low[row]) : int(high[row])] = True
        pairs[row, :, :, : reads.first] = True
        for head in range(h if reads.starts is not None else 0):
            for at in reads.starts[row, head].tolist():
                if at >= 0:
                    pairs[row, head, :, at : at + reads.span] = True
    return pairs


def starts(b, h, count, span, below, random):
    """[b h count] distinct multiples of span, some of them -1."""
    whole = torch.rand(b, h, below // span, generator=random).argsort(-1)[..., :count] * span
    return whole.masked_fill(torch.rand(whole.shape, generator=random) < 0.2, -1)


def readings(b, h, random):
    """Everything that `Reads` can say."""
    some = torch.randint(20, ROOM + 1, (b,), generator=random)
    empty = torch.where(torch.arange(b) == 0, 0, some)
    nothing = torch.full((b, h, 2), -1)
    return {
        "all": Reads(0, ROOM),
        "run and first": Reads(21, 43, 3),
        "one": Reads(7, 8),
        "runs": Reads(32, 41, 0, starts(b, h, 5, 4, 32, random), 4),
        "slots": Reads(30, ROOM, 0, starts(b, h, 17, 1, 30, random)),
        "slots alone": Reads(ROOM, ROOM, 0, starts(b, h, 9, 1, ROOM, random)),
        "rows": Reads(some - 8, some, 0, starts(b, h, 2, 6, 12, random), 6),
        "an empty row": Reads((empty - 3).clamp(min=0), empty),
        "nothing": Reads(5, 5, 0, nothing),
    }


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_is_the_definition(way, shape, dtype):
    q, k, v, random = inputs(shape, dtype, strided=shape[0] == 3)
    b, h = q.shape[:2]
    for n, (name, reads) in enumerate(readings(b, h, random).items()):
        score = Score(
            scale=(None, 0.4, -0.3)[n % 3],
            softcap=(None, 2.5)[n % 2],
            sinks=(None, torch.randn(h, generator=random))[n // 2 % 2],
        )
        beside = torch.randn(b, h, generator=random) if n % 4 == 1 else None
        pairs, wide = pairs_of(reads, b, h), [x.double() for x in (q, k, v)]
        if beside is None:
            wanted = softmax_attention(*wide, pairs, score)
        else:  # one key more, of value zero, whose score is that logit
            more = [torch.cat([x, x.new_zeros(*x.shape[:2], 1, x.shape[3])], 2) for x in wide[1:]]
            bias = torch.cat([torch.zeros(b, h, 1, ROOM), beside[..., None, None]], -1)
            pairs = torch.nn.functional.pad(pairs, (0, 1), value=True)
            wanted = softmax_attention(wide[0], *more, pairs, score, bias=bias)
        k_spoiled, v_spoiled = k.clone(), v.clone()
        groups = pairs[..., :ROOM].view(b, k.shape[1], -1, ROOM).any(2)
        k_spoiled[~groups] = v_spoiled[~groups] = float("nan")
        got = attend_one(q, k_spoiled, v_spoiled, reads, score, beside)
        assert got.dtype == dtype
        assert_near(got.double(), wanted, f"{name}, {score}", TOLERANCE[dtype] * (1 + 3 * (dtype == torch.bfloat16)))
        if n == 8:
            assert not got.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_torchs_own(dtype):
    q, k, v, random = inputs(SHAPES[1], dtype)
    for reads in readings(2, 6, random).values():
        wanted = softmax_attention(*(x.double() for x in (q, k, v)), pairs_of(reads, 2, 6), Score())
        got = attend_one(q, k, v, reads, Score())
        assert_near(got.double(), wanted, str(reads), 2e-3 if dtype == torch.float16 else 1e-12)


def test_a_gradient_and_a_trace_have_torchs_path(monkeypatch):
    monkeypatch.setattr(one_query, "_library", lambda: pytest.fail("the C has no gradient"))
    q, k, v, _ = inputs(SHAPES[1], torch.float32)
    for x in (q, k, v):
        x.requires_grad_()
    found = []
    for path in ("torch", "reference"):
        o = attend(q, k, v, Window(window=9, sinks=2), Mask(causal=True), backend=path)
        found.append(torch.autograd.grad(o.square().sum(), (q, k, v)))
    for one, two in zip(*found, strict=True):
        assert_near(one, two, "gradient", 1e-5)
        assert one.abs().sum() > 0


def test_what_is_no_number_stays_so(way):
    q, k, v, _ = inputs(SHAPES[2], torch.float32)
    reads = Reads(4, 40)
    for x, at in ((k, 9), (v, 30)):
        spoiled = x.clone()
        spoiled[1, 2, at] = float("nan")
        o = attend_one(q, *((spoiled, v) if x is k else (k, spoiled)), reads, Score())
        assert o[1, 2].isnan().all()
        assert o[0].isfinite().all()
        assert o[1, :2].isfinite().all()
    huge = attend_one(q * 1e18, k, v, reads, Score())
    assert huge.isfinite().all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_blocks_are_the_best(way, dtype):
    for n, (b, h, g, d) in enumerate(((1, 2, 1, 16), (3, 6, 2, 17), (2, 4, 4, 64))):
        random = generator("boxes", n, str(dtype))
        q = torch.randn(b, h, 1, d, generator=random).to(dtype)
        boxes = torch.randn(b, g, 90, 2 * d, generator=random)
        boxes[..., d:].abs_()
        if n == 1:
            boxes = boxes[:, :, torch.randint(5, (90,), generator=random)]  # many are equal
        counts = torch.randint(0, 80, (b,), generator=random)
        for count in (80, 1, counts, 7):
            for most in (1, 6, 79, 200):
                for sign in (1.0, -1.0):
                    found = best_blocks(q, boxes, count, most, sign)
                    assert found.dtype == torch.int64
                    rows = q.float().view(b, g, h // g, d) * sign
                    s = box_scores(rows, boxes).flatten(1, 2)
                    there = torch.arange(90) < torch.as_tensor(count).view(-1, 1, 1)
                    wanted = best(s.masked_fill(~there, float("-inf")), most)
                    read = torch.zeros(b, h, 91, dtype=torch.bool).scatter_(-1, found.where(found >= 0, 90), True)
                    assert torch.equal(read[..., :90], wanted), (n, count, most, sign)
                    assert (found >= 0).sum() == wanted.sum(), "a block is there twice"


def test_a_block_that_is_no_number_is_read(way):
    """So that what is wrong with it is seen, as it is in dense attention."""
    q, boxes = torch.ones(1, 1, 1, 8), torch.rand(1, 1, 20, 16)
    boxes[:, :, 13] = float("nan")
    assert 13 in best_blocks(q, boxes, 20, 4).flatten().tolist()


@pytest.mark.parametrize("bits", [0, 3, 8, 16])
def test_keys_of_buckets_are_the_rule(way, bits):
    b, h, g, r, n = 3, 4, 2, 3, 300
    random = generator("bucket keys", bits)
    kinds = torch.randint(2**bits, (7,), generator=random)
    numbers = kinds[torch.randint(7, (b, g * r, n + 20), generator=random)]
    asked = kinds[torch.randint(7, (r, b, h), generator=random)].int()
    held = numbers.to(torch.uint8 if bits <= 8 else torch.int16)
    highs = torch.tensor([n, 0, 130])
    for low, high in ((n, n), (n - 30, n), (0, n), ((highs - 25).clamp(min=0), highs), (129, 130), (highs, highs)):
        for most in (1, 6, 70, 500):
            found = bucket_keys(held, asked, low, high, most)
            assert found.shape[:2] == (b, h)
            lows, ends = (torch.as_tensor(x).expand(b).tolist() for x in (low, high))
            for row in range(b):
                for head in range(h):
                    wanted = set()
                    for each in range(r):
                        of = numbers[row, head // (h // g) * r + each, : ends[row]]
                        same = (of == asked[each, row, head]).nonzero()[:, 0].tolist()
                        wanted |= {at for at in same[-most:] if at < lows[row]}
                    got = [at for at in found[row, head].tolist() if at >= 0]
                    assert sorted(got) == sorted(wanted)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_buckets_of_few_are_those_of_many(way, dtype):
    """Up to projections that rounding cannot tell apart."""
    for bits in (1, 2, 4, 7, 8, 11, 16):
        random = generator("few buckets", bits)
        x = torch.randn(2, 3, 5, 19, generator=random).to(dtype)
        turns = torch.randn(3, 19, 3 * directions(bits), generator=random)
        few, many = buckets(x, turns, bits, 3), buckets(x.repeat(1, 1, 40, 1), turns, bits, 3)
        assert (few == many[..., :5]).double().mean() > 0.97
        assert int(few.max()) >= 2**bits // 2
        assert few.unique().numel() > min(2**bits, 20) // 2
    if way == "torch":
        assert few_buckets(x, turns, bits, 3) is None


def test_scores_of_neighbours():
    q, k, _, random = inputs(SHAPES[1], torch.float32)
    score, high = Score(softcap=3.0, sinks=torch.randn(6, generator=random)), torch.tensor([40, 12])
    whole = score.cap(torch.einsum("bhd,bhnd->bhn", q[:, :, 0], k.repeat_interleave(3, 1)) * 17**-0.5)
    got = near_scores(q, k, Reads(high - 10, high), score)
    for row, at in enumerate(high.tolist()):
        assert_near(got[row, :, :10], whole[row, :, at - 10 : at], "scores", 1e-5)
        assert_near(got[row, :, 10], score.sinks, "sinks", 0.0)


def test_threads_do_not_change_numbers(way):
    shape = (2, 8, 4, 64, 64)
    q, k, v, random = inputs(shape, torch.float32)
    k, v = (x.repeat(1, 1, 40, 1) for x in (k, v))
    reads = Reads(1200, 1920, 5, starts(2, 8, 30, 4, 1000, random) + 8, 4)
    boxes = torch.rand(2, 4, 400, 128, generator=random)
    run = lambda: (attend_one(q, k, v, reads, Score()), best_blocks(q, boxes, 400, 30))  # noqa: E731
    threads, alone = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            alone.append(run())
    finally:
        torch.set_num_threads(threads)
    with ThreadPoolExecutor(4) as pool:
        alone += list(pool.map(lambda _: run(), range(8)))
    if way == "c":
        assert all(torch.equal(x, y) for other in alone[1:] for x, y in zip(alone[0], other, strict=True))
    else:
        assert all(torch.allclose(x[0], alone[0][0], atol=1e-5) for x in alone)


def test_without_a_compiler_it_is_said_once(monkeypatch, caplog):
    def none(name):
        raise native.CannotCompile("there is no C compiler (cc, gcc, clang)")

    monkeypatch.setattr(native, "load", none)
    one_query._library.cache_clear()
    try:
        q, k, v, random = inputs(SHAPES[1], torch.float32)
        with caplog.at_level(logging.WARNING):
            for reads in readings(2, 6, random).values():
                wanted = softmax_attention(q, k, v, pairs_of(reads, 2, 6), Score())
                assert_near(attend_one(q, k, v, reads, Score()), wanted, "torch", 1e-5)
        assert [r.message for r in caplog.records if "steps of decoding" in r.message] == [
            "steps of decoding run on torch's own operations, which is slower: there is no C compiler (cc, gcc, clang)"
        ]
    finally:
        one_query._library.cache_clear()
