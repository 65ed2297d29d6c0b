"""Texts that a model makes for examples: greedy or by beams, rows of similar length together."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..packing import IGNORED
from .examples import Collator, Examples

__all__ = ["generate_texts"]


@torch.no_grad()
def generate_texts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    *,
    batch: int = 32,
    new_tokens: int = 64,
    beams: int = 1,
    share: tuple[int, int] = (0, 1),
    context: AbstractContextManager[Any] | None = None,
) -> dict[int, str]:
    """{example: text}, in the order of the examples; encoder-decoders read the input, others continue the prompt.

    share    (rank, world): this process makes every world-th text.
    context  of autocast, say.
    """
    decoder_only = not model.config.is_encoder_decoder
    mine = range(share[0], len(examples), share[1])
    prompts = {n: _prompt(examples[n], decoder_only) for n in mine}
    order = sorted(mine, key=lambda n: (len(prompts[n]), n))
    collate = Collator(tokenizer.pad_token_id, "left" if decoder_only else "right")
    device, was_training = next(model.parameters()).device, model.training
    cache, model.config.use_cache = model.config.use_cache, True  # Trainer switches it off
    model.eval()
    made: dict[int, str] = {}
    try:
        with context or nullcontext():
            for start in range(0, len(order), batch):
                chosen = order[start : start + batch]
                given = collate([{"input_ids": prompts[n]} for n in chosen])
                out = model.generate(
                    **{name: x.to(device) for name, x in given.items()},
                    max_new_tokens=new_tokens,
                    num_beams=beams,
                    do_sample=False,
                    use_cache=True,
                )
                new = out[:, given["input_ids"].shape[1] :] if decoder_only else out
                texts = tokenizer.batch_decode(new, skip_special_tokens=True)
                made.update({n: text.strip() for n, text in zip(chosen, texts, strict=True)})
    finally:
        model.train(was_training)
        model.config.use_cache = cache
    return dict(sorted(made.items()))


def _prompt(feature: dict[str, Any], decoder_only: bool) -> list[int]:
    ids: list[int] = feature["input_ids"]
    if not decoder_only:
        return ids
    return ids[: next((n for n, label in enumerate(feature["labels"]) if label != IGNORED), len(ids))]
