"""convert: plan, calibration and report in one; nothing changes where anything is wrong."""

import json
from importlib import import_module

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_tfast import (
    SVD,
    Activation,
    FastPlan,
    Int8,
    LowRank,
    Pruned,
    TensorTrain,
    TFastConfig,
    TFastForCausalLM,
    Window,
    apply_plan,
    calibrate,
    convert,
)
from hf_tfast.backends.int8 import uncompiled
from hf_tfast.compression._twin import Twin
from hf_tfast.feed_forward._fused import FusedInt8
from hf_tfast.feed_forward.low_rank import LowRankLinear
from tests.integration.tiny_models import GROUPED, inputs, output, tiny, tokens

PRUNED = Pruned(ratio=0.5, method="activation", recover=True)
WHITE = LowRank(ratio=0.6, method="activation")


@pytest.fixture(autouse=True)
def _as_written():
    """Steps of Int8 uncompiled: a step that is compiled anew for another shape may round otherwise."""
    with uncompiled():
        yield


VERB = import_module("hf_tfast.compression.convert")
BATCHES = [{"input_ids": tokens("calibration", n, batch=4)} for n in range(3)]


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize(
    "forms", [PRUNED, WHITE, Activation(bits=4), [PRUNED, WHITE], [PRUNED, WHITE, Activation(bits=6)]], ids=repr
)
def test_forms_made_from_data_reload_bit_for_bit(name, forms, tmp_path):
    model, report = convert(tiny(name), FastPlan(attention=Window(window=8), feed_forward=forms), BATCHES, rounds=0)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(output(again, inputs(name)), output(model, inputs(name)))
    assert report.basis.held_out
    assert report.attention_linears == 0


def test_the_error_is_that_of_the_layer_on_the_dense_input():
    plan = FastPlan(feed_forward=LowRank(rank=9))
    dense, mask = tiny("llama"), torch.ones(4, 30).long()
    mask[0, 11:] = 0
    held = {"input_ids": tokens("held", batch=4), "attention_mask": mask}
    model, report = convert(tiny("llama"), plan, [BATCHES[0], held], rounds=0)
    inputs_of = {}
    for n, layer in enumerate(dense.model.layers):
        layer.mlp.register_forward_pre_hook(lambda module, args, n=n: inputs_of.update({n: args[0]}))
    with torch.no_grad():
        logits = dense(**held).logits[mask.bool()]
        for n, layer in enumerate(model.model.layers):
            x = inputs_of[n][mask.bool()]
            y, other = dense.model.layers[n].mlp(x), layer.mlp(x)
            assert report.layers[n].error == pytest.approx(float((other - y).norm() / y.norm()), rel=1e-4)
        whole = (model(**held).logits[mask.bool()] - logits).norm() / logits.norm()
    assert report.error == pytest.approx(float(whole), rel=1e-4)
    assert report.layers[0].error > 0.01


def test_data_helps():
    """On inputs that live in few directions, the forms that have seen them err less than those that have not."""

    def error(form):
        model = tiny("llama")
        with torch.no_grad():
            model.model.embed_tokens.weight[:, 6:] *= 0.05
        return convert(model, FastPlan(feed_forward=form), BATCHES, rounds=0)[1].layers[0].error

    assert error(LowRank(rank=10, method="activation")) < error(LowRank(rank=10))
    assert error(PRUNED) < error(Pruned(ratio=0.5))


def test_calibration_sees_the_planned_attention():
    """Moments are those under the window: another window gives other factors, in a model of the same weights."""
    made = [
        convert(tiny("llama"), FastPlan(attention=Window(window=w), feed_forward={"1": WHITE}), BATCHES, rounds=0)[0]
        for w in (2, 2, 30)
    ]
    first, again, wide = (model.model.layers[1].mlp.up_proj.first.weight for model in made)
    assert torch.equal(first, again)
    assert not torch.allclose(first, wide)


