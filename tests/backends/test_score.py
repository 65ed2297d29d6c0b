"""Scores and the softmax that defines attention, against one written independently."""

from dataclasses import replace

import pytest
import torch

from hf_tfast.backends.score import Score, softmax_attention
from hf_tfast.testing import Shape, assert_near, generator, naive_attention, qkv


def pairs(shape, seed, b=None, h=None):
    """[b h i j] bool, with one query that reads nothing."""
    size = (b or shape.b, h or shape.h, shape.i, shape.j)
    allowed = torch.rand(size, generator=generator(seed)) < 0.5
    allowed[-1, -1, 3] = False
    return allowed


SCORES = {
    "plain": Score(),
    "scaled": Score(scale=0.3),
    "softcap": Score(softcap=0.9),
    "sinks": Score(sinks=torch.tensor([0.0, -30.0, 2.0, 50.0], dtype=torch.float64)),
    "dropout": Score(dropout=0.4, seed=9, first_head=2),
}


@pytest.mark.parametrize("g", [1, 2, 4])
@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES.keys())
def test_equals_the_naive_softmax(score, g):
    shape = Shape(g=g, i=20, j=33, e=5)
    q, k, v = qkv(shape, "score", grad=True)
    score = replace(score, sinks=None if score.sinks is None else score.sinks.clone().requires_grad_())
    leaves = (q, k, v) if score.sinks is None else (q, k, v, score.sinks)
    for allowed in (pairs(shape, g), pairs(shape, g, 1, 1), torch.ones(20, 33, dtype=torch.bool)):
        o, expected = softmax_attention(q, k, v, allowed, score), naive_attention(q, k, v, allowed, score)
        assert_near(o, expected, "output")
        for got, want in zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in (o, expected)), strict=True):
            assert_near(got, want, "gradient")
    assert torch.equal(softmax_attention(q, k, v, None, score), softmax_attention(q, k, v, allowed, score))


def test_nothing_to_read_gives_zeros():
    q, k, v = qkv(Shape(), "nothing", grad=True)
    never = torch.zeros(65, 65, dtype=torch.bool)
    for score in (Score(), Score(sinks=torch.zeros(4)), Score(softcap=1.0), Score(dropout=0.5, seed=1)):
        o = softmax_attention(q, k, v, never, score)
        assert not o.any()
        assert not any(x.any() for x in torch.autograd.grad(o.sum(), (q, k, v)))
        assert not softmax_attention(q, k[:, :, :0], v[:, :, :0], None, replace(score, dropout=0.0)).any()


def test_large_scores_stay_finite():
    q, k, v = qkv(Shape(), "large", dtype=torch.float32, grad=True)
    o = softmax_attention(q * 1e4, k * 1e4, v, None, Score(sinks=torch.tensor([0.0, -1e9, 1e9, 5.0])))
    assert bool(o.isfinite().all())
    assert not o[:, 2].any()  # the sink logit takes everything
    assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(o.sum(), (q, k, v)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype):
    q, k, v = qkv(Shape(), "half", dtype=dtype)
    o = softmax_attention(q, k, v, None, Score())
    assert torch.equal(o, softmax_attention(q.float(), k.float(), v.float(), None, Score()).to(dtype))


def test_dropout_is_drawn_by_position_and_head():
    q, k, v = qkv(Shape(h=4, g=2), "draws")
    score, at = Score(dropout=0.5, seed=3), torch.arange(65)
    o = softmax_attention(q, k, v, at <= at[:, None], score)
    last = softmax_attention(q[:, :, -9:], k, v, at <= at[-9:, None], score)
    assert_near(last, o[:, :, -9:], "the last queries")
    half = softmax_attention(q[:, 2:], k[:, 1:], v[:, 1:], at <= at[:, None], replace(score, first_head=2))
    assert_near(half, o[:, 2:], "the second half of the heads")
    band = (at <= at[:, None]) & (at > at[:, None] - 10)
    rest = torch.arange(65)[40:]
    cut = softmax_attention(q[:, :, -9:], k[:, :, 40:], v[:, :, 40:], band[-9:, 40:], score, at=rest)
    assert_near(cut, softmax_attention(q, k, v, band, score)[:, :, -9:], "behind a gap")


@pytest.mark.parametrize("wrong", [{"dropout": 1.0}, {"dropout": -0.1}, {"dropout": float("nan")}, {"softcap": 0.0},
                                   {"softcap": -1.0}, {"softcap": float("nan")}])  # fmt: skip
def test_wrong_scores_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Score(**wrong)


def test_dropout_needs_a_seed():
    with pytest.raises(ValueError, match="seed"):
        softmax_attention(*qkv(Shape(), "seed"), None, Score(dropout=0.1))
