"""A key/value cache that keeps only what a causal window and its sinks still need, for any model under a plan.

A pre-hook on every stamped attention module sees the cache that the model was called with and swaps a layer that
holds nothing yet, and would grow without bound, for a `WindowLayer`. What the user made on purpose (StaticCache,
quantised or offloaded caches) and a model's own sliding layers stay as they are.

A `WindowLayer` tells Transformers the full length, so that one mask serves all layers of a model, dense ones included;
`fit` then turns the full row of that mask into the row of the keys that this layer still has. What to keep is decided
per row and by position: the sinks are the first valid tokens of each row, wherever its padding lies.

    window - 1 most recent tokens, `ROLLBACK` more so that assisted generation can take tokens back, and the sinks
"""

from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from ..attention import Mask
from ..attention.window import Window
from ._dense import is_dense_mask
from ._stamps import NAME, stamp_of
from .masks import KeyRow, remembered

__all__ = ["ROLLBACK", "WindowLayer", "bound_cache", "cache_bytes", "meet_cache", "unbound_cache", "window_layer"]

ROLLBACK = 32  # tokens that `crop` can take back without activate_past_recording; assisted generation drafts up to 20

_CURRENT: ContextVar[tuple[nn.Module, "WindowLayer | None"] | None] = ContextVar("tfast_cache_layer", default=None)


