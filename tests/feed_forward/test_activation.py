"""Activation: levels, gradients and step of each kind, against their definitions."""

import math

import pytest
import torch

from hf_tfast.feed_forward.activation import SEEN, Activation, Binary, Learned, Piecewise, spread, step_of
from hf_tfast.testing import generator
from tests.feed_forward.blocks import block, error, inputs, moments


def numbers(*seed, count=4000, signed=True):
    x = torch.randn(count, generator=generator("numbers", *seed))
    return x if signed else x.abs()


def made(kind, bits, x, pieces=4):
    signed = bool((x < 0).any())
    levels = {"learned": lambda: Learned(bits, signed), "binary": lambda: Binary(bits)}.get(
        kind, lambda: Piecewise(bits, pieces)
    )()
    with torch.no_grad():
        levels.start(x)
    return levels


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["learned", "binary", "piecewise"])
def test_there_are_two_to_the_bits_levels(kind, bits, signed):
    x = numbers(kind, bits, signed=signed)
    y = made(kind, bits, x)(x).detach()
    assert 1 < len(y.unique()) <= 2**bits


@pytest.mark.parametrize("kind", ["learned", "binary", "piecewise"])
def test_the_error_falls_with_the_bits(kind):
    x = numbers(kind)
    errors = [float((made(kind, bits, x)(x).detach() - x).square().mean()) for bits in range(1, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3


@pytest.mark.parametrize("kind", ["learned", "binary", "piecewise"])
def test_rounding_is_to_the_nearest_level(kind):
    """Within the outer levels, x^ is the level next to x (of `piecewise`: next in g, which is linear in between)."""
    x = numbers(kind).double()
    levels = made(kind, 3, x).double()
    y = levels(x).detach()
    every = y.unique()
    inside = (x > every[0]) & (x < every[-1])
    nearest = every[(x[:, None] - every).abs().argmin(1)]
    agree = (nearest == y)[inside].double().mean()
    assert agree > (0.9 if kind == "piecewise" else 0.999)


@pytest.mark.parametrize("kind", ["learned", "binary", "piecewise"])
def test_gradient_of_x_is_one_inside_and_zero_beyond(kind):
    x = numbers(kind, "gradient").double()
    levels = made(kind, 4, x).double()
    every = levels(torch.linspace(-9, 9, 5000, dtype=torch.float64)).detach().unique()
    middle = torch.linspace(float(every[0]) * 0.9, float(every[-1]) * 0.9, 301, dtype=torch.float64).requires_grad_()
    levels(middle).sum().backward()
    assert float((middle.grad - 1).abs().mean()) < (0.35 if kind == "piecewise" else 1e-9)
    beyond = torch.tensor([-50.0, 50.0], dtype=torch.float64, requires_grad=True)
    levels(beyond).sum().backward()
    assert torch.equal(beyond.grad, torch.zeros(2, dtype=torch.float64))


def test_learned_step_has_the_gradient_of_the_paper():
    """Equation 3: (-x/s + round(x/s)) within, the outer code beyond; times 1 / sqrt(N Q), section 2.2."""
    x = numbers("paper", count=500).double() * 3
    levels = Learned(3, True).double()
    with torch.no_grad():
        levels.step.fill_(0.7)
    levels(x).sum().backward()
    u = x / 0.7
    each = torch.where(u <= -4, torch.tensor(-4.0), torch.where(u >= 3, torch.tensor(3.0), u.round() - u))
    torch.testing.assert_close(levels.step.grad, each.double().sum() / math.sqrt(500 * 3))


def test_learned_agrees_with_torch_fake_quantise():
    x = numbers("torch", count=800)
    levels = Learned(8, True)
    with torch.no_grad():
        levels.step.fill_(0.03)
    peer = torch.fake_quantize_per_tensor_affine(x, 0.03, 0, -128, 127)
    torch.testing.assert_close(levels(x).detach(), peer, rtol=0, atol=1e-6)


def test_first_step_is_the_best_of_many():
    x = numbers("best")
    levels = made("learned", 4, x)
    found = float((levels(x).detach() - x).square().mean())
    for share in (0.5, 0.8, 1.25, 2.0):
        other = Learned(4, True)
        with torch.no_grad():
            other.step.copy_(levels.step * share)
        assert found <= float((other(x).detach() - x).square().mean())


def test_piecewise_beats_even_steps_where_most_numbers_are_small():
    x = numbers("heavy", count=20000) ** 3
    even = Piecewise(4, 1)
    with torch.no_grad():
        even.start(x)
    curved = made("piecewise", 4, x, pieces=8)
    assert (curved(x) - x).square().mean() < (even(x) - x).square().mean()


@pytest.mark.parametrize("kind", ["learned", "binary", "piecewise"])
def test_levels_learn(kind):
    """From a bad start, a few steps of gradient descent on the error bring it down."""
    x = numbers(kind, "learn")
    levels = made(kind, 2, x * 4)
    optimiser = torch.optim.Adam(levels.parameters(), lr=0.03)
    before = float((levels(x).detach() - x).square().mean())
    for _ in range(150):
        optimiser.zero_grad()
        loss = (levels(x) - x).square().mean() * (1000 if kind == "learned" else 1)
        loss.backward()
        optimiser.step()
    assert float((levels(x).detach() - x).square().mean()) < 0.7 * before


def test_eight_bits_hardly_change_a_block():
    for kind in ("learned", "piecewise", "binary"):
        given, dense, x = block("gated", kind), block("gated", kind), inputs(kind)
        Activation(kind=kind, bits=8).apply(given, moments=moments(dense, x))
        assert error(given, dense, x) < 0.06, kind


def test_limit_needs_no_data():
    given = block("plain")
    Activation(bits=8, limit=6.0).apply(given)
    assert given.get("up").levels.step.item() == pytest.approx(6 / 127, rel=0.1)


def test_which_steps_an_int8_layer_can_use():
    assert step_of(Learned(8, True)) is not None
    assert step_of(Learned(7, False)) is not None
    assert step_of(Learned(8, False)) is None  # codes up to 255
    assert step_of(Learned(1, True)) is None
    assert step_of(Binary(8)) is None


def check_best(levels, x, seen, weight):
    """No step rounds all of x with much less error than the one found from a sample of it."""
    with torch.no_grad():
        levels.start(seen, weight)
        found = float((levels(x) - x).norm())
        for share in torch.linspace(0.02, 2, 50):
            levels.step.copy_(share * x.abs().max() / 127)
            assert found < 1.03 * float((levels(x) - x).norm())


def test_first_levels_see_every_feature():
    """One feature in 384 is large, as in real encoders: steps taken evenly over [n 384] would never meet it."""
    x = torch.randn(4096, 384, generator=generator("outlier"))
    x[:, 7] *= 30
    seen, weight = spread(x)
    assert len(seen) == len(weight) == SEEN
    assert torch.equal(spread(x)[0], seen)
    assert float(weight.sum()) == pytest.approx(x.numel(), rel=1e-4)
    assert float((seen.square() * weight).sum()) == pytest.approx(float(x.square().sum()), rel=0.05)
    levels = Learned(8, signed=True)
    check_best(levels, x, seen, weight)


def test_a_handful_that_holds_most_of_the_energy_is_met():
    x = torch.randn(4096, 384, generator=generator("handful")) / 10
    x[::800, 3] = 300.0
    seen, weight = spread(x)
    assert int((seen == 300).sum()) == 6
    levels = Learned(8, signed=True)
    check_best(levels, x, seen, weight)


def test_small_samples_are_taken_whole():
    x = torch.randn(3, 5, generator=generator("small"))
    seen, weight = spread(x)
    assert torch.equal(seen, x.flatten())
    assert torch.equal(weight, torch.ones(15))
