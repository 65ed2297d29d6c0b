"""Generation with encoder-decoders: every cache and every way to decode says what the model without a cache says."""

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from hf_tfast import Window
from hf_tfast.attention import mechanisms
from hf_tfast.integration.cache import WindowLayer
from hf_tfast.testing import assert_near
from tests.models.test_padding import padded
from tests.models.tiny_seq2seq import NARROW, START, make, pair
from tests.models.tiny_tfast import POSITIONS, logits, small, tokens

CAUSAL = [name for name, cls in mechanisms().items() if cls.causal]
GREEDY = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize("asked", ["tfast", "sdpa", "eager"])
def test_greedy_with_any_cache_is_greedy_without(asked):
    made, ids = make(attention=NARROW), tokens()
    made.set_attn_implementation(asked)
    ways = {**GREEDY, "no_repeat_ngram_size": 2}
    expected = made.generate(ids, use_cache=False, **ways)
    assert expected.shape == (2, 17)
    assert (expected[:, 0] == START).all()
    assert expected.unique().numel() > 8, "a model that repeats itself shows nothing"
    given = EncoderDecoderCache(DynamicCache(config=made.config), DynamicCache(config=made.config))
    for name, cache in {
        "its own": {},
        "given": {"past_key_values": given},
        "static": {"cache_implementation": "static"},
    }.items():
        assert torch.equal(made.generate(ids, **cache, **ways), expected), name


@pytest.mark.parametrize("name", CAUSAL)
def test_steps_with_a_cache_are_the_rows_of_one_call(name):
    made, given = make(attention={"decoder": small(name)}).double(), pair(2, 20, 24)
    whole = logits(made, **given, use_cache=False)
    states, cache, parts = made.get_encoder()(given["input_ids"]), None, []
    for part in given["decoder_input_ids"].split([10, 7, 1, 1, 5], dim=1):
        with torch.no_grad():
            out = made(encoder_outputs=states, decoder_input_ids=part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    assert_near(torch.cat(parts, 1), whole, name)


@pytest.mark.parametrize("positions", POSITIONS)
def test_positions_continue_with_a_cache(positions):
    made = make(attention=NARROW, position_encoding=positions)
    ids = tokens()
    assert torch.equal(made.generate(ids, **GREEDY), made.generate(ids, use_cache=False, **GREEDY))


def test_the_cache_of_the_decoder_is_bounded_by_its_window():
    made = make(attention={"decoder.0": Window(window=4, sinks=1)})
    out = made.generate(tokens(), return_dict_in_generate=True, **{**GREEDY, "max_new_tokens": 60})
    own, crossed = out.past_key_values.self_attention_cache, out.past_key_values.cross_attention_cache
    assert isinstance(own.layers[0], WindowLayer)
    assert own.layers[0].keys.shape[2] < 60 == own.layers[1].keys.shape[2]
    assert [layer.keys.shape[2] for layer in crossed.layers] == [20, 20]


def test_cross_attention_keys_are_made_once():
    made, ids = make(attention=NARROW), tokens()
    calls = []
    made.model.decoder.layers[0].cross_attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
    made.generate(ids, **GREEDY)
    assert len(calls) == 1
    made.generate(ids, use_cache=False, **GREEDY)
    assert len(calls) == 1 + 16


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("asked", ["tfast", "sdpa"])
def test_a_padded_batch_generates_what_its_rows_do(side, asked):
    made, lengths = make(attention=NARROW).double(), (20, 11, 4)
    made.set_attn_implementation(asked)
    source, mask = padded(tokens(3, 20), lengths, side)
    found = made.generate(source, attention_mask=mask, **GREEDY)
    for row, length in enumerate(lengths):
        assert torch.equal(found[row : row + 1], made.generate(tokens(3, 20)[row : row + 1, :length], **GREEDY))


@pytest.mark.parametrize(
    "ways", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 2.0}]
)
def test_beams(ways):
    made, ids = make(attention=NARROW).double(), tokens()
    given = {"max_new_tokens": 12, "do_sample": False, **ways}
    expected = made.generate(ids, use_cache=False, **given)
    assert torch.equal(made.generate(ids, **given), expected)
    assert not torch.equal(
        expected[:: len(expected) // 2, :13], made.generate(ids, max_new_tokens=12, do_sample=False)
    )


def test_sampling_is_seeded_and_cached_alike():
    made, ids = make(attention=NARROW).double(), tokens()
    runs = []
    for use_cache in (True, True, False):
        torch.manual_seed(5)
        runs.append(made.generate(ids, do_sample=True, top_k=20, max_new_tokens=12, use_cache=use_cache))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
    torch.manual_seed(6)
    assert not torch.equal(made.generate(ids, do_sample=True, top_k=20, max_new_tokens=12), runs[0])


def test_generate_takes_embeddings_prompts_and_encoder_outputs():
    made, ids = make(attention=NARROW), tokens()
    expected = made.generate(ids, **GREEDY)
    assert torch.equal(made.generate(inputs_embeds=made.get_input_embeddings()(ids), **GREEDY), expected)
    assert torch.equal(made.generate(encoder_outputs=made.get_encoder()(ids), **GREEDY), expected)
    begun = made.generate(ids, decoder_input_ids=expected[:, :6], **{**GREEDY, "max_new_tokens": 11})
    assert torch.equal(begun, expected)


def test_an_end_token_ends_a_row():
    made, ids = make(attention=NARROW), tokens()
    plain = made.generate(ids, **GREEDY)
    end = int(plain[0, 4])
    ended = made.generate(ids, **{**GREEDY, "eos_token_id": end})
    stop = plain[0].tolist().index(end)
    assert torch.equal(ended[0, : stop + 1], plain[0, : stop + 1])
    assert (ended[0, stop + 1 :] == 0).all()