class WindowLayer(DynamicLayer):
    """One layer's keys and values [b g m d], in the order they came; what no later query can read is dropped.

    Either every row is full, holding its first `sinks` tokens and then, after `dropped` tokens that are gone, the most
    recent ones; or rows have padding or different lengths, and `position` [b m] counts every key from the row's first
    valid token, with -1 for padding and holes.
    """

    keys: Tensor  # type: ignore[assignment]
    values: Tensor  # type: ignore[assignment]

    def __init__(self, window: int, sinks: int = 0) -> None:
        super().__init__()
        self.window, self.sinks = window, sinks
        self.record_past = False
        self._clear()

    def _clear(self) -> None:
        self.seen = 0  # slots given so far, padding included
        self.fresh = 0  # slots of the last update, until attention has told which of them are valid
        self.dropped: int | Tensor = 0  # [b] where rows differ
        self.position: Tensor | None = None

    @property
    def recent(self) -> int:
        """How many tokens at the end of a row are kept."""
        return self.window - 1 + ROLLBACK

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.fresh:
            raise ValueError("keys were added to a window cache, but hf_tfast's attention did not run on them")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        parts = [] if not self.seen else [slice(None)] if self.record_past else self._drop()
        self.keys = torch.cat([*(self.keys[:, :, part] for part in parts), key_states], dim=2)
        self.values = torch.cat([*(self.values[:, :, part] for part in parts), value_states], dim=2)
        self.fresh = key_states.shape[2]
        self.seen += self.fresh
        return self.keys, self.values

    def fit(self, row: KeyRow | None) -> KeyRow | None:
        """The row of all tokens so far -> the row of the keys that the last `update` returned; drops what it can."""
        if row is not None and (row.mask.segments is not None or row.keys != self.seen or _any(row.mask.start)):
            raise ValueError(
                f"the window cache has seen {self.seen} tokens per row, and the mask is not a row of these: packed "
                "documents cannot be cached, and one cache serves one model"
            )
        prefill = self.fresh > 1
        mask, keys = self._admit(None if row is None else row.mask.valid), self.keys.shape[2]
        if prefill and not self.record_past:
            self._shrink()
        if row is not None:
            return replace(row, mask=mask, keys=keys)
        return None if mask.valid is None and not _any(mask.start) else KeyRow(mask=mask, keys=keys)

    def _admit(self, valid: Tensor | None) -> Mask:
        """Learn which of the fresh slots are valid, from [b seen] bool (None: all). The mask of all stored keys."""
        fresh, self.fresh, keys = self.fresh, 0, self.keys.shape[2]
        counts: int | Tensor = (
            self.seen if valid is None else remembered(valid, "_tfast_counts", lambda: valid.sum(-1))
        )
        full = valid is None or remembered(valid, f"_tfast_full_{fresh}", lambda: bool(valid[:, -fresh:].all()))
        if self.position is not None or not full:
            before = self._positions(keys - fresh)
            new = torch.ones_like(self.keys[:, 0, keys - fresh :, 0], dtype=torch.bool)
            if valid is not None:
                new = valid[:, -fresh:]
            ahead = before.amax(-1, keepdim=True) if before.shape[1] else before.new_full((len(before), 1), -1)
            self.position = torch.cat([before, torch.where(new, ahead + new.cumsum(-1), -1)], dim=1)
            self._settle()
        tokens = self._tokens()
        same = tokens == counts
        if not (same if isinstance(same, bool) else bool(same.all())):
            raise ValueError(
                f"the attention mask counts {counts} valid tokens, but the window cache was filled with {tokens}: the "
                "mask of tokens that have been cached cannot change"
            )
        if self.position is None:
            return Mask(start=self.dropped, kept=self.sinks) if _any(self.dropped) else Mask()
        present = self.position >= 0
        start = tokens - present.sum(-1)
        mask = Mask(valid=present)
        if _any(start):
            mask = replace(mask, start=start, kept=(self.position < self.sinks).long().cumprod(-1).sum(-1))
        return mask

    def _positions(self, keys: int) -> Tensor:
        """[b keys] int64: the position of each of the first `keys` stored keys."""
        if self.position is not None:
            return self.position[:, :keys]
        n = torch.arange(keys, device=self.keys.device).expand(self.keys.shape[0], -1)
        dropped = self.dropped[:, None] if isinstance(self.dropped, Tensor) else self.dropped
        return torch.where(n < self.sinks, n, n + dropped)

    def _tokens(self) -> int | Tensor:
        """Valid tokens of each row so far."""
        if self.position is None:
            return self.keys.shape[2] + self.dropped
        return self.position.amax(-1) + 1

    def _settle(self) -> None:
        """Rows that have become full need no positions."""
        if self.position is not None and bool((self.position >= 0).all()):
            dropped = self.position.amax(-1) + 1 - self.position.shape[1]
            self.dropped = int(dropped[0]) if bool((dropped == dropped[0]).all()) else dropped
            self.position = None

    def _drop(self) -> list[slice]:
        """Forget what no later query reads. The stored keys that stay; rows that differ are moved together first."""
        keys, most = self.keys.shape[2], self.sinks + self.recent
        if keys <= most:
            return [slice(None)]
        if self.position is None:
            self.dropped = self.dropped + keys - most
            return [slice(0, self.sinks), slice(keys - self.recent, keys)]
        near = self.position > self.position.amax(-1, keepdim=True) - self.recent
        needed = (self.position >= 0) & (near | (self.position < self.sinks))
        count = int(needed.sum(-1).amax())  # a row that needs fewer has no more tokens: padding fills it up
        order = needed.long().argsort(dim=-1, stable=True)[:, keys - count :]
        self.position = self.position.gather(1, order)
        order = order[:, None, :, None].to(self.keys.device)
        self.keys = self.keys.gather(2, order.expand(-1, self.keys.shape[1], -1, self.keys.shape[3]))
        self.values = self.values.gather(2, order.expand(-1, self.values.shape[1], -1, self.values.shape[3]))
        self._settle()
        return [slice(None)]

    def _shrink(self) -> None:
        """Drop now, and give the memory back."""
        parts = self._drop()
        if len(parts) > 1:
            self.keys = torch.cat([self.keys[:, :, part] for part in parts], dim=2)
            self.values = torch.cat([self.values[:, :, part] for part in parts], dim=2)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens (a number below 0, as in Transformers); 0 ends a recording of the past."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}")
        if not self.is_initialized or not self.seen:
            return
        removed, keys = min(-tokens_to_remove, self.seen), self.keys.shape[2]
        after = self._positions(max(keys - removed, 0))
        before = self._positions(keys)
        gone = _any(before.amax(-1) + 1 > (before >= 0).sum(-1))
        if removed and gone and _any((after >= self.sinks).sum(-1) < self.window - 1):
            raise ValueError(
                f"cannot take back {removed} tokens: the window cache has dropped what the ones before them read; "
                f"call activate_past_recording() on the cache first (up to {ROLLBACK} tokens need no recording)"
            )
        self.keys, self.values = self.keys[:, :, : keys - removed], self.values[:, :, : keys - removed]
        self.position = None if self.position is None else after
        self.seen -= removed
        if self.record_past:
            self._shrink()

    def activate_past_recording(self) -> None:
        """Keep everything until the next `crop`."""
        self.record_past = True

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As a cache that drops nothing: `fit` picks this layer's part of the mask."""
        return self.seen + query_length, 0

    def reset(self) -> None:
        super().reset()
        self._clear()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._rows(lambda x: x[indices.to(x.device)] if isinstance(indices, Tensor) else x[indices])

    def _rows(self, change: Any) -> None:
        """Do to the notes of each row what was done to its keys."""
        if isinstance(self.dropped, Tensor):
            self.dropped = change(self.dropped)
        if self.position is not None:
            self.position = change(self.position)


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


