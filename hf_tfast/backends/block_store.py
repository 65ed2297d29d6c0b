"""Keys and values as they are, by blocks, and what tells of a block without reading it: its box, and its mean."""

import torch
from torch import Tensor

from .growing import Growing, Lengths
from .one_query import box_scores
from .token_store import TokenStore


class BlockStore(TokenStore):
    """Tokens [b g . d] of one layer, each row from its own first token on, in blocks of `block` slots; no gradient.

    boxes   [b g n 2d] in at least fp32, of every complete block: the middle and half the width of the box that holds
            its keys (Tang et al., "Quest", section 3.2, https://arxiv.org/abs/2406.10774).
    means   [b g n d] in at least fp32, of its keys, if asked for.
    """

    def __init__(self, block: int, *, means: bool = False) -> None:
        super().__init__(step=block)
        self.block = block
        self.boxes = Growing()
        self.means = Growing() if means else None

    def append(self, k: Tensor, v: Tensor, new: Tensor | None = None) -> None:
        """As ever, and boxes and means of the blocks that become complete."""
        before = self.lengths
        super().append(k, v, new)
        with torch.no_grad():
            self._describe(before, self.lengths)

    def highest(self, q: Tensor, blocks: int) -> Tensor:
        """[b g m n]: no key of block n has a larger q . k, for q [b g m d] in the dtype of the boxes."""
        return box_scores(q, self.boxes.first(blocks))

    def _growing(self) -> list[Growing]:
        return [*super()._growing(), self.boxes, *([] if self.means is None else [self.means])]

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
