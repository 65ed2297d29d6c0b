"""Few keys and few queries in C against torch's own operations in double precision, and where the C stands aside."""

import logging

import pytest
import torch

from hf_tfast.backends import few, few_native, native
from hf_tfast.testing import assert_near, generator
from tests.backends.broken_compiler import broken_compiler

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 8e-3}
SHAPES = {  # b, h, g, many, few, d, e
    "one": (1, 1, 1, 1, 1, 1, 1),
    "odd": (2, 4, 2, 130, 7, 17, 33),
    "many chunks": (1, 2, 1, 1300, 20, 16, 32),
    "wide": (1, 2, 2, 200, 70, 64, 80),
}


@pytest.fixture
def ran(monkeypatch):
    """What the C was asked for; skips where there is none."""
    if few_native._library() is None:
        pytest.skip("this machine has no C compiler, or no wide vectors")
    calls = []
    run = few_native._run
    monkeypatch.setattr(few_native, "_run", lambda *given: (calls.append(given[0]), run(*given))[1])
    return calls


def tensors(name, dtype, transposed=True):
    """Many [b h i d], [b g i d], [b g i e]; few [b h n d], [b g n d], [b g n e]."""
    b, h, g, many, count, d, e = SHAPES[name]
    random = generator(name)

    def draw(heads, rows, width):
        x = torch.randn(b, rows, heads, width, generator=random).transpose(1, 2) * 2
        x = x if transposed else x.contiguous()
        return x.to(dtype).requires_grad_()

    sizes = ((h, many, d), (g, many, d), (g, many, e), (h, count, d), (g, count, d), (g, count, e))
    return [draw(*size) for size in sizes]


def both(q, k, v, few_q, few_k, few_v, bias, sinks):
    one = few.few_keys(q, few_k, few_v, 0.3, bias=bias)
    other = few.few_queries(few_q, k, v, 0.3, sinks=sinks)
    up = [torch.randn(x.shape, generator=generator("up"), dtype=torch.float64).to(x.dtype) for x in (one, other)]
    leaves = [q, k, v, few_q, few_k, few_v, sinks]
    return one.detach(), other.detach(), *torch.autograd.grad((one, other), leaves, up)


def logits(h, n, dtype):
    bias, sinks = torch.randn(h, n, generator=generator("bias")), torch.randn(h, generator=generator("sinks"))
    return bias.to(dtype), sinks.to(dtype).requires_grad_()


def compare(name, dtype):
    given, (_, h, _, _, n, _, _) = tensors(name, dtype), SHAPES[name]
    fast = both(*given, *logits(h, n, torch.float32))
    exact = both(*(x.detach().double().requires_grad_() for x in given), *logits(h, n, torch.float64))
    for number, (x, y) in enumerate(zip(fast, exact, strict=True)):
        tolerance = TOLERANCE[x.dtype] * (y.norm() / y.numel() ** 0.5 + 1).item()
        assert_near(x.double(), y, f"tensor {number}", tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_c_is_the_definition(ran, name, dtype):
    compare(name, dtype)
    assert sorted(ran) == ["keys", "keys_backward", "queries", "queries_backward"]


def with_means(q, few_k, few_v):
    q, means = few.with_means(q, 9)
    o = few.few_keys(q, few_k, few_v, 0.3)
    up = [torch.randn(x.shape, generator=generator("means"), dtype=torch.float64).to(x.dtype) for x in (o, means)]
    return o, means, up


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["odd", "many chunks"])
def test_means_and_their_gradient(ran, name, dtype):
    """The gradient of what is read twice is the sum of both, also where only the means are read."""
    q, few_k, few_v = (tensors(name, dtype)[n] for n in (0, 4, 5))
    wide = [x.detach().double().requires_grad_() for x in (q, few_k, few_v)]
    (o, means, up), (plain, exact, wide_up) = with_means(q, few_k, few_v), with_means(*wide)
    assert_near(means.detach().double(), exact.detach(), "means", 1e-6)
    for both in (True, False):
        pick = slice(0 if both else 1, 2)
        (got,) = torch.autograd.grad((o, means)[pick], q, up[pick], retain_graph=True)
        (want,) = torch.autograd.grad((plain, exact)[pick], wide[0], wide_up[pick], retain_graph=True)
        assert_near(got.double(), want, f"gradient of both {both}", TOLERANCE[dtype] * (1 + want.abs().max().item()))
    assert ran == ["means", "keys", "keys_backward", "means_backward", "means_backward"]


