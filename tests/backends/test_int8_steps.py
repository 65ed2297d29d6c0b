"""The C around the integer product computes what torch's operations do, and is compiled once or not without a word."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hf_tfast.backends import int8 as backend
from hf_tfast.backends import native as compiled
from hf_tfast.backends.int8 import ACTIVATIONS, _steps, int8_feed_forward, int8_linear
from hf_tfast.backends.int8_steps import Layer
from hf_tfast.backends.native import CannotCompile
from tests.backends.broken_compiler import broken_compiler
from tests.feed_forward.int8_products import definition, product, random


@pytest.fixture
def native(monkeypatch):
    """The steps in C, whatever the machine multiplies fast."""
    try:
        _steps("compiled")
    except CannotCompile as error:
        pytest.skip(str(error))
    monkeypatch.setattr(backend, "way_of", lambda device: "compiled")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 600])
@pytest.mark.parametrize("threshold", [0.0, 2.5, 6.0])
def test_c_is_the_definition(native, rows, bias, threshold):
    _, p = product(24, 40, rows, bias=bias, threshold=threshold)
    x = random("c", rows, threshold, size=(rows, 40))
    x[:, 5] *= 20
    off = int8_linear(x, p).double() - definition(x, p)
    assert off.norm() < 2e-3 * definition(x, p).norm()  # a number on the edge of two codes may fall to either side
    spread = x.T.contiguous().T.to(torch.bfloat16)  # other strides, another dtype
    y = int8_linear(spread, p)
    assert y.dtype == torch.bfloat16
    assert (y.double() - definition(spread, p)).norm() < 8e-3 * y.double().norm()


@pytest.mark.parametrize("loud", [1.0, 30.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", ["plain", "gated", "fused gate", "no bias"])
def test_c_is_the_same_as_torch(native, activation, form, loud):
    """Also where columns of x and of the inner activations hold numbers above the threshold."""
    parts, bias = 2 if form == "fused gate" else 1, form != "no bias"
    ups = [product(40 * parts, 24, "c", form, n, bias=bias)[1] for n in range(2 if form == "gated" else 1)]
    _, down = product(24, 40, "c", form, "down", bias=bias, threshold=3.0)
    x = random("c", form, activation, loud, size=(2, 300, 24))
    x[..., 3] *= loud
    compiled = int8_feed_forward(x, ups, down, activation, parts)
    again = int8_feed_forward(x, ups, down, activation, parts)
    assert torch.equal(compiled, again)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "way_of", lambda device: "eager")
        eager = int8_feed_forward(x, ups, down, activation, parts)
    assert (compiled - eager).norm() < 5e-3 * eager.norm()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_the_c_are_torch_s(native, activation):
    """Through a layer that hands one number through: sums 127 z, scale 127, so that y = z."""
    z = torch.linspace(-30, 30, 4001)
    sums = torch.full((1, 4001), 127, dtype=torch.int32)
    layer = Layer(sums, torch.zeros(4001), z)
    _, scale, h = _steps("compiled").middle([layer], torch.ones(1, 1), activation, 1, keep=True)
    exact = ACTIVATIONS[activation](z.double())
    assert (h[0] - exact).abs().max() < 4e-6
    assert scale.item() == h.abs().max().item()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_not_lost(native, bad):
    _, up = product(40, 24, "bad")
    _, down = product(24, 40, "bad", "down")
    x = random("bad", size=(3, 24))
    x[1, 7] = bad
    for threshold in (0.0, 6.0):
        y = int8_feed_forward(x, [up._replace(threshold=threshold)], down._replace(threshold=threshold), "gelu")
        assert not y[1].isfinite().any()
        assert y[[0, 2]].isfinite().all()


def test_threads_share_nothing(native):
    """Memory between two steps belongs to one thread."""
    _, up = product(40, 24, "threads")
    _, down = product(24, 40, "threads", "down")
    xs = [random("threads", n, size=(50 + n, 24)) for n in range(8)]
    alone = [int8_feed_forward(x, [up], down, "gelu") for x in xs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            together = list(pool.map(lambda x: int8_feed_forward(x, [up], down, "gelu"), xs))
            assert all(map(torch.equal, alone, together))


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        (None, "there is no C compiler"),
        ("exit 1", "exit status 1"),
        ("echo no such flag >&2; exit 2", "cannot compile int8_steps.c: no such flag"),
    ],
)
def test_without_a_compiler_that_works_it_says_so_and_runs_bf16(monkeypatch, caplog, tmp_path, compiler, words):
    caches = (backend._steps, backend._way_of)
    with broken_compiler(monkeypatch, tmp_path, compiler, *caches, capability="AVX512") as said:
        weight, p = product(24, 40)
        x = random(size=(5, 40))
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                y = int8_linear(x, p)
        assert (y - (x @ weight.T + p.bias)).norm() < 0.02 * y.norm()
        assert words in said(caplog, "multiply in bf16")


def test_the_library_is_compiled_once(monkeypatch, tmp_path):
    if compiled.compiler() is None:
        pytest.skip("this machine has no C compiler")
    monkeypatch.setattr(compiled, "_folder", lambda: tmp_path)
    compiled.load.cache_clear()
    try:
        compiled.load("int8_steps")
        (made,) = tmp_path.iterdir()
        compiled.load.cache_clear()
        monkeypatch.setattr(compiled, "_compile", None)
        assert compiled.load("int8_steps")._name == str(made)
    finally:
        compiled.load.cache_clear()
