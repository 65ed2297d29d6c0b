"""Runs of sorted keys in C: the definition on what Hashed asks, and where the C stands aside."""

import logging
from dataclasses import replace

import pytest
import torch

from hf_tfast.attention import Mask, Score, attend
from hf_tfast.attention.hashed import Hashed
from hf_tfast.backends import native, run_native
from hf_tfast.testing import Shape, assert_near, generator, qkv, with_gradients
from tests.attention.contract import MASKS, make_mask, make_score
from tests.backends.broken_compiler import broken_compiler

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2}
CASES = {  # name: shape, mechanism
    "one token": (Shape(h=2, g=1, j=1), Hashed(bits=1, rounds=1, cap=2, window=1)),
    "odd": (Shape(b=2, h=4, g=2, i=130, j=200, d=17, e=33), Hashed(bits=2, rounds=3, cap=9, window=5)),
    "no window": (Shape(h=2, g=2, j=300, d=16), Hashed(bits=4, rounds=2, cap=7, window=0)),
    "one bucket": (Shape(h=2, g=1, j=400, d=32), Hashed(bits=0, rounds=1, cap=90, window=0)),
    "few queries": (Shape(h=2, g=1, i=9, j=500, d=16), Hashed(bits=3, rounds=2, cap=20, window=3)),
    "wide": (Shape(h=1, g=1, j=700, d=64), Hashed(bits=1, rounds=2, cap=230, window=100)),
}


@pytest.fixture
def ran(monkeypatch):
    """How often the C ran; skips where there is none."""
    if run_native._library() is None:
        pytest.skip("this machine has no C compiler, or no wide vectors")
    calls = []
    run = run_native._run
    monkeypatch.setattr(run_native, "_run", lambda *given: (calls.append(given[0]), run(*given))[1])
    return calls


