"""What is said to be read is what is read: pairs of peers against their own outputs; recall, density, matching."""

import random
from dataclasses import replace

import pytest
import torch

from hf_tfast.attention import mechanism_from_dict
from hf_tfast.attention.dense import Dense
from hf_tfast.attention.hashed import Hashed
from hf_tfast.attention.nystrom import Nystrom
from hf_tfast.attention.window import Window
from hf_tfast.benchmarking import recall
from hf_tfast.benchmarking.peer_modules import bigbird, bigbird_density, reformer_module
from hf_tfast.benchmarking.workload import Case, Competitor, make_inputs, workload

SMALL = Case(length=256, heads=2, kv_heads=2, width=16, causal=False, level="module", content="topics")


@pytest.mark.parametrize("hashes", [1, 3])
def test_pairs_of_reformer_are_those_that_its_output_depends_on(hashes):
    """The gradient of an output to a value is the weight: nothing exactly where the pair is not read."""
    inputs = make_inputs(SMALL, seed=random.randrange(1000))
    module, values = reformer_module(SMALL, inputs, hashes), []
    module.value.register_forward_hook(lambda m, given, o: values.append(o.requires_grad_()) or o)
    made, few = module(inputs.tensors[0]), torch.randint(SMALL.length, (6,))
    said = recall.reformer_pairs(made.buckets, SMALL.length, few)
    o = made.hidden_states.unflatten(-1, (SMALL.heads, SMALL.width))
    for n, i in enumerate(few):
        for head in range(SMALL.heads):
            (gradient,) = torch.autograd.grad(o[0, i, head].sum(), values[0], retain_graph=True)
            weight = gradient.unflatten(-1, (SMALL.heads, SMALL.width))[0, :, head, 0]
            read = said[0, head, n].clone()
            read[i] = False  # a query reads itself only where there is nothing else
            assert torch.equal(weight > 0, read)


def test_density_of_bigbird_is_that_of_its_output():
    """A block of activations is changed: who notices reads it."""
    case = Case(length=240, heads=1, kv_heads=1, width=16, causal=False, level="module", passes="both")
    inputs = make_inputs(case, seed=random.randrange(1000))
    forward, _ = bigbird(case, inputs, block=16, blocks=3)
    x, blocks, moved = inputs.tensors[0], case.length // 16, 0
    with torch.no_grad():
        before = forward()
        for n in range(blocks):
            part = slice(n * 16, n * 16 + 16)
            kept = x[:, part].clone()
            x[:, part] += 1
            moved += ((forward() - before).abs().amax(-1)[0] > 1e-6).view(blocks, 16).all(-1).sum().item()
            x[:, part] = kept
    assert bigbird_density(case.length, 16, 3) == pytest.approx(moved / blocks**2)


@pytest.mark.parametrize("causal", [False, True])
def test_density_counts_pairs(causal):
    case = replace(SMALL, content="normal", causal=causal, length=100)
    at = torch.arange(100)
    back = at[:, None] - at
    seen = (back >= 0) & (back < 7) if causal else back.abs() <= 7
    whole = 100 * 101 / 2 if causal else 100**2
    assert recall.density(case, Window(window=7)) == pytest.approx(seen.sum().item() / whole)
    assert recall.density(case, Dense()) == 1
    assert recall.density(replace(case, causal=False), Nystrom(landmarks=4)) is None


def test_shared_queries_and_keys_are_those_of_reformer():
    """With chunks that hold everything Reformer is dense but for itself; the weights are those of `off_diagonal`."""
    case = replace(SMALL, length=64)
    inputs = make_inputs(case, seed=random.randrange(1000))
    x, w_qk, _, w_v, _ = inputs.tensors
    module = reformer_module(case, inputs, 1)
    q, k, v = recall.shared(x, w_qk, w_v, case.width)
    mine = (recall.off_diagonal(q, k, torch.arange(64)) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(x).hidden_states, mine, rtol=1e-4, atol=1e-5)


def test_a_match_reaches_what_it_says():
    found = recall.match(SMALL, 2)
    assert 0 < found["peer_density"] < found["peer_recall"] < 1
    assert found["recall"] >= found["peer_recall"]
    mechanism = mechanism_from_dict(found["mechanism"])
    assert isinstance(mechanism, Hashed)
    inputs = make_inputs(SMALL)
    x, w_qk, _, w_v, _ = inputs.tensors
    q, k, _ = recall.shared(x, w_qk, w_v, SMALL.width)
    few = recall.evenly(SMALL.length, recall.QUERIES)
    seen, _ = recall.pairs(mechanism, q, k, recall.Mask(), few, mechanism.choose(q, k, recall.Mask()))
    weights = recall.off_diagonal(q, k, few)
    assert (weights * seen).sum(-1).mean().item() == pytest.approx(found["recall"])
    build = Competitor("x", build=lambda case, given: recall.shared_module(case, given, mechanism=mechanism))
    assert workload(SMALL, build, inputs)().shape == x.shape


def test_the_least_cap_is_the_least():
    """One key less in every bucket is not enough, and what is said to be enough is."""
    x, w_qk, _, w_v, _ = make_inputs(SMALL, seed=random.randrange(1000)).tensors
    q, k, _ = recall.shared(x, w_qk, w_v, SMALL.width)
    few = recall.evenly(SMALL.length, 40)
    weights, itself = recall.off_diagonal(q, k, few), torch.arange(SMALL.length) == few[:, None]

    def found(mechanism):
        seen, _ = recall.pairs(mechanism, q, k, recall.Mask(), few, mechanism.choose(q, k, recall.Mask()))
        return (weights * (seen & ~itself)).sum(-1).mean().item()

    sufficient = recall._sufficient(3, q, k, weights, few, 0.3)
    assert sufficient
    for _, mechanism in sufficient:
        assert found(mechanism) >= 0.3
        assert mechanism.cap == 1 or found(replace(mechanism, cap=mechanism.cap - 1)) < 0.3 + 1e-5


def test_a_grid_that_does_not_reach_it_says_so(monkeypatch):
    monkeypatch.setattr(recall, "MOST", 1)
    monkeypatch.setattr(recall, "ROUNDS", 1)
    assert recall.match(SMALL, 4)["mechanism"] is None


def test_topics_are_alike_as_said():
    x = make_inputs(replace(SMALL, length=4096, heads=8, kv_heads=8, width=64)).tensors[0][0]
    assert x.square().mean().sqrt().item() == pytest.approx(1.25, rel=0.02)
    alike = torch.nn.functional.normalize(x[:200], dim=-1) @ torch.nn.functional.normalize(x, dim=-1).T
    same = alike[(alike > 0.5) & (alike < 0.999)]
    assert same.mean().item() == pytest.approx(0.8, abs=0.02)
    assert len(same) / 200 == pytest.approx(64, rel=0.2)
    with pytest.raises(ValueError, match="needs level module"):
        Case(content="topics")
