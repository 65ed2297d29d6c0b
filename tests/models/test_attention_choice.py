"""Which attention runs: the config's choice, or what the user asks for; kept by every way to make and move a model."""

import copy
import json
import pickle

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from hf_tfast import (
    Dense,
    FastPlan,
    TFastForCausalLM,
    TFastForMaskedLM,
    TFastModel,
    Window,
    apply_plan,
    attention_report,
)
from hf_tfast.attention import mechanisms
from hf_tfast.integration._stamps import last_run, stamped_modules
from hf_tfast.testing import assert_near
from tests.models.tiny_tfast import config, logits, make, small, tokens

NARROW = Window(window=3, sinks=1)
AUTO = {TFastForCausalLM: AutoModelForCausalLM, TFastForMaskedLM: AutoModelForMaskedLM}
EVERY = [
    (model, name)
    for name, cls in mechanisms().items()
    for model in (TFastForCausalLM, TFastForMaskedLM)
    if cls.causal or model is TFastForMaskedLM
]


def ran(model):
    return [last_run(module).mechanism for module, _ in stamped_modules(model)]


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("model", [TFastForCausalLM, TFastForMaskedLM])
def test_dense_mechanism_sdpa_and_eager_agree(model, cosine):
    made, ids = make(model, similarity="cosine" if cosine else "dot", attention_gate=cosine).double(), tokens()
    padded = torch.ones_like(ids)
    padded[0, :4] = 0
    for mask in (None, padded):
        seen = slice(4, None) if mask is not None else slice(None)
        expected = {}
        for name in ("tfast", "sdpa", "eager"):
            made.set_attn_implementation(name)
            expected[name] = logits(made, ids, attention_mask=mask)[:, seen]
        assert_near(expected["sdpa"], expected["tfast"], "sdpa")
        assert_near(expected["eager"], expected["tfast"], "eager")


@pytest.mark.parametrize(("model", "name"), EVERY)
def test_every_mechanism_trains_a_step_and_reloads_to_the_last_bit(model, name, tmp_path):
    made, ids = make(model, name, attention=small(name), num_hidden_layers=1), tokens(2, 40)
    before = logits(made, ids)
    made.train()
    step = torch.optim.SGD(made.parameters(), lr=0.5)
    made(ids, labels=ids).loss.backward()
    without = [name for name, parameter in made.named_parameters() if parameter.grad is None]
    assert not without
    step.step()
    after = logits(made.eval(), ids)
    assert after.isfinite().all()
    assert (after - before).abs().max() > 1e-3
    assert ran(made) == [small(name)]
    made.save_pretrained(tmp_path)
    loaded = AUTO[model].from_pretrained(tmp_path).eval()
    assert type(loaded) is model
    assert torch.equal(logits(loaded, ids), after)
    assert ran(loaded) == [small(name)]


def test_layers_run_what_the_config_says_of_them():
    made = make(TFastForCausalLM, num_hidden_layers=3, attention={"0": Window(window=3), "2": Window(window=9)})
    made(tokens())
    assert ran(made) == [Window(window=3), Dense(), Window(window=9)]
    listed = make(TFastForCausalLM, num_hidden_layers=3, attention=[Window(window=3), Dense(), Window(window=9)])
    assert torch.equal(logits(listed, tokens()), logits(made, tokens()))


def test_an_explicit_implementation_wins_and_is_not_saved(tmp_path):
    made, ids = make(TFastForCausalLM, attention=NARROW), tokens()
    fast, dense = logits(made, ids), logits(make(TFastForCausalLM, attention=Dense()), ids)
    assert (fast - dense).abs().max() > 1e-2
    made.save_pretrained(tmp_path / "fast")
    for asked, near in (("sdpa", dense), ("eager", dense), ("tfast", fast), (None, fast)):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fast", attn_implementation=asked).eval()
        assert loaded.config._attn_implementation == (asked or "tfast")
        assert_near(logits(loaded, ids), near, str(asked))
        loaded.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
        assert torch.equal(logits(again, ids), fast), "the choice in the config is what a saved model says"
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "fast", attn_implementation="tfast_window").eval()
    assert_near(logits(wide, ids), dense, "tfast_window with its default window")
    assert ran(wide) == [Window()] * 2


