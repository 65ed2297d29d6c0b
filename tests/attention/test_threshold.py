"""Threshold beyond the contract: the plain rule, the proof that what is skipped is small, gradients of the rule."""

import pytest
import torch

from hf_tfast.attention import Mask, Score, attend
from hf_tfast.attention.threshold import Threshold
from hf_tfast.testing import Shape, assert_near, naive_attention, qkv, with_gradients
from tests.attention import contract
from tests.attention.test_topk import pairs_of

SINKS = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)
SCORES = (Score(), Score(scale=0.9, softcap=2.0), Score(sinks=SINKS), Score(scale=-0.7))
OTHERS = (
    Threshold(tau=0.02, block=1, window=2),
    Threshold(tau=0.03, block=1, window=0, renormalise=True),
    Threshold(tau=0.05, block=3, window=0, renormalise=True),
    Threshold(tau=0.05, block=2, window=5),
)


def dense_weights(q, k, causal, score):
    """[b h i j]: A, by giving every key a value of its own."""
    (b, _, i, _), (g, j) = q.shape, k.shape[1:3]
    earlier = torch.ones(i, j, dtype=torch.bool).tril(j - i) if causal else torch.ones(i, j, dtype=torch.bool)
    return naive_attention(q, k, torch.eye(j, dtype=q.dtype).expand(b, g, j, j), earlier, score)


@pytest.mark.parametrize("score", SCORES, ids=["plain", "softcap", "sinks", "negative"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("path", ["reference", "torch"])
def test_the_plain_rule(score, causal, renormalise, path):
    q, k, v = qkv(Shape(i=50, j=61), "plain", causal)
    tau = 0.02

    def rule(q, k, v, score):
        a = dense_weights(q, k, causal, score)
        kept = a * (a >= tau)
        if renormalise:
            total = kept.sum(-1, keepdim=True)
            if score.sinks is not None:  # the sink keeps its own weight
                total = total + 1 - a.sum(-1, keepdim=True)
            kept = kept / total
        return kept @ v.repeat_interleave(2, 1)

    mechanism = Threshold(tau=tau, block=1, window=0, renormalise=renormalise)
    run = lambda q, k, v, s: attend(q, k, v, mechanism, Mask(causal=causal), s, backend=path)  # noqa: E731
    assert 0.05 < (dense_weights(q, k, causal, score) >= tau).double().mean() < 0.9
    contract.same(with_gradients(run, q, k, v, score), with_gradients(rule, q, k, v, score), "plain rule")


@pytest.mark.parametrize("score", SCORES, ids=["plain", "softcap", "sinks", "negative"])
@pytest.mark.parametrize("causal", [False, True])
def test_skipped_blocks_hold_small_weights_only(score, causal):
    q, k, v = qkv(Shape(i=90, j=101), "proof", causal)
    q = q * 3
    for block in (2, 4, 16):
        mechanism = Threshold(tau=0.05, block=block, window=3)
        pairs = pairs_of(mechanism, q, k, Mask(causal=causal), score)
        a = dense_weights(q, k, causal, score)
        assert a[~pairs].max() < 0.05
        if block == 2 and score.softcap is None:
            earlier = a > 0 if causal else torch.ones_like(pairs)
            assert pairs.sum() < 0.7 * earlier.sum(), "nothing is skipped"
        bound = 0.05 * (~pairs).sum(-1, keepdim=True) * v.abs().max()
        o = attend(q, k, v, mechanism, Mask(causal=causal), score)
        assert ((o - a @ v.repeat_interleave(2, 1)).abs() <= 2 * bound + 1e-12).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mechanism", OTHERS, ids=str)
def test_contract_of_other_fields(mechanism, causal):
    for case in contract.grid()[2::7]:
        contract.check_fast_is_reference(mechanism, case)
    contract.check_full_budget(mechanism, causal, 20, "torch")
    if causal:
        contract.check_future(mechanism, Shape(j=97), (0, 31, 63, 80), "torch")
        contract.check_decoding(mechanism, Mask(causal=True), "torch")


def test_renormalised_weights_sum_to_one_and_plain_ones_do_not():
    q, k, v = qkv(Shape(j=64), "sum")
    ones = torch.ones_like(v)
    for block in (1, 4):
        o = attend(q * 2, k, ones, Threshold(tau=0.05, block=block, window=1, renormalise=True))
        assert_near(o, torch.ones_like(o), "renormalised")
        o = attend(q * 2, k, ones, Threshold(tau=0.05, block=block, window=1))
        assert (o < 1 + 1e-12).all()
        assert o.min() < 0.95


def test_nothing_left_is_zeros():
    q, k, v = qkv(Shape(j=40), "nothing")
    for renormalise in (False, True):
        mechanism = Threshold(tau=1.0, block=1, window=0, renormalise=renormalise)
        for path in ("reference", "torch"):
            run = lambda q, k, v, s, p=path, m=mechanism: attend(q, k, v, m, backend=p)  # noqa: E731
            assert all(not x.any() for x in with_gradients(run, q, k, v, Score()).values())


@pytest.mark.parametrize(
    "fields",
    [
        {"tau": -0.1},
        {"tau": 1.5},
        {"tau": "x"},
        {"tau": float("nan")},
        {"block": 0},
        {"window": -1},
        {"renormalise": 1},
    ],
    ids=str,
)
def test_bad_fields(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Threshold(**fields)
