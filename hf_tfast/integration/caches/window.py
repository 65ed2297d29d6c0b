"""A cache layer that keeps only what a causal window and its sinks still need.

What to keep is decided per row and by position: the sinks are the first valid tokens of each row, wherever its padding
lies. A step reads as many keys at any length.

    window - 1 most recent tokens, `ROLLBACK` more so that assisted generation can take tokens back, and the sinks
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...attention import Mask, Mechanism, Score, attend
from ...attention.window import Window
from ...backends.growing import Change
from ..masks import KeyRow, remembered
from ._own import OwnLayer, any_of

__all__ = ["ROLLBACK", "WindowLayer"]

ROLLBACK = 32  # tokens that `crop` can take back without activate_past_recording; assisted generation drafts up to 20


class WindowLayer(OwnLayer):
    """One layer's keys and values [b g m d], in the order they came; what no later query can read is dropped.

    Either every row is full, holding its first `sinks` tokens and then, after `dropped` tokens that are gone, the most
    recent ones; or rows have padding or different lengths, and `position` [b m] counts every key from the row's first
    valid token, with -1 for padding and holes.
    """

    keys: Tensor  # type: ignore[assignment]
    values: Tensor  # type: ignore[assignment]

    def __init__(self, mechanism: Window) -> None:
        super().__init__(mechanism)
        self.window, self.sinks = mechanism.window, mechanism.sinks
        self._clear()

    def _clear(self) -> None:
        self.seen = self.fresh = 0
        self.dropped: int | Tensor = 0  # [b] where rows differ
        self.position: Tensor | None = None

    @property
    def recent(self) -> int:
        """How many tokens at the end of a row are kept."""
        return self.window - 1 + ROLLBACK

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.check_update()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        parts = [] if not self.seen else [slice(None)] if self.record_past else self._drop()
        self.keys = torch.cat([*(self.keys[:, :, part] for part in parts), key_states], dim=2)
        self.values = torch.cat([*(self.values[:, :, part] for part in parts), value_states], dim=2)
        self.fresh = key_states.shape[2]
        self.seen += self.fresh
        return self.keys, self.values

    @property
    def span(self) -> int:
        return self.keys.shape[2]

    def fit(self, row: KeyRow | None) -> KeyRow | None:
        """The row of all tokens so far -> the row of the keys that the last `update` returned; drops what it can."""
        self.check_row(row)
        prefill = self.fresh > 1
        mask, keys = self._admit(None if row is None else row.mask.valid), self.keys.shape[2]
        if prefill and not self.record_past:
            self._shrink()
        if row is not None:
            return replace(row, mask=mask, keys=keys)
        return None if mask.valid is None and not any_of(mask.start) else KeyRow(mask=mask, keys=keys)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mechanism: Mechanism, mask: Mask, score: Score) -> Tensor:
        return attend(q, k, v, mechanism, mask, score)

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
            return Mask(start=self.dropped, kept=self.sinks) if any_of(self.dropped) else Mask()
        present = self.position >= 0
        start = tokens - present.sum(-1)
        mask = Mask(valid=present)
        if any_of(start):
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
        gone = any_of(before.amax(-1) + 1 > (before >= 0).sum(-1))
        if removed and gone and any_of((after >= self.sinks).sum(-1) < self.window - 1):
            raise ValueError(
                f"cannot take back {removed} tokens: the window cache has dropped what the ones before them read; "
                f"call activate_past_recording() on the cache first (up to {ROLLBACK} tokens need no recording)"
            )
        self.keys, self.values = self.keys[:, :, : keys - removed], self.values[:, :, : keys - removed]
        self.position = None if self.position is None else after
        self.seen -= removed
        if self.record_past:
            self._shrink()

    def reset(self) -> None:
        super().reset()
        self._clear()

    def change_rows(self, change: Change) -> None:
        if not self.seen:
            return
        self.keys, self.values = change(self.keys), change(self.values)
        if isinstance(self.dropped, Tensor):
            self.dropped = change(self.dropped)
        if self.position is not None:
            self.position = change(self.position)
