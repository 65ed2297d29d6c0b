"""The classifiers: what they read of a row, their losses, and that the Auto classes know them."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import hf_tfast
from hf_tfast import (
    TFastForCausalLM,
    TFastForMaskedLM,
    TFastForQuestionAnswering,
    TFastForSequenceClassification,
    TFastForTokenClassification,
    TFastModel,
    Window,
)
from hf_tfast.testing import assert_near
from tests.models.tiny_tfast import config, logits, make, tokens

AUTO = {
    AutoModel: TFastModel,
    AutoModelForCausalLM: TFastForCausalLM,
    AutoModelForMaskedLM: TFastForMaskedLM,
    AutoModelForSequenceClassification: TFastForSequenceClassification,
    AutoModelForTokenClassification: TFastForTokenClassification,
    AutoModelForQuestionAnswering: TFastForQuestionAnswering,
}


@pytest.mark.parametrize("auto", AUTO)
def test_auto_classes_make_and_load(auto, tmp_path):
    made = auto.from_config(config(attention=Window(window=4)))
    assert type(made) is AUTO[auto]
    made.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is AUTO[auto]
    assert torch.equal(logits(loaded, tokens()), logits(made, tokens()))
    assert getattr(hf_tfast, type(made).__name__) is type(made)


@pytest.mark.parametrize("causal", [False, True])
def test_base_weights_are_shared_by_all_heads(causal, tmp_path):
    base = make(TFastModel, causal=causal, attention=Window(window=4))
    base.save_pretrained(tmp_path)
    for head in list(AUTO.values())[1:]:
        loaded = head.from_pretrained(tmp_path).eval()
        own = {TFastForCausalLM: True, TFastForMaskedLM: False}.get(head, causal)
        assert loaded.config.causal is own
        assert torch.equal(logits(loaded.model, tokens()), logits(base, tokens())) is (own is causal)


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
@pytest.mark.parametrize("by_mask", [True, False])
def test_a_row_is_classified_by_its_own_tokens(pooling, by_mask):
    made = make(TFastForSequenceClassification, classifier_pooling=pooling, attention=Window(window=4), num_labels=3)
    ids = tokens(2, 12)
    rows = torch.cat([F.pad(ids[:1], (5, 0)), F.pad(ids[1:], (0, 5))])
    mask = (rows != 0).long()
    states = made.model(ids).last_hidden_state
    chosen = {"first": states[:, 0], "last": states[:, -1], "mean": states.mean(1)}[pooling]
    expected = made.score(chosen)
    assert_near(logits(made, ids), expected.detach(), "no padding")
    if by_mask:
        assert_near(logits(made, rows, attention_mask=mask), expected.detach(), "padded")
    else:  # the states then include padding, but what is pooled does not
        padded = made.model(rows).last_hidden_state
        seen = [padded[0, 5:], padded[1, :12]]
        chosen = torch.stack({"first": [s[0] for s in seen], "last": [s[-1] for s in seen],
                              "mean": [s.mean(0) for s in seen]}[pooling])  # fmt: skip
        assert_near(logits(made, rows), made.score(chosen).detach(), "padded, by pad_token_id")


def test_causal_models_are_classified_by_their_last_token():
    made = make(TFastForSequenceClassification, causal=True)
    ids = tokens(1, 12)
    assert_near(logits(made, ids), made.score(made.model(ids).last_hidden_state[:, -1]).detach(), "the last token")
    assert made.config.pooling == "last"
    assert make(TFastForSequenceClassification).config.pooling == "mean"


@pytest.mark.parametrize(
    ("labels", "loss"),
    [
        (torch.tensor([0, 2]), F.cross_entropy),
        (torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]), F.binary_cross_entropy_with_logits),
    ],
)
def test_losses_of_rows(labels, loss):
    made = make(TFastForSequenceClassification, num_labels=3)
    out = made(tokens(), labels=labels)
    assert_near(out.loss, loss(out.logits, labels), "loss")
    regression = make(TFastForSequenceClassification, num_labels=1)
    out = regression(tokens(), labels=torch.tensor([0.5, -1.0]))
    assert_near(out.loss, F.mse_loss(out.logits[:, 0], torch.tensor([0.5, -1.0])), "regression")


def test_losses_of_tokens_and_answers():
    ids = tokens(2, 12)
    labels = ids % 4
    labels[0, :5] = -100
    made = make(TFastForTokenClassification, num_labels=4)
    out = made(ids, labels=labels)
    assert_near(out.loss, F.cross_entropy(out.logits.flatten(0, 1), labels.flatten()), "tokens")
    made, start, end = make(TFastForQuestionAnswering), torch.tensor([1, 3]), torch.tensor([4, 5])
    out = made(ids, start_positions=start, end_positions=end)
    assert out.start_logits.shape == out.end_logits.shape == (2, 12)
    expected = (F.cross_entropy(out.start_logits, start) + F.cross_entropy(out.end_logits, end)) / 2
    assert_near(out.loss, expected, "answers")


def test_losses_of_language_models():
    ids = tokens(2, 12)
    out = make(TFastForCausalLM)(ids, labels=ids)
    assert_near(out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), "next token")
    labels = ids.clone()
    labels[:, ::2] = -100
    out = make(TFastForMaskedLM)(ids, labels=labels)
    assert_near(out.loss, F.cross_entropy(out.logits.flatten(0, 1), labels.flatten()), "masked tokens")


@pytest.mark.parametrize("model", list(AUTO.values()))
def test_hidden_states_are_the_embeddings_and_every_layer(model):
    made, ids = make(model, num_hidden_layers=3, attention=Window(window=4)), tokens()
    states = made(ids, output_hidden_states=True).hidden_states
    assert [tuple(s.shape) for s in states] == [(2, 20, 32)] * 4
    base = made.model if model is not TFastModel else made
    assert torch.equal(states[-1], base(ids).last_hidden_state)
    assert_near(states[0], base.get_input_embeddings()(ids), "rotary positions add nothing to embeddings")
    pair = made(ids, return_dict=False)
    assert isinstance(pair, tuple)


def test_token_types():
    made, ids = make(TFastModel, type_vocab_size=2), tokens()
    kinds = torch.zeros_like(ids)
    assert torch.equal(logits(made, ids, token_type_ids=kinds), logits(made, ids))
    kinds[:, 10:] = 1
    assert (logits(made, ids, token_type_ids=kinds) - logits(made, ids)).abs().max() > 1e-3
    plain = make(TFastModel)
    assert torch.equal(logits(plain, ids, token_type_ids=kinds * 0), logits(plain, ids))
    with pytest.raises(ValueError, match="set type_vocab_size=2"):
        plain(ids, token_type_ids=kinds)