@pytest.mark.parametrize("factorised", [LowRank(rank=9), WHITE])
def test_levels_after_factors_are_those_of_what_the_factors_read(factorised):
    """8 bits between the factors cost little: a step made from other data than F x would cost much."""
    plain, rounded = (
        convert(tiny("llama"), FastPlan(feed_forward=[PRUNED, factorised, *more]), BATCHES, rounds=0)[0]
        for more in ([], [Activation(bits=8)])
    )
    plain, rounded = plain.requires_grad_(False), rounded.requires_grad_(False)
    for one, other in zip(plain.model.layers, rounded.model.layers, strict=True):
        x = torch.randn(50, 32)
        assert (other.mlp(x) - one.mlp(x)).norm() < 0.1 * one.mlp(x).norm()
        read, levels = one.mlp.up_proj.first(x), other.mlp.up_proj.second.levels
        assert 0.3 < levels.step.item() * 127 / float(read.abs().max()) < 3


def test_a_form_after_cores_is_refused_by_name():
    with pytest.raises(ValueError, match="gate_proj is a TensorTrainLinear"):
        convert(tiny("llama"), FastPlan(feed_forward=[TensorTrain(ranks=3), Activation()]), BATCHES)


def test_causal_svd_is_calibrated_too(tmp_path):
    plan = FastPlan(attention=SVD(rank=4, keys=8), feed_forward=WHITE)
    model, _ = convert(tiny("llama"), plan, BATCHES, rounds=0)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(output(again, inputs("llama")), output(model, inputs("llama")))
    same = calibrate(apply_plan(tiny("llama"), FastPlan(attention=plan.attention)), BATCHES[:2])
    one, two = (dict(m.model.layers[0].self_attn.named_buffers()) for m in (model, same))
    assert set(one) == set(two)
    assert len(one) == 2


def test_a_plan_that_needs_no_data():
    model, report = convert(tiny("llama"), FastPlan(attention=Window(window=6), feed_forward=LowRank(rank=5)))
    same = apply_plan(tiny("llama"), FastPlan(attention=Window(window=6), feed_forward=LowRank(rank=5)))
    assert torch.equal(output(model, inputs("llama")), output(same, inputs("llama")))
    assert report.error is report.layers[0].seconds_after is report.basis is None
    assert "no error and no time" in str(report)


def test_bytes_and_counts():
    model, report = convert(tiny("llama"), FastPlan(feed_forward={"1": LowRank(rank=5)}))
    (row,) = report.layers
    assert (row.layer, row.bytes_before, row.bytes_after) == (1, 3 * 32 * 48 * 4, 3 * 5 * 80 * 4)
    assert report.bytes_before - report.bytes_after == row.bytes_before - row.bytes_after
    assert report.bytes_after == sum(p.numel() * 4 for p in model.parameters())
    assert report.facts == "3 feed-forward linears low_rank, 0 attention, output head kept"
    assert convert(tiny("bert"), FastPlan(feed_forward=TensorTrain(ranks=3)))[1].facts.endswith("no output head")


@pytest.mark.parametrize("name", ["llama", "bert", "bart"])
def test_int8_is_counted_halves_fp16_and_reloads(name, tmp_path):
    pytest.importorskip("bitsandbytes")
    given = BATCHES if name != "bart" else [{**batch, "labels": batch["input_ids"]} for batch in BATCHES]
    forms = Int8() if name != "bart" else {"encoder.0-": Int8()}
    model, report = convert(tiny(name), FastPlan(feed_forward=forms), given, rounds=1)
    n, head = {"llama": (6, "output head kept"), "bert": (4, "no output head"), "bart": (4, "output head kept")}[name]
    assert report.facts == f"{n} feed-forward linears int8, 0 attention, {head}"
    assert sum(type(m).__name__ == "Int8Linear" for m in model.modules()) == n
    for row in report.layers:
        assert 0 < row.error < 0.1
        assert row.bytes_after < 0.4 * row.bytes_before
        assert row.seconds_after > 0
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(output(again, inputs(name)), output(model, inputs(name)))


def test_int8_after_everything_else():
    pytest.importorskip("bitsandbytes")
    forms = [PRUNED, WHITE, Activation(bits=8), Int8()]
    model, report = convert(tiny("llama"), FastPlan(feed_forward=forms), BATCHES, rounds=0)
    assert (
        report.facts == "6 feed-forward linears pruned + low_rank + activation + int8, 0 attention, output head kept"
    )
    three = convert(tiny("llama"), FastPlan(feed_forward=forms[:3]), BATCHES, rounds=0)[1]
    for row, other in zip(report.layers, three.layers, strict=True):
        assert row.bytes_after < 0.5 * other.bytes_after
        assert abs(row.error - other.error) < 0.05


