"""Losses: what they are, and that neither masked tokens nor the cutting of a step into batches changes a gradient."""

import math

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from hf_tfast.distillation import losses
from hf_tfast.distillation.layers import Projections, layer_map, mapped_hidden_loss
from hf_tfast.distillation.losses import IGNORED
from hf_tfast.testing import assert_near, generator

B, N, V, D = 5, 11, 13, 12


def draw(*seed, shape=(B, N, V), dtype=torch.float64):
    return 2 * torch.randn(shape, generator=generator(*seed), dtype=torch.float64).to(dtype)


def some(*seed, share=0.6):
    keep = torch.rand(B, N, generator=generator("keep", *seed)) < share
    keep[0], keep[1] = False, True  # a row without tokens, a whole one
    return keep


def labels_of(keep, *seed):
    labels = torch.randint(0, V, (B, N), generator=generator("labels", *seed))
    return labels.masked_fill(~keep, IGNORED)


def divergence(**options):
    return lambda y, x, keep, count: losses.logits_divergence(y, x, keep, count, **options)


def top(k, **options):
    return lambda y, x, keep, count: losses.top_logits_divergence(
        y, losses.top_logits(x, k, 1.7), keep, count, **options
    )


def relation(y, x, keep, count):  # rows of a batch are whole, a relation needs them
    return losses.relation_loss(y, x, keep, count, heads=3, chunk=4)


def heads(y, x, keep, count):
    return losses.attention_output_loss(y.unflatten(-1, (3, 4)), x.unflatten(-1, (3, 4)), keep, count, kind="relative")


EVERY = {
    "forward": (divergence(temperature=2.0), V),
    "reverse": (divergence(kind="reverse"), V),
    "jsd": (divergence(kind="jsd", beta=0.3, chunk=4), V),
    "top forward": (top(4, chunk=3), V),
    "top reverse": (top(4, kind="reverse"), V),
    "top jsd": (top(V, kind="jsd"), V),
    "cross-entropy": (lambda y, x, keep, count: losses.cross_entropy(y, labels_of(keep), count, smoothing=0.1), V),
    "mse": (lambda y, x, keep, count: losses.hidden_loss(y, x, keep, count), D),
    "relative": (lambda y, x, keep, count: losses.hidden_loss(y, x, keep, count, kind="relative"), D),
    "cosine": (lambda y, x, keep, count: losses.hidden_loss(y, x, keep, count, kind="cosine"), D),
    "heads": (heads, D),
    "relation": (relation, D),
    "layers": (
        lambda y, x, keep, count: mapped_hidden_loss([y, y * 2], [-x, x, x * 2], {0: 1, 1: 2}, keep, count),
        D,
    ),
}
every = pytest.mark.parametrize(("loss", "width"), EVERY.values(), ids=EVERY)


def gradient(loss, y, x, keep, count=None):
    y = y.clone().requires_grad_()
    value = loss(y, x, keep, count)
    assert value.shape == ()
    return value.detach(), torch.autograd.grad(value, y)[0]


@every
def test_masked_tokens_never_count(loss, width, request):
    """They hold NaN in student and teacher: the loss is that of the kept tokens, and their gradient is zero."""
    keep = some(request.node.name)
    y, x = draw("y", shape=(B, N, width)), draw("x", shape=(B, N, width))
    value, slope = gradient(loss, y, x, keep)
    holes = ~keep[..., None].expand_as(y)
    again, same = gradient(loss, y.masked_fill(holes, math.nan), x.masked_fill(holes, math.nan), keep)
    assert value.isfinite()
    assert value > 0
    assert_near(again, value, "loss")
    assert_near(same, slope, "gradient")
    assert not same[~keep].any()
    assert same[keep].abs().sum() > 0
    nothing, none = gradient(loss, y, x, torch.zeros_like(keep))
    assert nothing == 0
    assert not none.any()


