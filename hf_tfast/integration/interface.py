"""The dispatcher: turns what Transformers hands to an attention function into one call of `attend`.

Registered as `tfast` (reads the plan's stamp on the module) and as `tfast_<mechanism>` for every mechanism that exists
(default fields, no plan needed; self-attention only, cross-attention stays dense). Each name has a mask function too:
without one Transformers passes no mask at all. Nothing that Transformers already has is touched.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils import logging

from .. import attention
from ..attention import Mask, Mechanism, Score, attend, choose_backend
from ..attention.dense import Dense
from ._basis import basis_of
from ._dense import cross_attention, eager_attention, is_dense_mask, masked_attention, pairs
from ._modules import is_cross
from ._sequence import sequence_of
from ._stamps import NAME, Ran, Stamp, note, stamp_of
from ._within import within
from .cache import own_layer
from .caches._own import OwnLayer
from .masks import KeyRow, key_row, read_row, remembered

__all__ = ["default_mechanism", "register_names"]

CHECK = "HF_TFAST_CHECK"

# Arguments that other attention functions need, or that only pass through: they cannot change the result here.
_HARMLESS = (
    "cache_position",
    "deterministic",
    "logits_to_keep",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "use_cache",
)
_PACKING = (
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "seq_idx",
)  # say again what the mask says
_REFUSED = {
    "output_attentions": "weights are never formed; use hf_tfast.attention_map for chosen rows",
    "head_mask": "no mechanism can honour it; remove it",
    "position_bias": "a bias of [heads, queries, keys] is dense; this model cannot run fast attention",
    "cache": "continuous batching supports Transformers' own attention only",
}

# What torch.export can trace: the others draw, or choose by content, and a trace would keep one choice for all inputs.
_TRACED = ("dense", "linformer", "nystrom", "quantized", "window")

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class _Call:
    """One call of an attention function, understood."""

    stamp: Stamp
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    score: Score
    window: int | None


def register_names() -> None:
    """Add `tfast` and `tfast_<mechanism>` to Transformers' attention and mask interfaces. Loads no mechanism."""
    files = (file.name for file in iter_modules(attention.__path__) if not file.name.startswith("_"))
    for name in (NAME, *(f"{NAME}_{mechanism}" for mechanism in files)):
        AttentionInterface.register(name, _attention_function(name))
        AttentionMaskInterface.register(name, key_row)


