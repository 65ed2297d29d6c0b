"""SVD: the basis is the best of its rank, scores and choices made with it, ranks beyond the width, bad input."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from hf_tfast.attention import Mask, Score, attend
from hf_tfast.attention.dense import Dense
from hf_tfast.attention.svd import SVD, best_basis
from hf_tfast.testing import Shape, assert_near, generator, naive_attention, qkv, with_gradients
from tests.attention import contract, contract_calls, contract_ways


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


def test_causal_use_without_a_basis_is_refused():
    q, k, v = qkv(Shape(j=9), "refused")
    for mechanism in (SVD(rank=7), SVD(rank=7, keys=4), SVD(rank=7, keys=20)):
        for path in ("torch", "reference"):
            with pytest.raises(ValueError, match="(?s)svd has no causal form without.*calibrate.*window"):
                attend(q, k, v, mechanism, Mask(causal=True), backend=path)
    with pytest.raises(ValueError, match="calibrate"):
        SVD(rank=7).choose(q, k, Mask(causal=True))


# --- with a calibrated basis -----------------------------------------------------------------------------------------


def basis(g, d, rank, first=0):
    """A basis per key head, counted among those of all ranks; of other data, as a calibrated one is."""
    heads = []
    for n in range(first, first + g):
        random = generator("basis", n, d, rank)
        q, k = (torch.randn(60, d, generator=random, dtype=torch.float64) for _ in "qk")
        heads.append(best_basis(q, k, rank))
    return tuple(torch.stack(x) for x in zip(*heads, strict=True))


@dataclass(frozen=True, kw_only=True)
class Calibrated(SVD):
    """SVD whose every call comes with a basis, as in a calibrated model: the contract knows of no basis."""

    causal: ClassVar[bool] = True

    def brought(self, q, k, score):
        if score.basis is not None or self.rank >= q.shape[-1]:
            return score
        shared = q.shape[1] // k.shape[1]
        b, c = basis(k.shape[1], q.shape[-1], self.rank, score.first_head // shared)
        return replace(score, basis=(b.to(q.dtype), c.to(q.dtype)))

    def check(self, q, k, mask, score):
        super().check(q, k, mask, self.brought(q, k, score))

    def choose(self, q, k, mask, score=Score()):  # noqa: B008
        return super().choose(q, k, mask, self.brought(q, k, score))


CALIBRATED = pytest.mark.parametrize(
    "mechanism",
    [Calibrated(rank=3), Calibrated(rank=3, keys=12), Calibrated(rank=8), Calibrated(rank=8, keys=12)],
    ids=["scores", "keys", "exact scores", "exact keys"],
)
DIRECTION = pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
PATH = pytest.mark.parametrize("path", ["torch", "reference"], ids=["fast", "definition"])
CHECKS = {
    "layouts": lambda m, causal, path: contract.check_layouts(m, causal, path),
    "long": lambda m, causal, path: contract.check_long(m, Shape(b=1, h=2, g=1, j=777), causal, path),
    "long, few queries": lambda m, causal, path: contract.check_long(m, Shape(b=1, i=300, j=1025), causal, path),
    "full budget": lambda m, causal, path: contract.check_full_budget(m, causal, 75, path),
    "full budget, few queries": lambda m, causal, path: contract.check_full_budget(m, causal, 20, path),
    "poison, left": lambda m, causal, path: contract_calls.check_poison(m, "left", causal, path),
    "poison, holes": lambda m, causal, path: contract_calls.check_poison(m, "holes", causal, path),
    "padding": contract_calls.check_padding,
    "packing": contract_calls.check_packing,
    "nothing valid": contract_calls.check_nothing_valid,
    "rows apart": contract_calls.check_rows_apart,
    "heads apart": contract_calls.check_heads_apart,
    "dropout": contract_calls.check_dropout,
    "worst": contract_calls.check_worst_content,
    "modes": contract_ways.check_modes,
}


@CALIBRATED
@pytest.mark.parametrize("case", contract.grid(), ids=str)
def test_calibrated_fast_is_reference(mechanism, case):
    contract.check_fast_is_reference(mechanism, case)


@CALIBRATED
@DIRECTION
@PATH
@pytest.mark.parametrize("check", CHECKS)
def test_calibrated_keeps_the_contract(mechanism, causal, path, check):
    CHECKS[check](mechanism, causal, path)


@CALIBRATED
@PATH
def test_calibrated_never_reads_the_future(mechanism, path):
    contract.check_future(mechanism, Shape(j=97), (0, 7, 11, 12, 13, 63, 64, 80), path)
    contract.check_future(mechanism, Shape(i=60, j=130), (70, 95, 96, 127), path)
    contract.check_future(mechanism, Shape(b=1, h=2, g=1, j=700), (63, 300, 511, 512), path)


@CALIBRATED
@PATH
@pytest.mark.parametrize("kind", ["none", "left", "holes", "segments"])
def test_calibrated_decoding_continues_prefill(mechanism, path, kind):
    contract.check_decoding(mechanism, contract.make_mask(kind, True, 2, 97, "decoding"), path)
    contract_calls.check_every_length(mechanism, path)


@CALIBRATED
@DIRECTION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_calibrated_low_precision(mechanism, causal, dtype):
    contract.check_low_precision(mechanism, dtype, causal)
    contract_ways.check_autocast(mechanism, dtype, causal)


@pytest.mark.parametrize("gap", [(0, 0), (20, 3)], ids=["whole", "gap"])
@DIRECTION
def test_calibrated_pattern(causal, gap):
    contract.check_pattern(Calibrated(rank=3, keys=12), Mask(causal=causal, start=gap[0], kept=gap[1]))


@CALIBRATED
@DIRECTION
@pytest.mark.parametrize("alike", [False, True], ids=["random", "equal"])
def test_calibrated_memory_is_linear(mechanism, causal, alike):
    contract_calls.check_memory(mechanism, causal, alike)


def causal_pairs(i, j):
    at = torch.arange(j)
    return at <= at[j - i :, None]


@pytest.mark.parametrize("scale", [None, -0.4])
def test_causal_keys_are_the_best_of_the_past(scale):
    """For each query by itself: of j <= i the seven best by rank-2 scores, exact attention over them."""
    q, k, v = qkv(Shape(g=4, i=33, j=40), "causal", scale)
    b, c = basis(4, 8, 2)
    s = (q @ b) @ (k @ c).mT * (1.0 if scale is None else -1.0)
    s = s.masked_fill(~causal_pairs(33, 40), float("-inf"))
    pairs = (s >= s.topk(7, -1).values[..., -1:]) & causal_pairs(33, 40)
    o = attend(q, k, v, SVD(rank=2, keys=7), Mask(causal=True), Score(basis=(b, c), scale=scale))
    assert_near(o, naive_attention(q, k, v, pairs, Score(scale=scale)), "seven keys of the past")


def test_causal_scores_of_low_rank():
    q, k, v = qkv(Shape(g=4, i=33, j=40), "causal scores")
    b, c = basis(4, 8, 3)
    o = attend(q, k, v, SVD(rank=3), Mask(causal=True), Score(basis=(b, c)))
    expected = naive_attention(q @ b, k @ c, v, causal_pairs(33, 40), Score(scale=8**-0.5))
    assert_near(o, expected, "rank 3")


def test_fewer_past_keys_than_asked_for_are_all_read():
    q, k, v = qkv(Shape(j=30), "few")
    given, mask = Score(basis=basis(2, 8, 2)), Mask(causal=True)
    dense = attend(q, k, v, Dense(), mask, backend="reference")
    for keys in (1, 9, 29, 30, 31):
        o = attend(q, k, v, SVD(rank=2, keys=keys), mask, given)
        assert_near(o[:, :, :keys], dense[:, :, :keys], f"{keys} keys")
        chosen = SVD(rank=2, keys=keys).choose(q, k, mask, given).keys
        if chosen is not None:
            assert (chosen >= 0).sum(-1)[0, 0].tolist() == [min(n + 1, keys) for n in range(30)]
            assert (chosen <= torch.arange(30)[:, None]).all(), "a key of the future is in the choice"
        if keys < 29:
            assert (o[:, :, keys:] - dense[:, :, keys:]).abs().amax() > 1e-3


@pytest.mark.parametrize("rank", [8, 9])
def test_rank_of_the_width_is_causal_without_a_basis(rank):
    q, k, v = qkv(Shape(i=20, j=57), rank)
    dense = attend(q, k, v, Dense(), Mask(causal=True), backend="reference")
    assert_near(attend(q, k, v, SVD(rank=rank), Mask(causal=True)), dense, "dense")
    assert_near(attend(q, k, v, SVD(rank=rank, keys=57), Mask(causal=True)), dense, "all keys")
    with pytest.raises(ValueError, match=f"a rank of {rank} is exact"):
        attend(q, k, v, SVD(rank=rank), Mask(causal=True), Score(basis=basis(2, 8, rank)))


def test_ties_go_to_the_earlier_key_whatever_the_length():
    """Equal keys with unequal values: the choice must not depend on how many keys follow."""
    q, k, v = (x.mul(4).round() for x in qkv(Shape(b=1, h=2, g=1, j=80), "ties"))  # whole numbers: scores are exact
    k = k[:, :, :4].repeat(1, 1, 20, 1)
    whole = tuple(x.mul(4).round() for x in basis(1, 8, 2))
    given, mask, mechanism = Score(basis=whole), Mask(causal=True), SVD(rank=2, keys=7)
    o = attend(q, k, v, mechanism, mask, given)
    for n in range(1, 81):
        step = attend(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n], mechanism, mask, given)
        assert_near(step, o[:, :, n - 1 : n], f"{n} keys")
    chosen = mechanism.choose(q, k, mask, given).keys[0, 0, 79].sort().values
    assert chosen.tolist() == list(range(int(chosen[0]), int(chosen[0]) + 25, 4)), "one kind of key, the earliest"


def test_a_given_basis_is_used_without_causality_too():
    q, k, v = qkv(Shape(j=30), "given")
    one = attend(q, k, v, SVD(rank=3), score=Score(basis=basis(2, 8, 3)))
    assert (one - attend(q, k, v, SVD(rank=3))).abs().max() > 1e-3
    own = best_basis(q.view(2, 2, -1, 8)[:1], k[:1], 3)
    same = attend(q[:1], k[:1], v[:1], SVD(rank=3), score=Score(basis=(own[0][0], own[1][0])))
    assert_near(same, attend(q[:1], k[:1], v[:1], SVD(rank=3)), "the row's own basis, given")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((torch.zeros(2, 8, 3), torch.zeros(2, 8, 4)), r"C of score.basis must be \[g d r\] = \(2, 8, 3\)"),
        ((torch.zeros(4, 8, 3), torch.zeros(4, 8, 3)), r"got \(4, 8, 3\)"),
        ((torch.zeros(2, 9, 3), torch.zeros(2, 9, 3)), r"got \(2, 9, 3\)"),
        ((torch.zeros(2, 8, 3).long(), torch.zeros(2, 8, 3)), "int64"),
        ((torch.zeros(2, 8, 3, device="meta"), torch.zeros(2, 8, 3)), "on meta"),
    ],
)
def test_a_basis_that_does_not_fit_is_refused(given, words):
    q, k, v = qkv(Shape(j=9), "misfit")
    with pytest.raises(ValueError, match=words):
        attend(q, k, v, SVD(rank=3), Mask(causal=True), Score(basis=given))


def test_a_basis_that_nobody_reads_is_refused():
    q, k, v = qkv(Shape(j=9), "unread")
    with pytest.raises(ValueError, match="dense makes no use of a calibrated basis"):
        attend(q, k, v, Dense(), score=Score(basis=basis(2, 8, 3)))
