"""Many chunks at once give what chunk after chunk gives: outputs, logarithms and gradients, and no look ahead."""

import pytest
import torch

from hf_tfast.attention import Mask, Score, attend
from hf_tfast.attention.performer import Performer
from hf_tfast.backends import scan, scan_wide
from hf_tfast.backends.scan_wide import WideScan
from hf_tfast.testing import Shape, assert_near, generator, qkv, with_gradients

SHAPES = {
    "spans": Shape(b=2, h=2, g=1, j=75),
    "border": Shape(b=1, h=4, g=2, j=48, e=3),
    "prefix": Shape(b=1, h=2, g=2, i=37, j=90),
    "one": Shape(j=1),
    "last chunk of one": Shape(b=1, h=2, g=1, j=25),
}


@pytest.fixture
def small(monkeypatch):
    """Chunks of 8, spans of 3 of them."""
    monkeypatch.setattr(scan_wide, "CHUNK", 8)
    monkeypatch.setattr(scan_wide, "MOST", 3)


def both_ways(q, k, v, w, scale):
    """Outputs, and gradients for one random gradient of them, by either scan."""
    found = []
    wide = lambda: WideScan.apply(q, k, v, w, scale, True, False)  # noqa: E731
    for run in (wide, lambda: scan.feature_attention(q, k, v, w, scale, causal=True)):
        got = run()
        up = [torch.randn(x.shape, generator=generator("up", n), dtype=x.dtype) for n, x in enumerate(got)]
        found.append([*got, *torch.autograd.grad(got, (q, k, v), up)])
    return zip(("o", "lse", "dq", "dk", "dv"), *found, strict=True)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("scale", [0.3, -0.2])
def test_as_chunk_after_chunk(name, scale, small, poisoned_memory):
    shape = SHAPES[name]
    q, k, v = qkv(shape, name, grad=True)
    w = torch.randn(shape.h, 12, shape.d, generator=generator(name), dtype=q.dtype)
    for what, one, other in both_ways(q, k, v, w, scale):
        assert one.dtype == other.dtype
        assert_near(one.detach(), other.detach(), what)


@pytest.mark.parametrize("order", [1, -1])
def test_levels_far_apart(order, small):
    """Keys whose features grow, or shrink, by hundreds of orders of magnitude over the row: nothing is lost that chunk
    after chunk would keep."""
    q, k, v = qkv(Shape(b=1, h=2, g=1, j=70), "levels")
    w = torch.randn(2, 12, 8, generator=generator("levels"), dtype=q.dtype)
    size = torch.linspace(0.01, 30, 70, dtype=q.dtype)[::order] if order > 0 else torch.linspace(30, 0.01, 70).double()
    k = k * size[:, None]
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    for what, one, other in both_ways(q, k, v, w, 0.3):
        assert bool(one.isfinite().all()), what
        assert_near(one.detach(), other.detach(), what)


def test_nothing_is_read_ahead(small):
    q, k, v = qkv(Shape(b=1, h=2, g=1, j=60), "ahead")
    w = torch.randn(2, 12, 8, generator=generator("ahead"), dtype=q.dtype)
    first = WideScan.apply(q, k, v, w, 0.3, False, False)
    for t in (0, 7, 23, 24, 40):
        x, y, z = (torch.cat([a[:, :, : t + 1], 50 * torch.randn_like(a[:, :, t + 1 :])], 2) for a in (q, k, v))
        for one, other in zip(first, WideScan.apply(x, y, z, w, 0.3, False, False), strict=True):
            assert torch.equal(one[:, :, : t + 1], other[:, :, : t + 1])


def test_low_precision():
    """With the chunks of a device."""
    q, k, v = qkv(Shape(b=1, h=2, g=1, j=700, d=16), "low", dtype=torch.bfloat16)
    w = torch.randn(2, 20, 16, generator=generator("low"))
    o, lse = WideScan.apply(q, k, v, w, 0.25, False, False)
    expected = scan.feature_attention(q.double(), k.double(), v.double(), w.double(), 0.25, causal=True)
    assert (o.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert_near(o.double(), expected[0], "o", 2e-2)
    assert_near(lse.double(), expected[1], "lse", 2e-2)


def test_spans_hold_about_as_much_for_any_number_of_heads():
    assert scan_wide.span(16) == scan_wide.CHUNK * scan_wide.MOST
    assert scan_wide.span(256) * 256 == scan_wide.ROWS
    assert scan_wide.span(10**6) == scan_wide.CHUNK
    assert scan.bulk(4, torch.device("cpu")) == scan.BULK < scan.bulk(16, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_on_a_device(dtype, causal):
    q, k, v = qkv(Shape(b=2, i=900, j=1500, d=32), "device", dtype=dtype, device="cuda")
    mask, score = Mask(causal=causal), Score(sinks=torch.randn(4, device="cuda"))
    through = lambda way: lambda q, k, v, s: attend(q, k, v, Performer(features=64), mask, s, backend=way)  # noqa: E731
    expected = with_gradients(through("reference"), q, k, v, score)
    for name, x in with_gradients(through("torch"), q, k, v, score).items():
        assert_near(x, expected[name], name, 1e-9 if dtype == torch.float64 else 2e-3)
