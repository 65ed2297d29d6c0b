"""Pruned: the neurons that stay compute what they computed; recovery is least squares; better scores lose less."""

import pytest
import torch

from hf_tfast.feed_forward.pruned import Pruned
from tests.feed_forward.blocks import INNER, KINDS, block, error, inputs, moments, outputs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["magnitude", "activation", "random"])
def test_pruned_is_dense_with_silent_neurons(kind, method):
    """Zeroing the columns of the neurons that went gives the same outputs."""
    given, dense, x = block(kind, method), block(kind, method), inputs(kind)
    Pruned(width=16, method=method).apply(given, moments=moments(given, x))
    narrow = outputs(given, x)
    down = dense.model.down
    columns = (down.weight if kind == "conv1d" else down.weight.T).detach()  # [inner out]
    mine = given.model.down.weight.T.detach()
    kept = [int((columns - row).abs().sum(1).argmin()) for row in mine]
    assert len(set(kept)) == 16
    assert kept == sorted(kept)
    with torch.no_grad():
        for n in set(range(INNER)) - set(kept):
            columns[n] = 0
    torch.testing.assert_close(narrow, outputs(dense, x))


def test_matrices_shrink():
    given = block("fused")
    sizes = Pruned(ratio=0.4).apply(given)
    assert sizes == {"down": 16}
    assert given.model.up.weight.shape == (32, 24)
    assert given.model.down.weight.shape == (24, 16)
    assert given.model.down.in_features == 16


@pytest.mark.parametrize("bias", [True, False])
def test_recovery_is_least_squares(bias):
    given, dense, x = block("plain", bias=bias), block("plain", bias=bias), inputs("recover")
    seen = moments(dense, x)
    Pruned(width=16, method="activation", recover=True).apply(given, moments=seen)
    with torch.no_grad():
        h = given.model.inner(x)
        y = outputs(dense, x)
        design = torch.cat([h, torch.ones(len(h), 1, dtype=h.dtype)], 1) if bias else h
        best = (design @ torch.linalg.lstsq(design, y).solution - y).square().sum()
        found = (outputs(given, x) - y).square().sum()
    torch.testing.assert_close(found, best, rtol=1e-3, atol=0)


def test_each_help_lowers_the_error():
    """Over several blocks: random > magnitude > activation > activation with recovery."""
    ways = [{"method": "random"}, {"method": "magnitude"}, {"method": "activation"}]
    ways.append({"method": "activation", "recover": True})
    total = [0.0] * len(ways)
    for n in range(12):
        dense, x = block("gated", n), inputs(n)
        for m, way in enumerate(ways):
            given = block("gated", n)
            Pruned(width=24, **way).apply(given, moments=moments(dense, x))
            total[m] += error(given, dense, x)
    assert total == sorted(total, reverse=True)


def test_neurons_that_never_fire_do_not_break_recovery():
    given, x = block("plain"), inputs()
    with torch.no_grad():
        given.model.up.weight[:20] = 0
        given.model.up.bias[:20] = 0
    Pruned(width=32, method="magnitude", recover=True).apply(given, moments=moments(given, x))
    assert torch.isfinite(given.model.down.weight).all()


def test_widths_are_multiples():
    assert Pruned(ratio=0.53).apply(block("plain")) == {"down": 24}
    assert Pruned(ratio=0.53, multiple=1).apply(block("plain")) == {"down": 21}
    assert Pruned(ratio=0.001).apply(block("plain")) == {"down": 8}


def test_a_form_after_it_sees_fewer_features():
    given, x = block("plain"), inputs()
    seen = moments(given, x)
    Pruned(width=16).apply(given, moments=seen)
    assert seen["down"].second.shape == (16, 16)
    torch.testing.assert_close(
        seen["down"].second,
        given.model.inner(x).detach().T @ given.model.inner(x).detach() / len(x),
        rtol=1e-4,
        atol=1e-5,
    )