@every
def test_cutting_a_step_changes_nothing(loss, width, request, monkeypatch):
    """Any cut into batches, of very different numbers of tokens: with the step's count they add up to the whole."""
    keep = some(request.node.name)
    y, x = draw("y", shape=(B, N, width)), draw("x", shape=(B, N, width))
    labels = labels_of(keep)
    cut = torch.zeros(1)
    if request.node.callspec.id == "cross-entropy":
        monkeypatch.setitem(globals(), "labels_of", lambda kept: labels[cut : cut + len(kept)])
        cut = 0
    whole, slope = gradient(loss, y, x, keep)
    for sizes in ([1] * B, [2, 3], [4, 1]):
        values, slopes, start = [], [], 0
        for size in sizes:
            cut, part = start, slice(start, start + size)
            value, mine = gradient(loss, y[part], x[part], keep[part], keep.sum())
            values.append(value)
            slopes.append(mine)
            start += size
        assert_near(sum(values), whole, f"loss in {sizes}")
        assert_near(torch.cat(slopes), slope, f"gradient in {sizes}")


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_computed_in_fp32_at_least(loss, width, dtype):
    keep = some("dtype")
    y, x = draw("y", shape=(B, N, width)).to(dtype), draw("x", shape=(B, N, width)).to(dtype)
    value = loss(y, x, keep, None)
    assert value.dtype == torch.float32
    assert_near(value.double(), loss(y.double(), x.double(), keep, None), "loss", 2e-5)


@every
def test_no_gradient_reaches_the_teacher(loss, width):
    y = draw("y", shape=(B, N, width)).requires_grad_()
    x = draw("x", shape=(B, N, width)).requires_grad_()
    loss(y, x, some(), None).backward()
    assert y.grad is not None
    assert x.grad is None


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_divergences_are_those_of_the_books(temperature):
    y, x, keep = draw("y"), draw("x"), some("books")
    q, p = ((z[keep] / temperature).softmax(-1) for z in (y, x))
    m = 0.3 * p + 0.7 * q

    def kl(a, b):
        return (a * (a / b).log()).sum(-1).mean()

    expected = {"forward": kl(p, q), "reverse": kl(q, p), "jsd": 0.3 * kl(p, m) + 0.7 * kl(q, m)}
    for kind, value in expected.items():
        got = losses.logits_divergence(y, x, keep, temperature=temperature, kind=kind, beta=0.3)
        assert_near(got, value * temperature**2, kind)
        assert losses.logits_divergence(x, x, keep, temperature=temperature, kind=kind).abs() < 1e-12


@pytest.mark.parametrize("kind", losses.DIVERGENCES)
def test_top_logits(kind):
    """All tokens kept: the full divergence, gradients too. Fewer: never more than it, and more with every token."""
    y, x, keep = draw("y"), draw("x"), some(kind)
    full, slope = gradient(divergence(temperature=1.7, kind=kind), y, x, keep)
    value, mine = gradient(top(V, kind=kind), y, x, keep)
    assert_near(value, full, "loss")
    assert_near(mine, slope, "gradient")
    values = [float(top(k, kind=kind)(y, x, keep, None)) for k in range(1, V + 1)]
    assert values == sorted(values)
    assert values[0] < values[4] < values[-1]
    saved = losses.top_logits(x, 5)
    assert_near(saved.logs.exp().sum(-1) + saved.rest.exp(), torch.ones(B, N, dtype=torch.float64), "probability")


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_change_nothing(chunk):
    y, x, keep = draw("y"), draw("x"), some(chunk)
    for options in ({}, {"kind": "jsd"}):
        plain, slope = gradient(divergence(**options), y, x, keep)
        value, mine = gradient(divergence(chunk=chunk, **options), y, x, keep)
        assert_near(value, plain, "loss")
        assert_near(mine, slope, "gradient")


def test_cross_entropy_is_of_the_next_token():
    logits, keep = draw("logits"), some("next")
    labels = labels_of(keep)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_near(losses.cross_entropy(logits, losses.next_tokens(labels)), expected, "loss")


def test_states():
    y, x = draw("y", shape=(B, N, D)), draw("x", shape=(B, N, D))
    assert_near(losses.hidden_loss(y, x), F.mse_loss(y, x), "mse")
    assert_near(losses.hidden_loss(7 * y, 7 * x, kind="relative"), losses.hidden_loss(y, x, kind="relative"), "scale")
    assert_near(losses.hidden_loss(7 * y, x, kind="cosine"), losses.hidden_loss(y, x, kind="cosine"), "length")
    zero = torch.zeros_like(x)
    assert losses.hidden_loss(zero, x, kind="relative") == pytest.approx(1.0)
    assert losses.hidden_loss(x, zero, kind="relative").isfinite()
    assert losses.embedding_cosine(y[:, 0], -y[:, 0]) == pytest.approx(2.0)
    apart = losses.attention_output_loss(y.unflatten(-1, (3, 4)), x.unflatten(-1, (3, 4)))
    assert_near(apart, losses.attention_output_loss(y, x), "heads of equal width")


