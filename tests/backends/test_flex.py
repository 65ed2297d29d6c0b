"""FlexAttention as a backend: its rules and tiles are the mechanisms' own, kernels are compiled twice at most."""

import sys
from collections import OrderedDict
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from hf_tfast.attention import BACKENDS, Mask, Score, attend, choose_backend, mechanisms
from hf_tfast.attention.topk import TopK
from hf_tfast.attention.window import Window
from hf_tfast.backends import flash, flex, flex_patterns, triton_kernels
from hf_tfast.testing import Shape, assert_near, generator, qkv, with_gradients

SERVED = sorted(name for name, cls in mechanisms().items() if "flex" in cls.backends)
BIG = {  # tiles read whole, in part and not at all at a few hundred tokens
    "window": {"window": 300, "sinks": 130},
    "random": {"window": 150, "blocks": 1, "block": 64},
    "graph": {"blocks": tuple((a, 0) for a in range(8)), "block": 128},
    "topk": {"k": 256, "block": 128, "window": 1},
    "threshold": {"tau": 1e-4, "block": 64, "window": 200},
    "hashed": {"bits": 1, "rounds": 2, "cap": 200, "window": 150},
}


def through(mechanism, mask, backend):
    return lambda q, k, v, score: attend(q, k, v, mechanism, mask, score, backend=backend)


def same(mechanism, mask, shape, score, *seed):
    q, k, v = qkv(shape, *seed)
    with flex.unfused():
        found = with_gradients(through(mechanism, mask, "flex"), q, k, v, score)
    for name, x in with_gradients(through(mechanism, mask, "reference"), q, k, v, score).items():
        assert_near(found[name], x, name)


def test_who_is_served():
    assert set(SERVED) == set(BIG)
    assert all(set(cls.backends) <= set(BACKENDS) for cls in mechanisms().values())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", SERVED)
def test_equals_the_reference(name, causal):
    sinks = torch.randn(4, dtype=torch.float64, generator=generator(name))
    mechanism = replace(
        mechanisms()[name](**mechanisms()[name].small), **({"block": 4} if name == "threshold" else {})
    )
    same(mechanism, Mask(causal=causal), Shape(i=60, j=150), Score(softcap=3.0, sinks=sinks), name)
    valid = torch.ones(2, 140, dtype=torch.bool)
    valid[0, :9], valid[1, 133:] = False, False
    same(mechanism, Mask(causal=causal, valid=valid), Shape(j=140), Score(scale=0.3), name)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", SERVED)
def test_wide_budgets(name, causal):
    mechanism = mechanisms()[name](**BIG[name])
    same(mechanism, Mask(causal=causal), Shape(b=1, i=300, j=520), Score(), name)


@pytest.mark.parametrize("name", sorted(set(SERVED) - {"graph"}))
def test_after_a_gap(name):
    mechanism = replace(
        mechanisms()[name](**mechanisms()[name].small), **({"block": 4} if name == "threshold" else {})
    )
    same(mechanism, Mask(causal=True, start=70, kept=20), Shape(b=1, i=40, j=150), Score(), name)


@pytest.mark.parametrize("name", sorted(set(SERVED) - {"hashed"}))
def test_dropout_draws_as_the_reference(name):
    mechanism = replace(
        mechanisms()[name](**mechanisms()[name].small), **({"block": 4} if name == "threshold" else {})
    )
    if name == "threshold":
        mechanism = replace(mechanism, renormalise=True)
    same(mechanism, Mask(causal=True), Shape(i=30, j=70), Score(dropout=0.3, seed=5, first_head=4), name)


def test_tiles_are_exact():
    """Over a band with sinks: full tiles are exactly those read whole, partial ones exactly those read in part."""
    at = torch.arange(1000)
    for window, sinks, causal in ((300, 0, True), (300, 200, True), (200, 3, False)):
        mechanism = Window(window=window, sinks=sinks)
        tiles = flex_patterns.banded(mechanism.layout(causal), at, 1000, 0, 0).tiles
        pairs = mechanism.allowed(None, at, at, at[:, None], at, causal=causal)
        pairs = torch.nn.functional.pad(pairs & (at <= at[:, None]) if causal else pairs, (0, 24, 0, 24))
        whole = torch.nn.functional.pad(pairs[:1000], (0, 0, 0, 24), value=True)
        cut = lambda x: x.unflatten(0, (8, 128)).unflatten(2, (8, 128)).transpose(1, 2)  # noqa: E731
        some, full = cut(pairs).any(-1).any(-1), cut(whole).all(-1).all(-1)
        assert torch.equal(tiles.full.met(8)[0, 0], full)
        assert torch.equal(tiles.partial.met(8)[0, 0], some & ~full)
        assert torch.equal(tiles.full_back.met(8)[0, 0], full.T)
        assert torch.equal(tiles.partial_back.met(8)[0, 0], (some & ~full).T)


