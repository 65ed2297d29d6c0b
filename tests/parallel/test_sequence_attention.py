"""Attention whose sequence several ranks hold: outputs and gradients of one process. Ranks are threads here."""

import pytest
import torch

from hf_tfast.attention import Mask, Score, attend
from hf_tfast.attention.hashed import Hashed
from hf_tfast.attention.nystrom import Nystrom
from hf_tfast.attention.performer import Performer
from hf_tfast.attention.window import Window
from hf_tfast.parallel import sequence_window
from hf_tfast.parallel.sequence_attention import attend_shared
from hf_tfast.parallel.sequence_wire import simulate
from hf_tfast.testing import Shape, assert_near, generator, qkv

LENGTH = 60
WHOLE = torch.ones(2, LENGTH, dtype=torch.int64)
PACKED = torch.tensor([[1] * 10 + [2] * 33 + [3] * 17, [0] * 23 + [1] * 30 + [0] * 7])  # left and right padding too
CUTS = ([20, 20, 20], [7, 30, 23], [4, 4, 4, 48])  # the last: a window wider than slices takes several hops
CAUSAL = [Window(window=5, sinks=3), Window(window=25, sinks=6), Window(window=1), Performer(features=24)]
TWO_WAY = [*CAUSAL, Nystrom(landmarks=6, iterations=3), Nystrom(landmarks=12, iterations=3)]  # 10 and 17: dense, not
CASES = [(mechanism, True) for mechanism in CAUSAL] + [(mechanism, False) for mechanism in TWO_WAY]


def gradients(mechanism, causal, documents, cuts, *, dropout=0.0, logits=False, shape=None):
    """The same call in one process and cut: {name: (one, cut)}, and bytes sent by each rank."""
    shape = shape or Shape(b=2, h=4, g=2, j=LENGTH, d=8, e=6)
    q, k, v = qkv(shape, mechanism, causal, cuts)
    sinks = torch.randn(shape.h, generator=generator("sinks"), dtype=torch.float64) if logits else None
    upstream = torch.randn(*q.shape[:3], v.shape[-1], generator=generator("up", cuts), dtype=torch.float64)

    def run(at, call, rank=0):
        leaves = [x[:, :, at].clone().requires_grad_() for x in (q, k, v)]
        own = None if sinks is None else sinks.clone().requires_grad_()
        score = Score(sinks=own, dropout=dropout, seed=11 + rank if dropout else None)  # rank 0's counts
        o = call(*leaves, mechanism, Mask(causal=causal, segments=documents[:, at]), score)
        o.backward(upstream[:, :, at])
        return [o.detach(), *(x.grad for x in leaves), None if own is None else own.grad]

    one = run(slice(None), attend)
    ends = torch.tensor([0, *cuts]).cumsum(0).tolist()

    def rank(wire):
        at = slice(ends[wire.rank], ends[wire.rank + 1])
        return run(at, lambda *given: attend_shared(*given, wire), wire.rank), wire.sent

    parts, sent = zip(*simulate(len(cuts), rank), strict=True)
    found = {name: (one[n], torch.cat([p[n] for p in parts], 2)) for n, name in enumerate(("o", "q", "k", "v"))}
    if logits:
        found["sinks"] = one[4], sum(p[4] for p in parts)
    return found, sent


@pytest.mark.parametrize(("mechanism", "causal"), CASES, ids=str)
@pytest.mark.parametrize("documents", [WHOLE, PACKED], ids=["whole", "packed"])
def test_cut_is_whole(mechanism, causal, documents):
    for cuts in CUTS:
        for logits in (False, True):
            found, _ = gradients(mechanism, causal, documents, cuts, logits=logits)
            for name, (one, cut) in found.items():
                assert_near(cut, one, f"{name}, cut at {cuts}")


