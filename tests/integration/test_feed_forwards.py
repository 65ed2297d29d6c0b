"""The feed-forwards of many families, found by structure."""

import pytest
import torch
import transformers as hf

from hf_tfast.integration._feed_forwards import feed_forwards
from tests.integration.tiny_models import FAMILIES, REFUSED, tiny

COUNTS = {"bart": 4, "encoder_decoder": 4, "whisper": 4, "llava": 4, "t5": 4, "trocr": 4}
FOUND = [name for name in [*FAMILIES, *REFUSED] if name != "gpt_oss"]


@pytest.mark.parametrize("name", FOUND)
def test_every_family(name):
    model = tiny(name)
    blocks = feed_forwards(model)
    assert len(blocks) == COUNTS.get(name, 2)
    for stack in {block.stack for block in blocks}:
        assert [block.layer for block in blocks if block.stack == stack] == [0, 1]
    paths = [path for block in blocks for path in block.paths]
    assert len(set(paths)) == len(paths)
    assert not any("attn" in path or "attention" in path or "head" in path for path in paths)
    # all linear layers of a model are attention, feed-forward, a head, a pooler or a projection between models
    left = {
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | hf.pytorch_utils.Conv1D) and path not in paths
    }
    others = (
        "att",
        "head",
        "pooler",
        "embed",
        "projector",
        "proj_out",
        "Attention",
        "decoder.dense",
        "enc_to_dec",
        "predictions",
        "output_proj",
    )
    assert [path for path in left if not any(word in path for word in others)] == []


def test_fused_gates_are_counted():
    assert {block.parts for block in feed_forwards(tiny("modernbert"))} == {2}
    phi = hf.Phi3ForCausalLM(
        hf.Phi3Config(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=99,
            pad_token_id=0,
        )
    )
    assert {block.parts for block in feed_forwards(phi)} == {2}


def test_experts_are_named():
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.experts .* holds all its experts in one tensor"):
        feed_forwards(tiny("gpt_oss"))


def test_widths_that_do_not_fit_are_named():
    model = tiny("llama")
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(50, 32)
    with pytest.raises(ValueError, match="widths do not fit: .*layers.1.mlp.gate_proj 32 -> 48"):
        feed_forwards(model)


def test_meta():
    with torch.device("meta"):
        assert len(feed_forwards(FAMILIES["llama"].make())) == 2