def _attention_function(name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    @torch.compiler.disable
    def tfast_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Transformers' attention interface: q [b h i d], k, v [b g j .] -> ([b i h e] contiguous, None)."""
        return _dispatch(name, module, (query, key, value), attention_mask, options)

    return tfast_attention


def _dispatch(
    name: str, module: nn.Module, qkv: tuple[Tensor, Tensor, Tensor], given: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    if torch.jit.is_tracing():
        raise ValueError(
            f"{type(module).__name__}: torch.jit.trace would keep what these inputs decide for all others, and cannot "
            "record fast attention: use torch.export.export(model, ...), whose programs ONNX and OpenVINO take, too"
        )
    stamp = _stamp(name, module, given)
    _refuse(options, module)
    q, k, v = _autocast(*qkv)
    layer, shared = own_layer(module), sequence_of(module)
    if shared is not None:  # other processes hold the rest of the sequence
        if layer is not None or (given is not None and is_dense_mask(given)):
            raise ValueError(
                f"{stamp.path}: a sequence over several processes has neither a cache nor a dense 4-D mask; pass "
                "use_cache=False and what `shard` made of the batch"
            )
        layer = shared.layer(given)
    causal = options.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", None)
    if causal is None and stamp.kind == "self" and (given is None or is_dense_mask(given)):
        raise ValueError(f"{type(module).__name__} has no mask and does not say whether it is causal; use 'sdpa'")
    causal = bool(causal)
    score = _score(options, first_head(stamp, q.shape[1]))
    basis = basis_of(module, stamp, k.shape[1]) if name == NAME else None
    if basis is not None:
        score = replace(score, basis=basis)
    if stamp.kind == "cross":
        return _cross(module, stamp, q, k, v, given, score)
    if given is not None and is_dense_mask(given):
        if layer is not None:
            raise ValueError(
                f"{stamp.path}: a dense 4-D mask came after the cache had been made for {layer.mechanism}; give it "
                "from the first call on (the cache then keeps everything), or a 2-D mask [batch, length]"
            )
        # as in Transformers, a dense mask stands for all masks, the model's own window included
        o = masked_attention(q, k, v, stamp.mechanism, given, Mask(causal=causal), score)
        return _done(module, o, stamp.mechanism, "dense mask", Mask(causal=causal), q, k)
    row = None if given is None else read_row(given).on(k.shape[0])
    if layer is not None:
        row = layer.fit(row)  # the mask is made once for all layers, of the full length
    call = _understand(stamp, q, k, v, row, score, causal, options)
    _check_positions(options, call, given)
    if isinstance(stamp.mechanism, Dense) and stamp.dense == "eager":
        seen = pairs(call.mask, call.window, q.shape[2], call.k.shape[2], q.device)
        o, weights = eager_attention(module, q, call.k, call.v, seen, options)
        return _done(module, o.transpose(1, 2), stamp.mechanism, "eager", call.mask, q, call.k)[0], weights
    return _run(module, call, layer)


def _autocast(*qkv: Tensor) -> tuple[Tensor, ...]:
    """As sdpa under autocast: queries and keys that a norm left in fp32 meet values of the lower dtype."""
    device = qkv[0].device.type
    if not torch.is_autocast_enabled(device):
        return qkv
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in qkv)


def _run(module: nn.Module, call: _Call, layer: OwnLayer | None) -> tuple[Tensor, None]:
    keys = call.k.shape[2] if layer is None else layer.seen
    span = call.k.shape[2] if layer is None else layer.span
    mechanism = within(call.stamp.mechanism, call.window, call.mask, span)
    q, k, v = (call.q, call.k, call.v) if layer is None else (None, None, None)  # our caches decode in plain torch
    backend = choose_backend(mechanism, "auto", q, k, v, call.mask, call.score)
    run = attend if layer is None else layer.attend
    if torch.compiler.is_exporting() and (mechanism.name not in _TRACED or layer is not None):
        what = mechanism if layer is None else "a cache of hf_tfast"
        raise ValueError(
            f"{call.stamp.path}: torch.export cannot trace {what}; it can without a cache (use_cache=False): "
            f"{', '.join(_TRACED)}; or export model.set_attn_implementation('sdpa'), the same weights densely"
        )
    try:
        o = run(call.q, call.k, call.v, mechanism, call.mask, call.score)
    except ValueError as error:
        raise ValueError(f"{call.stamp.path}: {error}") from error
    if os.environ.get(CHECK, "0") not in ("", "0"):
        _compare(call, mechanism, o, layer)
    return _done(module, o, mechanism, backend, call.mask, call.q, call.k, keys)


def _done(
    module: nn.Module,
    o: Tensor,
    mechanism: Mechanism,
    backend: str,
    mask: Mask,
    q: Tensor,
    k: Tensor,
    keys: int | None = None,
) -> tuple[Tensor, None]:
    """Note what ran, and the one transposition of the adapter: [b h i e] -> [b i h e]."""
    ran = Ran(
        mechanism=mechanism,
        backend=backend,
        queries=q.shape[2],
        keys=k.shape[2] if keys is None else keys,
        causal=mask.causal,
        heads=q.shape[1],
        width=q.shape[3] + o.shape[3],
    )
    note(module, ran)
    return o.transpose(1, 2).contiguous(), None


def _cross(
    module: nn.Module, stamp: Stamp, q: Tensor, k: Tensor, v: Tensor, given: Tensor | None, score: Score
) -> tuple[Tensor, None]:
    if given is not None and is_dense_mask(given):
        o = masked_attention(q, k, v, Dense(), given, Mask(), score)
    else:
        if _causal_row(given):
            raise ValueError(
                f"{stamp.path} was taken for cross-attention, but its mask is causal; it cannot have a plan"
            )
        mask = Mask() if given is None else read_row(given).on(k.shape[0]).mask
        if mask.segments is not None:
            raise ValueError(
                f"{stamp.path}: packed documents cannot be told apart in cross-attention; pad them instead"
            )
        o = cross_attention(q, k, v, mask.valid, score)
    return _done(module, o, Dense(), "sdpa", Mask(), q, k)


def _stamp(name: str, module: nn.Module, given: Tensor | None = None) -> Stamp:
    """The plan's stamp; for a mechanism's own name, its default fields on self-attention."""
    stamp = stamp_of(module)
    if name == NAME:
        if stamp is None:
            raise ValueError(
                f"{type(module).__name__} runs attn_implementation='{NAME}' without a plan: load with from_pretrained "
                "(a plan's checkpoint, or with quantization_config=FastPlan(...)) or call apply_plan(model, plan); "
                f"from_config builds no plan. Without a plan use '{NAME}_window' or another mechanism's name"
            )
        return stamp
    mechanism = default_mechanism(name)
    if stamp is not None:  # the name was asked for explicitly and wins over the plan; the stamp knows what is crossed
        kind, path, layer = stamp.kind, stamp.path, stamp.layer
    else:
        crossed = is_cross(module) and not _causal_row(given)  # no causal mask over another sequence
        if crossed is None:
            raise ValueError(
                f"{type(module).__name__} serves self- and cross-attention, and this module does not say which it is; "
                f"use apply_plan(model, FastPlan(attention={type(mechanism).__name__}(...))), which reads its place"
            )
        kind, path, layer = (
            "cross" if crossed else "self",
            type(module).__name__,
            getattr(module, "layer_idx", None) or 0,
        )
    _say_once(f"attn_implementation='{name}': {type(module).__name__} {kind}-attention runs "
              f"{Dense() if kind == 'cross' else mechanism}")  # fmt: skip
    return Stamp(path=path, stack="", layer=layer, kind=kind, mechanism=mechanism)


def _causal_row(given: Tensor | None) -> bool:
    return given is not None and not is_dense_mask(given) and read_row(given).causal is True


@cache
def default_mechanism(name: str) -> Mechanism:
    """The mechanism behind `tfast_<name>`, with its default fields; only its own file is loaded."""
    module = import_module(f"{attention.__name__}.{name.removeprefix(f'{NAME}_')}")
    found = (cls for cls in vars(module).values() if isinstance(cls, type) and issubclass(cls, Mechanism))
    cls = next(cls for cls in found if cls.__module__ == module.__name__)
    try:
        return cls()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{cls.__name__} has no default fields ({error}); give them in a plan: "
            f"FastPlan(attention={cls.__name__}(...))"
        ) from error


