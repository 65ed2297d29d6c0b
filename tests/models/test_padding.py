"""Padding and packed documents change nothing for the tokens beside them, with any attention and any positions."""

import pytest
import torch

from hf_tfast import Dense, TFastForCausalLM, TFastForMaskedLM, TFastModel, Window, extend_positions
from hf_tfast.attention import mechanisms
from hf_tfast.testing import assert_near
from tests.models.tiny_tfast import POSITIONS, logits, make, small, tokens

MODELS = [TFastForCausalLM, TFastForMaskedLM]
RUNS = ["tfast", "sdpa", "eager"]


def padded(ids, lengths, side):
    """Rows of `ids` cut to `lengths` and padded with other tokens, whose content must not show, and the mask."""
    rows, mask = tokens(*ids.shape, "padding"), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        at = slice(ids.shape[1] - length, None) if side == "left" else slice(0, length)
        rows[row, at], mask[row, at] = ids[row, :length], 1
    return rows, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("asked", RUNS)
def test_padded_equals_alone(side, positions, model, asked):
    made = make(model, attention=Window(window=4, sinks=1), position_encoding=positions).double()
    made.set_attn_implementation(asked)
    ids, lengths = tokens(3, 20), (20, 13, 5)
    given, mask = padded(ids, lengths, side)
    found = logits(made, given, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = logits(made, ids[row : row + 1, :length])[0]
        assert_near(found[row][mask[row] == 1], alone, f"row {row}")


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("asked", RUNS)
def test_packed_equals_alone(positions, model, asked):
    made = make(model, attention=Window(window=4, sinks=1), position_encoding=positions).double()
    made.set_attn_implementation(asked)
    ids, borders = tokens(2, 24), ((9, 15), (4, 12, 8))
    restarting = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in borders])
    found = logits(made, ids, position_ids=restarting)
    for row, lengths in enumerate(borders):
        alone = [logits(made, part[None])[0] for part in ids[row].split(list(lengths))]
        assert_near(found[row], torch.cat(alone), f"row {row}")


@pytest.mark.parametrize("name", list(mechanisms()))
def test_every_mechanism_keeps_packed_documents_apart(name):
    model = TFastForCausalLM if mechanisms()[name].causal else TFastForMaskedLM
    made, ids = make(model, attention=small(name)), tokens(1, 40)
    found = logits(made, ids, position_ids=torch.cat([torch.arange(17), torch.arange(23)])[None])
    alone = torch.cat([logits(made, part) for part in ids.split([17, 23], dim=1)], 1)
    assert_near(found, alone, name)


def test_packed_documents_are_not_cached():
    made, ids = make(TFastForCausalLM, attention=Dense()), tokens(1, 20)
    restarting = torch.cat([torch.arange(8), torch.arange(12)])[None]
    assert made(ids, position_ids=restarting, use_cache=True).past_key_values is None
    assert made(ids, use_cache=True).past_key_values is not None
    with pytest.raises(ValueError, match="position_ids restart within a row"):
        made(ids, position_ids=restarting, attention_mask=torch.ones_like(ids))


def test_a_bidirectional_model_takes_no_cache():
    made, decoder = make(TFastModel, causal=False), make(TFastModel, causal=True)
    cache = decoder(tokens()).past_key_values
    with pytest.raises(ValueError, match="bidirectional"):
        made(tokens(), past_key_values=cache)
    assert made(tokens(), use_cache=True).past_key_values is None


@pytest.mark.parametrize("positions", ["learned", "low_rank"])
def test_past_the_end_of_a_table(positions):
    made = make(TFastForMaskedLM, position_encoding=positions, max_position_embeddings=32, attention=Window(window=4))
    made(tokens(1, 32))
    with pytest.raises(ValueError, match="position 32 was asked for, but the table has 32"):
        made(tokens(1, 33))


def test_learned_positions_are_extended(tmp_path):
    made = make(TFastForMaskedLM, position_encoding="learned", max_position_embeddings=32)
    ids = tokens(1, 32)
    before = logits(made, ids)
    extend_positions(made, 64)
    assert made.config.max_position_embeddings == 64
    assert torch.equal(logits(made, ids), before)
    longer = logits(made, tokens(1, 64))
    made.save_pretrained(tmp_path)
    assert torch.equal(logits(TFastForMaskedLM.from_pretrained(tmp_path).eval(), tokens(1, 64)), longer)


@pytest.mark.parametrize("positions", ["rotary", "sinusoidal", "none"])
def test_longer_than_ever_announced(positions):
    made = make(TFastForMaskedLM, position_encoding=positions, max_position_embeddings=16, attention=Window(window=4))
    assert logits(made, tokens(1, 100)).isfinite().all()


def test_a_dense_4d_mask_is_honoured():
    made, ids = make(TFastForMaskedLM, attention=Dense()), tokens(1, 12)
    seen = torch.ones(12, 12).tril().bool()[None, None]
    causal = make(TFastForMaskedLM, attention=Dense())
    assert_near(logits(made, ids, attention_mask=seen), logits(causal, ids, is_causal=True), "a causal 4-D mask")
