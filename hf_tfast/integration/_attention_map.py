"""attention_map: the attention weights of chosen rows, by the definition of what a layer computes.

Fast paths never form weights, so `output_attentions` is refused. Here one layer's queries, keys and mask are caught in
one forward, and the weights are what the reference gives for values that are the identity: p = p I. That holds for
every mechanism that is linear in its values, patterns of pairs and low-rank ones alike.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention import Mask, Score, attend
from ..backends.score import softmax_attention
from ._basis import basis_of
from ._dense import is_dense_mask, masked_attention
from ._modules import Found, survey
from ._stamps import NAME
from ._within import within
from .interface import _score, _stamp, _understand, first_head
from .masks import read_row

__all__ = ["attention_map"]

_DENSE = ("sdpa", "eager")


@dataclass(frozen=True)
class _Call:
    """What a layer handed to its attention function: q [b h i d], k [b g j d], the mask as given, and the rest."""

    module: nn.Module
    implementation: str
    q: Tensor
    k: Tensor
    mask: Tensor | None
    options: dict[str, Any]


_WATCHED: ContextVar[tuple[nn.Module, list[_Call]] | None] = ContextVar("tfast_watched", default=None)


@torch.no_grad()
def attention_map(
    model: PreTrainedModel,
    inputs: Mapping[str, Any] | Tensor,
    layer: int | str,
    head: int,
    rows: Sequence[int] | None = None,
) -> Tensor:
    """The weights with which queries read keys in one head of one layer: [b, rows, keys], in at least fp32.

    inputs   what the model is called with (without a cache): a dict, or input_ids.
    layer    its number in the stack; "decoder.3" where there are two stacks, "decoder.3.cross" for cross-attention.
    rows     slots of the queries, negative ones from the end; None for all.
    For a plan's layer these are the weights of its mechanism, by its reference; for a dense one those of softmax
    attention. Rows of tokens sum to 1 (less what a sink logit takes). Rows of padding are zeros under a plan, and else
    what the model computes for them. Dropout is left out. A mechanism that rounds values rounds the identity here.
    The model runs once as it is. O(queries x keys) time and memory for the heads that share this one's
    keys.

    ValueError for a layer, head or row that does not exist, and for layers that Transformers' attention interface does
    not reach.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"expected a Transformers model, got {type(model).__name__}; unwrap it first")
    given: dict[str, Any] = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
    if given.get("past_key_values") is not None:
        raise ValueError("attention_map takes the whole input at once: leave past_key_values out")
    if "use_cache" in inspect.signature(model.forward).parameters:
        given = {**given, "use_cache": False}
    found = _find(model, layer)
    calls: list[_Call] = []
    with _watching(model, found, calls):
        model(**given)
    if len(calls) != 1:
        raise ValueError(f"{found.path} ran {len(calls)} times in one forward; attention_map needs it to run once")
    call = calls[0]
    if not 0 <= head < call.q.shape[1]:
        raise ValueError(f"{found.path} has heads 0 to {call.q.shape[1] - 1}, got {head}")
    chosen = _rows(rows, call.q.shape[2]).to(call.q.device)
    weights = _dense_weights(call, head) if call.implementation in _DENSE else _plan_weights(call, head)
    return weights[:, head % (call.q.shape[1] // call.k.shape[1]), chosen]


def _find(model: PreTrainedModel, layer: int | str) -> Found:
    """The attention module that `layer` names."""
    found = survey(model).found
    names = {f"{f.stack}.{f.layer}" + (".cross" if f.kind == "cross" else ""): f for f in found}
    stacks = sorted({f.stack for f in found if f.kind == "self"})
    name = str(layer)
    if not isinstance(layer, str) and len(stacks) > 1 and "text" not in stacks:
        raise ValueError(
            f"this model has the stacks {', '.join(stacks)}: give layer as {stacks[0]}.{layer}, for instance"
        )
    for full in (name, f"text.{name}", f"{stacks[0]}.{name}" if len(stacks) == 1 else name):
        if full in names:
            return names[full]
    raise ValueError(
        f"{type(model).__name__} has no layer {layer!r} that goes through Transformers' attention interface; it has "
        f"{', '.join(names) or 'none'}"
    )


def _rows(rows: Sequence[int] | None, queries: int) -> Tensor:
    if rows is None:
        return torch.arange(queries)
    if wrong := [row for row in rows if not -queries <= row < queries]:
        raise ValueError(f"expected rows from {-queries} to {queries - 1}, got {wrong[0]}")
    return torch.tensor([row % queries for row in rows], dtype=torch.int64)


@contextmanager
def _watching(model: PreTrainedModel, found: Found, calls: list[_Call]) -> Iterator[None]:
    """Run the layer's stack under a name that computes the same and notes the call; restored exactly afterwards."""
    owners = [m for path, m in model.named_modules() if isinstance(m, PreTrainedModel) and _holds(path, found.path)]
    own: Any = found.module.config
    running: str = own._attn_implementation or "eager"
    configs: dict[int, Any] = {
        id(c): c for c in (own, *(m.config for m in owners)) if c._attn_implementation == running
    }
    watcher = _register(running)
    token = _WATCHED.set((found.module, calls))
    try:
        for config in configs.values():
            config._attn_implementation_internal = watcher
        yield
    finally:
        for config in configs.values():
            config._attn_implementation_internal = running
        _WATCHED.reset(token)


def _holds(owner: str, path: str) -> bool:
    return owner == "" or path.startswith(f"{owner}.")


def _register(running: str) -> str:
    """The name of an implementation that does what `running` does, and notes the calls of the watched module."""
    if running not in _DENSE and running.split("_")[0] != NAME:
        raise ValueError(f"attention_map reads layers that run {NAME}*, sdpa or eager, not {running!r}")
    name = f"{NAME}_watched_{running}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _noting(running))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[running])
    return name


def _noting(running: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def watched(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        watch = _WATCHED.get()
        if watch is not None and watch[0] is module:
            watch[1].append(_Call(module, running, query, key, attention_mask, options))
        if running == "eager":
            attend_eagerly = sys.modules[type(module).__module__].eager_attention_forward
            return attend_eagerly(module, query, key, value, attention_mask, **options)
        return ALL_ATTENTION_FUNCTIONS[running](module, query, key, value, attention_mask, **options)

    return watched


def _one_group(call: _Call, head: int, score: Score) -> tuple[Tensor, Tensor, Tensor, Score, slice]:
    """q [b s i d] of the s heads that share the head's keys, k [b 1 j d], in at least fp32, the identity [b 1 j j] as
    values, and the group's score and heads. Mechanisms may draw per key head, so a group is not cut further."""
    wide, shared = torch.promote_types(call.q.dtype, torch.float32), call.q.shape[1] // call.k.shape[1]
    group = head // shared
    heads = slice(group * shared, (group + 1) * shared)
    q, k = call.q[:, heads].to(wide), call.k[:, group : group + 1].to(wide)
    identity = torch.eye(k.shape[2], dtype=wide, device=k.device).expand(len(k), 1, -1, -1)
    sinks = None if score.sinks is None else score.sinks[heads]
    basis = None if score.basis is None else (score.basis[0][group : group + 1], score.basis[1][group : group + 1])
    score = replace(score, sinks=sinks, dropout=0.0, first_head=score.first_head + heads.start, basis=basis)
    return q, k, identity, score, heads


def _plan_weights(call: _Call, head: int) -> Tensor:
    """[b s i j] by the reference of what the dispatcher would run; the steps are those of its `_dispatch`."""
    stamp = _stamp(call.implementation, call.module)
    causal = call.options.get("is_causal")
    causal = getattr(call.module, "is_causal", True) if causal is None else causal
    score = _score({**call.options, "dropout": 0.0}, first_head(stamp, call.q.shape[1]))
    if call.implementation == NAME:
        score = replace(score, basis=basis_of(call.module, stamp, call.k.shape[1]))
    q, k, identity, score, heads = _one_group(call, head, score)
    dense = call.mask is not None and is_dense_mask(call.mask)
    if stamp.kind == "cross":
        valid = None if call.mask is None or dense else read_row(call.mask).on(len(k)).mask.valid
        seen = _of_heads(call.mask, heads) if dense else None if valid is None else valid[:, None, None]
        return _softmax(q, k, identity, seen, score)
    if dense:
        mechanism = within(stamp.mechanism, call.options.get("sliding_window"), Mask(causal=causal), k.shape[2])
        return masked_attention(q, k, identity, mechanism, _of_heads(call.mask, heads), Mask(causal=causal), score)
    row = None if call.mask is None else read_row(call.mask).on(len(k))
    understood = _understand(stamp, q, k, identity, row, score, causal, call.options)
    mechanism = within(stamp.mechanism, understood.window, understood.mask, understood.k.shape[2])
    weights = attend(q, understood.k, understood.v, mechanism, understood.mask, score, backend="reference")
    return weights[..., : understood.k.shape[2]]


def _dense_weights(call: _Call, head: int) -> Tensor:
    """[b s i j] of Transformers' own softmax attention, under the mask that it was given."""
    options, mask = call.options, call.mask
    score = Score(scale=options.get("scaling"), softcap=options.get("softcap"), sinks=options.get("s_aux"))
    q, k, identity, score, heads = _one_group(call, head, score)
    i, j = q.shape[2], k.shape[2]
    causal = options.get("is_causal")
    causal = getattr(call.module, "is_causal", True) if causal is None else causal
    if mask is not None:
        mask = _of_heads(mask, heads)[..., :j]
    elif causal and i > 1:
        mask = torch.ones(i, j, dtype=torch.bool, device=q.device).tril(j - i)[None, None]
    bias = options.get("position_bias")
    return _softmax(q, k, identity, mask, score, None if bias is None else bias[:, heads])


def _of_heads(mask: Tensor | None, heads: slice) -> Tensor:
    """A dense mask [b, h or 1, i, j] for some heads."""
    if mask is None:
        raise ValueError("expected a mask")
    return mask if mask.shape[1] == 1 else mask[:, heads]


def _softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, score: Score, bias: Tensor | None = None) -> Tensor:
    """`mask` is bool (True: read) or float (added; the least float, Transformers' sign for hidden, is False)."""
    if mask is not None and mask.is_floating_point():
        bias = mask if bias is None else mask + bias
        mask = mask > torch.finfo(mask.dtype).min
    return softmax_attention(q, k, v, mask, score, bias=bias)
