"""TopK beyond the contract: the choice itself, ties, bounds given from outside, what decoding reads."""

import pytest
import torch

from hf_tfast.attention import Mask, Score, attend
from hf_tfast.attention.topk import TopK
from hf_tfast.backends.key_blocks import Bounds, Grid
from hf_tfast.testing import Shape, assert_near, generator, naive_attention, qkv
from tests.attention import contract

PLAIN = Score()
OTHERS = (
    TopK(k=5, block=1, window=3),
    TopK(k=7, block=1, window=0),
    TopK(k=5, block=3, window=0),
    TopK(k=9, block=8, window=20),
)


def pairs_of(mechanism, q, k, mask, score=PLAIN):
    """[b h i j]: what the mechanism allows, future taken out."""
    (b, h, i, _), j = q.shape, k.shape[2]
    choice, at = mechanism.choose(q, k, mask, score), mask.positions(j)
    rows, heads = torch.arange(b).view(-1, 1, 1, 1), torch.arange(h).view(-1, 1, 1)
    pairs = mechanism.allowed(choice, rows, heads, at[j - i :, None], at, causal=mask.causal)
    return (pairs & (at <= at[j - i :, None]) if mask.causal else pairs).expand(b, h, i, j)


def expected_pairs(mechanism, q, k, causal):
    """The rule of the docstring, one query at a time."""
    (b, h, i, _), (g, j) = q.shape, k.shape[1:3]
    pairs = torch.zeros(b, h, i, j, dtype=torch.bool)
    c, w = mechanism.block, mechanism.window
    reach = -(-max(w - 1, 0) // c) if causal else -(-w // c)
    for row in range(b):
        for head in range(h):
            keys = k[row, head // (h // g)]
            for t in range(i):
                p, query = t + j - i, q[row, head, t]
                if c == 1:
                    near = [m for m in range(j) if (0 <= p - m < w if causal else w and abs(p - m) <= w)]
                    far = [m for m in range(p + 1 if causal else j) if m not in near]
                    far.sort(key=lambda m: (-float(query @ keys[m]), m))  # noqa: B023
                    pairs[row, head, t, near + far[: mechanism.k]] = True
                    continue
                blocks = range(-(-j // c))
                near = [n for n in blocks if (0 <= p // c - n <= reach if causal else abs(p // c - n) <= reach)]
                far = [n for n in blocks if n not in near and (n < p // c or not causal)]
                bound = {
                    n: torch.maximum(
                        query * keys[n * c : n * c + c].amin(0), query * keys[n * c : n * c + c].amax(0)
                    ).sum()
                    for n in far
                }
                far.sort(key=lambda n: (-float(bound[n]), n))  # noqa: B023
                for n in near + far[: -(-mechanism.k // c)]:
                    pairs[row, head, t, n * c : n * c + c] = True
    at = torch.arange(j)
    return pairs & (at <= at[j - i :, None]) if causal else pairs


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mechanism", OTHERS, ids=str)
def test_choice_is_the_rule(mechanism, causal):
    q, k, v = qkv(Shape(b=1, h=2, g=1, i=40, j=53), "rule", causal)
    pairs = pairs_of(mechanism, q, k, Mask(causal=causal))
    assert torch.equal(pairs, expected_pairs(mechanism, q, k, causal))
    for path in ("reference", "torch"):
        o = attend(q, k, v, mechanism, Mask(causal=causal), backend=path)
        assert_near(o, naive_attention(q, k, v, pairs, Score()), path)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mechanism", OTHERS, ids=str)
def test_contract_of_other_fields(mechanism, causal):
    for case in contract.grid()[1::7]:
        contract.check_fast_is_reference(mechanism, case)
    contract.check_full_budget(mechanism, causal, 20, "torch")
    if causal:
        contract.check_future(mechanism, Shape(j=97), (0, 31, 63, 80), "torch")
        contract.check_decoding(mechanism, Mask(causal=True), "torch")


def test_a_negative_scale_turns_the_order_round():
    q, k, v = qkv(Shape(j=60), "negative")
    mechanism = TopK(k=8, block=4, window=0)
    o = attend(q, k, v, mechanism, score=Score(scale=-0.5))
    assert_near(o, attend(-q, k, v, mechanism, score=Score(scale=0.5)), "negative scale")


@pytest.mark.parametrize("block", [1, 4])
def test_ties_go_to_the_earlier_position(block):
    q, k, _ = qkv(Shape(b=1, h=2, g=2, j=40), "ties")
    pairs = pairs_of(TopK(k=8, block=block, window=0), q, k[:, :, :1].expand_as(k), Mask(causal=True))
    last = pairs[0, :, -1].nonzero()[:, 1].view(2, -1)
    assert torch.equal(last, torch.tensor([*range(8), *([] if block == 1 else range(36, 40))]).expand(2, -1))


@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("kinds", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_keys_are_chosen_alike_in_prefill_and_in_steps(block, kinds, dtype):
    """Scores of equal keys differ by rounding, and not alike in a pass and in a step: none of that may decide."""
    mechanism = TopK(k=24, block=block, window=block)
    for n, length in enumerate((97, 130, 257, 391)):
        g = generator("equal keys", block, kinds, n)
        some = torch.randn(1, 2, kinds, 64, dtype=dtype, generator=g)
        which = torch.randint(kinds, (length // 8 + 1,), generator=g).repeat_interleave(8)[:length]
        q = torch.randn(1, 4, length, 64, dtype=dtype, generator=g)
        k, v = some[:, :, which], torch.randn(1, 2, length, 16, dtype=dtype, generator=g)
        whole = attend(q, k, v, mechanism, Mask(causal=True))[:, :, -1:]
        assert_near(attend(q[:, :, -1:], k, v, mechanism, Mask(causal=True)), whole, "step", 1e-5)
        store = mechanism.store()
        if store is not None:
            mechanism.remember(store, q, k, v, PLAIN, None)
            assert_near(mechanism.resume(store, q[:, :, -1:], PLAIN, None), whole, "cached step", 1e-5)


def test_decoding_reads_only_what_it_chose():
    """With the bounds kept from before, keys that were not chosen are not read at all: they may be anything."""
    mechanism, mask = TopK(k=32, block=16, window=4), Mask(causal=True)
    q, k, v = qkv(Shape(i=1, j=500), "decoding")
    grid = Grid.of(torch.arange(500), 16)
    choice = mechanism.choose(q, k, mask, bounds=Bounds.of(k, grid))
    expected = mechanism.fast(q, k, v, mask, Score(), choice=choice)
    read = pairs_of(mechanism, q, k, mask)[:, :, 0].view(2, 2, 2, 500).any(2)  # by key head
    assert read.float().mean() < 0.2
    k, v = (x.masked_fill(~read[..., None], float("nan")) for x in (k, v))
    assert torch.equal(mechanism.fast(q, k, v, mask, Score(), choice=choice), expected)
    blind = mechanism.choose(q, k, mask, bounds=Bounds.of(qkv(Shape(i=1, j=500), "decoding")[1], grid))
    assert torch.equal(blind.chosen, choice.chosen)


def test_blocks_find_the_keys_that_matter():
    """Topics of a few tokens come back far away: the blocks of a query's own topic are read."""
    topics = torch.randn(1, 2, 50, 1, 16, dtype=torch.float64, generator=generator("topics"))
    keys = topics + 0.3 * qkv(Shape(b=50, h=2, g=2, j=8, d=16), "tokens")[1].movedim(0, 1)
    k = keys.reshape(1, 2, 400, 16)
    order = torch.randperm(400, generator=generator("order"))
    pairs = pairs_of(TopK(k=32, block=8, window=0), 3 * k[:, :, order], k, Mask())
    assert pairs.float().mean() < 0.12
    assert pairs[:, :, torch.arange(400), order].float().mean() > 0.98


@pytest.mark.parametrize("fields", [{"k": 0}, {"k": 2.0}, {"k": True}, {"block": 0}, {"window": -1}], ids=str)
def test_bad_fields(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} must be a whole number"):
        TopK(**fields)


def test_budget_beyond_the_length_is_dense():
    q, k, v = qkv(Shape(j=30), "dense")
    for causal in (False, True):
        earlier = torch.ones(30, 30, dtype=torch.bool).tril() if causal else torch.ones(30, 30, dtype=torch.bool)
        for mechanism in (
            TopK(k=30, block=1, window=0),
            TopK(k=10**6, block=7, window=0),
            TopK(k=1, block=64, window=0),
        ):
            o = attend(q, k, v, mechanism, Mask(causal=causal))
            assert_near(o, naive_attention(q, k, v, earlier, Score()), str(mechanism))
