"""Transformers' pipelines take TFast models with an ordinary tokenizer."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

from hf_tfast import (
    TFastForCausalLM,
    TFastForMaskedLM,
    TFastForSequenceClassification,
    TFastForTokenClassification,
    TFastModel,
    Window,
)
from tests.models.tiny_tfast import make

SPECIAL = ["[PAD]", "[BOS]", "[MASK]", "[UNK]", "[SEP]"]
WORDS = [*SPECIAL, "the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs"]
TEXTS = ["the quick brown fox", "a lazy dog and the quick fox runs over the brown dog"]


@pytest.fixture
def tokenizer():
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[BOS] $A", pair="[BOS] $A [SEP]:1 $B:1", special_tokens=[("[BOS]", 1), ("[SEP]", 4)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", bos_token="[BOS]", mask_token="[MASK]", unk_token="[UNK]",
        sep_token="[SEP]", padding_side="left",
    )  # fmt: skip


def model_of(kind, **fields):
    return make(kind, vocab_size=len(WORDS), attention=Window(window=4, sinks=1), **fields)


def test_text_generation(tokenizer, tmp_path):
    model = model_of(TFastForCausalLM)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    run = pipeline("text-generation", model=str(tmp_path))
    assert type(run.model) is TFastForCausalLM
    given = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": list(range(len(SPECIAL)))}
    alone = [run(text, **given)[0]["generated_text"] for text in TEXTS]
    together = run(TEXTS, batch_size=2, **given)
    assert [out[0]["generated_text"] for out in together] == alone
    assert all(out.startswith(text) and out != text for out, text in zip(alone, TEXTS, strict=True))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.attention["window"] == 4


def test_fill_mask(tokenizer):
    run = pipeline("fill-mask", model=model_of(TFastForMaskedLM), tokenizer=tokenizer)
    found = run("the quick [MASK] fox", top_k=3)
    ids = tokenizer("the quick [MASK] fox", return_tensors="pt").input_ids
    scores = run.model(ids).logits[0, 3].softmax(-1)
    assert [out["token"] for out in found] == scores.topk(3).indices.tolist()


def test_text_classification(tokenizer):
    run = pipeline("text-classification", model=model_of(TFastForSequenceClassification), tokenizer=tokenizer)
    alone = [run(text)[0] for text in TEXTS]
    for one, other in zip(run(TEXTS, batch_size=2), alone, strict=True):
        assert one["label"] == other["label"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)


def test_token_classification(tokenizer):
    run = pipeline("token-classification", model=model_of(TFastForTokenClassification), tokenizer=tokenizer,
                   ignore_labels=[])  # fmt: skip
    assert [out["word"] for out in run(TEXTS[0])] == TEXTS[0].split()


def test_feature_extraction(tokenizer):
    run = pipeline("feature-extraction", model=model_of(TFastModel), tokenizer=tokenizer, return_tensors=True)
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    assert torch.equal(run(TEXTS[0]), run.model(ids).last_hidden_state.detach())
