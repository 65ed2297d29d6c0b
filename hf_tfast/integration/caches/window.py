"""A cache layer that keeps only what a causal window and its sinks still need.

What to keep is decided per row and by position: the sinks are the first valid tokens of each row, wherever its padding
lies. A step reads as many keys at any length.

    window - 1 most recent tokens, `ROLLBACK` more so that assisted generation can take tokens back, and the sinks
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...attention import Mask, Mechanism, Score, attend
from ...attention.window import Window
from ...backends.growing import Change
from ..masks import KeyRow, remembered
from ._own import OwnLayer, any_of

__all__ = ["ROLLBACK", "WindowLayer"]

ROLLBACK = 32  # tokens that `crop` can take back without activate_past_recording; assisted generation drafts up to 20


SPARE = 8  # the room holds one slot in so many more than needed: stored keys are copied once in n / SPARE steps


class _Room(NamedTuple):
    """Where rows move on: `both` keys and values [b g room .]; `keys` is the view of them that ends at slot `stop`."""

    both: tuple[Tensor, ...]
    keys: Tensor
    stop: int

    def free(self, keys: Tensor) -> bool:
        """Can `keys` move on here?"""
        writable = torch.is_inference_mode_enabled() or not self.both[0].is_inference()
        return keys is self.keys and self.stop < self.both[0].shape[2] and writable


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
        self._room: _Room | None = None

    @property
    def recent(self) -> int:
        """How many tokens at the end of a row are kept."""
        return self.window - 1 + ROLLBACK

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.check_update()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.fresh, graph = key_states.shape[2], torch.is_grad_enabled() and key_states.requires_grad
        if self.fresh == 1 and self.seen and self.position is None and not self.record_past and not graph:
            self._slide(key_states, value_states)
            self.seen += 1
            return self.keys, self.values
        parts = [] if not self.seen else [slice(None)] if self.record_past else self._drop()
        self.keys = torch.cat([*(self.keys[:, :, part] for part in parts), key_states], dim=2)
        self.values = torch.cat([*(self.values[:, :, part] for part in parts), value_states], dim=2)
        self.seen += self.fresh
        return self.keys, self.values

    def _slide(self, k: Tensor, v: Tensor) -> None:
        """Add one token to full rows in place: a row moves on through its room, and takes its sinks along."""
        n, most = self.keys.shape[2], self.sinks + self.recent
        gone = max(n - most, 0)
        if self._room is None or not self._room.free(self.keys):
            size = n + 1 + n // SPARE
            both = tuple(x.new_empty(*x.shape[:2], size, x.shape[3]) for x in (self.keys, self.values))
            for room, x in zip(both, (self.keys, self.values), strict=True):
                room[:, :, :n] = x
            self._room = _Room(both, self.keys, n)
        stop, start = self._room.stop + 1, self._room.stop - n + gone
        for room, x in zip(self._room.both, (k, v), strict=True):
            if gone and self.sinks:
                room[:, :, start : start + self.sinks] = room[:, :, start - gone : start - gone + self.sinks].clone()
            room[:, :, stop - 1 : stop] = x
        self.keys, self.values = (room[:, :, start:stop] for room in self._room.both)
        self._room = _Room(self._room.both, self.keys, stop)
        self.dropped = self.dropped + gone

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and positions, and of the room for more."""
        if not self.is_initialized:
            return 0
        roomy = self._room is not None and self._room.keys is self.keys
        held = [*(self._room.both if roomy else (self.keys, self.values)), self.position, self.dropped]  # type: ignore[union-attr]
        return sum(x.nbytes for x in held if isinstance(x, Tensor))

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
        whole = mask.valid is None and mask.segments is None and type(mask.start) is int and type(mask.kept) is int
        step = whole and mask.causal and q.shape[2] == 1 and not score.dropout
        if step and not torch.is_autocast_enabled(q.device.type):
            return mechanism.fast(q, k, v, mask, score)  # what `attend` comes to, after checks that the prompt passed
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
