"""What the saved model says, loaded again as any user loads it."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerBase

NEW_TOKENS = 64


@torch.no_grad()
def sample(folder: Path, text: str, args: Any, two_way: bool) -> dict[str, Any]:
    """A continuation of `args.prompt` (or of a held-out text), or what fills the mask in it.

    The sample is drawn from `args.seed`; torch's own generator is left as it was.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if two_way:
        return _filled(folder, tokenizer, args.prompt or _with_mask(text, tokenizer.mask_token))
    prompt = args.prompt or text[: max(text.find("\n", 80), 0) or 80]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = tokenizer(prompt, return_tensors="pt")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        made = model.generate(**tokens, max_new_tokens=NEW_TOKENS, do_sample=True, temperature=0.7, top_k=50)
    continued = tokenizer.decode(made[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
    return {"prompt": prompt, "continuation": continued}


def _filled(folder: Path, tokenizer: PreTrainedTokenizerBase, text: str) -> dict[str, Any]:
    if tokenizer.mask_token not in text:
        raise ValueError(f"the prompt of a masked language model holds {tokenizer.mask_token}, got {text!r}")
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    tokens = tokenizer(text, return_tensors="pt")
    place = int((tokens["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0])
    best = model(**tokens).logits[0, place].float().softmax(-1).topk(5)
    guesses = [[tokenizer.decode([int(n)]), round(float(p), 4)] for p, n in zip(*best, strict=True)]
    return {"prompt": text, "guesses": guesses}


def _with_mask(text: str, mask: str) -> str:
    """The beginning of a text whose last word is masked."""
    words = text.split(" ")
    place = max(len(words) // 2, 0)
    return " ".join([*words[:place], mask, *words[place + 1 :]])