def test_a_band_takes_linear_space():
    layout = Window(window=64).layout(True)
    tiles = [flex_patterns.banded(layout, torch.arange(n), n, 0, 0).tiles for n in (4096, 16384)]
    assert tiles[1].partial.places.numel() == 4 * tiles[0].partial.places.numel()


def test_patterns_are_remembered_and_forgotten(monkeypatch):
    store = flex_patterns._Remembered()
    monkeypatch.setattr(flex_patterns, "REMEMBERED", store)
    made = []
    monkeypatch.setattr(flex_patterns, "banded", lambda *a, own=flex_patterns.banded: made.append(a) or own(*a))
    with flex.unfused(), torch.inference_mode():
        for n in (*range(1, 70), 69):
            attend(*qkv(Shape(b=1, h=1, g=1, j=n, d=4), n), Window(window=4), backend="flex")
    assert len(made) == 69
    assert len(store.held) == flex_patterns.KEPT


def test_refused():
    q, k, v = qkv(Shape(j=20, d=16), "refused", dtype=torch.float32)
    for mechanism, score, message in (
        (Window(), Score(), "window cannot run on backend 'flex': .*CUDA only"),
        (TopK(block=1), Score(), "topk cannot run on backend 'flex': single keys"),
        (mechanisms()["hashed"](), Score(dropout=0.1), "hashed cannot run on backend 'flex': dropout"),
        (mechanisms()["performer"](), Score(), "performer has no flex path"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(q, k, v, mechanism, score=score, backend="flex")


def on_cuda(*shape, dtype=torch.bfloat16):
    """What the choice of a backend looks at, without a device."""
    x = torch.empty(shape, dtype=dtype, device="meta")

    class There:
        device = torch.device("cuda")

        def __getattr__(self, name):
            return getattr(x, name)

    return There()


@pytest.mark.parametrize(
    ("mechanism", "queries", "dtype", "expected"),
    [
        (Window(), 512, torch.bfloat16, "flex"),
        (Window(), 1, torch.bfloat16, "torch"),
        (Window(), 512, torch.float64, "torch"),
        (TopK(), 512, torch.bfloat16, "flex or torch"),
        (TopK(block=1), 512, torch.bfloat16, "torch"),
        (mechanisms()["nystrom"](), 512, torch.bfloat16, "torch"),
        (mechanisms()["performer"](), 512, torch.bfloat16, "triton or torch"),
        (mechanisms()["quantized"](), 512, torch.bfloat16, "triton or torch"),
        (mechanisms()["quantized"](scheme="sine"), 512, torch.bfloat16, "torch"),
    ],
)
def test_auto_on_cuda(mechanism, queries, dtype, expected, monkeypatch):
    """What runs, or what is raced."""
    for module in (flex, triton_kernels):
        monkeypatch.setattr(module, "find_spec", lambda name: object())
    monkeypatch.setattr(flash, "race", lambda about, runners: " or ".join(runners))
    q, k = on_cuda(1, 4, queries, 64, dtype=dtype), on_cuda(1, 4, 512, 64, dtype=dtype)
    assert choose_backend(mechanism, "auto", q, k, k) == expected
    assert choose_backend(mechanism, "auto") == "torch"
    q.requires_grad_()
    if mechanism.name in ("performer", "quantized"):
        trained = expected if mechanism.name == "performer" else "torch"
        assert choose_backend(mechanism, "auto", q, k, k) == trained, "the kernel of codes has no backward pass"


def test_a_race_is_run_once(monkeypatch):
    took = {"slow": 2.0, "fast": 1.0}
    timed = []
    monkeypatch.setattr(flash, "timed", lambda run: timed.append(run()) or took[run()])
    monkeypatch.setattr(flash, "_WON", OrderedDict())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for _ in range(3):
        assert flash.race("a", {name: lambda name=name: name for name in took}) == "fast"
    assert timed == ["slow", "fast"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert flash.race("b", {name: lambda name=name: name for name in took}) == "slow", "nothing is timed in a graph"
    assert flash.race("a", {name: lambda name=name: name for name in took}) == "fast"
    assert len(timed) == 2


def test_flash_is_given_the_window(monkeypatch):
    """A stand-in that keeps the documented meaning of flash-attn's arguments must give the window's own numbers."""
    stand_in = ModuleType("flash_attn")

    def flash_attn_func(q, k, v, softmax_scale, causal, window_size, softcap):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        i, j = q.shape[2], k.shape[2]
        apart = torch.arange(j - i, j)[:, None] - torch.arange(j)
        read = (apart <= window_size[0]) & (-apart <= (0 if causal else window_size[1]))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        s = q @ k.mT * softmax_scale
        s = softcap * torch.tanh(s / softcap) if softcap else s
        return (s.masked_fill(~read, -torch.inf).softmax(-1) @ v).transpose(1, 2)

    stand_in.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    monkeypatch.setattr(flash, "why_not", lambda q, v: None)
    window = Window(window=7)
    for causal, i in ((True, 20), (False, 40)):
        q, k, v = qkv(Shape(i=i, j=40), "flash")
        score, mask = Score(softcap=4.0), Mask(causal=causal)
        expected = with_gradients(through(window, mask, "reference"), q, k, v, score)
        for name, x in with_gradients(through(window, mask, "flash"), q, k, v, score).items():
            assert_near(x, expected[name], name)
    for mechanism, score in (
        (Window(sinks=1), Score()),
        (window, Score(sinks=torch.zeros(4))),
        (window, Score(dropout=0.1)),
    ):
        with pytest.raises(ValueError, match="flash-attn"):
            attend(q, k, v, mechanism, score=score, backend="flash")


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_compiled_twice_at_most(train, monkeypatch):
    """Torch's own flex_attention, traced: equal numbers, and two compilations for seven lengths and two windows."""
    import torch.nn.attention.flex_attention as torchs

    counters, own = {}, flex.compiled.__wrapped__

    def compiled(plan):
        if plan not in counters:
            counter = CompileCounterWithBackend("aot_eager" if train else "eager")
            counters[plan] = counter, own(plan, counter)
        return counters[plan][1]

    monkeypatch.setattr(flex, "compiled", compiled)
    monkeypatch.setattr(torchs, "_validate_device", lambda *tensors: None)  # CPUs have no fused backward pass
    monkeypatch.setattr(flex, "why_not", lambda q, v: None)
    score = Score(softcap=5.0, sinks=torch.randn(4))
    for j, window in ((300, 8), (700, 8), (200, 20), (513, 8), (900, 300), (256, 8), (90, 8)):
        q, k, v = qkv(Shape(b=1, j=j, d=16), j, dtype=torch.float32)
        call = through(Window(window=window, sinks=2), Mask(causal=True), "flex")

        def run(call=call, qkv=(q, k, v)):
            if train:
                return with_gradients(call, *qkv, score)
            with torch.no_grad():
                return {"o": call(*qkv, score)}

        found = run()
        with flex.unfused():
            expected = run()
        for name, x in expected.items():
            assert_near(found[name], x, name)
    counts = [counter.frame_count for counter, _ in counters.values()]
    assert len(counts) == 1
    assert 1 <= counts[0] <= 2  # torch may remember from another test which lengths vary


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # those of compilers
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", SERVED)
def test_on_a_device(name, causal):
    mechanism = mechanisms()[name](**BIG[name])
    q, k, v = qkv(Shape(b=2, i=500, j=777, d=64), name, dtype=torch.float32, device="cuda")
    score = Score(softcap=5.0, sinks=torch.randn(4, device="cuda"))
    expected = with_gradients(through(mechanism, Mask(causal=causal), "reference"), q, k, v, score)
    found = with_gradients(through(mechanism, Mask(causal=causal), "flex"), q, k, v, score)
    for field, x in found.items():
        assert_near(x, expected[field], field, 2e-3)
