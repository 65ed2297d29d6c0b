"""Tensors that grow token by token, in place, with rows of different lengths: what caches are made of.

Row r holds its own tokens at slots 0 to lengths[r] - 1, wherever the padding of its batch lay: a slot is a position.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Lengths = int | Tensor  # tokens of every row; [b] int64 where rows differ
Change = Callable[[Tensor], Tensor]  # of the batch: [b ..] -> [b' ..]

SPARE = 64  # one slot in so many is kept free: a step copies 1 / SPARE of what is held on average, never all of it


class Growing:
    """Numbers [b g n w] that are written at any n; what was never written is 0. No gradient.

    step   the room is a multiple of this many slots, so that it can be viewed as blocks.
    """

    def __init__(self, step: int = 8) -> None:
        self.step = step
        self.data: Tensor | None = None  # [b g room w]

    @property
    def nbytes(self) -> int:
        """Bytes of all the room."""
        return 0 if self.data is None else self.data.nbytes

    def write(self, x: Tensor, at: int | Tensor) -> None:
        """Put x [b g m w] at the slots from `at` on, or each at its slot in `at` [b m]; -1: nowhere."""
        with torch.no_grad():
            if isinstance(at, int):
                self._reserve(x, at + x.shape[2])[:, :, at : at + x.shape[2]] = x
                return
            b, m = (at >= 0).nonzero(as_tuple=True)
            n = at[b, m]
            self._reserve(x, int(n.max()) + 1 if len(n) else 0)[b, :, n] = x[b, :, m]

    def first(self, n: int) -> Tensor:
        """[b g n w], a view."""
        return self.held[:, :, :n]

    def at(self, n: Tensor) -> Tensor:
        """[b g m w]: the slots n [b m]."""
        return self.held[torch.arange(len(n), device=n.device)[:, None], :, n].transpose(1, 2)

    def rows(self, change: Change) -> None:
        """Do `change` to the batch."""
        if self.data is not None:
            self.data = change(self.data)

    @property
    def held(self) -> Tensor:
        """[b g room w]"""
        if self.data is None:
            raise ValueError("nothing is stored yet: append keys and values first")
        return self.data

    def _reserve(self, x: Tensor, need: int) -> Tensor:
        """The room, at least `need` slots of it."""
        room = 0 if self.data is None else self.data.shape[2]
        if self.data is None or room < need:
            spare = need // SPARE if room else 0  # the first write is a whole prompt
            room = -(-(need + spare) // self.step) * self.step
            grown = x.new_zeros(*x.shape[:2], room, x.shape[3])
            if self.data is not None:
                grown[:, :, : self.data.shape[2]] = self.data
            self.data = grown
        elif self.data.is_inference() and not torch.is_inference_mode_enabled():
            self.data = self.data.clone()  # what inference_mode has made cannot be written to outside of it
        return self.data


def places(lengths: Lengths, slots: int, new: Tensor | None) -> int | Tensor:
    """Where the next `slots` slots of a batch go, of which those in `new` [b slots] bool (None: all) hold tokens: from
    one slot on in every row, or [b slots], -1 for none."""
    if isinstance(lengths, int) and new is None:
        return lengths
    return positions(torch.as_tensor(lengths, device=None if new is None else new.device), slots, new)


def positions(lengths: Tensor, slots: int, new: Tensor | None) -> Tensor:
    """[b or 1, slots] int64: the positions of these slots in rows of `lengths` [b] or [] so far, -1 for no token."""
    held = lengths.view(-1, 1)
    if new is None:
        return held + torch.arange(slots, device=lengths.device)
    return torch.where(new, held + new.long().cumsum(-1) - 1, -1)


def longer(lengths: Lengths, slots: int, new: Tensor | None) -> Lengths:
    """Lengths after these slots."""
    return settled(lengths + (slots if new is None else new.sum(-1)))


def settled(lengths: Lengths) -> Lengths:
    """One number where all rows agree."""
    if isinstance(lengths, Tensor) and bool((lengths == lengths[0]).all()):
        return int(lengths[0])
    return lengths


def longest(lengths: Lengths) -> int:
    return int(lengths.max()) if isinstance(lengths, Tensor) else lengths
