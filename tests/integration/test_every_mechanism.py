"""Every mechanism that exists, inside real models: padding, cached generation, save and reload, training, refusals."""

import pytest
import torch
from transformers import AutoModel

from hf_tfast import FastPlan, apply_plan, attention_report
from hf_tfast.attention import mechanisms
from hf_tfast.testing import assert_near
from tests.integration.tiny_models import inputs, output, tiny, tokens

MECHANISMS = mechanisms()
CAUSAL = [name for name, cls in MECHANISMS.items() if cls.causal]


def _plan(name):
    return FastPlan(attention=MECHANISMS[name](**MECHANISMS[name].small))


@pytest.mark.parametrize("name", CAUSAL)
def test_cached_generation_equals_uncached(name):
    model = apply_plan(tiny("llama"), _plan(name))
    ids, valid = tokens("mechanism", name, length=20), torch.ones(2, 20, dtype=torch.long)
    valid[0, :8] = 0
    cached, uncached = (
        model.generate(
            ids,
            attention_mask=valid,
            use_cache=use_cache,
            max_new_tokens=10,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip
        for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("name", MECHANISMS)
def test_padded_equals_unpadded_in_an_encoder(name):
    model, ids = apply_plan(tiny("bert"), _plan(name)), inputs("bert")["input_ids"][:1]
    alone = output(model, {"input_ids": ids})
    padded = torch.cat([ids, torch.full((1, 9), 5)], 1)
    valid = (torch.arange(39) < 30).long()[None]
    assert_near(output(model, {"input_ids": padded, "attention_mask": valid})[:, :30], alone, name)
    report = attention_report(model)
    assert all(row.backend in MECHANISMS[name].backends for row in report.layers)
    assert all(row.density is None or 0.0 < row.density <= 1.0 for row in report.layers)
    str(report)


@pytest.mark.parametrize("name", MECHANISMS)
def test_saved_and_reloaded_to_the_last_bit(name, tmp_path):
    model = apply_plan(tiny("bert"), _plan(name))
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(output(again, inputs("bert")), output(model, inputs("bert")))
    assert again.config.quantization_config == _plan(name)


@pytest.mark.parametrize("name", MECHANISMS)
def test_gradients_reach_every_weight(name):
    model = apply_plan(tiny("bert"), _plan(name))
    model(**inputs("bert")).last_hidden_state.square().sum().backward()
    for path, parameter in model.named_parameters():
        if "attention.self" in path and "key.bias" not in path:  # a key's bias moves all scores of a query alike
            assert parameter.grad is not None, path
            assert parameter.grad.isfinite().all(), path
            assert parameter.grad.abs().max() > 0, path


@pytest.mark.parametrize("name", [n for n, cls in MECHANISMS.items() if not (cls.causal or cls.calibrated)])
def test_without_a_causal_form_a_decoder_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} has no causal form"):
        apply_plan(tiny("llama"), _plan(name))


@pytest.mark.parametrize("name", [name for name, cls in MECHANISMS.items() if not cls.dropout])
def test_dropout_without_a_meaning_is_refused(name):
    model = apply_plan(tiny("bert"), _plan(name)).train()
    with pytest.raises(ValueError, match="no attention dropout.*attention_probs_dropout_prob"):
        output(model, inputs("bert"))
