"""TFastConfig: what it accepts, keeps, saves, and refuses with which words."""

import json
import re
from copy import deepcopy

import pytest
import torch
from transformers import AutoConfig

from hf_tfast import Dense, TFastConfig, TFastForCausalLM, TFastForMaskedLM, TFastModel, Window
from hf_tfast.attention import mechanisms
from tests.models.tiny_tfast import config, make, tokens

NARROW = {"mechanism": "window", "window": 5, "sinks": 1}


@pytest.mark.parametrize(
    ("given", "layers"),
    [
        (Window(window=5, sinks=1), [Window(window=5, sinks=1)] * 3),
        (NARROW, [Window(window=5, sinks=1)] * 3),
        ({"1": Window(window=5)}, [Dense(), Window(window=5), Dense()]),
        ({"0": Dense(), "1-": NARROW}, [Dense(), Window(window=5, sinks=1), Window(window=5, sinks=1)]),
        ([Dense(), NARROW, Window(window=3)], [Dense(), Window(window=5, sinks=1), Window(window=3)]),
        (None, [Dense()] * 3),
        ({}, [Dense()] * 3),
    ],
)
def test_attention_is_kept_as_dicts_and_read_back(given, layers, tmp_path):
    made = config(num_hidden_layers=3, attention=given)
    made.save_pretrained(tmp_path)
    for one in (made, AutoConfig.from_pretrained(tmp_path), deepcopy(made), TFastConfig.from_dict(made.to_dict())):
        assert [one.mechanism(n) for n in range(3)] == layers
        assert one.attention == made.attention
        json.dumps(one.attention)


def test_attention_set_later_is_kept_as_a_dict_and_checked_by_the_model():
    made = config()
    made.attention = Window(window=7)
    assert made.attention == Window(window=7).to_dict()
    assert TFastModel(made).layers[1].self_attn._tfast_stamp.mechanism == Window(window=7)
    made.attention = [Dense()]
    with pytest.raises(ValueError, match="lists 1 mechanisms for 2 layers"):
        TFastModel(made)


def test_a_round_trip_keeps_fields_that_are_not_known(tmp_path):
    made = config(attention=Window(window=5), note={"by": ["a", 1]}, similarity="cosine", position_encoding="learned")
    made.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    read.save_pretrained(tmp_path / "again")
    assert read.note == {"by": ["a", 1]}
    assert (tmp_path / "config.json").read_text() == (tmp_path / "again" / "config.json").read_text()
    assert {**read.to_dict(), "_name_or_path": ""} == made.to_dict()


def test_the_config_file_says_nothing_of_the_implementation(tmp_path):
    for asked in (None, "sdpa", "eager"):
        model = TFastModel._from_config(config(attention=NARROW), attn_implementation=asked)
        assert model.config._attn_implementation == (asked or "tfast")
        model.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert saved["attention"] == NARROW
        assert not [key for key in saved if "implementation" in key]


def test_rotary_parameters_are_transformers_own():
    assert config().rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert config(position_encoding="none").rope_parameters is None
    scaled = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5, "original_max_position_embeddings": 16}
    model = make(TFastForCausalLM, rope_parameters=scaled, max_position_embeddings=64)
    assert model(tokens(1, 64)).logits.isfinite().all()
    assert not torch.equal(model.model.rotary_emb.inv_freq, make(TFastForCausalLM).model.rotary_emb.inv_freq)


def test_direction_is_the_classes_own():
    both = config(causal=False), config(causal=True)
    for given in both:
        assert TFastForCausalLM(given).config.causal is True
        assert TFastForMaskedLM(given).config.causal is False
        assert TFastModel(given).config.causal is given.causal
    assert [given.causal for given in both] == [False, True], "the config that was given stays as it is"


def sizes(**fields):
    return fields


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (sizes(hidden_size=30), "hidden_size 30 is not a multiple of num_attention_heads 4"),
        (sizes(num_key_value_heads=3), "4 attention heads cannot share 3 key/value heads"),
        (sizes(num_attention_heads=0), "num_attention_heads must be at least 1, got 0"),
        (sizes(num_hidden_layers=0), "num_hidden_layers must be at least 1"),
        (sizes(head_dim=7), "head_dim must be even, got 7"),
        (sizes(hidden_act="swosh"), "unknown hidden_act 'swosh'"),
        (sizes(norm_type="batch"), "unknown norm_type 'batch'; expected one of layer_norm, rms_norm"),
        (sizes(norm_placement="both"), "unknown norm_placement 'both'"),
        (sizes(similarity="euclid"), "unknown similarity 'euclid'; expected one of dot, cosine"),
        (sizes(position_encoding="alibi"), "unknown position_encoding 'alibi'; expected one of rotary, sinusoidal"),
        (sizes(position_encoding="learned", rope_parameters={"rope_theta": 1e6}), "position_encoding='rotary' only"),
        (sizes(position_rank=4), "position_rank is read by position_encoding='low_rank' only"),
        (sizes(attention_dropout=1.0), r"attention_dropout must lie in \[0, 1\)"),
        (sizes(feed_forward="mixture"), "form, a list of forms, or a dict"),
        (sizes(attention="window"), "attention is a mechanism or a dict"),
        (sizes(attention={"mechanism": "wibble"}), "unknown attention mechanism 'wibble'"),
        (sizes(attention={"mechanism": "window", "width": 3}), "Window has no field 'width'"),
        (sizes(attention=[Dense()]), "attention lists 1 mechanisms for 2 layers"),
        (sizes(attention=[Dense()] * 3), "attention lists 3 mechanisms for 2 layers"),
        (sizes(attention={"2": Dense()}), "names layers '2', but there are layers 0 to 1"),
        (sizes(attention={"0-5": Dense()}), "names layers '0-5', but there are layers 0 to 1"),
        (sizes(attention={"encoder.0": Dense()}), "names 'encoder.0'"),
        (sizes(attention={"0-1": Dense(), "1": Dense()}), "overlap"),
        (sizes(linformer_projection="learned"), "no layer of attention is Linformer"),
        (sizes(nystrom_kernel=3), "no layer of attention is Nystrom"),
        (sizes(attention={"mechanism": "nystrom"}, nystrom_kernel=4), "nystrom_kernel must be odd"),
    ],
)
def test_what_cannot_be_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        config(**fields)


@pytest.mark.parametrize("name", [name for name, cls in mechanisms().items() if not cls.causal])
def test_a_bidirectional_mechanism_is_refused_in_a_causal_model(name):
    cls = mechanisms()[name]
    given = cls(**cls.small)
    config(attention=given)
    for refuse in (lambda: config(attention=given, causal=True), lambda: TFastForCausalLM(config(attention=given))):
        with pytest.raises(ValueError, match=f"{name} in layer 0 has no causal form.* window"):
            refuse()


@pytest.mark.parametrize("name", [name for name, cls in mechanisms().items() if not cls.dropout])
def test_dropout_is_refused_where_a_mechanism_has_none(name):
    cls = mechanisms()[name]
    with pytest.raises(ValueError, match=f"{name} in layer 1 has no attention dropout: set attention_dropout=0.0"):
        config(attention={"1": cls(**cls.small)}, attention_dropout=0.1)


def test_a_wrong_type_is_named():
    with pytest.raises(Exception, match=re.compile("hidden_size.*int", re.DOTALL)):
        config(hidden_size="32")
