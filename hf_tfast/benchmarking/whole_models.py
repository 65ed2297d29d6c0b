"""Whole models as competitors: built from a config with random weights, which time does not depend on.

Llama-like   causal, 4 layers, 512 wide, 8 query on 4 key/value heads, vocabulary 8192. forward: prefill, logits of the
             last token only. both: a training step without its optimiser, next-token loss of every token.
MiniLM       the shape of all-MiniLM-L6-v2: 6 layers, 384 wide, 12 heads. BERT base: 12 layers, 768 wide, 12 heads.
             forward only: last hidden states of one document.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..attention import Mechanism
from ..feed_forward import Form
from ..feed_forward.int8 import Int8
from ..integration.apply import apply_plan
from ..integration.plan import FastPlan
from .workload import DTYPES, CannotRun, Case, Inputs

__all__ = ["document", "encoder", "llama", "made", "only_encoders"]

Built = tuple[Callable[[], Tensor], tuple[Tensor, ...]]
NOTHING = "tfast_bench_nothing"
VOCABULARY = 8192
LLAMA: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
LONGEST = 8192  # tokens of an encoder's document: dense ones take minutes beyond
ENCODERS: dict[str, dict[str, Any]] = {
    "MiniLM": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "BERT base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}


def llama(case: Case, inputs: Inputs, *, fast: Mechanism | None = None, attention: str = "sdpa") -> Built:
    """`attention`: "sdpa", or NOTHING, which leaves attention out: values pass as they are."""
    if attention == NOTHING:
        _register_nothing()
    model = _llama(case.dtype, case.device, max(case.length, 16384), attention, fast)
    model.train(case.passes == "both")
    ids = document(case, VOCABULARY)

    def loss() -> Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    def prefill() -> Tensor:
        return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    return (loss, tuple(model.parameters())) if case.passes == "both" else (prefill, ())


@cache
def _llama(dtype: str, device: str, positions: int, attention: str, fast: Mechanism | None) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, intermediate_size=1536, max_position_embeddings=positions, **LLAMA)
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention, dtype=DTYPES[dtype]).to(device)
    return model if fast is None else apply_plan(model, FastPlan(attention=fast))


def encoder(
    case: Case, inputs: Inputs, *, shape: str, fast: Mechanism | None = None, form: Form | None = None,
    attention: str = "sdpa",
) -> Built:  # fmt: skip
    """One document through an encoder; `attention` as in `llama`. CannotRun for training passes and for documents
    longer than LONGEST."""
    only_encoders(case)
    if attention == NOTHING:
        _register_nothing()
    model = made(shape, case.dtype, case.device, case.length, fast, form, attention)
    ids = document(case, model.config.vocab_size)
    return (lambda: model(input_ids=ids).last_hidden_state), ()


@cache
def made(
    shape: str, dtype: str, device: str, positions: int, fast: Mechanism | None = None, form: Form | None = None,
    attention: str = "sdpa",
) -> Any:  # fmt: skip
    """The encoder itself, in evaluation mode. CannotRun where its feed-forwards need what is not installed."""
    torch.manual_seed(0)
    config = BertConfig(max_position_embeddings=positions, **ENCODERS[shape])
    model = BertModel._from_config(config, attn_implementation=attention, dtype=DTYPES[dtype]).to(device).eval()
    if isinstance(form, Int8) and find_spec("bitsandbytes") is None:
        raise CannotRun("bitsandbytes is not installed")
    return model if fast is None else apply_plan(model, FastPlan(attention=fast, feed_forward=form))


def only_encoders(case: Case) -> None:
    """CannotRun for training passes and for documents longer than LONGEST."""
    if case.passes != "forward":
        raise CannotRun("encoders are measured forward")
    if case.length > LONGEST:
        raise CannotRun(f"encoders are measured up to {LONGEST} tokens")


def document(case: Case, vocabulary: int) -> Tensor:
    """Random tokens [batch, length], the same for all that read them."""
    random = torch.Generator().manual_seed(0)
    return torch.randint(1, vocabulary, (case.batch, case.length), generator=random).to(case.device)


def _register_nothing() -> None:
    if NOTHING not in AttentionInterface._global_mapping:
        AttentionInterface.register(NOTHING, _nothing)
        AttentionMaskInterface.register(NOTHING, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def _nothing(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Every query takes its own value; gradients of zero still reach the projections of queries and keys."""
    h, g = query.shape[1], value.shape[1]
    o = value.repeat_interleave(h // g, 1)
    if torch.is_grad_enabled():
        o = o + 0 * (query.sum() + key.sum())
    return o.transpose(1, 2).contiguous(), None
