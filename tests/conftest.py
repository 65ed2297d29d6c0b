"""Shared fixtures. Tests draw their inputs from hf_tfast.testing, seeded per test."""

import pytest
import torch

torch.set_num_threads(1)  # tests are small: on a busy machine waking a second thread costs ten times what it gives


def _poisoned(make):
    """`make`, whose memory holds NaN (or a large number) instead of whatever lay there."""

    def empty(*args, **kwargs):
        x = make(*args, **kwargs)
        if x.is_floating_point():
            return x.fill_(float("nan"))
        return x if x.dtype == torch.bool else x.fill_(77)

    return empty


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Memory that nobody writes shows: what torch.empty and its kin give is NaN within the test."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch, "empty_strided", _poisoned(torch.empty_strided))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(torch.Tensor, "new_empty_strided", _poisoned(torch.Tensor.new_empty_strided))