def test_whole_int8_feed_forwards_are_timed_whole(monkeypatch):
    """A hook on a layer would make it step aside: what is timed must be what runs."""
    pytest.importorskip("bitsandbytes")
    calls = []
    real = FusedInt8.whole
    monkeypatch.setattr(FusedInt8, "whole", lambda self, x: (calls.append(self), real(self, x))[1])
    model, report = convert(tiny("llama"), FastPlan(feed_forward=Int8()), BATCHES, rounds=3)
    fused = [m for m in model.modules() if isinstance(m, FusedInt8)]
    assert len(fused) == 2
    # each once when it is made, once for the error of the whole model, and in three timed forwards
    assert [calls.count(m) for m in fused] == [5, 5]
    assert all(row.seconds_after > 0 for row in report.layers)


def test_times_are_of_both_by_turns(monkeypatch):
    order = []
    for name in ("dense", "converted"):
        real = getattr(Twin, name)
        monkeypatch.setattr(Twin, name, lambda self, name=name, real=real: (order.append(name), real(self)))
    _, report = convert(tiny("llama"), FastPlan(attention=Window(window=8), feed_forward=WHITE), BATCHES, rounds=4)
    assert order == ["dense", "converted"] + ["dense", "converted", "converted", "dense"] * 2 + ["converted"]
    for row in (*report.layers, report):
        assert 0 < row.seconds_before < 5
        assert 0 < row.seconds_after < 5
    assert sum(row.seconds_after for row in report.layers) < report.seconds_after
    assert [row.part for row in report.layers] == ["feed_forward"] * 2 + ["attention"] * 2


