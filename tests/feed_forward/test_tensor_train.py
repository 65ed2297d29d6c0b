"""TensorTrain: cores equal TT-SVD's definition, and every order of contraction gives the same numbers."""

import math

import pytest
import torch

from hf_tfast.feed_forward.tensor_train import (
    TensorTrain,
    TensorTrainLinear,
    balanced,
    cheapest,
    full_ranks,
    parameters,
    tensor_train,
)
from hf_tfast.testing import generator
from tests.feed_forward.blocks import block

SHAPES = [((4, 6), (5, 8)), ((2, 3, 4), (5, 2, 4)), ((3, 2, 2, 2), (2, 2, 5, 2))]


def train(ins, outs, rank, *seed):
    weight = torch.randn(math.prod(outs), math.prod(ins), generator=generator(ins, outs, *seed), dtype=torch.float64)
    ranks = tuple(min(rank, most) for most in full_ranks(ins, outs))
    return weight, tensor_train(weight, ins, outs, ranks)


@pytest.mark.parametrize(("ins", "outs"), SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 999])
def test_every_order_of_contraction_agrees(ins, outs, rank):
    weight, cores = train(ins, outs, rank)
    layer = TensorTrainLinear(cores, None)
    x = torch.randn(7, weight.shape[1], generator=generator(rank), dtype=torch.float64)
    exact = x @ layer.dense().mT
    for way in (layer._forward, layer._backward):
        torch.testing.assert_close(way(x, list(layer.cores)).reshape(exact.shape), exact)
    if rank == 999:
        torch.testing.assert_close(layer.dense(), weight)


def test_dense_is_the_definition():
    ins, outs = (2, 3, 4), (5, 2, 4)
    weight, cores = train(ins, outs, 6)
    made = torch.einsum("aixb,bjyc,ckzd->xyzijk", *cores).reshape(weight.shape)
    torch.testing.assert_close(TensorTrainLinear(cores, None).dense(), made)


def test_error_is_within_the_bound_of_oseledets():
    """Theorem 2.2: the squared error is at most the sum of what each cut's best approximation leaves."""
    ins, outs = (2, 3, 4), (5, 2, 4)
    weight, cores = train(ins, outs, 6)
    n = len(ins)
    whole = weight.reshape(*outs, *ins).permute([axis for m in range(n) for axis in (n + m, m)])
    left = 0.0
    for m in range(1, n):
        cut = whole.reshape(math.prod(i * o for i, o in zip(ins[:m], outs[:m], strict=True)), -1)
        left += float(torch.linalg.svdvals(cut)[6:].square().sum())
    assert float((TensorTrainLinear(cores, None).dense().detach() - weight).square().sum()) <= left * (1 + 1e-9)


def test_ratio_fits_the_budget():
    given = block("plain")
    sizes = TensorTrain(ratio=0.4).apply(given)
    for path in given.paths:
        held = sum(core.numel() for core in given.get(path).cores)
        assert held <= 0.4 * 24 * 40
        ins, outs = given.get(path).ins, given.get(path).outs
        assert parameters(ins, outs, max(sizes[path]) + 1) > 0.4 * 24 * 40


def test_the_layer_down_turns_the_shape_around():
    given = block("plain")
    TensorTrain(ranks=4, shape=((4, 6), (5, 8))).apply(given)
    assert (given.get("up").ins, given.get("up").outs) == ((4, 6), (5, 8))
    assert (given.get("down").ins, given.get("down").outs) == ((5, 8), (4, 6))


def test_factors():
    assert balanced(768, 3, "x") == (12, 8, 8)
    assert balanced(24, 2, "x") in ((6, 4),)
    with pytest.raises(ValueError, match="up: 31 has no 3 factors"):
        balanced(31, 3, "up")


def test_the_cheapest_order_counts_multiplications():
    cores = [(1, 4, 4, 2), (2, 4, 4, 1)]
    assert cheapest(1, cores) in ("first", "last")
    assert cheapest(10**6, [(1, 4, 4, 16), (16, 4, 4, 1)]) == "dense"  # full ranks: building it once is cheaper
    assert cheapest(8, [(1, 2, 64, 2), (2, 64, 2, 1)]) == "last"  # the last core shrinks the state first


def test_tensorly_agrees():
    tensorly = pytest.importorskip("tensorly", reason="the peer of this test is not installed")
    from tensorly.decomposition import tensor_train_matrix

    ins, outs = (4, 6), (5, 8)
    weight, cores = train(ins, outs, 5)
    tensor = tensorly.tensor(weight.reshape(*outs, *ins).numpy())
    peer = tensor_train_matrix(tensor, rank=[1, 5, 1]).to_tensor().reshape(weight.shape)
    torch.testing.assert_close(TensorTrainLinear(cores, None).dense(), torch.as_tensor(peer))
