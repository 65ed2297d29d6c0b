"""A random BERT small enough for seconds, saved with a tokenizer of its own, and a corpus of its words."""

import json
import random
import string

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = [f"w{a}{b}" for a in string.ascii_lowercase for b in "aeiou"]


def save_tiny_encoder(folder, positions=64, seed=0):
    """Model and tokenizer with [CLS] and [SEP] in `folder`; `positions` learned ones."""
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=positions,
    )
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.3,
    )
    BertModel(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_corpus(path, documents=4, words=150, seed=0):
    """JSONL of `documents`; each document's query is words of its own."""
    draw = random.Random(seed)
    with open(path, "w") as file:
        for n in range(documents):
            mine = WORDS[n::documents]
            paragraphs = [" ".join(draw.choices(mine, k=words // 3)) for _ in range(3)]
            line = {"document": "\n\n".join(paragraphs), "queries": [" ".join(draw.choices(mine, k=6))]}
            file.write(json.dumps(line) + "\n")
    return path
