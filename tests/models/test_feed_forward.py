"""Feed-forward forms in TFast models: begun from shapes, trained, saved and reloaded; the rest is refused in words."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_tfast import (
    Activation,
    FastPlan,
    Int8,
    LowRank,
    Pruned,
    TensorTrain,
    TFastConfig,
    TFastForCausalLM,
    TFastForConditionalGeneration,
    TFastSeq2SeqConfig,
    Window,
    apply_plan,
)
from hf_tfast.feed_forward.low_rank import LowRankLinear
from hf_tfast.testing import generator

TINY = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FORMS = {
    "low_rank": LowRank(rank=5),
    "tensor_train": TensorTrain(ranks=8),
    "activation": Activation(bits=4, limit=3.0),
    "composed": [Pruned(width=24), LowRank(ratio=0.5)],
    "by layer": {"0": LowRank(rank=4), "1": Activation(kind="binary", bits=2, limit=3.0)},
}


def ids(*seed, length=24):
    return torch.randint(3, 60, (2, length), generator=generator("ff", *seed))


@pytest.mark.parametrize("form", FORMS)
def test_trains_and_reloads(form, tmp_path):
    torch.manual_seed(1)
    config = TFastConfig(**TINY, causal=True, attention=Window(window=8), feed_forward=FORMS[form])
    model = TFastForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(10):
        loss = model(ids(form), labels=ids(form)).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids(form)).logits, model(ids(form)).logits)
    assert again.config.feed_forward == model.config.feed_forward


@pytest.mark.parametrize("form", [LowRank(rank=5), TensorTrain(ranks=8)], ids=repr)
def test_new_weights_have_the_size_of_dense_ones(form):
    torch.manual_seed(2)
    found = []
    for _ in range(5):
        model = TFastForCausalLM(TFastConfig(**TINY, causal=True, feed_forward=form))
        layer = model.model.layers[0].mlp.up_proj
        weight = layer.second.weight @ layer.first.weight if isinstance(layer, LowRankLinear) else layer.dense()
        found.append(weight.std().item())
    assert 0.5 * 0.02 < sum(found) / 5 < 2 * 0.02


def test_encoder_decoder(tmp_path):
    config = TFastSeq2SeqConfig(
        **TINY, pad_token_id=0, decoder_start_token_id=1, feed_forward={"encoder.0-": LowRank(rank=4)}
    )
    model = TFastForConditionalGeneration(config).eval()
    kinds = [isinstance(m, LowRankLinear) for m in model.modules()]
    assert sum(kinds) == sum(isinstance(m, LowRankLinear) for m in model.model.encoder.modules()) > 0
    model.save_pretrained(tmp_path)
    again = TFastForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids(1), labels=ids(2)).logits, model(ids(1), labels=ids(2)).logits)


@pytest.mark.parametrize(
    "form", [LowRank(energy=0.9), LowRank(rank=3, method="activation"), Activation(bits=8), Int8()]
)
def test_what_needs_weights_or_data_comes_later(form):
    with pytest.raises(ValueError, match="made from trained weights or data"):
        TFastConfig(**TINY, feed_forward=form)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"2": LowRank(rank=3)}, "feed_forward names layers '2'"),
        ({"encoder.0": LowRank(rank=3)}, "feed_forward names layers 'encoder.0'"),
        ("sparse", "a form, a list of forms"),
        ({"form": "sparse"}, "unknown feed-forward form 'sparse'"),
    ],
)
def test_bad_choices(given, message):
    with pytest.raises(ValueError, match=message):
        TFastConfig(**TINY, feed_forward=given)


def test_plans_of_feed_forwards_work_on_tfast_models(tmp_path):
    """Attention stays what the config says, before and after."""
    model = TFastForCausalLM(TFastConfig(**TINY, causal=True, attention=Window(window=8))).eval()
    apply_plan(model, FastPlan(feed_forward=LowRank(rank=6)))
    assert model.config._attn_implementation == "tfast"
    with torch.no_grad():
        first = model(ids(3)).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config._attn_implementation == "tfast"
    with torch.no_grad():
        assert torch.equal(again(ids(3)).logits, first)
