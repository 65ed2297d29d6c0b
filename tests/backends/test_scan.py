"""Feature attention by prefix sums against the sum over all pairs, logarithm of the weights and gradients included."""

import math

import pytest
import torch

from hf_tfast.backends import scan
from hf_tfast.testing import Shape, assert_near, generator, qkv

SHAPES = {
    "chunks": Shape(b=2, h=2, j=300),
    "border": Shape(b=1, g=4, j=256, e=3),
    "prefix": Shape(b=1, g=1, i=140, j=600),
    "decoding": Shape(b=1, i=1, j=600),
    "one": Shape(j=1),
}


def by_pairs(q, k, v, w, scale, causal):
    """o and log-weights from log A [b h i j], features and all, in plain torch."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = lambda x, s: s * x @ w.mT - (s * x).square().sum(-1, keepdim=True) / 2  # noqa: E731
    s = math.sqrt(abs(scale))
    pairs = logits(q, math.copysign(s, scale))[:, :, :, None] + logits(k, s)[:, :, None]
    weights = pairs.logsumexp(-1) - math.log(w.shape[1])
    if causal:
        i, j = weights.shape[-2:]
        weights = weights.masked_fill(torch.ones(i, j).tril(j - i) == 0, -torch.inf)
    return weights.softmax(-1) @ v, weights.logsumexp(-1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("scale", [0.3, -0.2])
def test_against_pairs(name, causal, scale):
    shape = SHAPES[name]
    q, k, v = qkv(shape, name, grad=True)
    w = torch.randn(shape.h, 12, shape.d, generator=generator(name), dtype=q.dtype)
    got = scan.feature_attention(q, k, v, w, scale, causal=causal)
    expected = by_pairs(q, k, v, w, scale, causal)
    up = [torch.randn(x.shape, generator=generator(name, n), dtype=x.dtype) for n, x in enumerate(got)]
    for what, one, other in zip(("o", "lse"), got, expected, strict=True):
        assert_near(one.detach(), other.detach(), what)
    gradients = [torch.autograd.grad(x, (q, k, v), up) for x in (got, expected)]
    for what, one, other in zip("qkv", *gradients, strict=True):
        assert_near(one, other, f"gradient of {what}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
def test_low_precision_under_autocast(dtype, causal):
    """Sums stay in fp32 whatever the dtype, and autocast does not reach them."""
    q, k, v = qkv(Shape(b=1, h=2, g=1, j=700, d=16), "low", dtype=dtype)
    w = torch.randn(2, 20, 16, generator=generator("low"))
    expected = by_pairs(q.double(), k.double(), v.double(), w.double(), 0.25, causal)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, lse = scan.feature_attention(q, k, v, w, 0.25, causal=causal)
    assert o.dtype == dtype
    assert lse.dtype == torch.float32
    low = torch.finfo(dtype).eps if dtype != torch.float16 else 2e-4
    assert_near(o, expected[0].to(dtype), "o", 2 * low + 2e-5)
    assert_near(lse, expected[1].float(), "lse", 2 * low + 2e-5)


def test_state_in_any_parts():
    q, k, v = qkv(Shape(j=900), "parts")
    w = torch.randn(4, 12, 8, generator=generator("parts"), dtype=q.dtype)
    expected = scan.feature_attention(q[:, :, -1:], k, v, w, 0.3)
    for cut in (0, 1, 450, 899):
        state = scan.absorb(None, k[:, :, :cut], v[:, :, :cut], w, 0.3)
        state = scan.absorb(state, k[:, :, cut:], v[:, :, cut:], w, 0.3)
        for one, other in zip(scan.read(state, q[:, :, -1:], w, 0.3), expected, strict=True):
            assert_near(one, other, f"cut at {cut}")
