"""Cache layers that keep what a mechanism needs instead of all keys and values, for any model under a plan.

A pre-hook on every stamped attention module sees the cache that the model was called with and swaps a layer that
holds nothing yet, and would grow without bound, for the layer that the module's mechanism wants. What the
user made on purpose (StaticCache, quantised or offloaded caches) and a model's own sliding layers stay as they are.

Every layer of ours tells Transformers the full length, so that one mask serves all layers of a model, dense ones
included; `fit` then turns the full row of that mask into the row of the keys that this layer gave.
"""

from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from ..attention import Mechanism
from ..attention._cached import Cached
from ..attention.window import Window
from ._dense import is_dense_mask
from ._stamps import NAME, stamp_of
from .caches._own import OwnLayer
from .caches.store import StoreLayer
from .caches.window import WindowLayer

__all__ = ["bound_cache", "cache_bytes", "layer_bytes", "meet_cache", "own_layer", "unbound_cache"]

_CURRENT: ContextVar[tuple[nn.Module, OwnLayer | None] | None] = ContextVar("tfast_cache_layer", default=None)


def bound_cache(module: nn.Module) -> None:
    """Let a stamped attention module swap the cache layers that it is called with. Done once; survives deepcopy."""
    if _before not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_before, with_kwargs=True)


def meet_cache(module: nn.Module, cache: Cache, attention_mask: Tensor | None) -> None:
    """What the hook of `bound_cache` does, for a stamped module that calls it itself before it updates its cache."""
    _before(module, (cache, attention_mask), {})


def unbound_cache(module: nn.Module) -> None:
    """Undo `bound_cache`."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is _before:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def own_layer(module: nn.Module) -> OwnLayer | None:
    """The cache layer of ours that `module` was just called with, asked once by the dispatcher."""
    current = _CURRENT.get()
    _CURRENT.set(None)
    return current[1] if current is not None and current[0] is module else None


@torch.compiler.disable
def _before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = (*args, *kwargs.values())
    cache = next((value for value in given if isinstance(value, Cache)), None)
    layer = None if cache is None else _swapped(module, cache, given)
    if layer is not None:
        layer.met = True
    _CURRENT.set(None if cache is None else (module, layer))


def _swapped(module: nn.Module, cache: Cache, given: Iterable[Any]) -> OwnLayer | None:
    """The layer of this module in `cache`, made one of ours if it may be; None for any other."""
    stamp, config, number = stamp_of(module), getattr(module, "config", None), getattr(module, "layer_idx", None)
    if stamp is None or stamp.kind != "self" or not isinstance(number, int):
        return None
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    layer = cache.layers[number] if number < len(cache.layers) else None
    mechanism, running = stamp.mechanism, getattr(config, "_attn_implementation", None)
    own = running == NAME and getattr(module, "is_causal", True)
    if isinstance(layer, OwnLayer):
        if not own or mechanism != layer.mechanism:
            raise ValueError(
                f"this cache holds what {layer.mechanism} reads, and {stamp.path} "
                f"now runs {mechanism if running == NAME else running}: start with a new cache"
            )
        return layer
    if not own or any(map(_is_dense, given)) or cache.offloading or getattr(config, "num_kv_shared_layers", None):
        return None
    missing = layer is None and number == len(cache.layers) and cache.layer_class_to_replicate is DynamicLayer
    if not missing and (type(layer) is not DynamicLayer or layer.is_initialized):
        return None
    made = _made(mechanism)
    if made is not None and missing:
        cache.layers.append(made)
    elif made is not None:
        cache.layers[number] = made
    return made


def _made(mechanism: Mechanism) -> OwnLayer | None:
    """A new cache layer for a mechanism; None where all keys and values are needed as they are."""
    if isinstance(mechanism, Window):
        return WindowLayer(mechanism)
    kept = mechanism.store() if isinstance(mechanism, Cached) else None
    return None if kept is None else StoreLayer(mechanism)


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and is_dense_mask(value)


def cache_bytes(past_key_values: Cache) -> int:
    """Bytes of everything that a cache holds: keys and values or what stands for them, scales, positions, room."""
    if isinstance(past_key_values, EncoderDecoderCache):
        return cache_bytes(past_key_values.self_attention_cache) + cache_bytes(past_key_values.cross_attention_cache)
    return sum(map(layer_bytes, past_key_values.layers))


def layer_bytes(layer: Any) -> int:
    """Bytes of one layer of a cache."""
    own = getattr(layer, "nbytes", None)
    return sum(x.nbytes for x in vars(layer).values() if isinstance(x, Tensor)) if own is None else own
