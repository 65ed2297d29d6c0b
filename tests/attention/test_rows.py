"""Cutting a batch into full rows, against one masked softmax over the whole batch with positions counted here."""

import random
from dataclasses import replace

import pytest
import torch

from hf_tfast.attention import Mask, Score
from hf_tfast.attention._rows import over_full_rows
from hf_tfast.testing import Shape, assert_near, generator, naive_attention, qkv

WINDOW, SINKS = 4, 2


def near(i, j, causal, windowed):
    """Which positions a query reads: everything, or a window and the first ones."""
    pairs = torch.ones_like(i - j, dtype=torch.bool)
    if windowed:
        pairs = (i - j < WINDOW if causal else (i - j).abs() <= WINDOW) | (j < SINKS)
        pairs = pairs if causal else pairs | (i < SINKS)
    return pairs & (j <= i) if causal else pairs


def on_full_rows(windowed):
    """What a mechanism does: one softmax over a full row. Checks that nothing but full rows arrives."""

    def run(q, k, v, mask, score):
        assert mask.valid is None
        assert mask.segments is None
        assert type(mask.start) is int
        assert type(mask.kept) is int
        assert 0 < q.shape[2] <= k.shape[2] == v.shape[2]
        at = mask.positions(k.shape[2])
        return naive_attention(q, k, v, near(at[-q.shape[2] :, None], at, mask.causal, windowed), score)

    return run


def oracle(q, k, v, mask, score, windowed):
    """One softmax over everything, [b i j] pairs by document and by position inside the document."""
    (b, _, i, _), j = q.shape, k.shape[2]
    documents = torch.ones(b, j, dtype=torch.int64) if mask.segments is None else mask.segments
    documents = documents if mask.valid is None else documents * mask.valid
    one_document = documents[:, :, None] == documents[:, None, :]
    counted = (one_document & (torch.arange(j) < torch.arange(j)[:, None])).sum(-1)  # keys of the document before it
    start, kept = (torch.as_tensor(x).reshape(-1, 1) for x in (mask.start, mask.kept))
    at = torch.where(torch.arange(j) < kept, counted, counted + start)
    pairs = near(at[:, j - i :, None], at[:, None, :], mask.causal, windowed)
    pairs = pairs & one_document[:, j - i :] & (documents != 0)[:, None, :]
    return naive_attention(q, k, v, pairs[:, None], score)


def random_case(n):
    """Shapes and a mask: every combination of valid, segments, start and kept that has a meaning."""
    dice = random.Random(n)
    b, j = dice.randint(1, 4), dice.choice([1, 2, 7, 33, 50])
    shape = Shape(b=b, h=4, g=dice.choice([1, 2, 4]), i=dice.choice([1, j, dice.randint(1, j)]), j=j, d=4, e=3)
    draws = generator("rows", n)
    at, size = torch.arange(j), torch.randint(0, j + 1, (b, 1), generator=draws)
    valid = {
        "all": None,
        "left": at >= j - size,
        "right": at < size,
        "holes": torch.rand(b, j, generator=draws) < dice.random(),
        "true": torch.ones(b, j, dtype=torch.bool),
    }[dice.choice(["all", "left", "right", "holes", "true"])]
    kinds = {
        "none": None,
        "packed": (torch.rand(b, j, generator=draws) < 0.15).long().cumsum(-1) + 1,
        "interleaved": torch.randint(-1, 4, (b, j), generator=draws),
        "one": torch.full((b, j), 5, dtype=torch.int32),
    }
    segments = kinds[dice.choice(list(kinds))]
    mask = Mask(causal=dice.random() < 0.5, valid=valid, segments=segments)
    if segments is None and dice.random() < 0.5:  # a cache that has dropped keys holds one document per row
        starts = dice.choice([7, torch.tensor(3), torch.randint(0, 9, (b,), generator=draws)])
        mask = replace(mask, start=starts, kept=dice.choice([0, 2, torch.randint(0, 4, (b,), generator=draws)]))
    return shape, mask


