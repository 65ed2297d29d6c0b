"""What a mechanism asks of a cache that keeps something else than all keys and values: codes, bounds, a running sum.

A store holds the tokens of each row from the row's own first token on, wherever the padding of the batch lay, so that
its slots are positions. New slots come with `new` [b i] bool: which of them hold tokens; None: all. Always causal.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..backends.growing import Change, Lengths, positions
from ..backends.score import Score
from ._base import Mask

STEPS = 16  # queries of one call that are decoded one by one; more of them share what they read


class Store(Protocol):
    """What a cache layer keeps of the keys and values of one attention layer."""

    lengths: Lengths  # tokens of each row
    recording: bool  # keep all that `take_back` may need until its next call

    @property
    def nbytes(self) -> int:
        """Bytes of everything kept."""

    def most_back(self) -> int | None:
        """How many slots `take_back` can forget; None: all."""

    def settle(self) -> None:
        """The last slots have been attended to: drop what only they needed."""

    def take_back(self, slots: int, lengths: Lengths) -> None:
        """Forget the last `slots` slots, so that the rows hold `lengths` tokens."""

    def rows(self, change: Change) -> None:
        """Do `change` to the batch."""


@runtime_checkable
class Cached(Protocol):
    """A mechanism with a store of its own."""

    def store(self) -> Store | None:
        """An empty store; None where these fields need all keys and values as they are."""

    def remember(self, store: Any, q: Tensor, k: Tensor, v: Tensor, score: Score, new: Tensor | None) -> None:
        """Take the next i slots k [b g i d], v [b g i e] in; of q [b h i d] only heads and width may be read."""

    def resume(self, store: Any, q: Tensor, score: Score, new: Tensor | None) -> Tensor:
        """Attention of q [b h i d], the last i slots, which `remember` has taken in, over all tokens -> [b h i e].
        Without gradient. Slots without a token get zeros."""

    def expected(self, store: Any, q: Tensor, score: Score, new: Tensor | None) -> Tensor | None:
        """What `resume` must give, by the definition, O(i j); None where the store no longer tells."""


Run = Callable[..., Tensor]  # (q, k, v, mask, *more)


def over_rows(
    run: Run, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, new: Tensor | None, *more: Tensor
) -> Tensor:
    """run(q, k, v, mask, *more) over the tokens of each row: q [b h i d] are the last i slots; k [b g n d],
    v [b g n e] and `more` [b . n .] hold row r in their first lengths[r] slots. One call where all rows are alike."""
    mask = Mask(causal=True)
    if isinstance(lengths, int) and new is None:
        return run(q, k[:, :, :lengths], v[:, :, :lengths], mask, *(x[:, :, :lengths] for x in more))
    o = v.new_zeros(*q.shape[:3], v.shape[-1])
    each = lengths.tolist() if isinstance(lengths, Tensor) else [lengths] * len(q)
    for b, n in enumerate(each):
        at = torch.arange(q.shape[2], device=q.device) if new is None else new[b].nonzero()[:, 0]
        if len(at):
            row = slice(b, b + 1)
            rest = (x[row, :, :n] for x in more)
            o[row, :, at] = run(q[row][:, :, at], k[row, :, :n], v[row, :, :n], mask, *rest)
    return o


def ends(lengths: Lengths, q: Tensor, new: Tensor | None) -> list[Lengths]:
    """For each of the last i slots, the queries q [b h i d], how many tokens there are up to it and with it; 0 where
    it holds none. `new` [b i] tells which do, None: all. A number, or [b] where rows may differ. Rows now hold
    `lengths`."""
    i = q.shape[2]
    if isinstance(lengths, int) and new is None:
        return list(range(lengths - i + 1, lengths + 1))
    held = torch.as_tensor(lengths, device=q.device).expand(len(q))
    return list((positions(held - (i if new is None else new.sum(-1)), i, new) + 1).unbind(1))
