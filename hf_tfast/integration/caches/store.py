"""The cache layer of a mechanism with a store of its own (attention/_cached.py): codes, block bounds, a running state.

`update` stores nothing yet: it is `attend` that hands the tokens to the store, once `fit` has read from the mask which
of them exist. Crops are noted as slots, and done when the next mask tells how many of them held tokens.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ...attention import Mask, Mechanism, Score, attend
from ...attention._cached import Cached, Store
from ...backends.growing import Change, Lengths, longer, settled
from ..masks import KeyRow, remembered
from ._own import OwnLayer, any_of, without_autocast

__all__ = ["StoreLayer"]


class StoreLayer(OwnLayer):
    """One layer's tokens as the mechanism's own store holds them, instead of keys and values."""

    def __init__(self, mechanism: Mechanism) -> None:
        super().__init__(mechanism)
        self.cached: Cached = mechanism  # type: ignore[assignment]
        self._clear()

    def _clear(self) -> None:
        store = self.cached.store()
        if store is None:
            raise ValueError(f"{self.mechanism} needs all keys and values as they are: use a DynamicLayer")
        self.store: Store = store
        self.seen = self.fresh = 0
        self.lengths: Lengths = 0  # tokens of each row
        self.new: Tensor | None = None  # [b fresh] which of the fresh slots hold tokens; None: all
        self.cropped: int | None = None  # slots taken back since the last call, if `crop` was called

    @property
    def nbytes(self) -> int:
        """Bytes of everything held."""
        return self.store.nbytes

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.check_update()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.fresh = key_states.shape[2]
        self.seen += self.fresh
        return key_states, value_states

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def fit(self, row: KeyRow | None) -> KeyRow | None:
        self.check_row(row)
        valid, fresh, before = None if row is None else row.mask.valid, self.fresh, self.seen - self.fresh
        counts: Lengths = before
        self.new = None
        if valid is not None:
            counts = remembered(valid, f"_tfast_counts_{before}", lambda: settled(valid[:, :before].sum(-1)))
            every = remembered(valid, f"_tfast_full_{fresh}", lambda: bool(valid[:, before:].all()))
            self.new = None if every else valid[:, before:]
        if self.cropped is not None:
            self.store.take_back(self.cropped, counts)
            self.lengths, self.cropped = counts, None
        if any_of(torch.as_tensor(counts) != torch.as_tensor(self.lengths)):
            raise ValueError(
                f"the attention mask counts {counts} valid tokens before these, but the {self.mechanism.name} cache "
                f"was filled with {self.lengths}: the mask of tokens that have been cached cannot change"
            )
        self.lengths = longer(self.lengths, fresh, self.new)
        return None if row is None else replace(row, mask=Mask(valid=self.new), keys=fresh)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mechanism: Mechanism, mask: Mask, score: Score) -> Tensor:
        meant = q.shape[2] == k.shape[2] == self.fresh and mask.causal and mechanism == self.mechanism
        if not meant:
            raise ValueError(
                f"a {self.mechanism.name} cache serves causal self-attention over the keys as they were given to it, "
                f"but {q.shape[2]} queries came with {k.shape[2]} keys, causal={mask.causal}, after {self.fresh} were "
                "cached; call the model with use_cache=False, or plan Dense() for this layer"
            )
        first, self.fresh, self.store.recording = self.seen == k.shape[2], 0, self.record_past
        o = attend(q, k, v, mechanism, mask, score) if first else None
        with torch.no_grad(), without_autocast(q.device.type):
            self.cached.remember(self.store, q, k, v, score, self.new)
            if o is None:
                o = self.cached.resume(self.store, q, score, self.new)
            self.store.settle()
        if not first and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            o = _NoGradient.apply(o, mechanism.name, q, k, v)
        return o

    def expected(
        self, q: Tensor, k: Tensor, v: Tensor, mechanism: Mechanism, mask: Mask, score: Score
    ) -> Tensor | None:
        if self.seen == k.shape[2]:
            return super().expected(q, k, v, mechanism, mask, score)
        with torch.no_grad():
            return self.cached.expected(self.store, q, score, self.new)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens (a number below 0, as in Transformers)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}")
        removed = -tokens_to_remove
        if removed > self.seen:
            raise ValueError(f"cannot take back {removed} tokens: the cache holds {self.seen}")
        most = self.store.most_back()
        removed += self.cropped or 0
        if most is not None and removed > most:
            raise ValueError(
                f"cannot take back {removed} tokens: the {self.mechanism.name} cache has summed up all but the last "
                f"{most}; call activate_past_recording() on it before the tokens that may be taken back"
            )
        self.seen, self.cropped = self.seen + tokens_to_remove, removed

    def reset(self) -> None:
        self.is_initialized = False
        self._clear()

    def change_rows(self, change: Change) -> None:
        if self.is_initialized:
            self.store.rows(change)
            self.lengths = change(self.lengths) if isinstance(self.lengths, Tensor) else self.lengths


class _NoGradient(torch.autograd.Function):
    """An output whose gradient is not known: the stored keys and values have none."""

    @staticmethod
    def forward(ctx: FunctionCtx, o: Tensor, name: str, *inputs: Tensor) -> Tensor:
        ctx.name = name  # type: ignore[attr-defined]
        return o.view_as(o)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[None, ...]:
        raise ValueError(
            f"this call continued a {ctx.name} cache, which keeps no gradient: train on whole sequences "  # type: ignore[attr-defined]
            "(use_cache=False, or no past_key_values)"
        )
