"""Generation: every cache and every way to decode says what the model without a cache says."""

import copy

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StaticCache

from hf_tfast import Dense, TFastForCausalLM, Window
from hf_tfast.attention import mechanisms
from hf_tfast.integration.cache import WindowLayer
from hf_tfast.testing import assert_near
from tests.models.tiny_tfast import POSITIONS, logits, make, small, tokens

NARROW = Window(window=6, sinks=2)
CAUSAL = [name for name, cls in mechanisms().items() if cls.causal]
GREEDY = {"max_new_tokens": 16, "do_sample": False}


def test_greedy_with_any_cache_is_greedy_without():
    model, ids = make(TFastForCausalLM, attention={"1": NARROW}), tokens()
    expected = model.generate(ids, use_cache=False, **GREEDY)
    assert expected.unique().numel() > 8, "a model that repeats itself shows nothing"
    caches = {
        "its own": {},
        "dynamic": {"past_key_values": DynamicCache(config=model.config)},
        "static": {"past_key_values": StaticCache(config=model.config, max_cache_len=64)},
        "static by name": {"cache_implementation": "static"},
    }
    for name, given in caches.items():
        assert torch.equal(model.generate(ids, **given, **GREEDY), expected), name


@pytest.mark.parametrize("name", CAUSAL)
def test_steps_with_a_cache_are_the_rows_of_one_call(name):
    model, ids = make(TFastForCausalLM, attention=small(name)), tokens(2, 24)
    whole = logits(model, ids, use_cache=False)
    cache, parts = None, []
    for part in ids.split([10, 7, 1, 1, 5], dim=1):
        with torch.no_grad():
            out = model(part, past_key_values=cache, use_cache=True)
        cache, parts = out.past_key_values, [*parts, out.logits]
    assert_near(torch.cat(parts, 1), whole, name)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("asked", ["tfast", "sdpa", "eager"])
def test_left_padding_changes_nothing(positions, asked):
    model, ids = make(TFastForCausalLM, attention=NARROW, position_encoding=positions), tokens(2, 14)
    model.set_attn_implementation(asked)
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], 1)
    mask = (padded != 0).long()
    padded[1, :5], mask[1] = tokens(1, 5), 1  # the second row is full
    out = model.generate(padded, attention_mask=mask, **GREEDY)
    assert torch.equal(out[:1, 19:], model.generate(ids[:1], **GREEDY)[:, 14:])
    assert torch.equal(out[1:], model.generate(padded[1:], **GREEDY))


def test_window_layers_keep_a_bounded_cache():
    model = make(TFastForCausalLM, attention={"1": NARROW})
    with torch.no_grad():
        out = model(tokens(1, 60))
    first, second = out.past_key_values.layers
    assert type(first).__name__ == "DynamicLayer"
    assert first.keys.shape[2] == 60
    assert isinstance(second, WindowLayer)
    assert second.keys.shape[2] < 60
    model.set_attn_implementation("sdpa")
    assert not any(isinstance(layer, WindowLayer) for layer in model(tokens()).past_key_values.layers)


def test_beams():
    model, ids = make(TFastForCausalLM, attention=NARROW), tokens()
    given = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
    found, expected = (model.generate(ids, use_cache=c, **given, **GREEDY) for c in (True, False))
    assert torch.equal(found.sequences, expected.sequences)
    assert_near(found.sequences_scores, expected.sequences_scores, "scores of beams")


def test_sampling_is_drawn_from_the_models_own_logits():
    model, ids = make(TFastForCausalLM, attention=NARROW), tokens()
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(model.generate(ids, max_new_tokens=12, do_sample=True, top_k=20, use_cache=use_cache))
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], model.generate(ids, max_new_tokens=12, do_sample=False))


@pytest.mark.parametrize("attention", [Dense(), NARROW])
def test_assisted_generation(attention):
    model, ids = make(TFastForCausalLM, attention=attention), tokens(1)
    expected = model.generate(ids, **GREEDY)
    assistants = {"itself": copy.deepcopy(model), "another": make(TFastForCausalLM, "another", num_hidden_layers=1)}
    for name, assistant in assistants.items():
        assert torch.equal(model.generate(ids, assistant_model=assistant, **GREEDY), expected), name
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), expected)


class _Only(LogitsProcessor):
    def __init__(self, ids):
        self.ids = ids

    def __call__(self, input_ids, scores):
        return scores.masked_fill(~torch.isin(torch.arange(scores.shape[1]), torch.tensor(self.ids)), -torch.inf)


def test_constrained_generation():
    model, ids = make(TFastForCausalLM, attention=NARROW), tokens()
    free = model.generate(ids, **GREEDY)[:, 20:]
    by_prefix = model.generate(ids, prefix_allowed_tokens_fn=lambda batch, seen: [5, 6, 7], **GREEDY)[:, 20:]
    assert set(by_prefix.flatten().tolist()) <= {5, 6, 7}
    by_processor = model.generate(ids, logits_processor=LogitsProcessorList([_Only([5, 6, 7])]), **GREEDY)[:, 20:]
    assert torch.equal(by_processor, by_prefix)
    first = int(free[0, 0])
    assert first not in model.generate(ids, bad_words_ids=[[first]], **GREEDY)[0, 20:].tolist()


def test_embeddings_in_place_of_ids():
    model, ids = make(TFastForCausalLM, attention=NARROW, position_encoding="sinusoidal"), tokens()
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(logits(model, inputs_embeds=embeds), logits(model, ids))
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), model.generate(ids, **GREEDY)[:, 20:])
    for given in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**given)


def test_logits_to_keep():
    model, ids = make(TFastForCausalLM, attention=NARROW), tokens()
    whole = logits(model, ids)
    assert_near(logits(model, ids, logits_to_keep=3), whole[:, -3:], "the last three")
    assert_near(logits(model, ids, logits_to_keep=torch.tensor([0, 7])), whole[:, [0, 7]], "two of them")
