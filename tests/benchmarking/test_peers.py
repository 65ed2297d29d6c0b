"""Peers run as Transformers' own modules with the weights given, and what is called equal is equal."""

import random
from dataclasses import replace

import pytest
import torch

from hf_tfast.benchmarking import peer_modules, peers
from hf_tfast.benchmarking.peer_pages import AGAINST
from hf_tfast.benchmarking.workload import CannotRun, Case, Competitor, make_inputs, workload

CASE = Case(length=1024, heads=2, kv_heads=2, width=16, causal=False, level="module", content="topics")
PEERS = {pair.peer.series: pair.peer for pair in peers.pairs(CASE, [])}


@pytest.mark.parametrize("pair", [p for p in peers.pairs(CASE, []) if p.equal], ids=lambda p: p.peer.label)
def test_equal_mathematics_gives_equal_outputs_and_gradients(pair):
    case = replace(CASE, dtype="fp64", passes="both")
    inputs = make_inputs(case, seed=random.randrange(1000))
    (mine, own), (theirs, other) = ((who.build or peers_own(who))(case, inputs) for who in (pair.ours, pair.peer))
    torch.testing.assert_close(mine(), theirs(), rtol=1e-5, atol=1e-6)  # Longformer's softmax is fp32
    found = [torch.autograd.grad(f(), wanted, inputs.gradient) for f, wanted in ((mine, own), (theirs, other))]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def peers_own(who):
    from hf_tfast.benchmarking.workload import _own

    return lambda case, inputs: _own(who, case, inputs)


@pytest.mark.parametrize("name", PEERS)
def test_a_backward_pass_reaches_everything_that_is_trained(name):
    case = replace(CASE, passes="both")
    inputs = make_inputs(case)
    gradients = workload(case, PEERS[name], inputs)()
    wanted = 4 if name.startswith("Reformer") else 5
    assert len(gradients) == wanted
    assert all(g.abs().max() > 0 for g in gradients)
    assert {tuple(g.shape) for g in gradients[1:]} == {(32, 32)}


def test_weights_are_those_given():
    """Nothing of a module's own random initialisation is left."""
    inputs = make_inputs(CASE)
    for name, who in PEERS.items():
        torch.manual_seed(1)
        first = workload(CASE, who, inputs)()
        torch.manual_seed(2)
        assert torch.equal(first, workload(CASE, who, inputs)()), name


def test_hashed_is_the_setting_that_was_matched():
    (who,) = [p.ours for p in peers.pairs(CASE, []) if p.ours.series == "Hashed for 1"]
    with pytest.raises(CannotRun, match="not matched"):
        workload(CASE, who, make_inputs(CASE))
    form = {"mechanism": "hashed", "bits": 3, "rounds": 2, "cap": 32, "window": 1}
    record = {"kind": "match", "hashes": 1, "length": CASE.length, "mechanism": form}
    (who,) = [p.ours for p in peers.pairs(CASE, [record]) if p.ours.series == "Hashed for 1"]
    assert who.mechanism.rounds == 2
    (who,) = [p.ours for p in peers.pairs(CASE, [{**record, "mechanism": None}]) if p.ours.series == "Hashed for 1"]
    with pytest.raises(CannotRun, match="no setting"):
        workload(CASE, who, make_inputs(CASE))


def test_the_page_speaks_of_every_pair():
    assert [(p.peer.series, p.ours.series) for p in peers.pairs(CASE, [])] == sorted(
        AGAINST, key=lambda pair: ("Reformer" in pair[0], AGAINST.index(pair))
    )


@pytest.mark.parametrize(
    ("who", "case", "words"),
    [
        ("Longformer", replace(CASE, length=1000), "multiples of 256"),
        ("BigBird", replace(CASE, length=512), "dense up to 704"),
        ("Reformer, 1", replace(CASE, length=1000), "multiples of 64"),
        ("Nystromformer", replace(CASE, causal=True), "bidirectional"),
        ("Nystromformer", replace(CASE, dtype="bf16"), "raises RuntimeError"),
    ],
)
def test_what_a_peer_cannot_do_is_said(who, case, words):
    competitor = next(peer for name, peer in PEERS.items() if name.startswith(who))
    with pytest.raises(CannotRun, match=words):
        workload(case, competitor, make_inputs(case))


def test_other_errors_are_not_swallowed():
    def fails(case, inputs):
        raise KeyError("a mistake of ours")

    with pytest.raises(KeyError):
        workload(CASE, Competitor("x", build=peer_modules.peer(fails)), make_inputs(CASE))


def test_difference_is_measured():
    pair = next(p for p in peers.pairs(CASE, []) if p.equal)
    record = peers.difference(CASE, pair)
    assert 0 <= record["difference"] < 1e-4 < record["largest"]
    wrong = peers.difference(CASE, replace(pair, ours=peers._own("Window", peers.Window(window=100))))
    assert wrong["difference"] > 1e-3
