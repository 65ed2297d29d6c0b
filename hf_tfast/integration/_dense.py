"""Dense attention inside a plan: cross-attention, layers that a plan leaves dense, and dense 4-D masks."""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers.utils import logging

from ..attention import Mask, Mechanism, Score
from ..backends.score import softmax_attention

__all__ = ["cross_attention", "eager_attention", "is_dense_mask", "masked_attention"]

logger = logging.get_logger(__name__)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, score: Score) -> Tensor:
    """Every query of another sequence reads every valid key: q [b h i d], k, v [b g j .], valid [b j] -> [b h i e]."""
    if valid is not None and valid.shape[0] != k.shape[0]:
        valid = valid.expand(k.shape[0], -1)
    if score.softcap is not None or score.sinks is not None:
        return softmax_attention(q, k, v, None if valid is None else valid[:, None, None], score)
    o = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if valid is None else valid[:, None, None],
        dropout_p=score.dropout,
        scale=score.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return o if valid is None else o.masked_fill(~valid.any(-1)[:, None, None, None], 0.0)


def pairs(mask: Mask, window: int | None, queries: int, keys: int, device: torch.device) -> Tensor:
    """[b or 1, 1, i, j] bool: the pairs that dense attention reads under a row of words."""
    documents = mask.segments if mask.segments is not None else mask.valid
    slots = torch.arange(keys, device=device)
    i, j = slots[keys - queries :, None], slots
    seen = (j <= i) if mask.causal else torch.ones_like(j <= i)
    if window is not None:
        seen = seen & ((i - j < window) if mask.causal else ((i - j).abs() <= window))
    if documents is None:
        return seen[None, None]
    documents = documents.long()
    return (seen & (documents[:, keys - queries :, None] == documents[:, None]) & (documents[:, None] != 0))[:, None]


def eager_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The model's own eager attention over the pairs `seen` [b or 1, 1, i, j]: output [b i h e] and its weights."""
    home = sys.modules[type(module).__module__]
    eager = getattr(home, "eager_attention_forward", None)
    if eager is None:
        raise ValueError(f"{home.__name__} has no eager attention; load with attn_implementation='sdpa' or none")
    bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, torch.finfo(q.dtype).min)
    return eager(module, q, k, v, bias, **options)


def is_dense_mask(mask: Any) -> bool:
    """Is this a mask over pairs (given by the user, or made by a model itself) rather than a row [b 1 1 n]?

    ValueError for anything that is neither.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        what = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
        raise ValueError(f"expected an attention mask [batch, 1, queries or 1, keys], got one of {what}")
    if mask.shape[1:3] != (1, 1):
        return True
    if mask.is_floating_point() and mask.numel() and float(mask.amax()) > 2.0**60:
        raise ValueError(
            "the model turned the integer row of hf_tfast's mask into floats; use attn_implementation='sdpa'"
        )
    return mask.is_floating_point()


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mechanism: Mechanism, given: Tensor, mask: Mask, score: Score
) -> Tensor:
    """A mechanism under a dense mask `given` [b or 1, h or 1, i, j], bool (True: read) or float (added to the scores).

    The given mask decides causality and padding exactly; the mechanism's pattern, on positions counted from the first
    slot, takes pairs away. O(i j) time and memory.
    """
    (b, h, i, _), j = q.shape, k.shape[2]
    if given.ndim != 4 or given.shape[2] not in (1, i) or given.shape[3] < j or given.shape[0] not in (1, b):
        raise ValueError(
            f"expected a dense mask [{b} or 1, {h} or 1, {i}, {j}] (batch, heads, queries, keys), "
            f"got {tuple(given.shape)}"
        )
    if type(mechanism).choose is not Mechanism.choose:
        raise ValueError(
            f"{mechanism.name} chooses keys by content and cannot honour a dense 4-D mask; give a 2-D mask "
            "[batch, length], or plan a static pattern such as Window"
        )
    logger.warning_once(
        "a dense 4-D attention mask was given: it is honoured exactly, at dense cost (O(queries x keys) time and "
        f"memory, here {i} x {j} per head), in every layer that it reaches. A 2-D mask [batch, length] stays fast."
    )
    given = given[..., :j]
    bias = None
    if given.is_floating_point():
        bias, seen = given, given > torch.finfo(given.dtype).min
    elif given.dtype == torch.bool:
        seen = given
    else:
        raise ValueError(f"expected a dense mask of bool (True: read) or floating dtype (added), got {given.dtype}")
    at = torch.arange(j, device=q.device)
    rows = torch.arange(b, device=q.device).view(-1, 1, 1, 1)
    heads = torch.arange(score.first_head, score.first_head + h, device=q.device).view(-1, 1, 1)
    try:
        pattern = mechanism.allowed(None, rows, heads, at[j - i :, None], at, causal=mask.causal)
    except NotImplementedError as error:
        raise ValueError(f"{mechanism.name} is not a pattern of pairs and cannot honour a dense 4-D mask") from error
    return softmax_attention(q, k, v, seen & pattern, score, bias=bias)