def window_layer(module: nn.Module) -> WindowLayer | None:
    """The window cache layer that `module` was just called with, asked once by the dispatcher."""
    current = _CURRENT.get()
    _CURRENT.set(None)
    return current[1] if current is not None and current[0] is module else None


@torch.compiler.disable
def _before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = (*args, *kwargs.values())
    cache = next((value for value in given if isinstance(value, Cache)), None)
    _CURRENT.set(None if cache is None else (module, _swapped(module, cache, given)))


def _swapped(module: nn.Module, cache: Cache, given: Iterable[Any]) -> WindowLayer | None:
    """The layer of this module in `cache`, made a `WindowLayer` if it may be; None for any other."""
    stamp, config, number = stamp_of(module), getattr(module, "config", None), getattr(module, "layer_idx", None)
    if stamp is None or stamp.kind != "self" or not isinstance(number, int):
        return None
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    layer = cache.layers[number] if number < len(cache.layers) else None
    mechanism, running = stamp.mechanism, getattr(config, "_attn_implementation", None)
    bounded = running == NAME and getattr(module, "is_causal", True)
    if isinstance(layer, WindowLayer):
        if not bounded or mechanism != Window(window=layer.window, sinks=layer.sinks):
            raise ValueError(
                f"this cache holds what Window(window={layer.window}, sinks={layer.sinks}) reads, and {stamp.path} "
                f"now runs {mechanism if running == NAME else running}: start with a new cache"
            )
        return layer
    if not bounded or not isinstance(mechanism, Window) or any(map(_is_dense, given)):
        return None
    if cache.offloading or getattr(config, "num_kv_shared_layers", None):
        return None
    if layer is None:
        if number != len(cache.layers) or cache.layer_class_to_replicate is not DynamicLayer:
            return None
        cache.layers.append(layer := WindowLayer(mechanism.window, mechanism.sinks))
    elif type(layer) is DynamicLayer and not layer.is_initialized:
        cache.layers[number] = layer = WindowLayer(mechanism.window, mechanism.sinks)
    return layer if isinstance(layer, WindowLayer) else None


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and is_dense_mask(value)


def cache_bytes(past_key_values: Cache) -> int:
    """Bytes of all keys and values (and positions) that a cache holds."""
    if isinstance(past_key_values, EncoderDecoderCache):
        return cache_bytes(past_key_values.self_attention_cache) + cache_bytes(past_key_values.cross_attention_cache)
    tensors = [x for layer in past_key_values.layers for x in vars(layer).values() if isinstance(x, Tensor)]
    return sum(x.numel() * x.element_size() for x in tensors)


def _any(x: int | Tensor) -> bool:
    return bool(x.any()) if isinstance(x, Tensor) else bool(x)
