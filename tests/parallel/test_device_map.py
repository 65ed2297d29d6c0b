"""Models with a plan whose layers lie in different memories: device_map, with parts on the disk and in CPU memory."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_tfast import FastPlan, Int8, LowRank, TFastForCausalLM, Window, apply_plan
from tests.integration.tiny_models import GROUPED
from tests.models.tiny_tfast import make, tokens

HOME = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
MIXED = {**HOME, "model.layers.0": "cpu", "model.layers.1": "disk"}


def save(kind, folder):
    if kind == "tfast":
        model = make(TFastForCausalLM, 0, attention=Window(window=5, sinks=1), tie_word_embeddings=False)
    else:
        torch.manual_seed(1)
        form = {"low_rank": LowRank(rank=6), "int8": Int8()}[kind]
        model = apply_plan(
            LlamaForCausalLM(LlamaConfig(**GROUPED)), FastPlan(attention=Window(window=5), feed_forward=form)
        )
    model.save_pretrained(folder)


def load(folder, tmp_path, device_map=MIXED):
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "off")
    return model.eval()


@pytest.mark.parametrize("kind", ["low_rank", "tfast", "int8"])
def test_half_on_the_disk(kind, tmp_path):
    """Outputs and generated tokens of the model in one memory; the offloaded half holds nothing between calls."""
    if kind == "int8":
        pytest.importorskip("bitsandbytes")
    save(kind, tmp_path / "model")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    if kind == "int8":
        with pytest.raises(ValueError, match="integers, which cannot be offloaded to the disk"):
            load(tmp_path / "model", tmp_path)
        return
    split = load(tmp_path / "model", tmp_path)
    assert split.hf_device_map["model.layers.1"] == "disk"
    assert all(p.is_meta for p in split.model.layers[1].parameters())
    ids = tokens(2, 20)
    with torch.no_grad():
        assert torch.equal(split(ids).logits, whole(ids).logits)
    given = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(split.generate(ids, **given), whole.generate(ids, **given))
    assert all(p.is_meta for p in split.model.layers[1].parameters())


@pytest.mark.gpu
def test_half_in_cpu_memory(tmp_path):
    save("low_rank", tmp_path / "model")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval().to("cuda")
    places = {**dict.fromkeys(HOME, 0), "model.layers.0": 0, "model.layers.1": "cpu"}
    split, ids = load(tmp_path / "model", tmp_path, places), tokens(2, 20).cuda()
    with torch.no_grad():
        assert torch.allclose(split(ids).logits, whole(ids).logits, rtol=0, atol=1e-5)
