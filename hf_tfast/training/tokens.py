"""Tokenizers that need no download: bytes, or byte pairs learned from the training texts.

Both are `tokenizers` pipelines over the 256 bytes, so every text has tokens and decodes to itself. AutoTokenizer
reloads them. Ids 0-3 are special: padding, begin and end of a document, mask.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, BEGIN, END, MASK = SPECIAL = ("<|pad|>", "<|begin|>", "<|end|>", "<|mask|>")
LEAST = len(SPECIAL) + 256
ADDED = [AddedToken(token, special=True, normalized=False, lstrip=token == MASK) for token in SPECIAL]
# tokens hold the space in front of their word, and so does a mask: "a <|mask|> word" hides one token


def byte_tokenizer(length: int, two_way: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte: 260 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _finished(tokenizer, length, two_way)


def learned_tokenizer(
    texts: Iterable[str], vocabulary: int, length: int, two_way: bool = False
) -> PreTrainedTokenizerFast:
    """Byte pairs (Sennrich et al., https://arxiv.org/abs/1508.07909) within GPT-2's words, learned from `texts`.

    vocabulary  tokens at most, special ones and bytes included; small texts give fewer.
    """
    if vocabulary < LEAST:
        raise ValueError(
            f"a vocabulary holds {LEAST} tokens at least (256 bytes, {len(SPECIAL)} special), got {vocabulary}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        show_progress=False,
        special_tokens=ADDED,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _finished(tokenizer, length, two_way)


def _finished(tokenizer: Tokenizer, length: int, two_way: bool) -> PreTrainedTokenizerFast:
    """Special tokens, the frame that training gives every document, and decoding."""
    tokenizer.add_special_tokens(ADDED)
    tokenizer.decoder = decoders.ByteLevel()
    frame = f"{BEGIN} $A {END}" if two_way else f"{BEGIN} $A"  # a prompt is a document that has not ended
    ids = [(token, tokenizer.token_to_id(token)) for token in (BEGIN, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        mask_token=ADDED[SPECIAL.index(MASK)],
        model_max_length=length,
        padding_side="right" if two_way else "left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def known_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """A saved tokenizer, from a folder or the Hub. ValueError unless it can frame and pad documents."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer {name} is not one of the `tokenizers` library, which this training needs")
    for role in ("bos", "eos", "pad"):
        if getattr(tokenizer, f"{role}_token_id") is None:
            raise ValueError(f"the tokenizer {name} has no {role} token; add one, or learn a tokenizer in the run")
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of whole documents, begin and end included. Text that spells a special token stays text."""
    backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    before = backend.encode_special_tokens
    backend.no_truncation()
    backend.encode_special_tokens = True
    try:
        coded = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    finally:
        backend.encode_special_tokens = before
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [[begin, *one.ids, end] for one in coded]


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """[vocabulary] int64: bytes of text that a token stands for; special tokens stand for none.

    ValueError for tokenizers that are not byte-level, whose tokens do not say.
    """
    tokens = tokenizer.get_vocab()
    sizes = torch.zeros(max(tokens.values()) + 1, dtype=torch.int64)
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    special = set(tokenizer.all_special_ids)
    for token, n in tokens.items():
        if n in special:
            continue
        if not alphabet.issuperset(token):
            raise ValueError(f"the tokenizer is not byte-level: {token!r} does not say how many bytes it stands for")
        sizes[n] = len(token)
    return sizes
