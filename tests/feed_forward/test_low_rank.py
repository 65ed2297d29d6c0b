"""LowRank: each method is the best at what it says, the random one nearly."""

import pytest
import torch

from hf_tfast.feed_forward.low_rank import LowRank, roots
from hf_tfast.testing import generator
from tests.feed_forward.blocks import KINDS, block, error, inputs, moments, outputs


def weights(given):
    """[out in] that each pair of factors stands for."""
    return {p: given.get(p).second.weight @ given.get(p).first.weight for p in given.paths}


@pytest.mark.parametrize("rank", [1, 6, 23])
def test_svd_reaches_the_bound_of_eckart_and_young(rank):
    given, dense = block("gated", rank), block("gated", rank)
    LowRank(rank=rank).apply(given)
    for path, weight in weights(given).items():
        left = torch.linalg.svdvals(dense.get(path).weight)[rank:].square().sum().sqrt()
        torch.testing.assert_close((weight - dense.get(path).weight).norm(), left)


def test_random_is_nearly_as_good_where_singular_values_fall():
    given, svd, dense = (block("plain", "sketch") for _ in range(3))
    for each in (given, svd, dense):
        with torch.no_grad():
            for path in each.paths:
                u, s, vh = torch.linalg.svd(each.get(path).weight, full_matrices=False)
                each.get(path).weight.copy_(u * (s * 0.8 ** torch.arange(len(s))) @ vh)
    LowRank(rank=6, method="random").apply(given)
    LowRank(rank=6).apply(svd)
    for path in dense.paths:
        worse, best = ((weights(x)[path] - dense.get(path).weight).norm() for x in (given, svd))
        assert best <= worse <= 1.05 * best


def test_random_is_a_function_of_its_seed():
    one, same, other = (block("plain", "seed") for _ in range(3))
    torch.manual_seed(1)
    LowRank(rank=3, method="random", seed=4).apply(one)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    LowRank(rank=3, method="random", seed=4).apply(same)
    LowRank(rank=3, method="random", seed=5).apply(other)
    assert torch.equal(weights(one)["up"], weights(same)["up"])
    assert not torch.equal(weights(one)["up"], weights(other)["up"])
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's draws go on as if nothing had been drawn


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [2, 8])
def test_activation_is_the_best_of_its_rank_on_the_data(rank, bias):
    """No factors of that rank, and no bias, give the layer a smaller squared error: regression proves it."""
    given, svd, dense = (block("plain", rank, bias=bias) for _ in range(3))
    x = inputs(rank)
    seen = moments(dense, x)
    LowRank(rank=rank, method="activation").apply(given, moments=seen)
    LowRank(rank=rank).apply(svd)
    for path in dense.paths:
        reads = x if path == "up" else dense.model.inner(x)
        with torch.no_grad():
            y = dense.get(path)(reads)
            found, plain = ((each.get(path)(reads) - y).square().sum() for each in (given, svd))
            centred = y - y.mean(0) if bias else y
            best = (
                torch.linalg.svdvals(centred)[rank:].square().sum()
            )  # outputs cut to the rank: reduced-rank regression
        torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-7)
        assert found < plain


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", ["svd", "random"])
def test_recovery_is_least_squares_given_the_first_factor(method, bias):
    given, plain, dense = (block("plain", method, bias=bias) for _ in range(3))
    x = inputs(method)
    LowRank(rank=6, method=method, recover=True).apply(given, moments=moments(dense, x))
    LowRank(rank=6, method=method).apply(plain)
    for path in dense.paths:
        assert torch.equal(given.get(path).first.weight, plain.get(path).first.weight)
        reads = x if path == "up" else dense.model.inner(x)
        with torch.no_grad():
            y = dense.get(path)(reads)
            z = given.get(path).first(reads)
            z = torch.cat([z, torch.ones(len(z), 1, dtype=z.dtype)], 1) if bias else z
            best = (z @ torch.linalg.lstsq(z, y).solution - y).square().sum()
            found, unfitted = ((each.get(path)(reads) - y).square().sum() for each in (given, plain))
        torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-7)
        assert found < unfitted


def test_recovery_helps_on_data_that_it_has_not_seen():
    given, plain, dense = (block("gated", "held") for _ in range(3))
    seen, held = inputs("seen", rows=600).split(300)
    LowRank(rank=6, recover=True).apply(given, moments=moments(dense, seen))
    LowRank(rank=6).apply(plain)
    assert error(given, dense, held) < error(plain, dense, held)
    with pytest.raises(ValueError, match="leave recover out"):
        LowRank(rank=6, method="activation", recover=True)
    with pytest.raises(ValueError, match="calibration=batches"):
        LowRank(rank=6, recover=True).apply(block("gated"))


def test_activation_leaves_out_what_the_data_does_not_have():
    given, dense = block("plain", "dead", bias=False), block("plain", "dead", bias=False)
    x = inputs("dead", rank=5)
    LowRank(rank=5, method="activation").apply(given, moments=moments(dense, x))
    torch.testing.assert_close(
        given.get("up")(x), dense.get("up")(x), rtol=1e-4, atol=1e-4
    )  # five directions are all there is
    assert all(torch.isfinite(p).all() for p in given.model.parameters())


def test_energy_keeps_as_few_as_it_may():
    given, dense = block("plain", "energy"), block("plain", "energy")
    sizes = LowRank(energy=0.8).apply(given)
    for path, rank in sizes.items():
        s = torch.linalg.svdvals(dense.get(path).weight).square()
        assert s[:rank].sum() >= 0.8 * s.sum() > s[: rank - 1].sum()


@pytest.mark.parametrize("kind", KINDS)
def test_ratio_holds_the_share_of_weights(kind):
    given = block(kind)
    dense = {path: given.get(path).weight.numel() for path in given.paths}
    LowRank(ratio=0.5).apply(given)
    for path, before in dense.items():
        after = given.get(path).first.weight.numel() + given.get(path).second.weight.numel()
        assert 0.4 * before < after <= 0.5 * before


def test_outputs_with_batch_axes():
    given = block("plain", "axes")
    LowRank(rank=5).apply(given)
    x = inputs("axes", rows=12)
    torch.testing.assert_close(outputs(given, x.view(3, 4, -1)).flatten(0, 1), outputs(given, x))


def test_roots_of_a_singular_matrix():
    a = torch.randn(9, 4, generator=generator("roots"), dtype=torch.float64)
    c = a @ a.T
    root, undo = roots(c)
    torch.testing.assert_close(root @ root, c)
    torch.testing.assert_close(root @ undo @ root, root, rtol=1e-6, atol=1e-6)


def test_factors_are_plain_linear_layers():
    """Factors are plain linear layers, so that forms after this one find them."""
    given = block("gated")
    LowRank(rank=4).apply(given)
    assert [path for path, _ in given.linears()] == [
        f"{path}.{half}" for path in given.paths for half in ("first", "second")
    ]
    dense = block("gated")
    assert 0 < error(given, dense, inputs()) < 1.5
