"""What the saved model says, loaded again as any user loads it."""

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerBase

NEW_TOKENS, WORDS = 64, 40


@torch.no_grad()
def sample(folder: Path, text: str, args: Any, two_way: bool) -> dict[str, Any]:
    """A continuation of `args.prompt`, or the words that fill the mask in it; without one, of a held-out text.

    The continuation is drawn from `args.seed`, torch's own generator is left as it was. ValueError for a prompt that
    the model's length does not hold, or without a mask where one is to be filled.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if two_way:
        return _filled(folder, tokenizer, args.prompt or _masked(text, tokenizer))
    return _continued(folder, tokenizer, args.prompt or _fitting(text, tokenizer), args.seed)


def _continued(folder: Path, tokenizer: PreTrainedTokenizerBase, prompt: str, seed: int) -> dict[str, Any]:
    tokens = tokenizer(prompt, return_tensors="pt")
    length = tokens["input_ids"].shape[1]
    room = tokenizer.model_max_length - length
    if room < 1:
        raise ValueError(
            f"the prompt has {length} tokens, but this model was trained on {tokenizer.model_max_length}: shorten it"
        )
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = model.generate(
            **tokens, max_new_tokens=min(NEW_TOKENS, room), do_sample=True, temperature=0.7, top_k=50
        )
    return {"prompt": prompt, "continuation": tokenizer.decode(made[0, length:], skip_special_tokens=True)}


def _filled(folder: Path, tokenizer: PreTrainedTokenizerBase, text: str) -> dict[str, Any]:
    tokens = tokenizer(text, return_tensors="pt", truncation=True)
    places = (tokens["input_ids"][0] == tokenizer.mask_token_id).nonzero().flatten()
    if not len(places):
        raise ValueError(
            f"the prompt of a masked language model holds {tokenizer.mask_token} within its first "
            f"{tokenizer.model_max_length} tokens, got {text!r}"
        )
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    best = model(**tokens).logits[0, places[0]].float().softmax(-1).topk(5)
    guesses = [[tokenizer.decode([int(n)]), round(float(p), 4)] for p, n in zip(*best, strict=True)]
    return {"prompt": text, "guesses": guesses}


def _fitting(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first lines of a text, in at most half of the model's length."""
    words = text.split(" ")[:WORDS]
    while (
        len(words) > 1
        and len(tokenizer(" ".join(words), verbose=False)["input_ids"]) > tokenizer.model_max_length // 2
    ):
        words = words[: len(words) // 2]
    return " ".join(words).rstrip()


def _masked(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The same, with the word in the middle masked."""
    fitting = _fitting(text, tokenizer)
    words = list(re.finditer(r"\w+", fitting))
    start, end = words[len(words) // 2].span() if words else (0, len(fitting))
    return fitting[:start] + tokenizer.mask_token + fitting[end:]
