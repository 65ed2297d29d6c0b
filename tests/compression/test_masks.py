"""Masks hold weights at zero while training, save nothing, and are never left in a checkpoint."""

from copy import deepcopy

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_tfast import FastPlan, LowRank, apply_plan
from hf_tfast.compression import make_permanent, mask, masked
from tests.integration.tiny_models import inputs, output, tiny, tokens

DOWN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_the_share_that_stays(name, method):
    model, dense = mask(tiny(name), ratio=0.25, method=method), tiny(name)
    paths = masked(model)
    assert len(paths) == (6 if name == "llama" else 4)
    for path in paths:
        layer, before = model.get_submodule(path), dense.get_submodule(path).weight
        stays = layer.weight_mask.bool()
        assert int(stays.sum()) == round(0.25 * before.numel())
        assert torch.equal(layer.weight[stays], before[stays])
        assert not layer.weight[~stays].any()
        if method == "magnitude":
            assert before[stays].abs().min() >= before[~stays].abs().max()


def test_random_masks_are_seeded_and_leave_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (mask(tiny_quietly(), 0.5, "random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    masks = [model.get_submodule(DOWN).weight_mask for model in (one, same, other)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def tiny_quietly():
    with torch.random.fork_rng():
        return tiny("llama")


def test_zeros_stay_zeros_in_training():
    model = mask(tiny("llama"), ratio=0.5).train()
    before = {path: model.get_submodule(path).weight.clone() for path in masked(model)}
    ids, optimiser = tokens("train"), torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    make_permanent(model)
    for path, weight in before.items():
        after = model.get_submodule(path).weight
        assert not after[weight == 0].any()
        assert not torch.equal(after, weight)


def test_a_checkpoint_never_holds_a_mask(tmp_path):
    model = mask(tiny("llama"), ratio=0.5)
    first = output(model, inputs("llama"))
    for save in (lambda: model.save_pretrained(tmp_path), model.state_dict, deepcopy(model).state_dict):
        with pytest.raises(ValueError, match="make_permanent"):
            save()
    assert not list(tmp_path.glob("*.safetensors"))
    make_permanent(model).save_pretrained(tmp_path)
    assert set(model.state_dict()) == set(tiny("llama").state_dict())
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), inputs("llama")), first)
    assert sum(int((p == 0).sum()) for p in model.parameters()) >= 6 * 32 * 48 // 2
    assert (tmp_path / "model.safetensors").stat().st_size > 4 * sum(p.numel() for p in tiny("llama").parameters())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ratio": 0}, "above 0"),
        ({"ratio": 1.5}, "above 0"),
        ({"ratio": True}, "above 0"),
        ({"ratio": 0.5, "method": "wanda"}, "magnitude, random"),
    ],
)
def test_bad_ratios_and_methods(given, message):
    with pytest.raises(ValueError, match=message):
        mask(tiny("llama"), **given)


def test_models_that_cannot_be_masked():
    with pytest.raises(ValueError, match="has a mask already"):
        mask(mask(tiny("llama"), 0.5), 0.5)
    with pytest.raises(ValueError, match="has no masks"):
        make_permanent(tiny("llama"))
    with pytest.raises(ValueError, match="gate_proj is a LowRankLinear"):
        mask(apply_plan(tiny("llama"), FastPlan(feed_forward=LowRank(rank=3))), 0.5)
    broken = tiny("llama")
    with torch.no_grad():
        broken.get_submodule(DOWN).weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        mask(broken, 0.5)
    assert not masked(broken)
