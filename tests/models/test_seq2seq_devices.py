"""Encoder-decoders and position tables spread over memory and disk, exported, and with code of their own."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM

from hf_tfast import TFastForCausalLM
from tests.models import tiny_tfast
from tests.models.tiny_seq2seq import NARROW, make, pair
from tests.models.tiny_tfast import POSITIONS, logits, tokens

OFFLOADED = {
    "decoder": {"model.encoder": "cpu", "model.decoder": "disk", "lm_head": "cpu"},
    "embeddings": {
        "model.encoder.embed_tokens": "cpu", "model.encoder.embeddings": "disk", "model.encoder.layers": "cpu",
        "model.encoder.norm": "cpu", "model.decoder.embeddings": "disk", "model.decoder.layers": "cpu",
        "model.decoder.norm": "disk", "lm_head": "cpu", "model.encoder.rotary_emb": "cpu",
        "model.decoder.rotary_emb": "disk",
    },
}  # fmt: skip


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("part", OFFLOADED)
def test_parts_on_disk(part, positions, tmp_path):
    made, given = make(attention=NARROW, position_encoding=positions), pair()
    places = {where: to for where, to in OFFLOADED[part].items() if positions == "rotary" or "rotary" not in where}
    made.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "saved", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert torch.equal(logits(loaded, **given), logits(made, **given))
    ways = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(loaded.generate(given["input_ids"], **ways), made.generate(given["input_ids"], **ways))


@pytest.mark.parametrize("positions", ["sinusoidal", "low_rank"])
def test_a_table_on_disk_serves_one_stack_too(positions, tmp_path):
    made, ids = tiny_tfast.make(TFastForCausalLM, position_encoding=positions), tokens(2, 50)
    made.save_pretrained(tmp_path / "saved")
    places = {"model.embed_tokens": "cpu", "model.embeddings": "disk", "model.layers": "cpu", "model.norm": "disk"}
    loaded = TFastForCausalLM.from_pretrained(
        tmp_path / "saved", device_map={**places, "lm_head": "cpu"}, offload_folder=tmp_path / "offloaded"
    )
    assert torch.equal(logits(loaded, ids), logits(made, ids))


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_encoder_exports_densely(positions):
    made = make(attention=NARROW, position_encoding=positions)
    made.set_attn_implementation("sdpa")

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = made.get_encoder()

        def forward(self, input_ids, attention_mask):
            return self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    ids, mask = tokens(), torch.ones(2, 20, dtype=torch.long)
    mask[1, 15:] = 0
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(Encoder(), (ids, mask), dynamic_shapes=({1: length}, {1: length}))
    for given in ((ids, mask), (tokens(2, 33), torch.ones(2, 33, dtype=torch.long))):
        with torch.no_grad():
            expected = made.get_encoder()(*given).last_hidden_state
            torch.testing.assert_close(program.module()(*given), expected, rtol=1e-4, atol=1e-5)


def test_the_encoder_exports_its_fast_attention():
    made = make(attention=NARROW)
    with torch.no_grad():
        program = torch.export.export(made.get_encoder(), (tokens(),)).module()
        other = tokens().flip(1)
        expected = made.get_encoder()(other).last_hidden_state
        torch.testing.assert_close(program(other).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="torch.export cannot trace fast attention over an attention_mask"):
        torch.export.export(made.get_encoder(), (tokens(), torch.ones(2, 20, dtype=torch.long)))