@cache
def _say_once(message: str) -> None:
    logger.info(message)


def _refuse(options: dict[str, Any], module: nn.Module) -> None:
    """Raise for every argument that would be ignored, and where the keys are not all here."""
    known = ("dropout", "scaling", "is_causal", "softcap", "s_aux", "sliding_window", "position_ids")
    for name, value in options.items():
        if value is None or value is False or name in known or name in _HARMLESS or name in _PACKING:
            continue
        why = _REFUSED.get(name, "it is not known to hf_tfast and would be ignored")
        raise ValueError(f"{type(module).__name__} passes {name!r} to its attention: {why}")
    parallel = sys.modules.get("torch.distributed.tensor.experimental._context_parallel._attention")
    if parallel is not None and F.scaled_dot_product_attention in parallel._replaced_functions:
        raise ValueError(
            "context parallel is active: every rank holds a part of the sequence, and only Transformers' sdpa "
            "exchanges the rest; train this plan without context parallel, or with attn_implementation='sdpa'"
        )


def first_head(stamp: Stamp, heads: int) -> int:
    """Number of this rank's first query head, where the call has `heads` of the layer's."""
    return stamp.rank * heads if stamp.heads is not None and heads < stamp.heads else 0


def _score(options: dict[str, Any], first: int) -> Score:
    dropout = options.get("dropout") or 0.0
    return Score(
        scale=options.get("scaling"),
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
        dropout=dropout,
        seed=int(torch.randint(2**31 - 1, ())) if dropout else None,  # checkpointing restores torch's generator
        first_head=first,
    )


