"""Tiny TFast models, two layers of 32 channels, with weights large enough that mechanisms make a difference."""

from typing import Any

import torch
from torch import Tensor

from hf_tfast import TFastConfig
from hf_tfast.attention import Mechanism, mechanisms
from hf_tfast.testing import generator

VOCABULARY = 99
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
POSITIONS = ("rotary", "sinusoidal", "learned", "low_rank", "none")


def config(**fields: Any) -> TFastConfig:
    return TFastConfig(**{**SIZES, **fields})


def make(model: Any, *seed: Any, **fields: Any) -> Any:
    """A model of class `model` in eval mode, with weights drawn from the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(generator(model.__name__, *seed).initial_seed())
        return model(config(**fields)).eval()


def tokens(rows: int = 2, length: int = 20, *seed: Any) -> Tensor:
    """[rows length] ids, none of them special."""
    return torch.randint(2, VOCABULARY, (rows, length), generator=generator("tokens", rows, length, *seed))


def small(name: str) -> Mechanism:
    """A mechanism with fields at which 20 tokens mean something."""
    return mechanisms()[name](**mechanisms()[name].small)


def logits(model: Any, *args: Any, **given: Any) -> Tensor:
    """The logits, or last states, of a model without gradient."""
    with torch.no_grad():
        out = model(*args, **given)
    found = next((out[name] for name in ("logits", "start_logits", "last_hidden_state") if name in out), None)
    assert found is not None
    return found
