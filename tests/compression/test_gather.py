"""Moments of feed-forward inputs: of valid tokens only, of the right layers, each input once."""

import psutil
import pytest
import torch

from hf_tfast import Activation, FastPlan, LowRank, Pruned
from hf_tfast.compression.moments import gather, moments_bytes
from hf_tfast.integration._forms import planned_blocks
from tests.integration.tiny_models import FAMILIES, inputs, tiny, tokens

DATA = LowRank(rank=4, method="activation")


def planned(model, forms=DATA):
    return planned_blocks(model, FastPlan(feed_forward=forms))


def seen(model, path, batches, masks):
    """What a layer reads, by a plain hook."""
    rows = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, args: rows.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1])[mask.flatten().bool()] for x, mask in zip(rows, masks, strict=True)])


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "gemma2", "modernbert"])
def test_moments_are_those_of_valid_tokens(name):
    model = tiny(name)
    masks = [torch.ones(2, 30).long(), torch.ones(2, 30).long()]
    masks[0][0, 21:] = 0
    masks[1][1, :8] = 0
    batches = [{"input_ids": tokens(name, n), "attention_mask": mask} for n, mask in enumerate(masks)]
    found = gather(model, planned(model), batches)
    assert len(found) == sum(len(block.paths) for block, _ in planned(model))
    for path, moments in found.items():
        x = seen(model, path, batches, masks).double()
        assert moments.count == len(x) == 103
        torch.testing.assert_close(moments.mean, x.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moments.second, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moments.sample.double(), x)


def test_what_is_padding_does_not_matter():
    model, mask = tiny("llama"), torch.ones(2, 30).long()
    mask[0, 20:] = 0
    ids = tokens("padding")
    other = torch.where(mask.bool(), ids, 7)
    one, two = (gather(model, planned(model), [{"input_ids": x, "attention_mask": mask}]) for x in (ids, other))
    for path, moments in one.items():
        assert torch.equal(moments.second, two[path].second)


def test_gate_and_up_share_their_moments_and_memory_is_foretold():
    model = tiny("llama")
    found = gather(model, planned(model), [{"input_ids": tokens("shared")}])
    assert found["model.layers.0.mlp.gate_proj"] is found["model.layers.0.mlp.up_proj"]
    held = {id(m): m for m in found.values()}.values()
    kept = sum(m.second.numel() * 8 + 4096 * m.sample.shape[1] * 4 for m in held)
    assert moments_bytes(planned(model)) == kept


@pytest.mark.parametrize(
    ("forms", "ends"),
    [
        (Pruned(ratio=0.5, method="activation"), {"down_proj"}),
        ([Pruned(ratio=0.5), DATA], {"gate_proj", "up_proj", "down_proj"}),
        (LowRank(rank=3), set()),
        (Activation(limit=2.0), set()),
    ],
)
def test_only_the_layers_that_a_form_reads(forms, ends):
    model = tiny("llama")
    found = gather(model, planned(model, forms), [{"input_ids": tokens("ends")}])
    assert {path.rpartition(".")[2] for path in found} == ends


@pytest.mark.parametrize("name", ["bart", "whisper"])
def test_two_stacks(name):
    """The encoder's mask hides nothing in the decoder, whose own mask does."""
    model, given = tiny(name), inputs(name)
    plan = FastPlan(feed_forward={"encoder.0-": DATA, "decoder.0-": DATA})
    n = given["decoder_input_ids"].numel()
    mask = torch.ones_like(given["decoder_input_ids"])
    mask[0, -3:] = 0
    if name == "bart":
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        given["attention_mask"][:, -5:] = 0
    counts = {
        path: moments.count
        for path, moments in gather(
            model, planned_blocks(model, plan), [{**given, "decoder_attention_mask": mask}]
        ).items()
    }
    assert {count for path, count in counts.items() if "decoder" in path} == {n - 3}
    if name == "bart":
        encoder = int(given["attention_mask"].sum())
        assert {count for path, count in counts.items() if "encoder.layers" in path} == {encoder}


def test_the_decoder_of_labels():
    model, labels = tiny("bart"), tokens("labels", length=9)
    labels[1, -4:] = -100
    plan = FastPlan(feed_forward={"decoder.0-": DATA})
    found = gather(model, planned_blocks(model, plan), [{"input_ids": tokens("source"), "labels": labels}])
    assert {moments.count for moments in found.values()} == {14}


def test_the_model_is_left_as_it_was():
    model = tiny("bert").train()
    model.encoder.layer[1].eval()
    modes = [module.training for module in model.modules()]
    gather(model, planned(model), [{"input_ids": tokens("state")}])
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.is_grad_enabled()


def test_a_layer_that_gives_infinities():
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"batch 0, at model.layers.1.mlp.gate_proj: .*not finite"):
        gather(model, planned(model), [{"input_ids": tokens("infinite")}])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_too_little_memory(monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    with pytest.raises(ValueError, match="GiB of moments at once"):
        gather(model, planned(model), [{"input_ids": tokens("memory")}])


def test_images_have_no_padding():
    model = FAMILIES["vit"].make()
    found = gather(model, planned(model), [inputs("vit")])
    assert {moments.count for moments in found.values()} == {2 * 17}
