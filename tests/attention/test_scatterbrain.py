"""Scatterbrain: exact near, unbiased far. The contract is tested in test_contract*.py."""

import pytest
import torch

from hf_tfast.attention import Mask, Score, attend
from hf_tfast.attention.dense import Dense
from hf_tfast.attention.performer import Performer
from hf_tfast.attention.scatterbrain import Scatterbrain
from hf_tfast.attention.window import Window
from hf_tfast.testing import Shape, assert_near, qkv

NEAR = 6


@pytest.mark.parametrize("causal", [False, True])
def test_outside_the_window_weights_are_unbiased(causal):
    """Numerator and denominator, seen through sink logits of value nought, are those of dense attention on average."""
    draws = 3000  # one per head
    q, k, _ = (x.expand(1, draws, 20, 4) for x in qkv(Shape(b=1, h=1, g=1, j=20, d=4), "unbiased", causal))
    v = torch.eye(20, dtype=q.dtype).expand(1, draws, 20, 20)
    large = 30.0  # so large that it is the whole denominator: outputs are weights times exp(-30)
    score = Score(scale=0.3, sinks=torch.full((draws,), large, dtype=q.dtype))
    weights = attend(q, k, v, Scatterbrain(window=NEAR, features=8), Mask(causal=causal), score)[0] * torch.e**large
    exact = attend(q[:, :1], k[:, :1], v[:, :1], Dense(), Mask(causal=causal), Score(scale=0.3, sinks=score.sinks[:1]))
    exact = exact[0, 0] * torch.e**large
    apart = torch.arange(20)[:, None] - torch.arange(20)
    near = apart < NEAR if causal else apart.abs() <= NEAR
    far = ~near & (apart >= 0) if causal else ~near
    assert_near(weights[:, near], exact[near].expand(draws, -1), "inside the window", 1e-9)
    off = (weights.mean(0) - exact)[far].abs() / (weights.std(0)[far] / draws**0.5)
    assert off.max() < 4.5, f"the mean over draws is {off.max():.2f} standard errors off"


@pytest.mark.parametrize("causal", [False, True])
def test_nearer_to_dense_than_its_halves(causal):
    random = torch.Generator().manual_seed(5)
    steps = torch.randn(2, 1, 8, 600, 16, generator=random, dtype=torch.float64)
    q, k = torch.nn.functional.avg_pool1d(steps.flatten(0, 2).mT, 9, 1, 4).mT.unflatten(0, (2, 1, 8)) * 2
    q, v = 0.8 * k + 0.2 * q, torch.randn(1, 8, 600, 16, generator=random, dtype=torch.float64)
    mask = Mask(causal=causal)
    exact = attend(q, k, v, Dense(), mask)
    error = lambda mechanism: ((attend(q, k, v, mechanism, mask) - exact).norm() / exact.norm()).item()  # noqa: E731
    both = error(Scatterbrain(window=16, features=128))
    assert both < 0.8 * error(Window(window=16))
    assert both < 0.9 * error(Performer(features=128))


@pytest.mark.parametrize("i", [1, 5, 40, 300])
@pytest.mark.parametrize("window", [1, 7, 299, 300, 500])
@pytest.mark.parametrize("causal", [False, True])
def test_window_against_length(i, window, causal):
    q, k, v = qkv(Shape(b=1, i=i, j=300), "lengths")
    one, other = (
        attend(q, k, v, Scatterbrain(window=window, features=10), Mask(causal=causal), backend=backend)
        for backend in ("torch", "reference")
    )
    assert_near(one, other, "fast against reference")


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_refuses_softcap(backend):
    with pytest.raises(ValueError, match="scatterbrain.*softcap=30"):
        attend(*qkv(Shape(j=5), "softcap"), Scatterbrain(), score=Score(softcap=30.0), backend=backend)


@pytest.mark.parametrize("name", ["window", "features"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "3", None])
def test_refuses_fields(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1"):
        Scatterbrain(**{name: value})
