"""A plan survives save, reload and push; a second one, a lost one and a corrupt one are refused."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from hf_tfast import Dense, FastPlan, Window, apply_plan, attention_report, remove_plan
from hf_tfast.integration._stamps import stamped_modules
from tests.integration.tiny_models import FAMILIES, inputs, output, tiny

PLAN = FastPlan(attention={"0": Dense(), "1-": Window(window=5, sinks=1)})
NARROW = FastPlan(attention=Window(window=5))
SAVED = ["bert", "llama", "gemma2", "gpt2", "bart", "encoder_decoder", "whisper", "vit", "llava"]


@pytest.fixture
def dense(tmp_path):
    def save(name):
        folder = tmp_path / f"{name}-dense"
        tiny(name).save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize("name", SAVED)
def test_saved_and_reloaded_twice_to_the_last_bit(name, dense, tmp_path):
    auto, given = FAMILIES[name].auto, inputs(name)
    plan = NARROW if FAMILIES[name].inputs in ("pair", "audio") else PLAN
    model = auto.from_pretrained(dense(name), quantization_config=plan).eval()
    expected = output(model, given)
    assert (expected - output(tiny(name), given)).abs().max() > 1e-3
    assert torch.equal(expected, output(apply_plan(tiny(name), plan), given)), "loading and apply_plan are one"
    for trip in ("once", "twice"):
        model.save_pretrained(tmp_path / trip)
        model = auto.from_pretrained(tmp_path / trip).eval()
        assert torch.equal(output(model, given), expected)
        assert not model.is_quantized
    stored = json.loads((tmp_path / "twice/config.json").read_text())
    assert stored["quantization_config"] == {"quant_method": "tfast", "plan_version": 1, **plan.to_dict()}
    parts = {"llava": {"text_config": "tfast"}, "encoder_decoder": {"encoder": "tfast", "decoder": "tfast"}}
    assert stored["attn_implementation"] == parts.get(name, "tfast")


def test_the_text_half_of_a_composite_keeps_its_plan(dense, tmp_path):
    apply_plan(tiny("llava"), NARROW).save_pretrained(tmp_path / "fast")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "fast")
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert {s.stack for _, s in stamped_modules(model) if s.mechanism == Window(window=5)} == {"text"}


def test_a_second_plan_is_refused(dense, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense("llama"), quantization_config=PLAN)
    model.save_pretrained(tmp_path / "fast")
    with pytest.raises(ValueError, match="SavedFastPlan"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "fast", quantization_config=NARROW)
    with pytest.raises(ValueError, match="SavedFastPlan"):
        AutoModelForCausalLM.from_pretrained(dense("llama"), config=model.config, quantization_config=NARROW)
    with pytest.raises(ValueError, match="already has a plan"):
        apply_plan(model, NARROW)
    with pytest.raises(ValueError, match="already has a plan"):
        apply_plan(AutoModelForCausalLM.from_pretrained(tmp_path / "fast"), NARROW)


def test_an_explicit_implementation_wins_and_is_reported(tmp_path):
    apply_plan(tiny("llama"), NARROW).save_pretrained(tmp_path / "fast")
    given = inputs("llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fast", attn_implementation="sdpa")
    assert torch.equal(output(model, given), output(tiny("llama"), given))
    report = attention_report(model)
    assert report.overruled == ("sdpa",)
    assert "sdpa" in str(report)
    assert {row.implementation for row in report.layers} == {"sdpa"}
    model.save_pretrained(tmp_path / "again")  # the plan is not lost
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert (output(again, given) - output(model, given)).abs().max() > 1e-3
    assert attention_report(again).overruled == ()
    again.set_attn_implementation("sdpa")
    assert attention_report(again).overruled == ("sdpa",)
    assert torch.equal(output(again, given), output(model, given))


def test_dense_layers_run_what_was_asked_for(dense):
    model = AutoModelForCausalLM.from_pretrained(dense("llama"), quantization_config=PLAN, attn_implementation="eager")
    output(model, inputs("llama"))
    backends = [row.backend for row in attention_report(model).layers]
    assert backends[0] == "eager"
    assert backends[1] != "eager"
    assert (
        output(model, inputs("llama")) - output(apply_plan(tiny("llama"), PLAN), inputs("llama"))
    ).abs().max() < 1e-4
    with pytest.raises(ValueError, match="'sdpa' or 'eager'"):
        AutoModelForCausalLM.from_pretrained(
            dense("llama"), quantization_config=PLAN, attn_implementation="flex_attention"
        )


def test_from_config_raises_rather_than_running_dense(dense, tmp_path):
    apply_plan(tiny("bert"), NARROW).save_pretrained(tmp_path / "fast")
    model = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path / "fast"))
    with pytest.raises(ValueError, match="without a plan"):
        output(model, inputs("bert"))


def test_remove_plan_leaves_a_plain_dense_checkpoint(tmp_path):
    model = remove_plan(apply_plan(tiny("llava"), NARROW))
    tiny("llava").save_pretrained(tmp_path / "dense")
    model.save_pretrained(tmp_path / "removed")
    assert (tmp_path / "removed/config.json").read_text() == (tmp_path / "dense/config.json").read_text()
    assert (tmp_path / "removed/model.safetensors").read_bytes() == (tmp_path / "dense/model.safetensors").read_bytes()
    assert not stamped_modules(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="no plan"):
        remove_plan(model)


@pytest.mark.parametrize("name", ["bert", "llava"])
def test_a_process_without_hf_tfast_raises(name, tmp_path):
    apply_plan(tiny(name), NARROW).save_pretrained(tmp_path / "fast")
    auto = FAMILIES[name].auto.__name__
    code = f"from transformers import {auto}; {auto}.from_pretrained({str(tmp_path / 'fast')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "ValueError" in done.stderr
    assert "tfast" in done.stderr


CORRUPT = {
    "no version": ({"quant_method": "tfast", "attention": {"mechanism": "window", "window": 5}}, "plan_version None"),
    "new version": ({"plan_version": 2, "attention": {"mechanism": "window"}}, "plan_version 2"),
    "version of text": ({"plan_version": "1", "attention": {"mechanism": "window"}}, "plan_version '1'"),
    "no attention": ({"plan_version": 1}, "neither 'attention' nor"),
    "attention is null": ({"plan_version": 1, "attention": None}, "changes nothing"),
    "attention is a list": ({"plan_version": 1, "attention": [{"mechanism": "window"}]}, "dict from layer ranges"),
    "unknown mechanism": ({"plan_version": 1, "attention": {"mechanism": "windwo"}}, "unknown attention mechanism"),
    "unknown field": ({"plan_version": 1, "attention": {"mechanism": "window", "size": 5}}, "no field 'size'"),
    "window of 0": ({"plan_version": 1, "attention": {"mechanism": "window", "window": 0}}, "at least 1"),
    "window of text": ({"plan_version": 1, "attention": {"mechanism": "window", "window": "8"}}, "whole number"),
    "layer of text": ({"plan_version": 1, "attention": {"first": {"mechanism": "window"}}}, "layer range"),
    "layer without mechanism": ({"plan_version": 1, "attention": {"0": 5}}, "layers '0'"),
    "absent layer": ({"plan_version": 1, "attention": {"7": {"mechanism": "window"}}}, "layers 0 to 1"),
    "unknown key": ({"plan_version": 1, "attention": {"mechanism": "window"}, "speed": 3}, "no field 'speed'"),
    "a form": (
        {"plan_version": 1, "attention": {"mechanism": "window"}, "feed_forward": {"form": "low_rank", "rank": 3}},
        "does not say the sizes",
    ),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_a_corrupt_plan_in_config_json_is_refused(case, tmp_path):
    apply_plan(tiny("bert"), NARROW).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    plan, message = CORRUPT[case]
    config["quantization_config"] = {"quant_method": "tfast", **plan}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(tmp_path)