def _understand(
    stamp: Stamp,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row: KeyRow | None,
    score: Score,
    causal: bool,
    options: dict[str, Any],
) -> _Call:
    """Line the row up with the keys: it may cover only the filled slots of a static cache."""
    window = options.get("sliding_window")
    if row is None:
        if not causal and q.shape[2] != k.shape[2]:
            raise ValueError(
                f"{stamp.path}: {q.shape[2]} queries over {k.shape[2]} keys without causality is no self-attention; "
                "hf_tfast cannot tell what it is: use apply_plan, or attn_implementation='sdpa'"
            )
        if window is not None and not causal:
            window -= 1  # Transformers' argument counts the query itself, Window's fields do not
        return _Call(stamp, q, k, v, Mask(causal=causal), score, window)
    if row.keys > k.shape[2]:
        raise ValueError(f"{stamp.path}: the mask covers {row.keys} keys, but the cache gave {k.shape[2]}")
    causal = causal if row.causal is None else row.causal
    window = row.window if row.causal is not None else window  # the mask is what Transformers itself would follow
    mask = Mask(
        causal=causal, valid=row.mask.valid, segments=row.mask.segments, start=row.mask.start, kept=row.mask.kept
    )
    return _Call(stamp, q, k[:, :, : row.keys], v[:, :, : row.keys], mask, score, window)


def _check_positions(options: dict[str, Any], call: _Call, row: Tensor | None) -> None:
    """Raise where documents are packed but the mask does not tell them apart: a query would read its neighbours."""
    packed = call.mask.segments is not None
    borders = options.get("cu_seq_lens_q")
    if borders is not None and borders.numel() > 2 and not packed:
        raise ValueError(
            "cu_seq_lens tell of packed documents, but the mask does not: pass position_ids that restart, no "
            "attention_mask and no cache, so that Transformers builds the mask of packed documents"
        )
    ids = options.get("position_ids")
    i = call.q.shape[2]
    if packed or not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] != i or i == 1:
        return
    if torch.compiler.is_exporting():  # see `masks._assert_whole`
        back = (ids[:, 1:] <= ids[:, :-1]).any()
        torch._assert_async(~back, "position_ids restart: an exported program reads one document a row")
        return
    valid = None if call.mask.valid is None else call.mask.valid[:, -i:]
    if remembered(ids, "_tfast_restarts", lambda: _restarts(ids, None)) and _restarts(ids, valid):
        raise ValueError(
            "position_ids restart within a row, but the mask holds no packed documents: Transformers finds them only "
            "without attention_mask and without a cache (use_cache=False, no past_key_values)"
        )


def _restarts(ids: Tensor, valid: Tensor | None) -> bool:
    back = ids[:, 1:] <= ids[:, :-1]
    return bool((back if valid is None else back & valid[:, 1:] & valid[:, :-1]).any())


def _compare(call: _Call, mechanism: Mechanism, o: Tensor, layer: OwnLayer | None) -> None:
    """HF_TFAST_CHECK=1: the fast path against its reference, on this very input."""
    reference = partial(attend, backend="reference") if layer is None else layer.expected
    expected = reference(call.q, call.k, call.v, mechanism, call.mask, call.score)
    if expected is None:  # a running state no longer knows its keys
        return
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(o.dtype, 3e-2)
    o, expected = o.detach(), expected.detach()
    off = float((o.double() - expected.double()).abs().max()) if o.numel() else 0.0
    allowed = tolerance * max(1.0, float(expected.double().abs().max()) if o.numel() else 0.0)
    if not off <= allowed:
        raise ValueError(
            f"{CHECK}: {call.stamp.path} ({mechanism}) differs from its reference by {off:.3g}, allowed {allowed:.3g} "
            f"in {o.dtype} (queries {tuple(call.q.shape)}, keys {tuple(call.k.shape)})"
        )
