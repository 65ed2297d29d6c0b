"""Tiny encoder-decoders, two layers in each stack, with weights large enough that mechanisms make a difference."""

from typing import Any

import torch
from torch import Tensor

from hf_tfast import TFastForConditionalGeneration, TFastSeq2SeqConfig, Window
from hf_tfast.testing import generator
from tests.models.tiny_tfast import SIZES, tokens

START, END = 1, 98
NARROW = {"encoder": Window(window=3, sinks=1), "decoder": Window(window=4, sinks=1)}


def config(**fields: Any) -> TFastSeq2SeqConfig:
    return TFastSeq2SeqConfig(**{**SIZES, "decoder_start_token_id": START, "eos_token_id": END, **fields})


def make(*seed: Any, model: Any = TFastForConditionalGeneration, **fields: Any) -> Any:
    """An encoder-decoder in eval mode, with weights drawn from the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(generator("seq2seq", *seed).initial_seed())
        return model(config(**fields)).eval()


def pair(rows: int = 2, source: int = 20, target: int = 12) -> dict[str, Tensor]:
    """input_ids and decoder_input_ids."""
    return {"input_ids": tokens(rows, source), "decoder_input_ids": tokens(rows, target, "target")}
