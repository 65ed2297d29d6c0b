"""SVD: the basis is the best of its rank, scores and choices made with it, ranks beyond the width, bad input."""

import pytest
import torch

from hf_tfast.attention import Mask, Score, attend
from hf_tfast.attention.dense import Dense
from hf_tfast.attention.svd import SVD, best_basis
from hf_tfast.testing import Shape, assert_near, generator, naive_attention, qkv, with_gradients
from tests.attention import contract


@pytest.mark.parametrize(("i", "j", "d", "rank"), [(40, 60, 8, 3), (5, 60, 8, 3), (40, 4, 8, 3), (30, 30, 16, 15)])
def test_basis_is_the_best_of_its_rank(i, j, d, rank):
    """Eckart and Young: no matrix of the rank is nearer, and the error is the norm of the singular values left out."""
    random = generator(i, j, d, rank)
    q, k = (torch.randn(2, 3, n, d, generator=random, dtype=torch.float64) for n in (i, j))
    exact = q @ k.mT
    b, c = best_basis(q, k, rank)
    assert b.shape == c.shape == (2, 3, d, min(rank, i, j, d))
    off = torch.linalg.matrix_norm((q @ b) @ (k @ c).mT - exact)
    left = torch.linalg.svdvals(exact)[..., rank:].square().sum(-1).sqrt()
    assert_near(off, left, "error of the approximation")


def test_rank_of_the_data_is_enough():
    """Keys in a subspace of 3 dimensions: rank 3 is exact, and singular values of zero give no infinities."""
    random = generator("subspace")
    q, k, v = qkv(Shape(j=50), "subspace")
    k = k[..., :3] @ torch.randn(3, 8, generator=random, dtype=torch.float64)
    for rank in (3, 5, 7):
        assert_near(attend(q, k, v, SVD(rank=rank)), attend(q, k, v, Dense(), backend="reference"), f"rank {rank}")
    assert bool(attend(q, k * 0, v, SVD(rank=3)).isfinite().all())


@pytest.mark.parametrize("mechanism", [SVD(rank=3), SVD(rank=8), SVD(rank=2, keys=9), SVD(rank=20, keys=9)], ids=str)
@pytest.mark.parametrize("score", contract.SCORES)
def test_fast_is_reference(mechanism, score):
    q, k, v = qkv(Shape(i=41, j=57), "svd", score)
    paths = [contract.through_attend(mechanism, Mask(), path) for path in ("torch", "reference")]
    one, other = (with_gradients(path, q, k, v, contract.make_score(score, 4)) for path in paths)
    contract.same(one, other, f"{mechanism} {score}")


@pytest.mark.parametrize("mask", contract.MASKS)
def test_masks(mask):
    q, k, v = qkv(Shape(j=65), mask)
    given = contract.make_mask(mask, False, 2, 65)
    assert_near(attend(q, k, v, SVD(rank=3), given), attend(q, k, v, SVD(rank=3), given, backend="reference"), mask)


@pytest.mark.parametrize("rank", [8, 9, 500])
def test_rank_of_the_width_is_dense(rank):
    q, k, v = qkv(Shape(j=57), rank)
    assert_near(attend(q, k, v, SVD(rank=rank)), attend(q, k, v, Dense(), backend="reference"), "dense")


@pytest.mark.parametrize("rank", [5, 6])
def test_rank_of_the_length_is_dense(rank):
    q, k, v = qkv(Shape(j=5, d=16), rank)
    assert_near(attend(q, k, v, SVD(rank=rank)), attend(q, k, v, Dense(), backend="reference"), "dense")


def test_chosen_keys_are_the_best_by_low_rank_scores():
    q, k, v = qkv(Shape(g=4, j=40), "chosen")
    b, c = best_basis(q, k, 2)
    s = (q @ b) @ (k @ c).mT
    pairs = s >= s.topk(7, -1).values[..., -1:]
    score = Score()
    assert_near(attend(q, k, v, SVD(rank=2, keys=7)), naive_attention(q, k, v, pairs, score), "seven keys")
    lowest = s <= s.topk(7, -1, largest=False).values[..., -1:]
    score = Score(scale=-0.4)  # the best keys are those with the lowest products
    o = attend(q, k, v, SVD(rank=2, keys=7), score=score)
    assert_near(o, naive_attention(q, k, v, lowest, score), "under a negative scale")


def test_higher_ranks_choose_better():
    q, k, v = qkv(Shape(j=200, d=32), "better")
    q, k = (x * torch.linspace(2.0, 0.1, 32, dtype=torch.float64) for x in (q, k))
    dense = attend(q, k, v, Dense(), backend="reference")
    off = [(attend(q, k, v, SVD(rank=rank, keys=60)) - dense).norm().item() for rank in (1, 4, 12, 32)]
    assert off == sorted(off, reverse=True)
    assert off[2] < 0.5 * off[0]


def test_grouped_heads_share_one_basis():
    """The key projections are shared as the keys are: a cache of them holds r numbers per key head."""
    q, k, _ = qkv(Shape(h=6, g=2, j=30), "grouped")
    choice = SVD(rank=3).choose(q, k, Mask())
    assert choice.basis is not None
    assert [x.shape for x in choice.basis] == [(2, 2, 8, 3)] * 2


def test_gradient_is_finite_where_singular_values_meet():
    q, k, v = qkv(Shape(j=20, g=4), "meet", grad=True)
    eye = torch.eye(8, dtype=torch.float64).repeat(3, 1)[:20].expand(2, 4, 20, 8)
    same = eye + 0 * q
    o = attend(same, eye + 0 * k, v, SVD(rank=3))
    for gradient in torch.autograd.grad(o.square().sum(), (q, k, v)):
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_large_numbers_and_low_precision(dtype):
    q, k, v = qkv(Shape(j=50), dtype, dtype=dtype)
    k[:, :, 3] = 6e4 if dtype == torch.float16 else 1e30
    assert bool(attend(q, k, v, SVD(rank=3)).isfinite().all())
    assert bool(attend(q, k, v, SVD(rank=3, keys=9)).isfinite().all())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"rank": 2.0}, "rank must be"),
        ({"keys": 0}, "keys must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_fields(fields, words):
    with pytest.raises(ValueError, match=words):
        SVD(**fields)


def test_causal_use_is_refused():
    q, k, v = qkv(Shape(j=9), "refused")
    with pytest.raises(ValueError, match="(?s)svd has no causal form.*window"):
        attend(q, k, v, SVD(), Mask(causal=True))
