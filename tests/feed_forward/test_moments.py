"""Moments: batch by batch they are those of all the data."""

import pytest
import torch

from hf_tfast.feed_forward import Moments
from hf_tfast.testing import generator
from tests.feed_forward.blocks import inputs


def test_batches_add_up():
    x = inputs("moments", rows=1000)
    whole, parts = Moments(), Moments()
    whole.add(x)
    for part in x.split([1, 0, 400, 599]):
        parts.add(part)
    assert parts.count == whole.count == 1000
    torch.testing.assert_close(parts.mean, x.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.second, x.T @ x / 1000, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.covariance, torch.cov(x.T, correction=0), rtol=1e-4, atol=1e-5)


def test_the_sample_is_fair():
    rows = torch.arange(40_000.0)[:, None]
    seen = Moments()
    for part in rows.split(1500):
        seen.add(part)
    assert len(seen.sample) == 4096
    assert len(seen.sample.unique()) == 4096
    for n, share in enumerate(torch.histc(seen.sample, 8, 0, 40_000) / 4096):
        assert 0.09 < share < 0.16, n


def test_part_is_that_of_the_features():
    x, kept = inputs("part"), torch.tensor([2, 5, 11])
    seen, part = Moments(), Moments()
    seen.add(x)
    part.add(x[:, kept])
    torch.testing.assert_close(seen.part(kept).second, part.second, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen.part(kept).sample, part.sample)


def test_not_finite():
    x = torch.randn(4, 3, generator=generator("bad"))
    x[1, 2] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        Moments().add(x)