@pytest.mark.parametrize(("mechanism", "causal"), CASES, ids=str)
def test_documents_that_end_where_a_slice_does(mechanism, causal):
    """Every rank holds a single run of every row, and yet not all of a row is one document."""
    documents = torch.ones(2, LENGTH, dtype=torch.int64)
    documents[0, 20:] = 2
    documents[1, 40:] = 2
    found, _ = gradients(mechanism, causal, documents, CUTS[0])
    for name, (one, cut) in found.items():
        assert_near(cut, one, name)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", [WHOLE, PACKED], ids=["whole", "packed"])
def test_dropout_draws_by_position(causal, documents):
    for mechanism in (Window(window=5, sinks=3), Window(window=30)):
        found, _ = gradients(mechanism, causal, documents, CUTS[1], dropout=0.4)
        for name, (one, cut) in found.items():
            assert_near(cut, one, f"{name} of {mechanism}")


@pytest.mark.parametrize(("mechanism", "causal"), [(Window(window=5, sinks=3), True), (Window(window=5), False),
                         (Performer(features=24), True), (Nystrom(landmarks=6), False)], ids=str)  # fmt: skip
def test_bytes_do_not_grow(mechanism, causal):
    def sent(length):
        shape = Shape(b=1, h=4, g=2, j=length, d=8)
        return gradients(mechanism, causal, torch.ones(1, length, dtype=torch.int64), [length // 3] * 3, shape=shape)[
            1
        ]

    assert sent(60) == sent(600)
    assert min(sent(60)) > 0


def test_the_future_changes_nothing():
    """Keys of later ranks, however large, leave earlier ranks bit-equal: no stabiliser looks ahead."""
    q, k, v = qkv(Shape(b=1, j=LENGTH), "future")
    later = k.clone()
    later[:, :, 40:] *= 30
    for mechanism in (Window(window=25, sinks=6), Performer(features=24)):
        outputs = []
        for keys in (k, later):

            def rank(wire, keys=keys, mechanism=mechanism):
                at = slice(20 * wire.rank, 20 * wire.rank + 20)
                return attend_shared(
                    q[:, :, at], keys[:, :, at], v[:, :, at], mechanism, Mask(causal=True), Score(), wire
                )

            outputs.append(torch.cat(simulate(3, rank), 2))
        assert torch.equal(outputs[0][:, :, :40], outputs[1][:, :, :40])
        assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize(
    ("documents", "words"),
    [
        ([[1, 1, 0, 1], [2, 2, 2, 2]], "holes"),
        ([[1, 2, 2, 2], [1, 1, 3, 3]], "grow"),
        ([[0, 0, 1, 1], [0, 1, 1, 1]], "holes"),
    ],
)
def test_rows_that_cannot_be_cut(documents, words):
    """All ranks raise, so that none waits for the others."""
    q = torch.randn(1, 2, 4, 4)

    def rank(wire):
        segments = torch.tensor([documents[wire.rank]])
        with pytest.raises(ValueError, match=words):
            attend_shared(q, q, q, Window(window=2), Mask(causal=True, segments=segments), Score(), wire)
        return True

    assert simulate(2, rank) == [True, True]


def test_other_mechanisms_are_named():
    q = torch.randn(1, 2, 4, 4)
    with pytest.raises(ValueError, match="nystrom, performer, window"):
        simulate(2, lambda wire: attend_shared(q, q, q, Hashed(), Mask(causal=True), Score(), wire))


def test_a_lost_halo_gradient_is_seen(monkeypatch):
    """Seeded fault: the gradient of received keys stays where it is."""
    real = sequence_window.swap
    monkeypatch.setattr(sequence_window, "swap", lambda *given: real(*given).detach() + 0 * real(*given))
    found, _ = gradients(Window(window=5, sinks=3), True, WHOLE, CUTS[0])
    assert_near(found["o"][1], found["o"][0], "outputs")
    with pytest.raises(AssertionError, match="off by"):
        assert_near(found["k"][1], found["k"][0], "keys")
