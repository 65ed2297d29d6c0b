"""Keys and values as they are, row by row from each row's own first token on."""

import torch
from torch import Tensor

from .growing import Change, Growing, Lengths, longer, places


class TokenStore:
    """Tokens [b g . d] of one layer; no gradient. `step`: as in Growing."""

    def __init__(self, step: int = 8) -> None:
        self.keys, self.values = Growing(step), Growing(step)
        self.lengths: Lengths = 0
        self.recording = False

    @property
    def nbytes(self) -> int:
        """Bytes of everything kept, and the room for more."""
        notes = self.lengths.nbytes if isinstance(self.lengths, Tensor) else 0
        return notes + sum(growing.nbytes for growing in self._growing())

    def append(self, k: Tensor, v: Tensor, new: Tensor | None = None) -> None:
        """Store keys k [b g m d] and values v [b g m e], the next m slots, of which those in `new` [b m] hold tokens;
        None: all."""
        with torch.no_grad():
            at = places(self.lengths, k.shape[2], new)
            self.keys.write(k, at)
            self.values.write(v, at)
            self.lengths = longer(self.lengths, k.shape[2], new)

    def most_back(self) -> None:
        """Any number of slots can be taken back."""

    def settle(self) -> None:
        """Nothing is kept longer than needed."""

    def take_back(self, slots: int, lengths: Lengths) -> None:
        """Forget the last `slots` slots, so that the rows hold `lengths` tokens."""
        self.lengths = lengths  # what is known of tokens and blocks is written anew when they come again

    def rows(self, change: Change) -> None:
        """Do `change` to the batch."""
        for growing in self._growing():
            growing.rows(change)
        self.lengths = change(self.lengths) if isinstance(self.lengths, Tensor) else self.lengths

    def _growing(self) -> list[Growing]:
        return [self.keys, self.values]
