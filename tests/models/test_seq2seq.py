"""Encoder-decoders: what they compute, save and refuse."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from hf_tfast import (
    Dense,
    TFastForConditionalGeneration,
    TFastSeq2SeqConfig,
    TFastSeq2SeqModel,
    Window,
)
from hf_tfast.attention import mechanisms
from hf_tfast.attention.linformer import Linformer
from hf_tfast.attention.nystrom import Nystrom
from hf_tfast.testing import assert_near
from tests.models.test_padding import padded
from tests.models.tiny_seq2seq import NARROW, config, make, pair
from tests.models.tiny_tfast import POSITIONS, logits, small, tokens

RUNS = ["tfast", "sdpa", "eager"]
CHOICES = {
    "none": (None, Dense(), Dense()),
    "one for both": (Window(window=4), Window(window=4), Window(window=4)),
    "whole stacks": (NARROW, NARROW["encoder"], NARROW["decoder"]),
    "one stack": ({"encoder": Nystrom(landmarks=4)}, Nystrom(landmarks=4), Dense()),
    "ranges": ({"encoder.0-": Nystrom(landmarks=4), "decoder.1": Window(window=4)}, Nystrom(landmarks=4), Dense()),
    "ranges in a stack": ({"decoder": {"0": Window(window=4)}}, Dense(), Window(window=4)),
    "lists": ({"encoder": [Nystrom(landmarks=4), Dense()]}, Nystrom(landmarks=4), Dense()),
    "dicts": ({"decoder": {"mechanism": "window", "window": 5}}, Dense(), Window(window=5)),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_each_stack_has_its_choice_and_keeps_it(choice, tmp_path):
    given, encoder, decoder = CHOICES[choice]
    made = config(attention=given, something_else=3)
    made.save_pretrained(tmp_path)
    for one in (made, AutoConfig.from_pretrained(tmp_path)):
        assert type(one) is TFastSeq2SeqConfig
        assert one.mechanism(0, "encoder") == encoder
        assert one.mechanism(0, "decoder") == decoder
        assert one.something_else == 3
        assert one.attention == made.attention


def test_layers_of_each_stack():
    made = make(encoder_layers=1, decoder_layers=3, attention={"decoder.2": Window(window=2)})
    assert (len(made.model.encoder.layers), len(made.model.decoder.layers)) == (1, 3)
    assert made.model.decoder.layers[2].self_attn._tfast_stamp.mechanism == Window(window=2)
    assert made.model.decoder.layers[2].cross_attn._tfast_stamp.mechanism == Dense()
    assert config(num_hidden_layers=5).encoder_layers == config(num_hidden_layers=5).decoder_layers == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention": Nystrom(landmarks=4)}, r"nystrom in layer decoder.0 has no causal form.*encoder alone"),
        ({"attention": {"decoder.1": Linformer(rank=4)}}, r"linformer in layer decoder.1 has no causal form"),
        ({"attention": [Dense(), Dense()]}, r'which stack it is for: give \{"encoder"'),
        ({"attention": {"encoder": [Dense()] * 3}}, r"lists 3 mechanisms for the 2 layers of the encoder"),
        ({"attention": {"0-1": Window(window=4)}}, r"layers are named encoder.0, decoder.0"),
        ({"attention": {"decoder.1-4": Window(window=4)}}, r"'decoder.1-4', but there are layers 0 to 1"),
        ({"attention": {"encoder": Dense(), "decoder.0": Dense()}}, r"'decoder.0' beside them"),
        ({"attention": {"encoder": {"mechanism": "wide"}}}, r"unknown attention mechanism 'wide'"),
        ({"causal": True}, r"leave it out"),
        ({"is_encoder_decoder": False}, r"take TFastConfig"),
        ({"type_vocab_size": 2}, r"type_vocab_size has no meaning"),
        ({"decoder_layers": 0}, r"decoder_layers must be at least 1, got 0"),
        ({"num_attention_heads": 5}, r"not a multiple"),
        ({"position_encoding": "alibi"}, r"unknown position_encoding"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_bad_calls():
    made, given = make(), pair()
    source, target = given["input_ids"], given["decoder_input_ids"]
    states = made.get_encoder()(source)
    for call, message in (
        ({"input_ids": source}, "either decoder_input_ids or"),
        ({**given, "decoder_inputs_embeds": torch.zeros(2, 12, 32)}, "either decoder_input_ids or"),
        ({**given, "encoder_outputs": states}, "would be ignored"),
        ({"decoder_input_ids": target}, "either input_ids or inputs_embeds"),
        ({**given, "position_ids": torch.arange(20)[None]}, "takes no position_ids"),
        ({**given, "is_causal": True}, "takes no is_causal"),
        ({**given, "past_key_values": DynamicCache()}, "needs an EncoderDecoderCache"),
        ({**given, "output_attentions": True}, "weights are never formed"),
    ):
        with pytest.raises(ValueError, match=message):
            made(**call)
    with pytest.raises(ValueError, match="needs encoder_hidden_states"):
        made.model.decoder(inputs_embeds=torch.zeros(1, 2, 32))
    no_start = make(decoder_start_token_id=None)
    with pytest.raises(
        ValueError, match=r"set config.decoder_start_token_id and config.pad_token_id \(now None and 0"
    ):
        no_start(input_ids=source, labels=target)
    learned = make(position_encoding="learned")
    with pytest.raises(ValueError, match="position 64 was asked for"):
        learned(input_ids=tokens(1, 65), decoder_input_ids=target[:1])


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("how", ["plain", "sharded", "device_map"])
def test_save_and_load(positions, how, tmp_path):
    made, given = make(attention=NARROW, position_encoding=positions), pair()
    made.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if how == "sharded" else {}))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or how != "sharded"
    loaded, notes = AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path, output_loading_info=True, **({"device_map": "cpu"} if how == "device_map" else {})
    )
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is TFastForConditionalGeneration
    assert torch.equal(logits(loaded, **given), logits(made, **given))
    bare = AutoModel.from_pretrained(tmp_path)
    assert type(bare) is TFastSeq2SeqModel
    assert torch.equal(logits(bare, **given), logits(made.model, **given))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loads_in_low_precision(positions, dtype, tmp_path):
    made, given = make(attention=NARROW, position_encoding=positions, initializer_range=0.02), pair()
    made.save_pretrained(tmp_path)
    loaded = TFastForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    if positions == "sinusoidal":
        assert torch.equal(
            loaded.model.encoder.embeddings.positions.table, made.model.encoder.embeddings.positions.table
        )
    assert_near(logits(loaded, **given).float(), logits(made, **given), "logits", 0.05)


def test_word_embeddings_are_one_table(tmp_path):
    made = make(attention=NARROW)
    assert made.lm_head.weight is made.get_input_embeddings().weight
    assert sum("embed" in name for name, _ in made.named_parameters()) == 1
    made.resize_token_embeddings(120, mean_resizing=False)
    assert made.lm_head.weight is made.get_input_embeddings().weight
    assert made.config.vocab_size == 120
    made.save_pretrained(tmp_path / "tied")
    loaded = TFastForConditionalGeneration.from_pretrained(tmp_path / "tied")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    given = pair()
    assert torch.equal(logits(loaded, **given), logits(made, **given))
    assert logits(loaded, **given).shape == (2, 12, 120)
    apart = make(tie_word_embeddings=False)
    apart.save_pretrained(tmp_path / "apart")
    loaded = TFastForConditionalGeneration.from_pretrained(tmp_path / "apart")
    assert loaded.lm_head.weight is not loaded.get_input_embeddings().weight
    assert torch.equal(logits(loaded, **given), logits(apart, **given))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("asked", ["sdpa", "eager"])
def test_other_implementations_run_the_same_weights_densely(positions, asked):
    fast, given = make(attention=NARROW, position_encoding=positions).double(), pair()
    dense = make(position_encoding=positions).double()
    mask = torch.ones_like(given["input_ids"])
    mask[1, :7] = 0
    expected = logits(dense, **given, attention_mask=mask)
    assert (logits(fast, **given, attention_mask=mask) - expected).abs().max() > 0.01
    fast.set_attn_implementation(asked)
    assert_near(logits(fast, **given, attention_mask=mask), expected, asked)


def test_hidden_states_and_attentions():
    made, given = make(attention=NARROW), pair()
    made.set_attn_implementation("eager")
    with torch.no_grad():
        out = made(**given, output_hidden_states=True, output_attentions=True)
    assert [x.shape for x in out.encoder_hidden_states] == [(2, 20, 32)] * 3
    assert [x.shape for x in out.decoder_hidden_states] == [(2, 12, 32)] * 3
    assert torch.equal(out.encoder_hidden_states[-1], out.encoder_last_hidden_state)
    assert torch.equal(made.lm_head(out.decoder_hidden_states[-1]), out.logits)
    assert [x.shape for x in out.encoder_attentions] == [(2, 4, 20, 20)] * 2
    assert [x.shape for x in out.decoder_attentions] == [(2, 4, 12, 12)] * 2
    assert [x.shape for x in out.cross_attentions] == [(2, 4, 12, 20)] * 2
    for weights in (*out.encoder_attentions, *out.decoder_attentions, *out.cross_attentions):
        assert_near(weights.sum(-1), torch.ones(weights.shape[:-1]), "rows")
    assert out.decoder_attentions[0].triu(1).abs().max() == 0
    assert out.encoder_attentions[0].triu(1).abs().max() > 0
    assert isinstance(made(**given, return_dict=False), tuple)


def test_embeddings_and_encoder_outputs_can_be_given():
    made, given = make(attention=NARROW), pair()
    expected = logits(made, **given)
    table = made.get_input_embeddings()
    embedded = {"inputs_embeds": table(given["input_ids"]), "decoder_inputs_embeds": table(given["decoder_input_ids"])}
    assert torch.equal(logits(made, **embedded), expected)
    states = made.get_encoder()(given["input_ids"]).last_hidden_state
    for outputs in (BaseModelOutput(last_hidden_state=states), (states,), made.get_encoder()(given["input_ids"])):
        found = logits(made, encoder_outputs=outputs, decoder_input_ids=given["decoder_input_ids"])
        assert torch.equal(found, expected)
    assert torch.equal(logits(made, **given, logits_to_keep=3), expected[:, -3:])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("asked", RUNS)
def test_padded_equals_alone(side, positions, asked):
    made = make(attention=NARROW, position_encoding=positions).double()
    made.set_attn_implementation(asked)
    sources, targets = (20, 13, 5), (4, 12, 7)
    source, source_mask = padded(tokens(3, 20), sources, side)
    target, target_mask = padded(tokens(3, 12, "target"), targets, side)
    given = {"attention_mask": source_mask, "decoder_attention_mask": target_mask}
    found = logits(made, source, decoder_input_ids=target, **given)
    for row in range(3):
        alone = logits(
            made, tokens(3, 20)[row : row + 1, : sources[row]],
            decoder_input_ids=tokens(3, 12, "target")[row : row + 1, : targets[row]],
        )  # fmt: skip
        assert_near(found[row][target_mask[row] == 1], alone[0], f"row {row}")


@pytest.mark.parametrize("name", list(mechanisms()))
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_mechanism_of_the_encoder_is_blind_to_padding(name, side):
    made = make(attention={"encoder": small(name)}).double()
    source, mask = padded(tokens(3, 40), (40, 23, 9), side)
    found = logits(made, source, attention_mask=mask, decoder_input_ids=tokens(3, 6))
    for row, length in enumerate((40, 23, 9)):
        alone = logits(made, tokens(3, 40)[row : row + 1, :length], decoder_input_ids=tokens(3, 6)[row : row + 1])
        assert_near(found[row], alone[0], f"row {row}")


@pytest.mark.parametrize("asked", RUNS)
def test_who_reads_whom(asked):
    """Every output reads all of the input; an output reads none after it."""
    made, given = make(attention=NARROW), pair(1)
    made.set_attn_implementation(asked)
    expected = logits(made, **given)[0]
    for at in (0, 9, 19):
        other = given["input_ids"].clone()
        other[0, at] = 97 if other[0, at] != 97 else 96
        changed = logits(made, other, decoder_input_ids=given["decoder_input_ids"])[0]
        assert ((changed - expected).abs().amax(-1) > 1e-6).all(), at
    for at in (0, 5, 11):
        other = given["decoder_input_ids"].clone()
        other[0, at] = 97 if other[0, at] != 97 else 96
        changed = logits(made, given["input_ids"], decoder_input_ids=other)[0]
        assert torch.equal(changed[:at], expected[:at]), at
        assert (changed[at] - expected[at]).abs().max() > 1e-3, at
