"""Performer: the estimate of softmax, the features, the running state. The contract is tested in test_contract*.py."""

import pytest
import torch

from hf_tfast.attention import Mask, Score, attend
from hf_tfast.attention.dense import Dense
from hf_tfast.attention.performer import Performer, estimated_logits, orthogonal
from hf_tfast.testing import Shape, assert_near, qkv

CPU = torch.device("cpu")


def directions(seed, heads, features, width, first_head=0):
    return orthogonal(seed, first_head, heads, features, width, torch.float64, CPU)


def test_weights_are_unbiased():
    draws = 5000  # one per head
    q, k, _ = (x.expand(1, draws, 6, 4) for x in qkv(Shape(b=1, h=1, g=1, j=6, d=4), "unbiased"))
    estimates = estimated_logits(q, k, directions(0, draws, 8, 4), 0.5)[0].exp()
    exact = (q @ k.mT * 0.5).exp()[0, 0]
    off = (estimates.mean(0) - exact).abs() / (estimates.std(0) / draws**0.5)
    assert off.max() < 4.5, f"the mean over draws is {off.max():.2f} standard errors from exp(score)"


@pytest.mark.parametrize("causal", [False, True])
def test_error_falls_with_the_root_of_features(causal):
    q, k, v = qkv(Shape(b=1, h=16, g=16, j=48, d=8), "error", causal)
    q, k = (0.8 * torch.nn.functional.normalize(x, dim=-1) for x in (q, k))  # long ones need exp(|q + k|^2) features
    mask, score = Mask(causal=causal), Score(scale=1.0)
    exact = attend(q, k, v, Dense(), mask, score)
    budgets = torch.tensor([32.0, 128.0, 512.0, 2048.0], dtype=torch.float64)
    errors = torch.stack(
        [
            torch.stack(
                [attend(q, k, v, Performer(features=int(r), seed=n), mask, score) - exact for n in range(5)]
            ).square().mean().sqrt()
            for r in budgets
        ]
    )  # fmt: skip
    slope = (errors.log()[-1] - errors.log()[0]) / (budgets.log()[-1] - budgets.log()[0])
    assert -0.65 < slope < -0.4, f"errors {errors.tolist()} fall like features^{slope:.2f}"
    assert errors[-1] < 0.06 * exact.square().mean().sqrt()


def test_features_are_orthogonal_and_gaussian():
    w = directions(3, 50, 20, 16)
    first, rest = w[:, :16], w[:, 16:]
    for block in (first, rest):
        gram = block @ block.mT
        assert_near(gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)), torch.zeros_like(gram), "angles")
    w = directions(4, 400, 16, 16)
    assert abs(w.mean()) < 0.02
    assert abs(w.square().mean() - 1) < 0.02
    assert abs(w.square().sum(-1).var() / (2 * 16) - 1) < 0.1, "squared lengths are not chi-squared"
    second = torch.einsum("n r d, n r c -> d c", w, w) / (400 * 16)
    assert (second - torch.eye(16)).abs().max() < 0.08, "directions are not uniform"


def test_features_follow_the_global_head():
    every = directions(7, 6, 10, 4)
    assert torch.equal(directions(7, 2, 10, 4, first_head=3), every[3:5])
    assert torch.equal(directions(7, 6, 13, 4)[:, :10], every), "more features are the same ones and some more"
    assert not torch.isclose(every[0], every[1]).any()
    assert not torch.isclose(directions(8, 6, 10, 4), every).any()


@pytest.mark.parametrize("sinks", [False, True])
def test_running_state_is_decoding(sinks):
    shape = Shape(b=2, h=4, g=2, j=700, d=8, e=5)
    q, k, v = qkv(shape, "state", sinks)
    score = Score(first_head=2, sinks=torch.randn(4, dtype=q.dtype) if sinks else None)
    performer = Performer(features=20)
    o = attend(q, k, v, performer, Mask(causal=True), score)
    state = performer.extend(None, q, k[:, :, :690], v[:, :, :690], score)
    for n in range(690, 700):
        state = performer.extend(state, q, k[:, :, n : n + 1], v[:, :, n : n + 1], score)
        assert state.sums.shape == (2, 4, 20, 6), "the state grows with the keys"
        assert_near(performer.step(state, q[:, :, n : n + 1], score), o[:, :, n : n + 1], f"token {n}")


def test_training_stores_no_state_per_position():
    length, features, width = 4096, 32, 16
    q, k, v = qkv(Shape(b=1, h=1, g=1, j=length, d=width), "stored", dtype=torch.float32, grad=True)
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (stored.append(x.numel()), x)[1], lambda x: x):
        attend(q, k, v, Performer(features=features), Mask(causal=True))
    assert sum(stored) < length * features * width / 4, "as large as a state per position"
    assert sum(stored) < 16 * length * width, "more than a few tensors of the size of v"


def test_float32_keeps_up_with_growing_keys():
    """Every key's level beats those before it: the running maximum moves at every step."""
    q, k, v = qkv(Shape(b=1, h=2, g=2, j=600, d=8), "growing")
    k = k * torch.linspace(4, 0.1, 600, dtype=k.dtype)[:, None]  # shorter keys have higher levels
    mask, performer = Mask(causal=True), Performer(features=64)
    exact = attend(q, k, v, performer, mask)
    assert_near(attend(q.float(), k.float(), v.float(), performer, mask), exact.float(), "fp32", 1e-4)


def test_inference_first_then_training():
    q, k, v = qkv(Shape(j=10, d=6), "inference", grad=True)
    performer = Performer(features=9, seed=12345)  # features nobody has asked for yet
    with torch.inference_mode():
        attend(q.detach(), k.detach(), v.detach(), performer)
    attend(q, k, v, performer).sum().backward()
    assert q.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_refuses_softcap(backend):
    with pytest.raises(ValueError, match="performer.*softcap=30"):
        attend(*qkv(Shape(j=5), "softcap"), Performer(), score=Score(softcap=30.0), backend=backend)


@pytest.mark.parametrize("features", [0, -3, 2.0, "64", None])
def test_refuses_features(features):
    with pytest.raises(ValueError, match="features must be a whole number of at least 1"):
        Performer(features=features)
