"""Linformer: the drawn projection. The contract is tested in test_contract*.py."""

import pytest
import torch

from hf_tfast.attention import Mask, Score, attend
from hf_tfast.attention.dense import Dense
from hf_tfast.attention.linformer import Linformer
from hf_tfast.testing import Shape, assert_near, qkv, with_gradients

CPU = torch.device("cpu")


def test_rows_are_balanced_and_random():
    rows = Linformer(rank=10, seed=3).rows(57, CPU)
    for block in range(5):
        assert sorted(rows[block * 10 : block * 10 + 10].tolist()) == list(range(10)), "a block fills every row once"
    assert len(set(rows[50:].tolist())) == 7
    assert len({tuple(rows[n * 10 : n * 10 + 10].tolist()) for n in range(5)}) == 5, "every block has its own order"
    assert not torch.equal(rows, Linformer(rank=10, seed=4).rows(57, CPU))
    pairs = torch.stack([Linformer(rank=4, seed=n).rows(8, CPU) for n in range(600)])
    together = (pairs[:, :4, None] == pairs[:, None, 4:]).double().mean(0)
    assert (together - 0.25).abs().max() < 5 * (0.25 * 0.75 / 600) ** 0.5, "some keys meet more often than others"


def test_rows_do_not_depend_on_the_length():
    linformer = Linformer(rank=7)
    every = linformer.rows(100, CPU)
    for length in (1, 7, 8, 50, 99):
        assert torch.equal(linformer.rows(length, CPU), every[:length])


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_equal_groups_are_dense(backend):
    """Keys that fall to one row are alike: averages lose nothing, and rows count two or three times."""
    linformer = Linformer(rank=9)
    q, k, v = qkv(Shape(j=25), "groups")
    rows = linformer.rows(25, CPU)
    k, v = k[:, :, rows], v[:, :, rows]
    score = Score(sinks=torch.randn(4, dtype=q.dtype), softcap=2.0)
    run = lambda mechanism: with_gradients(  # noqa: E731
        lambda q, k, v, s: attend(q, k, v, mechanism, Mask(), s, backend=backend), q, k, v, score
    )
    got, expected = run(linformer), run(Dense())
    for name in ("o", "q", "sinks"):
        assert_near(got[name], expected[name], name)


def test_error_falls_with_rank():
    """Until it is none: at rank = length every row averages one key."""
    q, k, v = qkv(Shape(b=1, h=8, g=8, j=256, d=16), "rank")
    exact = attend(q, k, v, Dense())
    errors = [(attend(q, k, v, Linformer(rank=r)) - exact).norm() / exact.norm() for r in (16, 64, 128, 255, 256)]
    assert all(more < less for less, more in zip(errors, errors[1:], strict=False)), errors
    assert errors[3] < 0.2
    assert errors[4] < 1e-12


def test_short_rows_of_a_batch_are_dense():
    q, k, v = qkv(Shape(b=2, j=40), "short")
    valid = torch.arange(40) < torch.tensor([[12], [40]])
    o = attend(q, k, v, Linformer(rank=12), Mask(valid=valid))
    exact = attend(q, k, v, Dense(), Mask(valid=valid))
    assert_near(o[0], exact[0], "12 keys and rank 12")
    assert (o[1] - exact[1]).abs().max() > 1e-3


@pytest.mark.parametrize("rank", [0, -1, 2.5, "3", None])
def test_refuses_rank(rank):
    with pytest.raises(ValueError, match="rank must be a whole number of at least 1"):
        Linformer(rank=rank)
