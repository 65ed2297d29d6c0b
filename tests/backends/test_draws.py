"""Draws without state: the same numbers as plain integer arithmetic, and no pattern in them."""

import math

import pytest
import torch

from hf_tfast.backends.draws import draw, keep, mix, uniform

MASK = 0xFFFFFFFF


def plain_mix(x):
    x &= MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def plain_draw(seed, *index):
    x = seed & MASK
    for n in index:
        x = plain_mix((x * 0x9E3779B1 & MASK) ^ (n & MASK))
    return x - (1 << 32) if x >> 31 else x


@pytest.mark.parametrize("seed", [0, 1, -1, 12345, 2**31, 2**31 - 1, -(2**31), 2**40 + 3])
def test_draw_is_plain_integer_arithmetic(seed):
    h, i = torch.arange(5)[:, None], torch.tensor([0, 1, 2, 63, 64, 1000, 2**20])
    expected = [[plain_draw(seed, a, b) for b in i.tolist()] for a in range(5)]
    assert draw(seed, h, i).tolist() == expected
    assert draw(seed, h.int(), i.int()).tolist() == expected
    assert draw(seed, torch.tensor(3), torch.tensor(64)).tolist() == expected[3][4]
    assert draw(seed, h, i).dtype == torch.int32


def test_mix_is_a_bijection():
    x = mix(torch.arange(-(2**19), 2**19))
    assert len(x.unique()) == 2**20


def test_every_index_matters():
    i = torch.arange(64)
    grids = torch.stack([draw(3, i[:, None], i), draw(4, i[:, None], i), draw(3, i[:, None], i, i[:1])])
    assert len(grids.unique()) >= grids.numel() - 2  # by chance 0.02 pairs meet
    assert ((grids[0] == grids[0].T) == (i == i[:, None])).all()


def test_uniform_is_uniform():
    for seed in (0, 1, -7):
        u = uniform(seed, torch.arange(16)[:, None], torch.arange(4096))
        assert u.dtype == torch.float64
        assert 0 <= u.min() < 1e-3
        assert 1 - 1e-3 < u.max() < 1
        counts = torch.histc(u, 64, 0, 1)
        chi = ((counts - 1024) ** 2 / 1024).sum().item()
        assert 63 - 5 * math.sqrt(126) < chi < 63 + 5 * math.sqrt(126)
        for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1])):
            assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 5 / 256


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9, 1 - 1e-12])
def test_keep_rate(rate):
    n = torch.arange(256)
    kept = keep(rate, 7, n[:2, None, None, None], n[:4, None, None], n[:, None], n)
    assert kept.shape == (2, 4, 256, 256)
    assert kept.dtype == torch.bool
    assert abs(kept.double().mean() - (1 - rate)) <= 5 * math.sqrt(rate * (1 - rate) / kept.numel()) + 1e-9
    for axis in range(4):  # no row, column, head or batch row is favoured
        others = [a for a in range(4) if a != axis]
        share = kept.double().mean(others)
        spread = math.sqrt(rate * (1 - rate) * kept.shape[axis] / kept.numel())
        assert (share - (1 - rate)).abs().max() <= 6 * spread + 1e-9


def test_keep_has_no_pattern():
    """Signs of neighbours, of other rows, heads and seeds, and of rectangles, are unrelated."""
    n = torch.arange(512)
    for seed in (0, 1, -1, 2**31 - 1):
        sign = keep(0.5, seed, n[:1, None, None], n[:2, None, None], n[:, None], n).double() * 2 - 1
        after = keep(0.5, seed + 1, n[:1, None, None], n[:2, None, None], n[:, None], n).double() * 2 - 1
        one = sign[0]
        pairs = {
            "next key": one[:, 1:] * one[:, :-1],
            "next query": one[1:] * one[:-1],
            "next head": sign[0] * sign[1],
            "next seed": one * after[0],
            "transposed": (one * one.T).triu(1)[n[:, None] < n],
            "rectangle": one[1:, 1:] * one[1:, :-1] * one[:-1, 1:] * one[:-1, :-1],
            "far rectangle": one[256:, 256:] * one[256:, :256] * one[:256, 256:] * one[:256, :256],
        }
        for name, product in pairs.items():
            assert abs(product.mean()) < 5 / math.sqrt(product.numel()), f"{name} at seed {seed}"


def test_keep_is_a_function_of_position():
    n = torch.arange(100)
    whole = keep(0.3, 5, n[:1, None, None], n[:4, None, None], n[:, None], n)
    part = keep(0.3, 5, n[:1, None, None], n[2:4, None, None], n[70:, None], n[30:60])
    assert torch.equal(part, whole[2:4, 70:, 30:60])
