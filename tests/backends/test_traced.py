"""What an exported program computes: the numbers of the definition, at every shape, and one program for many."""

import pytest
import torch

from hf_tfast.attention import Mask, Score, attend, linformer
from hf_tfast.attention.dense import Dense
from hf_tfast.attention.linformer import Linformer, _folded
from hf_tfast.attention.nystrom import Nystrom
from hf_tfast.attention.window import Window
from hf_tfast.backends import traced
from hf_tfast.backends.blocks import Layout, attend_tiles
from hf_tfast.testing import Shape, assert_near, generator, naive_attention, qkv

SHAPES = {  # name: shape, window, sinks
    "one token": (Shape(h=2, g=1, j=1), 4, 2),
    "fewer than sinks": (Shape(h=2, g=1, j=3), 1, 5),
    "whole blocks": (Shape(b=2, h=4, g=2, j=256, d=8, e=5), 32, 0),
    "a part of a block": (Shape(b=2, h=6, g=2, j=333, d=8), 20, 3),
    "itself": (Shape(b=1, h=3, g=3, j=200), 1, 0),
    "everything": (Shape(h=2, g=1, j=90), 300, 4),
    "a window of many blocks": (Shape(b=1, h=2, g=1, j=900, d=4), 300, 70),
}


@pytest.fixture
def recorded(monkeypatch):
    """As under torch.export, but with numbers; says which parts ran."""
    calls = []
    for module in (traced, linformer):
        monkeypatch.setattr(module, "tracing", lambda: True)
    for name in ("band", "few_keys", "few_queries"):
        run = getattr(traced, name)
        monkeypatch.setattr(traced, name, lambda *x, name=name, run=run: (calls.append(name), run(*x))[1])
    return calls


def compare(mechanism, shape, mask, score, *seed):
    inputs = qkv(shape, *seed)
    expected = attend(*inputs, mechanism, mask, score, backend="reference")
    assert_near(attend(*inputs, mechanism, mask, score, backend="torch"), expected, f"{mechanism}, {score}", 1e-10)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_a_band(recorded, name, causal):
    shape, window, sinks = SHAPES[name]
    logits = torch.randn(shape.h, generator=generator(name), dtype=torch.float64)
    scores = (Score(), Score(scale=0.7), Score(softcap=1.5), Score(sinks=logits), Score(sinks=logits, softcap=2.0))
    for score in scores:
        compare(Window(window=window, sinks=sinks), shape, Mask(causal=causal), score, name, causal)
    assert recorded == ([] if causal and shape.j == 1 else ["band"] * len(scores))


@pytest.mark.parametrize("mechanism", [Nystrom(landmarks=8), Linformer(rank=12)], ids=lambda m: m.name)
@pytest.mark.parametrize("j", [64, 101])
def test_few_and_many(recorded, mechanism, j):
    logits = torch.randn(4, generator=generator(j), dtype=torch.float64)
    for score in (Score(scale=0.4), Score(softcap=1.5), Score(sinks=logits)):
        compare(mechanism, Shape(j=j, e=5), Mask(), score, mechanism, j)
    assert "few_keys" in recorded


def test_keys_are_folded_without_a_loop():
    (x, *_), mechanism = qkv(Shape(j=101), "fold"), Linformer(rank=12)
    places, rows = mechanism._places(101, x.device), mechanism.rows(101, x.device)
    expected = x.new_zeros(2, 4, 12, 8).index_add_(2, rows, x)
    assert_near(_folded(x, places), expected, "folded", 1e-12)


# what torch cannot prove for all sizes, the program checks
OPEN = {"prefer_deferred_runtime_asserts_over_guards": True}


class _Attends(torch.nn.Module):
    def __init__(self, mechanism, causal, score):
        super().__init__()
        self.mechanism, self.mask, self.score = mechanism, Mask(causal=causal), score

    def forward(self, q, k, v):
        return attend(q, k, v, self.mechanism, self.mask, self.score, backend="torch")


def test_what_reads_everything_under_causality_is_left_to_tiles(recorded):
    layout = Layout(near=lambda i, j: i == j, sinks=9, open_sinks=True, solid=True)
    q, k, v = qkv(Shape(h=2, g=1, j=30), "open sinks")
    at = torch.arange(30)
    seen = ~layout.hidden(at[:, None], at)
    assert_near(attend_tiles(q, k, v, layout, Score()), naive_attention(q, k, v, seen, Score()), "o", 1e-10)
    assert recorded == []


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("mechanism", [Window(window=40, sinks=2), Dense()], ids=lambda m: m.name)
@pytest.mark.parametrize("causal", [False, True])
def test_one_program_for_every_batch_and_length(causal, mechanism, softcap):
    batch, length = torch.export.Dim("batch", max=9), torch.export.Dim("length", min=4, max=4096)
    shapes = [{0: batch, 2: length}] * 3
    attends = _Attends(mechanism, causal, Score(softcap=softcap))
    program = torch.export.export(attends, qkv(Shape(j=150), "open"), dynamic_shapes=shapes, **OPEN)
    for b, j in ((1, 5), (2, 64), (3, 333), (1, 1000)):
        inputs = qkv(Shape(b=b, j=j), "open", b)
        expected = attend(*inputs, mechanism, attends.mask, attends.score, backend="reference")
        assert_near(program.module()(*inputs), expected, f"{b} x {j}", 1e-10)
