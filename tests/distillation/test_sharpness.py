"""How sharply a model attends, against the definition."""

import pytest
import torch

from hf_tfast.distillation.sharpness import sharpness
from tests.distillation.tiny_lm import llama


def test_even_attention_divides_among_all(monkeypatch):
    """Keys of size zero: a query divides its attention among all keys it may read, half of them on average."""
    model = llama()
    for name, weight in model.named_parameters():
        if "k_proj" in name:
            weight.data.zero_()
    implementation = model.config._attn_implementation
    found = sharpness(model, torch.randint(0, 20, (1, 65)))
    assert [one["layer"] for one in found] == list(range(model.config.num_hidden_layers))
    assert all(one["keys"] == pytest.approx(33.0, rel=1e-5) for one in found)
    assert model.config._attn_implementation == implementation


def test_larger_queries_attend_more_sharply():
    model = llama()
    ids = torch.randint(0, 20, (1, 40))
    before = sharpness(model, ids)[0]
    for name, weight in model.named_parameters():
        if "layers.0" in name and ("q_proj" in name or "k_proj" in name):
            weight.data *= 6.0
    after = sharpness(model, ids)[0]
    assert after["norm"] == pytest.approx(36.0 * before["norm"], rel=1e-4)
    assert 1.0 <= after["keys"] < before["keys"] <= 20.5
