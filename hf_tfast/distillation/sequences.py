"""Sequence-level distillation: what the teacher itself would say becomes the target, and the loss is cross-entropy.

Source: Kim and Rush, "Sequence-Level Knowledge Distillation", https://arxiv.org/abs/1606.07947, section 3.2: the most
likely output under beam search stands for the teacher's whole distribution over sequences.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .losses import IGNORED

__all__ = ["teacher_labels", "teacher_texts"]


@torch.no_grad()
def teacher_labels(
    teacher: PreTrainedModel, inputs: dict[str, Any], *, beams: int = 5, max_new_tokens: int = 128, **options: Any
) -> Tensor:
    """The teacher's outputs for a batch of an encoder-decoder's inputs -> labels [b n], IGNORED after each end.

    beams    of the search; 1 is greedy. options go to `generate`, and may not ask for several sequences.
    The token that starts a decoder is no target and is cut off. The teacher keeps its training mode.
    """
    if not teacher.config.is_encoder_decoder:
        raise ValueError(
            f"{type(teacher).__name__} is no encoder-decoder: its output continues its prompt; distil its logits"
        )
    if options.get("num_return_sequences", 1) != 1:
        raise ValueError("sequence-level distillation takes the best sequence; leave num_return_sequences out")
    was_training = teacher.training
    teacher.eval()
    try:
        inputs = {name: x.to(teacher.device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
        inputs = {name: x for name, x in inputs.items() if not name.startswith(("labels", "decoder_"))}
        generate: Any = teacher.generate
        made = generate(**inputs, num_beams=beams, max_new_tokens=max_new_tokens, do_sample=False, **options)
    finally:
        teacher.train(was_training)
    made = made[:, 1:]
    ends = teacher.generation_config.eos_token_id
    ends = torch.tensor([] if ends is None else ends, device=made.device).flatten()
    ended = torch.isin(made, ends).cumsum(-1)
    past = (ended - torch.isin(made, ends).long()) > 0  # the end itself is a target, what follows is padding
    return made.masked_fill(past, IGNORED)


def teacher_texts(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    *,
    batch: int = 16,
    max_length: int | None = None,
    **options: Any,
) -> Iterator[str]:
    """The teacher's output for each source text, in order; options as in `teacher_labels`. Sources are cut at
    `max_length` tokens (None: the tokenizer's own limit)."""
    if batch < 1:
        raise ValueError(f"a batch holds at least 1 text, got {batch}")
    for start in range(0, len(sources), batch):
        given = tokenizer(
            list(sources[start : start + batch]),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=max_length,
        )
        labels = teacher_labels(teacher, dict(given), **options)
        for row in labels:
            yield str(tokenizer.decode(row[row != IGNORED], skip_special_tokens=True))
