"""Generation under a plan: cached equals uncached, every strategy and cache, chunked prefill, left padding."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hf_tfast import Dense, FastPlan, Random, Window, apply_plan
from hf_tfast.testing import assert_near
from tests.integration.tiny_models import inputs, output, tiny, tokens

PLANS = {
    "window": FastPlan(attention=Window(window=6)),
    "sinks": FastPlan(attention=Window(window=5, sinks=3)),
    "mixed": FastPlan(attention={"0": Dense(), "1-": Window(window=6, sinks=1)}),
    "random": FastPlan(attention=Random(window=4, sinks=1, blocks=1, block=4)),
}
STRATEGIES = {
    "greedy": {"do_sample": False},
    "beam": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.7},
}


def _generate(model, ids, **options):
    torch.manual_seed(7)
    return model.generate(ids, max_new_tokens=12, pad_token_id=0, eos_token_id=None, **options)


def _padded():
    """Two rows of which the first has 8 tokens of padding on the left."""
    ids, valid = tokens("padded", length=20), torch.ones(2, 20, dtype=torch.long)
    valid[0, :8] = 0
    return ids, valid


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2", "gpt_oss"])
def test_cached_generation_equals_uncached(name, strategy):
    plan = PLANS["sinks" if name in ("llama", "gpt2") else "window"]
    model, (ids, valid) = apply_plan(tiny(name), plan), _padded()
    cached, uncached = (
        _generate(model, ids, attention_mask=valid, use_cache=use_cache, **STRATEGIES[strategy])
        for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)
    dense = _generate(tiny(name), ids, attention_mask=valid, **STRATEGIES[strategy])
    assert not torch.equal(cached, dense), "a narrow window must change what is generated"


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_every_plan_and_cache(plan, cache):
    model, (ids, valid) = apply_plan(tiny("llama"), PLANS[plan]), _padded()
    expected = _generate(model, ids, attention_mask=valid, use_cache=False)
    assert torch.equal(_generate(model, ids, attention_mask=valid, cache_implementation=cache), expected)


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_static_cache_with_a_sliding_window(name):
    model, (ids, valid) = apply_plan(tiny(name), PLANS["window"]), _padded()
    expected = _generate(model, ids, attention_mask=valid, use_cache=False)
    assert torch.equal(_generate(model, ids, attention_mask=valid, cache_implementation="static"), expected)


@pytest.mark.parametrize("plan", ["sinks", "mixed", "random"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_chunked_prefill_equals_one_prefill(plan, cache):
    """One token at a time, then seven, then the rest: the logits of one forward."""
    model, ids = apply_plan(tiny("llama"), PLANS[plan]), inputs("llama")["input_ids"]
    expected = output(model, {"input_ids": ids})
    past = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=50)
    with torch.no_grad():
        parts = [model(chunk, past_key_values=past).logits for chunk in ids.split([1, 1, 7, 1, 20], dim=1)]
    assert_near(torch.cat(parts, 1), expected, f"{plan} {cache}")


@pytest.mark.parametrize("name", ["bart", "whisper", "encoder_decoder"])
def test_encoder_decoders_generate_as_without_a_cache(name):
    model = apply_plan(tiny(name), FastPlan(attention=Window(window=4, sinks=1)))
    given = {key: value for key, value in inputs(name).items() if not key.startswith("decoder")}
    if name != "whisper":
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        given["attention_mask"][0, 20:] = 0
    options = {"max_new_tokens": 10, "do_sample": False, "num_beams": 2, "decoder_start_token_id": 1, **given}
    options |= {"pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(use_cache=True, **options), model.generate(use_cache=False, **options))


def test_llava_generates_as_without_a_cache():
    model, given = apply_plan(tiny("llava"), PLANS["sinks"]), inputs("llava")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **given}
    assert torch.equal(model.generate(use_cache=True, **options), model.generate(use_cache=False, **options))
