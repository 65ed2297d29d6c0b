"""Band attention with its sum of weights, and merging, against softmax over all pairs."""

import pytest
import torch

from hf_tfast.backends.band import band_attention, merge
from hf_tfast.backends.score import Score, softmax_attention
from hf_tfast.testing import Shape, assert_near, generator, qkv


def pairs(i, j, before, after):
    n = torch.arange(j)
    apart = n[j - i :, None] - n
    return (apart <= before) & (apart >= -after)


@pytest.mark.parametrize(("before", "after"), [(0, 0), (5, 0), (9, 9), (0, 3), (400, 400)])
@pytest.mark.parametrize("shape", [Shape(j=300), Shape(b=1, g=4, i=130, j=301, e=3), Shape(i=1, j=70)], ids=str)
def test_against_pairs(before, after, shape):
    q, k, v = qkv(shape, "band", grad=True)
    near = pairs(q.shape[2], shape.j, before, after)
    scores = (q @ k.repeat_interleave(4 // shape.g, 1).mT * 0.7).masked_fill(~near, -torch.inf)
    expected = softmax_attention(q, k, v, near, Score(scale=0.7)), scores.logsumexp(-1)
    got = band_attention(q, k, v, 0.7, before, after)
    up = [torch.randn(x.shape, generator=generator(n), dtype=x.dtype) for n, x in enumerate(got)]
    for what, one, other in zip(("o", "lse"), got, expected, strict=True):
        assert_near(one.detach(), other.detach(), what)
    for name, *gradients in zip("qkv", *(torch.autograd.grad(x, (q, k, v), up) for x in (got, expected)), strict=True):
        assert_near(*gradients, f"gradient of {name}")


@pytest.mark.parametrize("with_sinks", [False, True])
def test_merged_parts_are_the_whole(with_sinks):
    q, k, v = qkv(Shape(g=4, j=90), "merge")
    sinks = torch.randn(4, generator=generator("sinks"), dtype=q.dtype) if with_sinks else None
    scores, parts = q @ k.mT * 8**-0.5, []
    for part in (slice(0, 20), slice(20, 21), slice(21, 90)):
        parts.append((scores[..., part].softmax(-1) @ v[:, :, part], scores[..., part].logsumexp(-1)))
    assert_near(merge(parts, sinks), softmax_attention(q, k, v, None, Score(sinks=sinks)), "merged")