@pytest.mark.parametrize("windowed", [False, True], ids=["everything", "band"])
@pytest.mark.parametrize("n", range(60))
def test_equals_one_masked_softmax(n, windowed):
    shape, mask = random_case(n)
    q, k, v = qkv(shape, n, grad=True)
    score = Score(sinks=torch.randn(4, generator=generator(n), dtype=torch.float64)) if n % 3 else Score()
    o = over_full_rows(on_full_rows(windowed), q, k, v, mask, score)
    expected = oracle(q, k, v, mask, score, windowed)
    assert_near(o, expected, str(mask))
    upstream = torch.randn(o.shape, generator=generator(n, "up"), dtype=o.dtype)
    gradients = [torch.autograd.grad(x, (q, k, v), upstream) for x in (o, expected)]
    for got, want in zip(*gradients, strict=True):
        assert_near(got, want, f"gradient, {mask}")


def calls(mask, shape=Shape(b=3, j=12), score=Score()):  # noqa: B008 frozen
    """The calls that a batch with `mask` becomes, and its keys."""
    q, k, v = qkv(shape, "calls")
    seen = []

    def run(*call):
        seen.append(call)
        return on_full_rows(False)(*call)

    over_full_rows(run, q, k, v, mask, score)
    return seen, k


def test_a_batch_without_padding_stays_one_call():
    ones = torch.ones(3, 12, dtype=torch.bool)
    masks = [
        Mask(),
        Mask(valid=ones),
        Mask(segments=ones * 4),
        Mask(segments=torch.arange(1, 4)[:, None].expand(3, 12)),
    ]
    masks += [Mask(valid=ones, start=torch.tensor([5, 5, 5]), kept=torch.tensor([2, 2, 2])), Mask(start=5, kept=2)]
    for mask in masks:
        seen, k = calls(mask)
        assert [call[1].data_ptr() for call in seen] == [k.data_ptr()]
        assert seen[0][1].shape == k.shape


def test_rows_with_their_own_gap_are_cut():
    seen, _ = calls(Mask(valid=torch.ones(3, 12, dtype=torch.bool), start=4, kept=torch.tensor([1, 2, 3])))
    assert [(call[3].start, call[3].kept) for call in seen] == [(4, 1), (4, 2), (4, 3)]


def test_contiguous_documents_are_views():
    segments = torch.tensor([[0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 0, 0]]).expand(3, 12)
    seen, k = calls(Mask(segments=segments))
    assert len(seen) == 9
    assert all(call[1].untyped_storage().data_ptr() == k.untyped_storage().data_ptr() for call in seen)
    assert [call[1].shape[2] for call in seen[:3]] == [2, 3, 4]


def test_documents_without_queries_are_not_computed():
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3]]).expand(3, 12)
    seen, _ = calls(Mask(segments=segments), Shape(b=3, i=5, j=12))
    assert [call[1].shape[2] for call in seen] == [5, 5, 5]


def test_every_document_draws_its_own_dropout():
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 0, 0]]).expand(3, 12)
    one, other = (
        [call[4].seed for call in calls(Mask(segments=segments), score=Score(dropout=0.5, seed=seed))[0]]
        for seed in (1, 2)
    )
    assert len(set(one + other)) == 18
    assert one == [call[4].seed for call in calls(Mask(segments=segments), score=Score(dropout=0.5, seed=1))[0]]


def test_a_gap_inside_packed_documents_is_refused():
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3]]).expand(3, 12)
    with pytest.raises(ValueError, match="dropped.*packed"):
        calls(Mask(segments=segments, start=4))


def test_an_empty_batch_stays_in_the_graph():
    q, k, v = (x.fill_(float("inf")).requires_grad_() for x in qkv(Shape(), "empty"))
    sinks = torch.zeros(4, dtype=q.dtype, requires_grad=True)
    mask = Mask(valid=torch.zeros(2, 65, dtype=torch.bool))
    o = over_full_rows(on_full_rows(False), q, k, v, mask, Score(sinks=sinks))
    assert not o.any()
    assert not any(x.any() for x in torch.autograd.grad(o.sum(), (q, k, v, sinks)))
    with torch.no_grad():
        assert not over_full_rows(on_full_rows(False), q, k, v, mask, Score()).requires_grad
