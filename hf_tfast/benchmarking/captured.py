"""Queries, keys and values of a model's own attention layers, on real input, as the model computes them.

A registered attention implementation of its own runs dense attention and hands what it was given to whoever listens in
the same context; no module and no existing implementation is changed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, AutoTokenizer, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..attention import Score
from ..backends.score import softmax_attention
from ..integration._modules import survey
from ..positions import extend_positions

NAME = "tfast_capture"


@dataclass(frozen=True)
class Call:
    """Self-attention of one layer over a whole row: q [b h i d], k [b g i d], v [b g i e]; its output o [b h i e]."""

    stack: str
    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    causal: bool
    score: Score


Listener = Callable[[nn.Module, Call], None]
_listener: ContextVar[Listener | None] = ContextVar("tfast_capture", default=None)


def load(source: str, length: int | None = None) -> tuple[PreTrainedModel, Any]:
    """The dense model of a Hub id or folder, fp32, in eval mode, whose attention can be heard, and its tokenizer.

    Learned positions are extended to `length` tokens where the model has fewer.
    """
    _register()
    model = AutoModel.from_pretrained(source, attn_implementation=NAME, dtype="float32")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"{source} has a plan or is quantised: give the dense model that it was made from")
    native = getattr(model.config, "max_position_embeddings", None)
    if length is not None and native is not None and native < length:
        extend_positions(model, length)
    return model.eval(), AutoTokenizer.from_pretrained(source)


@contextmanager
def heard(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a model that is loaded already runs dense attention that can be heard; then its own again."""
    _register()
    before = {
        id(m.config): (m, m.config._attn_implementation) for m in model.modules() if isinstance(m, PreTrainedModel)
    }
    try:
        model.set_attn_implementation(NAME)
        yield
    finally:
        for part, implementation in before.values():
            part.config._attn_implementation = implementation


def _register() -> None:
    if NAME not in AttentionInterface._global_mapping:
        AttentionInterface.register(NAME, _dense)
        AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@contextmanager
def listening(model: PreTrainedModel, listener: Callable[[Call], None]) -> Iterator[None]:
    """Inside, `listener` gets every self-attention that runs over a whole row without a window of its own.

    ValueError for a model whose attention does not go through Transformers' interface.
    """
    places = {id(f.module): f for f in survey(model).found if f.kind == "self"}
    if not places:
        raise ValueError(f"{type(model).__name__} has no self-attention that goes through Transformers' interface")

    def hear(module: nn.Module, call: Call) -> None:
        if (found := places.get(id(module))) is not None:
            listener(Call(**{**vars(call), "stack": found.stack, "layer": found.layer}))

    token = _listener.set(hear)
    try:
        yield
    finally:
        _listener.reset(token)


def _dense(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Transformers' attention interface: dense attention, and a note of it."""
    causal = options.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    score = Score(scale=options.get("scaling"), softcap=options.get("softcap"), sinks=options.get("s_aux"))
    i, j = query.shape[2], key.shape[2]
    if score.softcap is None and score.sinks is None:
        alone = attention_mask is None and causal and i > 1
        o = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, is_causal=alone, scale=score.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
    else:
        pairs = attention_mask
        if pairs is None and causal:
            pairs = query.new_ones(i, j).tril(j - i).bool()
        o = softmax_attention(query, key, value, pairs, score)
    window = options.get("sliding_window")
    listener = _listener.get()
    if listener is not None and i == j and (window is None or window >= j):
        listener(module, Call("", 0, query, key, value, o, causal, score))
    return o.transpose(1, 2).contiguous(), None
