"""propose_plan on tiny models: what it promises, with times that are given where they decide."""

import json
import time

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from hf_tfast import Dense, FastPlan, Nystrom, TFastConfig, TFastForCausalLM, Window, apply_plan, propose_plan
from hf_tfast.attention import mechanisms
from hf_tfast.benchmarking.environment import environment
from hf_tfast.planner import measure, propose
from hf_tfast.planner.candidates import BUDGETS, LEFT_OUT, candidates
from hf_tfast.planner.measure import Layer, end_error, ends, in_turns
from hf_tfast.planner.propose import plan_of
from hf_tfast.planner.report import MARK, markdown, write


def llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def bert(seed=0):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512,
    )  # fmt: skip
    return BertModel(config).eval()


def rows(count=3, length=256, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(64, (1, length), generator=random)} for _ in range(count)]


@pytest.fixture
def by_budget(monkeypatch):
    """Times that follow from the mechanism, not from the machine: a window costs its width, dense attention 256."""

    def cost(mechanism):
        return float(mechanism.window) if isinstance(mechanism, Window) else 256.0

    def layer_times(model, batch, who, *rest):
        layers = real(model, batch, [], 1, False, lambda text: None)
        for layer in layers:
            layer.dense_seconds, layer.seconds = 256.0, [cost(mechanism) for mechanism in who]
        return layers

    def times(self, choices, *rest):
        return [sum(map(cost, choice)) for choice in choices]

    real = measure.layer_times
    monkeypatch.setattr(propose, "layer_times", layer_times)
    monkeypatch.setattr(propose.Switchboard, "times", times)


def test_the_plan_keeps_the_budget_and_beats_every_single_mechanism(by_budget):
    model, given = llama(), rows()
    with torch.no_grad():
        before = model(given[1]["input_ids"]).logits
    for budget in (1e-6, 0.01, 0.1, 10.0):
        found = propose_plan(model, given, max_error=budget, mechanisms=["window"], rounds=1)
        assert found.kind == "kl"
        assert found.error <= budget
        within = [p for p in found.points if p.kind == "single" and p.error <= budget]
        assert all(found.seconds <= p.seconds for p in within)
        assert (found.single is None) == (not within)
        with torch.no_grad():
            assert torch.equal(model(given[1]["input_ids"]).logits, before), "the model was left changed"
        assert getattr(model.config, "quantization_config", None) is None
        planned = apply_plan(llama(), found.plan)
        with torch.no_grad():
            chosen = end_error("kl", ends(planned, given[1])[1], before[0])
            unseen = end_error("kl", ends(planned, given[2])[1], ends(model, given[2])[1])
        assert chosen == pytest.approx(found.error, rel=1e-3, abs=1e-9)
        assert unseen == pytest.approx(found.unseen, rel=1e-3, abs=1e-9)
    assert found.plan.attention == Window(window=64, sinks=4), "any error is allowed: the fastest in all layers"


def test_without_a_budget_everything_stays_dense(by_budget):
    found = propose_plan(llama(), rows(), max_error=0, mechanisms=["window"], rounds=1)
    assert found.plan.attention == Dense()
    assert found.error == 0
    assert found.speedup == 1
    assert found.kept


def test_an_encoder_by_its_embeddings_with_real_times(tmp_path):
    model = bert()
    found = propose_plan(model, rows(4, 512), max_error=0.5, rounds=1)
    assert found.kind == "cosine"
    assert {row.layer for row in found.layers} == {0, 1}
    assert found.seconds > 0
    assert found.dense_seconds > 0
    names = {label.split("(")[0] for label, _ in found.slow} | {p.label.split("(")[0] for p in found.points}
    assert names >= {mechanisms()[name].__name__ for name in BUDGETS}, "every mechanism is accounted for"
    about = {
        "model": "tiny", "dtype": "float32", "device": "cpu", "length": 512, "corpus": "random", "training": False,
        "batches": 4, "rounds": 1, "environment": environment(),
    }  # fmt: skip
    write(found, tmp_path, about)
    assert (tmp_path / "pareto.png").stat().st_size > 5000
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert FastPlan(**saved).to_dict() == found.plan.to_dict()
    assert json.loads((tmp_path / MARK).read_text())["max_error"] == 0.5
    assert "End error" in (tmp_path / "table.md").read_text()
    assert markdown(found)


def test_little_time_leaves_single_mechanisms_out_and_says_which(by_budget):
    found = propose_plan(llama(), rows(), max_error=0.1, mechanisms=["window"], rounds=1, seconds=1e-6)
    tried = {p.label for p in found.points if p.kind == "single"}
    assert len(tried) == 1, "one is always tried"
    assert found.left_out
    assert not tried & set(found.left_out)
    assert all(label in markdown(found) for label in found.left_out)
    assert propose_plan(llama(), rows(), mechanisms=["window"], rounds=1).left_out == ()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 23])
def test_little_time_finds_the_fastest_single_within_the_budget(count):
    errors, within = torch.rand(count).sort(descending=True).values.tolist(), float(torch.rand(()))
    found: dict[int, float] = {}
    while (c := propose._halving(range(count), found, within)) is not None:
        assert c not in found
        found[c] = errors[c]
    first = next((c for c in range(count) if errors[c] <= within), count)
    assert len(found) <= count.bit_length()
    assert first == count or first in found
    assert first == 0 or first - 1 in found


