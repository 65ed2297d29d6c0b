"""dequantise: plain layers that hold the rounded weights, plain checkpoints, and plans without Int8."""

import json

import pytest
import torch
import transformers as hf

from hf_tfast import (
    Activation,
    FastPlan,
    Int8,
    LowRank,
    Window,
    apply_plan,
    convert,
    dequantise,
    remove_plan,
)
from hf_tfast.backends.int8 import uncompiled
from hf_tfast.feed_forward._fused import FusedInt8
from tests.integration.tiny_models import inputs, output, tiny, tokens

pytest.importorskip("bitsandbytes")
WEIGHTS = {
    "llama": "model.layers.1.mlp.down_proj.weight",
    "bert": "encoder.layer.1.output.dense.weight",
    "gpt2": "transformer.h.1.mlp.c_proj.weight",
}


@pytest.fixture(autouse=True)
def _as_written():
    with uncompiled():
        yield


@pytest.mark.parametrize("again", [False, True], ids=["live", "loaded"])
@pytest.mark.parametrize("name", list(WEIGHTS))
def test_a_plain_checkpoint_with_the_rounded_weights(name, again, tmp_path):
    dense, model = tiny(name), apply_plan(tiny(name), FastPlan(feed_forward=Int8(threshold=0.0)))
    if again:
        model.save_pretrained(tmp_path / "int8")
        model = type(model).from_pretrained(tmp_path / "int8").eval()
    rounded = output(model, inputs(name))
    assert dequantise(model) is model
    weight, exact = (m.state_dict()[WEIGHTS[name]] for m in (model, dense))
    rows = exact.T if name == "gpt2" else exact
    step = rows.abs().amax(1) / 127
    off = (weight - exact).abs()
    assert (off <= (step if name == "gpt2" else step[:, None]) * 0.5001).all()
    assert off.max() > 0
    assert [type(m) for m in model.modules()] == [type(m) for m in dense.modules()]
    y = output(model, inputs(name))
    assert 0 < (y - rounded).norm() < 0.1 * rounded.norm()
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "is_loaded_in_8bit" not in vars(model)
    plain = type(dense).from_pretrained(tmp_path / "plain").eval()
    assert torch.equal(output(plain, inputs(name)), y)
    assert apply_plan(model, FastPlan(feed_forward=Int8()))


def test_attention_and_other_forms_stay(tmp_path):
    forms = {"0": [LowRank(ratio=0.6), Activation(bits=8, limit=3.0), Int8()], "1": Int8()}
    model = apply_plan(tiny("llama"), FastPlan(attention=Window(window=6), feed_forward=forms))
    dequantise(model)
    plan = model.config.quantization_config
    assert plan.feed_forward == {"0": [LowRank(ratio=0.6), Activation(bits=8, limit=3.0)]}
    assert plan.attention == Window(window=6)
    y = output(model, inputs("llama"))
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(output(again, inputs("llama")), y)
    plain = apply_plan(
        tiny("llama"),
        FastPlan(attention=Window(window=6), feed_forward={"0": [LowRank(ratio=0.6), Activation(bits=8, limit=3.0)]}),
    )
    assert (y - output(plain, inputs("llama"))).norm() < 0.05 * y.norm()


def test_attention_alone_is_left():
    model = apply_plan(tiny("bert"), FastPlan(attention=Window(window=6), feed_forward=Int8()))
    dequantise(model, torch.float64)
    assert model.config.quantization_config == FastPlan(attention=Window(window=6))
    assert model.encoder.layer[0].output.dense.weight.dtype == torch.float64
    assert not any(isinstance(module, FusedInt8) for module in model.modules())
    remove_plan(model)


def test_it_trains_again():
    model, _ = convert(
        tiny("llama"), FastPlan(feed_forward=[LowRank(rank=8), Int8()]), [{"input_ids": tokens(1)}], rounds=0
    )
    assert not any(p.requires_grad for p in model.model.layers[0].mlp.parameters() if p.is_floating_point())
    dequantise(model)
    model(input_ids=tokens(1), labels=tokens(1)).loss.backward()
    assert all(p.grad is not None for p in model.model.layers[0].mlp.parameters())


@pytest.mark.parametrize("plan", [None, FastPlan(attention=Window(window=6)), FastPlan(feed_forward=LowRank(rank=4))])
def test_nothing_to_do(plan):
    model = tiny("llama") if plan is None else apply_plan(tiny("llama"), plan)
    with pytest.raises(ValueError, match="no plan with Int8"):
        dequantise(model)


def test_adapters_are_taken_off_first():
    peft = pytest.importorskip("peft")
    model = apply_plan(tiny("llama"), FastPlan(feed_forward=Int8()))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj"], r=2))
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"down_proj is a Linear8bitLt .*merge_and_unload"):
        dequantise(model)
    assert dict(model.named_modules()) == before
    y = output(model, inputs("llama"))
    assert (output(dequantise(wrapped.unload()), inputs("llama")) - y).norm() < 0.1 * y.norm()


def test_remove_plan_names_the_way():
    model = apply_plan(tiny("llama"), FastPlan(feed_forward=Int8()))
    with pytest.raises(ValueError, match="dequantise"):
        remove_plan(model)