def test_switching_there_and_back():
    made, ids = make(TFastForMaskedLM, attention=NARROW), tokens()
    fast = logits(made, ids)
    made.set_attn_implementation("sdpa")
    assert (logits(made, ids) - fast).abs().max() > 1e-2
    made.set_attn_implementation("tfast")
    assert torch.equal(logits(made, ids), fast)


def test_the_choice_can_be_changed_while_loading(tmp_path):
    made, ids = make(TFastForCausalLM, attention=NARROW), tokens()
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attention=Window(window=2)).eval()
    loaded(ids)
    assert ran(loaded) == [Window(window=2)] * 2
    loaded.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["attention"]["window"] == 2


def test_every_way_to_make_a_model_runs_the_choice(tmp_path):
    given, ids = config(attention=NARROW, causal=True), tokens()
    made = make(TFastModel, attention=NARROW, causal=True)
    expected = logits(made, ids)
    made.save_pretrained(tmp_path)
    ways = {
        "deepcopy": copy.deepcopy(made),
        "pickle": pickle.loads(pickle.dumps(made)),
        "from_pretrained": TFastModel.from_pretrained(tmp_path),
        "auto": AutoModel.from_pretrained(tmp_path),
        "config": AutoModel.from_pretrained(tmp_path, config=given),
        "live config": AutoModel.from_pretrained(tmp_path, config=copy.deepcopy(made.config)),
        "device_map": AutoModel.from_pretrained(tmp_path, device_map="cpu"),
    }
    for way, model in ways.items():
        assert torch.equal(logits(model.eval(), ids), expected), way
        assert ran(model) == [NARROW] * 2, way
    assert AutoModel.from_config(given).config._attn_implementation == "tfast"
    dense = AutoModel.from_config(given, attn_implementation="sdpa")
    assert dense.config._attn_implementation == "sdpa"


def test_the_report_says_what_runs():
    made = make(TFastForCausalLM, attention={"1": NARROW})
    made(tokens(1, 40))
    report = attention_report(made)
    assert [row.mechanism for row in report.layers] == [repr(Dense()), repr(NARROW)]
    assert [row.implementation for row in report.layers] == ["tfast"] * 2
    assert report.layers[1].density < 0.2
    made.set_attn_implementation("sdpa")
    report = attention_report(made)
    assert [row.implementation for row in report.layers] == ["sdpa"] * 2
    assert report.overruled == ("sdpa",)
    assert "'sdpa' was asked for" in str(report)


def test_a_plan_that_would_contradict_the_config_is_refused(tmp_path):
    made, plan = make(TFastForCausalLM, attention=NARROW), FastPlan(attention=Window(window=9))
    expected = logits(made, tokens())
    made.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has its attention in its config"):
        apply_plan(made, plan)
    with pytest.raises(ValueError, match=r"from_pretrained\(folder, attention="):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=plan)
    assert torch.equal(logits(made, tokens()), expected)


def test_attention_weights_are_refused_where_none_are_formed():
    made, ids = make(TFastForCausalLM), tokens()
    with pytest.raises(ValueError, match="output_attentions.*attention_map"):
        made(ids, output_attentions=True)
    with pytest.raises(ValueError, match="never forms attention weights"):
        TFastForCausalLM(config(output_attentions=True))
    made.set_attn_implementation("eager")
    weights = made(ids, output_attentions=True).attentions
    assert [tuple(w.shape) for w in weights] == [(2, 4, 20, 20)] * 2
    assert_near(weights[0].sum(-1), torch.ones(2, 4, 20), "sums of weights")


@pytest.mark.parametrize(("causal", "asked"), [(True, False), (False, True)])
def test_direction_for_one_call(causal, asked):
    ids = tokens()
    for name in ("tfast", "sdpa", "eager"):
        made = make(TFastModel, causal=causal, attention=NARROW)
        made.set_attn_implementation(name)
        other = make(TFastModel, causal=asked, attention=NARROW)
        other.set_attn_implementation(name)
        assert_near(logits(made, ids, is_causal=asked), logits(other, ids), name)
