"""Tokenizers: every text survives, bytes are accounted for, AutoTokenizer reloads them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hf_tfast.training.tokens import (
    BEGIN,
    END,
    LEAST,
    MASK,
    byte_tokenizer,
    encode,
    known_tokenizer,
    learned_tokenizer,
    token_bytes,
)

TEXTS = ["def window(q, k):\n    return q @ k.mT\n" * 20, "naïve λ-calculus, 日本語\r\n\ttabs  and   spaces " * 20]
KINDS = {
    "bytes": byte_tokenizer(64),
    "learned": learned_tokenizer(TEXTS, LEAST + 60, 64),
    "two_way": learned_tokenizer(TEXTS, LEAST + 60, 64, two_way=True),
}
kinds = pytest.mark.parametrize("tokenizer", KINDS.values(), ids=KINDS.keys())
texts = st.lists(st.one_of(st.text(), st.sampled_from([*TEXTS, BEGIN, f"a{END}b{MASK}"])), min_size=1, max_size=4)


@kinds
@settings(max_examples=40, deadline=None)
@given(given_texts=texts)
def test_nothing_is_lost(tokenizer, given_texts):
    sizes = token_bytes(tokenizer)
    for text, ids in zip(given_texts, encode(tokenizer, given_texts), strict=True):
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert tokenizer.decode(ids[1:-1], clean_up_tokenization_spaces=False) == text
        assert not set(ids[1:-1]) & set(tokenizer.all_special_ids)  # text that spells a special token stays text
        assert int(sizes[ids].sum()) == len(text.encode())


def test_one_token_a_byte():
    ids = encode(KINDS["bytes"], [TEXTS[1]])[0]
    assert len(ids) == len(TEXTS[1].encode()) + 2
    assert len(KINDS["bytes"]) == LEAST


def test_learning_makes_texts_shorter():
    learned = encode(KINDS["learned"], TEXTS)
    assert LEAST < len(KINDS["learned"]) <= LEAST + 60
    assert sum(map(len, learned)) < 0.6 * sum(map(len, encode(KINDS["bytes"], TEXTS)))


@kinds
def test_reloads(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert encode(again, TEXTS) == encode(tokenizer, TEXTS)
    assert again(TEXTS[0])["input_ids"] == tokenizer(TEXTS[0])["input_ids"]
    assert (again.pad_token_id, again.mask_token_id, len(again)) == (0, 3, len(tokenizer))
    assert again(f"a {MASK} b")["input_ids"] == tokenizer(f"a {MASK} b")["input_ids"]
    assert set(again("x")) == {"input_ids", "attention_mask"}
    assert (again.padding_side, again.model_max_length) == (tokenizer.padding_side, 64)
    known_tokenizer(tmp_path)


def test_frames():
    assert KINDS["learned"]("x")["input_ids"][0] == 1
    assert KINDS["learned"]("x")["input_ids"][-1] != 2, "a prompt goes on"
    assert [KINDS["two_way"]("x")["input_ids"][n] for n in (0, -1)] == [1, 2]
    assert encode(KINDS["learned"], ["x"]) == [KINDS["two_way"]("x")["input_ids"]]


@kinds
def test_a_mask_hides_one_token(tokenizer):
    """The space before a word belongs to its token, so the mask takes it along, also after reloading."""
    ids = tokenizer(f"window {MASK} query")["input_ids"]
    spelled = tokenizer.decode(ids, skip_special_tokens=True)
    assert ids.count(3) == 1
    assert spelled == "window query"


def test_too_small_a_vocabulary():
    with pytest.raises(ValueError, match="260 tokens at least"):
        learned_tokenizer(TEXTS, 200, 64)


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    tokenizer = byte_tokenizer(8)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no eos token"):
        known_tokenizer(tmp_path)


def test_tokens_that_are_no_bytes_are_refused():
    tokenizer = byte_tokenizer(8)
    tokenizer.add_tokens(["▁日"])
    with pytest.raises(ValueError, match="not byte-level"):
        token_bytes(tokenizer)
