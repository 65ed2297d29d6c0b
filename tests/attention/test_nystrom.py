"""Nystrom: against Transformers' own module, the pseudo-inverse, segments. The contract is in test_contract*.py."""

import pytest
import torch
from transformers import NystromformerConfig
from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

from hf_tfast.attention import Mask, Score, attend
from hf_tfast.attention.dense import Dense
from hf_tfast.attention.nystrom import Nystrom, pseudo_inverse, value_convolution
from hf_tfast.backends.few import segment_means
from hf_tfast.testing import Shape, assert_near, generator, qkv


def transformers_module(length, landmarks, heads, kernel):
    torch.manual_seed(3)
    config = NystromformerConfig(
        hidden_size=heads * 8, num_attention_heads=heads, num_landmarks=landmarks, segment_means_seq_len=length,
        conv_kernel_size=kernel or 5, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    module = NystromformerSelfAttention(config).double()
    if kernel is None:  # its config insists on a convolution, its code does not
        module.conv_kernel_size, module.conv = None, None
    return module


def heads_of(module, x):
    cut = lambda y: y.unflatten(-1, (-1, 8)).transpose(1, 2)  # noqa: E731
    return cut(module.query(x)), cut(module.key(x)), cut(module.value(x))


@pytest.mark.parametrize(("batch", "heads", "own_norm"), [(1, 1, False), (2, 3, True)])
@pytest.mark.parametrize("kernel", [None, 5])
def test_equals_transformers_at_six_iterations(batch, heads, own_norm, kernel):
    """It starts from the largest norm of the batch, ours from each matrix's own: one matrix, or its own option."""
    module = transformers_module(96, 12, heads, kernel)
    if own_norm:
        module.init_option = "exact"
    x = torch.randn(batch, 96, heads * 8, generator=generator(batch, kernel), dtype=torch.float64, requires_grad=True)
    theirs = module(x)[0]
    q, k, v = heads_of(module, x)
    q, k, v = heads_of(module, x)
    ours = attend(q, k, v, Nystrom(landmarks=12, iterations=6))
    if kernel:
        ours = ours + value_convolution(v, module.conv.weight.flatten(1))
    ours = ours.transpose(1, 2).flatten(2)
    up = torch.randn(ours.shape, generator=generator("up"), dtype=ours.dtype)
    assert_near(ours.detach(), theirs.detach(), "o")
    leaves = [x, *module.parameters()]
    for one, other in zip(torch.autograd.grad(ours, leaves, up), torch.autograd.grad(theirs, leaves, up), strict=True):
        assert_near(one, other, "gradient")


def test_pseudo_inverse_converges():
    a = torch.randn(3, 2, 16, 16, generator=generator("inverse"), dtype=torch.float64).softmax(-1)
    a = (a + torch.eye(16, dtype=a.dtype)) / 2
    exact = torch.linalg.pinv(a)
    errors = [(pseudo_inverse(a, n) - exact).norm() / exact.norm() for n in (1, 2, 4, 12)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[3] < 1e-9
    for n in (2, 12):  # each by itself, whatever its neighbours need
        together = pseudo_inverse(torch.cat([a, torch.eye(16, dtype=a.dtype).expand(1, 2, 16, 16)]), n)
        assert torch.equal(pseudo_inverse(a[1:2], n), together[1:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pseudo_inverse_of_a_matrix_of_rank_one_stays(dtype):
    """Many steps blow up what rounding leaves in directions that a matrix does not have; it stops before."""
    a = torch.full((2, 64, 64), 1 / 64, dtype=dtype) * (
        1 + torch.finfo(dtype).eps * torch.rand(2, 64, 64, dtype=dtype)
    )
    a = a / a.sum(-1, keepdim=True)
    assert pseudo_inverse(a, 60).abs().max() < 1


def test_equal_tokens_are_their_average():
    q, k, v = (x[:, :, :1].repeat(1, 1, 333, 1).float() for x in qkv(Shape(j=1, g=4), "alike"))
    assert_near(attend(q, k, v, Nystrom(landmarks=64, iterations=50)), v, "equal tokens", 1e-4)


@pytest.mark.parametrize("length", [13, 20, 64, 65])
def test_segments_of_any_length(length):
    x = torch.randn(1, 2, length, 3, generator=generator(length), dtype=torch.float64)
    means = segment_means(x, 13)
    sizes = [length // 13 + (n < length % 13) for n in range(13)]
    for n, part in enumerate(x.split(sizes, dim=2)):
        assert_near(means[:, :, n], part.mean(2), f"segment {n}")


def test_error_falls_with_landmarks():
    random = generator("smooth")
    steps = torch.randn(3, 1, 4, 400, 8, generator=random, dtype=torch.float64)
    q, k, v = (steps.cumsum(3) / torch.arange(1, 401).sqrt()[:, None]).unbind()  # neighbours are alike, as in text
    exact = attend(q, k, v, Dense())
    errors = [
        ((attend(q, k, v, Nystrom(landmarks=m, iterations=12)) - exact).norm() / exact.norm()).item()
        for m in (4, 16, 64, 400)
    ]
    assert errors[0] > errors[1] > errors[2] > errors[3], errors
    assert errors[2] < 0.15, errors
    assert errors[3] < 1e-12, errors


def test_no_more_queries_than_landmarks_is_dense():
    q, k, v = qkv(Shape(i=16, j=90), "few")
    score = Score(sinks=torch.randn(4, dtype=q.dtype), softcap=3.0)
    exact = attend(q, k, v, Dense(), score=score)
    assert_near(attend(q, k, v, Nystrom(landmarks=16), score=score), exact, "16 queries")
    assert (attend(q, k, v, Nystrom(landmarks=15), score=score) - exact).abs().max() > 1e-4


def test_landmark_queries_alone_are_dense_with_sinks():
    """Every query equal to its segment's mean: this is dense attention, sink logits and softcap included."""
    q, k, v = qkv(Shape(g=4, j=48), "steps")
    q, k = (x[:, :, ::8].repeat_interleave(8, 2) for x in (q * 2, k * 2))
    score = Score(sinks=torch.randn(4, dtype=q.dtype), softcap=9.0)
    exact = attend(q, k, v, Dense(), score=score)
    assert_near(attend(q, k, v, Nystrom(landmarks=6, iterations=60), score=score), exact, "o", 1e-6)


def test_value_convolution_reads_one_document():
    v = torch.randn(2, 2, 30, 3, generator=generator("values"), dtype=torch.float64)
    weight = torch.randn(4, 7, generator=generator("weight"), dtype=torch.float64)
    segments = torch.tensor([[0] * 4 + [1] * 11 + [2] * 15, [1] * 30])
    o = value_convolution(v, weight, Mask(segments=segments))
    assert not o[0, :, :4].any()
    for at in (slice(4, 15), slice(15, 30)):
        assert_near(o[:1, :, at], value_convolution(v[:1, :, at], weight), "a document alone")
    assert_near(value_convolution(v, weight, queries=5), value_convolution(v, weight)[:, :, -5:], "the last five")
    by_hand = sum(weight[2, n] * torch.nn.functional.pad(v[1, 1], (0, 0, 3, 3))[n : n + 30] for n in range(7))
    assert_near(o[1, 2], by_hand, "the sum")
    with pytest.raises(ValueError, match="odd kernel"):
        value_convolution(v, weight[:, :6])


@pytest.mark.parametrize("name", ["landmarks", "iterations"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "3", None])
def test_refuses_fields(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1"):
        Nystrom(**{name: value})