def test_the_model_keeps_its_modes():
    model = tiny("bert").train()
    model.encoder.layer[0].eval()
    convert(model, FastPlan(feed_forward=WHITE), BATCHES, rounds=1)
    assert not any(module.training for module in model.encoder.layer[0].modules())
    assert all(module.training for module in model.encoder.layer[1].modules())
    assert isinstance(model.encoder.layer[1].output.dense, LowRankLinear)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_report_is_a_folder(tmp_path):
    _, report = convert(tiny("llama"), FastPlan(feed_forward=WHITE), BATCHES, rounds=1, report_to=tmp_path / "report")
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == ["plot.png", "report.json", "report.md"]
    saved = json.loads((tmp_path / "report" / "report.json").read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    assert saved["facts"] in (tmp_path / "report" / "report.md").read_text()
    assert (tmp_path / "report" / "plot.png").stat().st_size > 5000
    with pytest.raises(FileExistsError):
        convert(tiny("llama"), FastPlan(feed_forward=WHITE), BATCHES, report_to=tmp_path / "report")


@pytest.mark.parametrize("what", ["attention alone", "without data", "everything"])
def test_every_report_can_be_drawn(what, tmp_path):
    plan = FastPlan(
        attention=None if what == "without data" else Window(window=8),
        feed_forward=None if what == "attention alone" else LowRank(rank=5),
    )
    batches = BATCHES if what == "everything" else None
    report = convert(tiny("llama"), plan, batches, rounds=1, report_to=tmp_path / "report")[1]
    assert str(report).count("\n") > 5


NAN = {"pixel_values": torch.full((1, 3, 16, 16), torch.nan)}
WRONG = {
    "no batch": ([], "calibration is empty"),
    "no tokens": ([{"input_ids": torch.zeros(2, 0).long()}], "input_ids is empty"),
    "all padding": ([{"input_ids": tokens(1), "attention_mask": torch.zeros(2, 30)}], "all padding"),
    "not a number": ([{"inputs_embeds": torch.full((1, 5, 32), torch.nan)}], "not finite"),
    "another tokenizer": ([{"input_ids": torch.full((1, 5), 99)}], "another tokenizer"),
    "one batch bare": (BATCHES[0], "put it in a list"),
    "fractions": ([{"input_ids": torch.rand(2, 9)}], "input_ids are whole numbers, got torch.float32"),
    "texts": (["a text"], "a dict of what the model is called with"),
    "square mask": ([{"input_ids": tokens(1), "attention_mask": torch.ones(2, 1, 30, 30)}], r"\[b n\]"),
    "cache": ([{"input_ids": tokens(1), "past_key_values": ()}], "past_key_values"),
    "nothing": (None, "give calibration=batches"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_calibration_changes_nothing(case):
    batches, message = WRONG[case]
    model = tiny("llama")
    before, modules, names = output(model, inputs("llama")), dict(model.named_modules()), set(vars(model))
    with pytest.raises(ValueError, match=message):
        convert(model, FastPlan(attention=Window(window=6), feed_forward=[PRUNED, WHITE]), batches)
    check_untouched(model, before, modules, names)


def check_untouched(model, before, modules, names):
    assert dict(model.named_modules()) == modules
    assert torch.equal(output(model, inputs("llama")), before)
    assert getattr(model.config, "quantization_config", None) is None
    assert set(vars(model)) == names
    assert apply_plan(model, FastPlan(attention=Window(window=6)))


def test_int8_is_undone_too(monkeypatch):
    pytest.importorskip("bitsandbytes")
    model = tiny("llama")
    before, modules, names = output(model, inputs("llama")), dict(model.named_modules()), set(vars(model))

    def fail(*given):
        raise ValueError("broken")

    monkeypatch.setattr(VERB, "measure", fail)
    with pytest.raises(ValueError, match="broken"):
        convert(model, FastPlan(feed_forward=Int8()), BATCHES)
    assert type(model.model.layers[0].mlp) is type(tiny("llama").model.layers[0].mlp)
    check_untouched(model, before, modules, names)


@pytest.mark.parametrize("where", ["calibrate", "measure"])
def test_a_failure_midway_changes_nothing(where, monkeypatch):
    model = tiny("llama")
    before, modules, names = output(model, inputs("llama")), dict(model.named_modules()), set(vars(model))

    def fail(*given):
        if where == "calibrate" and not isinstance(model.model.layers[0].mlp.up_proj, LowRankLinear):
            return calibrate(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(VERB, where, fail)
    with pytest.raises(KeyboardInterrupt):
        convert(model, FastPlan(attention=SVD(rank=4), feed_forward=WHITE), BATCHES)
    check_untouched(model, before, modules, names)


def test_attention_of_the_models_own_config_stays(monkeypatch):
    """A TFast model's window is part of the model: in both of what is compared, and after a failure."""
    torch.manual_seed(3)
    config = TFastConfig(**GROUPED, causal=True, attention={"mechanism": "window", "window": 4})
    model = TFastForCausalLM(config).eval()
    before = output(model, inputs("llama"))
    monkeypatch.setattr(VERB, "_attention", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(model, FastPlan(feed_forward=LowRank(rank=5)), BATCHES)
    assert torch.equal(output(model, inputs("llama")), before)
    monkeypatch.undo()
    _, report = convert(model, FastPlan(feed_forward=LowRank(rank=32)), BATCHES, rounds=1)
    assert report.error < 1e-4
    assert [row.part for row in report.layers] == ["feed_forward"] * 2


def test_a_change_beyond_the_plan_is_refused(monkeypatch):
    """A form that touches attention: found by comparing modules, and undone."""
    model = tiny("llama")
    before, modules, names = output(model, inputs("llama")), dict(model.named_modules()), set(vars(model))
    real = LowRank.apply

    def greedy(self, block, size=None, moments=None):
        block.model.model.layers[0].self_attn.q_proj = torch.nn.Linear(32, 32, bias=False)
        return real(self, block, size, moments)

    monkeypatch.setattr(LowRank, "apply", greedy)
    with pytest.raises(ValueError, match=r"changed model.layers.0.self_attn.q_proj from Linear to Linear"):
        convert(model, FastPlan(feed_forward=LowRank(rank=5)))
    check_untouched(model, before, modules, names)


def test_what_is_not_a_dense_model():
    planned = apply_plan(tiny("llama"), FastPlan(attention=Window(window=6)))
    with pytest.raises(ValueError, match="already has a plan"):
        convert(planned, FastPlan(feed_forward=LowRank(rank=5)))
    with pytest.raises(ValueError, match="expected a FastPlan"):
        convert(tiny("llama"), Window(window=6))
    with pytest.raises(ValueError, match="rounds"):
        convert(tiny("llama"), FastPlan(feed_forward=LowRank(rank=5)), rounds=-1)
