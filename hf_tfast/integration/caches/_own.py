"""What all our cache layers share: they tell Transformers the full length, and learn from the mask what is padding."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ...attention import Mask, Mechanism, Score, attend
from ...backends.growing import Change, Lengths
from ..masks import KeyRow

__all__ = ["OwnLayer", "any_of", "without_autocast"]


class OwnLayer(DynamicLayer):
    """A layer of ours in a cache of Transformers: after `update` the dispatcher calls `fit`, and then `attend` in the
    place of `hf_tfast.attend`.

    seen    slots given so far, padding included.
    fresh   slots of the last update, until attention has told which of them hold tokens.
    """

    def __init__(self, mechanism: Mechanism) -> None:
        super().__init__()
        self.mechanism = mechanism
        self.record_past = False
        self.seen = self.fresh = 0
        self.met = False  # whether a module of this mechanism announced the next update

    @property
    def span(self) -> int:
        """Keys that `attend` reads or may read, those given with the call included."""
        return self.seen

    def fit(self, row: KeyRow | None) -> KeyRow | None:
        """The row of all tokens so far -> the row of the keys that the last `update` returned."""
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mechanism: Mechanism, mask: Mask, score: Score) -> Tensor:
        """Attention of q [b h i d] over the keys and values that `update` returned and those stored -> [b h i e]."""
        raise NotImplementedError

    def expected(
        self, q: Tensor, k: Tensor, v: Tensor, mechanism: Mechanism, mask: Mask, score: Score
    ) -> Tensor | None:
        """What the last `attend` must have given, by the mechanism's definition; None where nothing tells any more."""
        return attend(q, k, v, mechanism, mask, score, backend="reference")

    def check_row(self, row: KeyRow | None) -> None:
        """ValueError for a row that does not belong to the tokens seen."""
        if row is not None and (row.mask.segments is not None or row.keys != self.seen or any_of(row.mask.start)):
            raise ValueError(
                f"the {self.mechanism.name} cache has seen {self.seen} tokens per row, and the mask is not a row of "
                "these: packed documents cannot be cached, and one cache serves one model"
            )

    def check_update(self) -> None:
        """ValueError where keys come from a module that runs something else, or attention missed the last ones."""
        if self.fresh or not self.met:
            raise ValueError(
                f"this cache holds what {self.mechanism} reads, and keys were added to it, but hf_tfast's attention "
                "does not run on them: one cache serves one model; start with a new cache"
            )
        self.met = False

    def activate_past_recording(self) -> None:
        """Keep what the next `crop` may need, until it has come."""
        self.record_past = True

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As a cache that drops nothing: `fit` picks this layer's part of the mask."""
        return self.seen + query_length, 0

    def change_rows(self, change: Change) -> None:
        """Do `change` to the batch of everything held."""
        raise NotImplementedError

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.change_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.change_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.change_rows(lambda x: x[indices.to(x.device)] if isinstance(indices, Tensor) else x[indices])


def any_of(x: Lengths | bool) -> bool:
    return bool(x.any()) if isinstance(x, Tensor) else bool(x)


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Autocast off; to enter its context where it is off already costs a step more than what it does."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