def compare(mechanism, mask, score, q, k, v, *seed):
    """Outputs and gradients of the fast path against the definition in double precision, given the buckets."""
    choice = mechanism.choose(q, k, mask, score)
    fast = with_gradients(lambda *x: mechanism.fast(*x[:3], mask, x[3], choice=choice), q, k, v, score, *seed)
    wide = [x.double() for x in (q, k, v)]
    if score.sinks is not None:
        score = replace(score, sinks=score.sinks.double())
    exact = with_gradients(lambda *x: mechanism.reference(*x[:3], mask, x[3], choice), *wide, score, *seed)
    for name, x in fast.items():
        tolerance = TOLERANCE[q.dtype] * (exact[name].norm() / x.numel() ** 0.5 + 1).item()
        assert_near(x.double(), exact[name].double(), name, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_c_is_the_definition(ran, name, causal, dtype):
    shape, mechanism = CASES[name]
    q, k, v = qkv(shape, name, causal, dtype=dtype, transposed=causal)
    score = Score(scale=0.3, sinks=torch.randn(shape.h, generator=generator(name))) if causal else Score()
    compare(mechanism, Mask(causal=causal), score, q, k, v, name)
    assert ran == [0, 1]


@pytest.mark.parametrize("kind", MASKS)
def test_masks(ran, kind):
    """Padding and packing are rows of their own; a cache that dropped keys has a gap in its positions."""
    q, k, v = qkv(Shape(b=2, h=4, g=2, i=130, j=200), kind, dtype=torch.float32)
    mask, score = make_mask(kind, True, 2, 200), make_score("sinks", 4)
    mechanism = Hashed(bits=2, rounds=2, cap=9, window=5)
    fast = with_gradients(lambda *x: attend(*x[:3], mechanism, mask, x[3], backend="torch"), q, k, v, score, kind)
    assert ran
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(native.SWITCH, "0")
        count = len(ran)
        slow = with_gradients(lambda *x: attend(*x[:3], mechanism, mask, x[3], backend="torch"), q, k, v, score, kind)
        assert len(ran) == count
    for name, x in fast.items():
        assert_near(x, slow[name], name, 2e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_what_makes_no_difference(ran, dtype):
    """Threads and strides."""
    q, k, v = qkv(Shape(h=4, g=2, j=500, d=32), "same", dtype=dtype)
    mechanism, mask = Hashed(bits=2, rounds=2, cap=33, window=9), Mask(causal=True)
    choice = mechanism.choose(q, k, mask)

    def run(*x):
        return with_gradients(lambda *y: mechanism.fast(*y[:3], mask, Score(), choice=choice), *x, Score()).values()

    first, threads = list(run(q, k, v)), torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert all(map(torch.equal, first, run(q, k, v)))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, first, run(*(x.mT.contiguous().mT for x in (q, k, v)))))
    assert all(map(torch.equal, first, run(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)))))
    assert len(ran) == 8


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_never_reads_the_future(ran, dtype):
    q, k, v = qkv(Shape(h=2, g=1, j=600, d=16), "future", dtype=dtype)
    mechanism, mask = Hashed(bits=2, rounds=2, cap=50, window=20), Mask(causal=True)
    before = attend(q, k, v, mechanism, mask, backend="torch")
    for x in (q, k, v):
        x[:, :, 311:] = torch.randn(x[:, :, 311:].shape, generator=generator("other")) * 9
    after = attend(q, k, v, mechanism, mask, backend="torch")
    assert torch.equal(before[:, :, :311], after[:, :, :311])
    assert not torch.equal(before[:, :, 311:], after[:, :, 311:])
    assert ran == [0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_lost(ran, bad):
    q, k, v = qkv(Shape(h=1, g=1, j=200, d=16), "bad", dtype=torch.float32)
    mechanism, mask = Hashed(bits=0, rounds=1, cap=9, window=5), Mask(causal=True)
    choice = mechanism.choose(q, k, mask)
    q[0, 0, 90, 3] = bad
    found = with_gradients(lambda *x: mechanism.fast(*x[:3], mask, x[3], choice=choice), q, k, v, Score(), bad)
    hit = ~found["o"].isfinite().all(-1)[0, 0]
    assert hit[90]
    assert hit.sum() == 1
    assert ran == [0, 1]
    gradients = [x for name, x in found.items() if name != "o"]
    assert len(gradients) == 3
    assert not gradients[0][0, 0, 90].isfinite().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_sinks_that_are_not_finite(ran, bad):
    """Without weight they change nothing; otherwise nothing that they touch is finite."""
    q, k, v = qkv(Shape(h=2, g=1, j=90, d=16), "sinks", dtype=torch.float32)
    mechanism, mask = Hashed(bits=2, rounds=2, cap=9, window=0), Mask(causal=True)
    choice, score = mechanism.choose(q, k, mask), Score(sinks=torch.tensor([0.3, bad]))
    fast = with_gradients(lambda *x: mechanism.fast(*x[:3], mask, x[3], choice=choice), q, k, v, score)
    if bad != float("-inf"):
        assert not fast["o"][:, 1].isfinite().any()
        assert fast["o"][:, 0].isfinite().all()
    else:
        none = with_gradients(lambda *x: mechanism.fast(*x[:3], mask, x[3], choice=choice), q, k, v, Score())
        assert torch.equal(fast["o"][:, 1], none["o"][:, 1])
        assert all(x.isfinite().all() for x in fast.values())
    assert set(ran) == {0, 1}


def test_it_stands_aside(ran, monkeypatch):
    inputs, mechanism, mask = qkv(Shape(j=60), "aside", dtype=torch.float32), Hashed(), Mask(causal=True)
    for score in (Score(softcap=3.0), Score(dropout=0.1, seed=3)):
        attend(*inputs, mechanism, mask, score, backend="torch")
    attend(*(x.double() for x in inputs), mechanism, mask, backend="torch")
    monkeypatch.setattr(run_native, "WIDEST", 50)
    attend(*inputs, mechanism, mask, backend="torch")
    assert ran == []


@pytest.mark.parametrize("compiler", [None, "exit 1"])
def test_without_a_compiler_torch_runs(monkeypatch, caplog, tmp_path, compiler):
    with broken_compiler(monkeypatch, tmp_path, compiler, run_native._library, capability="AVX2") as said:
        q, k, v = qkv(Shape(j=60), "none", dtype=torch.float32)
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                compare(Hashed(bits=2, cap=9, window=3), Mask(causal=True), Score(), q, k, v)
        said(caplog, "attention within buckets")


@pytest.mark.parametrize("wrong", ["scale", "d", "rounds", "keys"])
def test_faults_are_found(ran, monkeypatch, wrong):
    """The comparison sees a call that says something else."""
    made = run_native._Call

    def faulty(**given):
        given[wrong] = given[wrong] * 1.1 if wrong == "scale" else given[wrong] - 1
        return made(**given)

    monkeypatch.setattr(run_native, "_Call", faulty)
    q, k, v = qkv(Shape(h=2, g=2, j=150), "faults", dtype=torch.float32)
    with pytest.raises(AssertionError, match="off by"):
        compare(Hashed(bits=2, rounds=2, cap=9, window=0), Mask(causal=True), Score(), q, k, v)