def test_relations_are_those_of_the_paper():
    """Naively, row by row; and rotating the channels of a relation head changes nothing, whatever the width."""
    y, x, keep = draw("y", shape=(B, N, D)), draw("x", shape=(B, N, 2 * D)), some("relation")
    total = 0.0
    for b in range(B):
        for h in range(2):
            q, p = (z[b, keep[b]].unflatten(-1, (2, -1))[:, h] for z in (y, x))
            q, p = ((z @ z.T / z.shape[-1] ** 0.5).softmax(-1) for z in (q, p))
            total = total + (p * (p / q).log()).sum()
    expected = total / keep.sum() / 2
    for chunk in (None, 1, 3):
        assert_near(losses.relation_loss(y, x, keep, heads=2, chunk=chunk), expected, "relations")
    turn = torch.linalg.qr(draw("turn", shape=(2, D, D)))[0]
    turned = torch.einsum("b n h d, h d e -> b n h e", x.unflatten(-1, (2, D)), turn).flatten(-2)
    assert losses.relation_loss(turned, x, keep, heads=2).abs() < 1e-10


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {0: 1, 1: 3, 2: 5}),
        ([0, 0, 4], {0: 0, 1: 0, 2: 4}),
        ({2: 1}, {2: 1}),
        ({"0": 5}, {0: 5}),  # JSON has words for keys
    ],
)
def test_layer_maps(given, expected):
    assert layer_map(given, 3, 6) == expected
    assert layer_map(None, 4, 4) == {n: n for n in range(4)}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({3: 0}, "student layer 3.*0 to 2"),
        ({0: 6}, "teacher layer 6.*0 to 5"),
        ([0, -1, 2], "teacher layer -1"),
        ([0, 1], "one teacher layer for each of 3"),
        ({}, "empty"),
        ({"last": 1}, "student layer: teacher layer"),
    ],
)
def test_layer_maps_that_do_not_exist(given, words):
    with pytest.raises(ValueError, match=words):
        layer_map(given, 3, 6)


def test_projections():
    y = [draw("y", n, shape=(B, N, 4)) for n in range(2)]
    x = [draw("x", n, shape=(B, N, D)) for n in range(4)]
    with pytest.raises(ValueError, match="student layer 0 is 4 wide and teacher layer 1 12"):
        mapped_hidden_loss(y, x, {0: 1, 1: 3})
    made = Projections({0: 1, 1: 3}, 4, D).double()
    loss = mapped_hidden_loss(y, x, {0: 1, 1: 3}, projections=made)
    expected = sum(F.mse_loss(y[n] @ made[str(n)].weight.T, x[m]) for n, m in ((0, 1), (1, 3))) / 2
    assert_near(loss, expected, "loss")
    assert not list(Projections({0: 1}, D, D).parameters())
    with pytest.raises(ValueError, match="cannot be spread"):
        layer_map(None, 5, 4)


WRONG = {
    "shapes": (lambda y: losses.logits_divergence(y, y[..., :-1]), "one shape"),
    "temperature": (lambda y: losses.logits_divergence(y, y, temperature=0.0), "above 0"),
    "kind": (lambda y: losses.logits_divergence(y, y, kind="total"), "forward, reverse, jsd"),
    "beta": (lambda y: losses.logits_divergence(y, y, kind="jsd", beta=1.0), "between 0 and 1"),
    "chunk": (lambda y: losses.logits_divergence(y, y, chunk=0), "at least 1 token"),
    "keep": (lambda y: losses.hidden_loss(y, y, torch.ones(B, N + 1)), "keep must be"),
    "states": (lambda y: losses.hidden_loss(y, y, kind="far"), "mse, relative, cosine"),
    "labels": (lambda y: losses.cross_entropy(y, torch.zeros(B, 3, dtype=torch.long)), "labels must be"),
    "k": (lambda y: losses.top_logits(y, 0), "most likely"),
    "vocabulary": (lambda y: losses.top_logits_divergence(y[..., :3], losses.top_logits(y, V)), "beyond the student"),
    "heads": (lambda y: losses.relation_loss(y, y, heads=5), "cannot be cut into 5"),
}


@pytest.mark.parametrize(("call", "words"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_said(call, words):
    with pytest.raises(ValueError, match=words):
        call(draw("wrong"))
