"""Rows: linear memory, chosen keys, rounding that passes gradients."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_tfast.attention import Mask, attend
from hf_tfast.attention.quantized import Quantized
from hf_tfast.attention.svd import SVD
from hf_tfast.backends.rows import Rows, attend_rows, product, rounded, scatter, strips
from hf_tfast.backends.score import Score
from hf_tfast.testing import Shape, assert_near, generator, naive_attention, qkv, with_gradients


class Largest(TorchDispatchMode):
    """Remembers the most elements that a result had."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize(
    "mechanism",
    [SVD(rank=2), SVD(rank=2, keys=8), Quantized(queries=True), Quantized(weights="bfloat16", sums="bfloat16")],
    ids=str,
)
def test_nothing_of_the_size_of_all_pairs_is_made(mechanism):
    length = 3000
    q, k, v = qkv(Shape(b=1, h=2, g=1, j=length), "memory", dtype=torch.float32, grad=True)
    with Largest() as largest:
        attend(q, k, v, mechanism, Mask(causal=mechanism.causal)).sum().backward()
    assert largest.elements < 2 * length * length / 6, f"{largest.elements} elements of {2 * length**2} pairs at once"


def test_strips_cover_every_query_once():
    for b, h, i, j in ((1, 1, 1, 1), (2, 8, 1000, 1000), (1, 8, 65, 70_000)):
        q, k = torch.empty(b, h, i, 4, device="meta"), torch.empty(b, h, j, 4, device="meta")
        cuts = strips(q, k)
        assert [first for first, _ in cuts] == [0, *(stop for _, stop in cuts[:-1])]
        assert cuts[-1][1] == i


@pytest.mark.parametrize("causal", [False, True])
def test_chosen_keys(causal):
    """-1 stands for none, keys may repeat, a query without keys reads zeros and has no gradient."""
    q, k, v = qkv(Shape(j=30), "chosen", causal)
    chosen = torch.randint(-1, 30, (2, 4, 30, 5), generator=generator("keys"))
    chosen[:, :, 7] = -1
    pairs = (chosen[..., None] == torch.arange(30)).any(-2)
    if causal:
        pairs = pairs & torch.ones(30, 30, dtype=torch.bool).tril()
        chosen = chosen.where(chosen <= torch.arange(30)[:, None], -1)
    sinks = torch.randn(4, generator=generator("logits"), dtype=torch.float64)
    score = Score(sinks=sinks, softcap=2.0)
    rows = lambda q, k, v, s: attend_rows(q, k, v, Rows(causal=causal, score=s, chosen=chosen))  # noqa: E731
    got = with_gradients(rows, q, k, v, score)
    expected = with_gradients(lambda q, k, v, s: naive_attention(q, k, v, pairs, s), q, k, v, score)
    for name in expected:
        assert_near(got[name], expected[name], name)
    assert not got["o"][:, :, 7].any()


def test_scatter():
    chosen = torch.tensor([[0, 2, 2], [-1, -1, -1], [3, -1, 1]], dtype=torch.int32)
    expected = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1]]).bool()
    assert torch.equal(scatter(chosen, 4), expected)


def test_rounding_passes_the_gradient():
    x = torch.randn(50, generator=generator("round"), dtype=torch.float64).requires_grad_()
    y = rounded(x, torch.bfloat16)
    assert torch.equal(y, x.detach().bfloat16().double())
    assert not torch.equal(y, x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones_like(x))
    assert rounded(x, None) is x
    assert rounded(x.half(), torch.float32).dtype == torch.float16


def test_sums_are_rounded_after_every_block():
    random = generator("sums")
    w, v = (torch.rand(*size, generator=random, dtype=torch.float64) for size in ((3, 100), (100, 2)))
    total = torch.zeros(3, 2, dtype=torch.float64)
    for n in range(0, 100, 30):
        total = (total + w[:, n : n + 30] @ v[n : n + 30]).half().double()
    assert torch.equal(product(w, v, torch.float16, 30), total)
    assert_near(product(w, v, None, 30), w @ v, "without rounding")