def test_slow_ones_are_timed_once():
    calls, clock = [0, 0, 0], {0: 0.002, 1: 0.02, 2: 0.001}

    def run(n):
        def call():
            calls[n] += 1
            time.sleep(clock[n])

        return call

    taken = in_turns([run(n) for n in range(3)], 3, torch.device("cpu"), give_up=1.5)
    assert calls[1] == 2, "one call that does not count, and one that does"
    assert calls[0] == 4
    assert calls[2] <= 4
    assert taken[1] >= 0.02


def test_training_times_have_a_backward():
    found = propose_plan(llama(), rows(), max_error=1.0, mechanisms=["window"], rounds=1, training=True)
    assert found.seconds > 0


def test_end_errors():
    x, y = torch.randn(2, 5, 7, dtype=torch.float64).unbind()
    wanted = F.kl_div(x.log_softmax(-1), y.log_softmax(-1), log_target=True, reduction="sum") / 5
    assert end_error("kl", x, y) == pytest.approx(wanted.item())
    assert end_error("cosine", 3 * x, x) == pytest.approx(0, abs=1e-12)
    assert end_error("cosine", -x, x) == pytest.approx(2)


def test_padding_does_not_count_at_the_end():
    model = bert()
    ids = rows()[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, 200:] = 0
    with torch.no_grad():
        _, padded = ends(model, {"input_ids": ids, "attention_mask": mask})
        _, cut = ends(model, {"input_ids": ids[:, :200]})
    assert torch.allclose(padded, cut, atol=1e-5)


def test_a_plan_by_ranges_of_layers():
    def layer(stack, n):
        return Layer(stack, n, True, (4, 8, 8))

    near, far, dense = Window(window=8), Nystrom(landmarks=4), Dense()
    text = [layer("text", n) for n in range(4)]
    assert plan_of(text, [near] * 4).attention == near
    assert plan_of(text, [near, near, dense, near]).attention == {"0-1": near, "2": dense, "3": near}
    both = [layer("encoder", 0), layer("encoder", 1), layer("decoder", 0)]
    assert plan_of(both, [far, far, near]).attention == {"encoder.0-1": far, "decoder.0": near}


def test_every_mechanism_is_a_candidate_or_has_a_reason():
    assert set(BUDGETS) | set(LEFT_OUT) == set(mechanisms())
    assert not set(BUDGETS) & set(LEFT_OUT)
    for length in (128, 1000, 4096, 65536):
        for causal in (False, True):
            found = candidates(length, causal)
            assert len(set(found)) == len(found)
            assert all(one.causal or not causal for one in found)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batches": rows(2)}, "three batches"),
        ({"max_error": -1.0}, "max_error >= 0"),
        ({"max_error": float("nan")}, "max_error >= 0"),
        ({"seconds": 0.0}, "seconds must be more than 0"),
        ({"mechanisms": ["windo"]}, "unknown attention mechanism 'windo'"),
        ({"mechanisms": ["graph"]}, "leaves graph out"),
        ({"mechanisms": ["nystrom"]}, "no causal form"),
        ({"batches": rows(3, 32), "mechanisms": ["window"]}, "dense attention is best"),
    ],
)
def test_what_cannot_be_used(change, words):
    given = {"batches": rows(), **change}
    with pytest.raises(ValueError, match=words):
        propose_plan(llama(), given.pop("batches"), **given)


def test_a_model_with_a_plan_raises():
    with pytest.raises(ValueError, match="remove_plan"):
        propose_plan(apply_plan(llama(), FastPlan(attention=Window(window=8))), rows(), rounds=1)


def tfast(**fields):
    torch.manual_seed(0)
    config = TFastConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, causal=True,
        initializer_range=0.3, **fields,
    )  # fmt: skip
    return TFastForCausalLM(config).eval()


def test_a_model_with_attention_in_its_config_is_planned_and_left_as_it_was(by_budget, tmp_path):
    model, ids = tfast(), rows(1)[0]
    with torch.no_grad():
        before = model(**ids).logits
    found = propose_plan(model, rows(), max_error=1e9, mechanisms=["window"], rounds=1)
    assert found.kept
    assert isinstance(found.plan.attention, Window)
    assert found.error > 0
    with torch.no_grad():
        assert torch.equal(model(**ids).logits, before)
        model.save_pretrained(tmp_path)
        fast = TFastForCausalLM.from_pretrained(tmp_path, attention=found.plan.attention)
        assert not torch.equal(fast(**ids).logits, before)


@pytest.mark.parametrize(
    ("fields", "implementation", "said"),
    [({"attention": Window(window=4)}, "tfast", "attention=Dense"), ({}, "sdpa", "attn_implementation='tfast'")],
)
def test_a_model_whose_layers_cannot_be_switched_is_refused(fields, implementation, said):
    model = tfast(**fields)
    model.set_attn_implementation(implementation)
    with pytest.raises(ValueError, match=said):
        propose_plan(model, rows(), mechanisms=["window"], rounds=1)
