"""Attention between many and few positions against softmax over all pairs."""

import pytest
import torch

from hf_tfast.backends import few
from hf_tfast.backends.score import Score, softmax_attention
from hf_tfast.testing import Shape, assert_near, generator, qkv


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(few, "ELEMENTS", 64 * 100)


def compare(run, plain, leaves):
    one, other = run(*leaves), plain(*leaves)
    assert_near(one.detach(), other.detach(), "o")
    up = torch.randn(one.shape, generator=generator("up"), dtype=one.dtype)
    for n, (got, want) in enumerate(
        zip(torch.autograd.grad(one, leaves, up), torch.autograd.grad(other, leaves, up), strict=True)
    ):
        assert_near(got, want, f"gradient {n}")


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("g", [1, 2, 4])
def test_few_keys(softcap, g):
    q, k, v = qkv(Shape(g=g, i=7, j=7, e=5), "few keys", grad=True)
    q = torch.randn(2, 4, 500, 8, generator=generator("many"), dtype=q.dtype, requires_grad=True)
    bias = torch.randn(4, 7, dtype=q.dtype, generator=generator("bias"), requires_grad=True)
    score = Score(softcap=softcap, scale=0.7)

    def plain(q, k, v, bias):
        k, v = (torch.nn.functional.pad(x, (0, 0, 500 - 7, 0)) for x in (k, v))  # it wants no more queries than keys
        there = torch.arange(500) >= 493
        return softmax_attention(q, k, v, there, score, bias=torch.nn.functional.pad(bias, (493, 0))[:, None])

    compare(lambda q, k, v, bias: few.few_keys(q, k, v, 0.7, softcap=softcap, bias=bias), plain, [q, k, v, bias])


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("g", [1, 2, 4])
def test_few_queries(softcap, g):
    q, k, v = qkv(Shape(g=g, i=7, j=500, e=5), "few queries", grad=True)
    sinks = torch.randn(4, dtype=q.dtype, generator=generator("sinks"), requires_grad=True)
    compare(
        lambda q, k, v, sinks: few.few_queries(q, k, v, 0.7, softcap=softcap, sinks=sinks),
        lambda q, k, v, sinks: softmax_attention(q, k, v, None, Score(softcap=softcap, scale=0.7, sinks=sinks)),
        [q, k, v, sinks],
    )


@pytest.mark.parametrize("segments", [0, -1, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_segments_hold_tokens(dtype, segments):
    x = torch.zeros(1, 2, 11, 4, dtype=dtype)
    for means in (few.segment_means, few.with_means):
        with pytest.raises(ValueError, match=f"expected 1 to 11 segments of 11 tokens, got {segments}"):
            means(x, segments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_means_may_come_expanded(dtype):
    x = torch.randn(2, 3, 11, 4, dtype=dtype, generator=generator("expanded"), requires_grad=True)
    y = torch.zeros_like(x, requires_grad=True)
    same, means = few.with_means(x, 4)
    up = torch.arange(4, dtype=dtype)
    dx, dy = torch.autograd.grad(((same + y).sum((0, 1, 2)) * up).sum() + means.sum(), (x, y))
    assert torch.equal(dy, up.expand_as(y))
    sizes = torch.tensor([3] * 9 + [2] * 2, dtype=dtype)
    assert_near(dx, (up + 1 / sizes[:, None]).expand_as(x), "gradient", 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_fp32(dtype):
    q, k, v = qkv(Shape(j=600, d=16), "low", dtype=dtype, grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        landmarks = few.few_queries(q[:, :, :9], k, v, 0.5)
        o = few.few_keys(q, k[:, :, :9], v[:, :, :9], 0.5)
    assert landmarks.dtype == torch.float32
    assert o.dtype == dtype
    wide = [x.detach().double() for x in (q, k, v)]
    assert_near(
        landmarks.double(), softmax_attention(wide[0][:, :, :9], *wide[1:], None, Score(scale=0.5)), "few", 2e-6
    )
    for gradient in torch.autograd.grad(landmarks.sum() + o.sum(), (q, k, v)):
        assert gradient.dtype == dtype