def test_what_makes_no_difference(ran):
    """Threads and strides."""
    name, dtype = "many chunks", torch.float32
    first, threads = both(*tensors(name, dtype), *logits(2, 20, dtype)), torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert all(map(torch.equal, first, both(*tensors(name, dtype), *logits(2, 20, dtype))))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, first, both(*tensors(name, dtype, transposed=False), *logits(2, 20, dtype))))
    spread = [x.detach().mT.contiguous().mT.requires_grad_() for x in tensors(name, dtype)]
    assert all(map(torch.equal, first, both(*spread, *logits(2, 20, dtype))))
    assert len(ran) == 16


def test_it_stands_aside(ran, monkeypatch):
    q, k, v, few_q, few_k, few_v = tensors("odd", torch.float32)
    bias = torch.zeros(4, 7, requires_grad=True)
    few.few_keys(q, few_k, few_v, 1.0, softcap=3.0)
    few.few_queries(few_q, k, v, 1.0, softcap=3.0)
    torch.autograd.grad(few.few_keys(q, few_k, few_v, 1.0, bias=bias).sum(), bias)
    few.few_keys(q.double(), few_k.double(), few_v.double(), 1.0)
    few.few_keys(q.half(), few_k.half(), few_v.half(), 1.0)
    few.few_keys(q[:, :, :0], few_k, few_v, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(few_native, "WIDEST", 6)
        few.few_queries(few_q, k, v, 1.0)
    with monkeypatch.context() as patch:
        patch.setenv(native.SWITCH, "0")
        few.few_queries(few_q, k, v, 1.0)
    assert ran == []


def test_what_is_not_finite_is_not_lost(ran):
    q, k, v, few_q, few_k, few_v = (x.detach() for x in tensors("odd", torch.float32))
    q[0, 1, 50] = float("nan")
    k[1, 0, 90] = float("nan")
    o = few.few_keys(q, few_k, few_v, 1.0)
    hit = ~o.isfinite().all(-1)
    assert hit[0, 1, 50]
    assert hit.sum() == 1
    landmarks = few.few_queries(few_q, k, v, 1.0)
    assert landmarks[1, :2].isnan().all()
    assert landmarks[0].isfinite().all()
    assert landmarks[1, 2:].isfinite().all()
    assert ran == ["keys", "queries"]


@pytest.mark.parametrize("compiler", [None, "exit 1"])
def test_without_a_compiler_torch_runs(monkeypatch, caplog, tmp_path, compiler):
    with broken_compiler(monkeypatch, tmp_path, compiler, few_native._library, capability="AVX2") as said:
        given = tensors("odd", torch.float32)
        with caplog.at_level(logging.WARNING):
            first = both(*given, *logits(4, 7, torch.float32))
        said(caplog, "attention to a few keys")
    for x, y in zip(first, both(*given, *logits(4, 7, torch.float32)), strict=True):
        assert_near(x, y, "torch", 3e-5)


@pytest.mark.parametrize("wrong", ["rows", "n", "d", "e"])
def test_faults_are_found(ran, monkeypatch, wrong):
    """The comparison sees a call that says something else."""
    made = few_native._Call
    monkeypatch.setattr(few_native, "_Call", lambda **given: made(**{**given, wrong: given[wrong] - 1}))
    with pytest.raises(AssertionError, match="off by"):
        compare("odd", torch.float32)
    assert len(ran) == 4
