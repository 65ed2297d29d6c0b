"""Keys and values as they are, by blocks, and what tells of a block without reading it: its box, and its mean."""

import torch
from torch import Tensor

from .growing import Change, Growing, Lengths, longer, places


class BlockStore:
    """Tokens [b g . d] of one layer, each row from its own first token on, in blocks of `block` slots; no gradient.

    boxes   [b g n 2d] in at least fp32, of every complete block: the middle and half the width of the box that holds
            its keys (Tang et al., "Quest", section 3.2, https://arxiv.org/abs/2406.10774).
    means   [b g n d] in at least fp32, of its keys, if asked for.
    """

    def __init__(self, block: int, *, means: bool = False) -> None:
        self.block = block
        self.keys, self.values, self.boxes = Growing(block), Growing(block), Growing()
        self.means = Growing() if means else None
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
            before, at = self.lengths, places(self.lengths, k.shape[2], new)
            self.keys.write(k, at)
            self.values.write(v, at)
            self.lengths = longer(before, k.shape[2], new)
            self._describe(before, self.lengths)

    def most_back(self) -> None:
        """Any number of slots can be taken back."""

    def settle(self) -> None:
        """Nothing is kept longer than needed."""

    def take_back(self, slots: int, lengths: Lengths) -> None:
        """Forget the last `slots` slots, so that the rows hold `lengths` tokens."""
        self.lengths = lengths  # a box is written anew when its block is complete again

    def rows(self, change: Change) -> None:
        """Do `change` to the batch."""
        for growing in self._growing():
            growing.rows(change)
        self.lengths = change(self.lengths) if isinstance(self.lengths, Tensor) else self.lengths

    def highest(self, q: Tensor, blocks: int) -> Tensor:
        """[b g m n]: no key of block n has a larger q . k, for q [b g m d] in the dtype of the boxes."""
        boxes = self.boxes.first(blocks).flatten(0, 1)
        return torch.bmm(torch.cat([q, q.abs()], -1).flatten(0, 1), boxes.mT).unflatten(0, q.shape[:2])

    def gather(self, of: Growing, blocks: Tensor) -> Tensor:
        """[b*h n*block w]: the keys or values of the blocks [b h n] int64; no others are read."""
        b, g, room, w = of.held.shape
        h, n = blocks.shape[1:]
        if b * g > 1:
            unit = torch.arange(0, b * g * room, room, device=blocks.device) // self.block
            blocks = blocks + unit.repeat_interleave(h // g).view(b, h, 1)
        rows = of.held.view(-1, self.block * w).index_select(0, blocks.flatten())
        return rows.view(b * h, n * self.block, w)

    def _growing(self) -> list[Growing]:
        return [self.keys, self.values, self.boxes] + ([] if self.means is None else [self.means])

    def _describe(self, before: Lengths, after: Lengths) -> None:
        """Boxes and means of the blocks that have become complete."""
        if isinstance(before, int) and isinstance(after, int):
            first, last = before // self.block, after // self.block
            if last > first:
                keys = self.keys.held[:, :, first * self.block : last * self.block]
                self._write(keys.unflatten(2, (-1, self.block)), first)
            return
        held = self.keys.held
        begin, end = (torch.as_tensor(x, device=held.device).expand(len(held)) // self.block for x in (before, after))
        most = int((end - begin).max())
        if most > 0:
            at = begin[:, None] + torch.arange(most, device=held.device)
            at = at.where(at < end[:, None], -1)
            rows = torch.arange(len(held), device=held.device)[:, None]
            keys = held.unflatten(2, (-1, self.block))[rows, :, at.clamp(min=0)]  # [b n g block d]
            self._write(keys.transpose(1, 2), at)

    def _write(self, keys: Tensor, at: int | Tensor) -> None:
        """keys [b g n block d]"""
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        low, high = keys.amin(3), keys.amax(3)
        self.boxes.write(torch.cat([(low + high) / 2, (high - low) / 2], -1), at)
        if self.means is not None:
            self.means.write(keys.sum(3) / self.block, at)
