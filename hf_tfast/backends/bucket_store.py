"""Keys and values as they are, and the buckets of every key: a step hashes its own key and query, and no other."""

import torch
from torch import Tensor

from .growing import Growing, Lengths, places
from .one_query import bucket_keys
from .token_store import TokenStore

__all__ = ["BucketStore"]


class BucketStore(TokenStore):
    """Tokens [b g . d] of one layer with buckets below 2^bits in each of `rounds`: of 1 byte, beyond 8 bits of 2.

    numbers   [b g*rounds n 1] uint8 or int16, of which the lowest `bits` bits count.
    """

    def __init__(self, bits: int, rounds: int) -> None:
        super().__init__()
        self.bits, self.rounds = bits, rounds
        self.numbers = Growing()

    def append(self, k: Tensor, v: Tensor, new: Tensor | None = None, buckets: Tensor | None = None) -> None:
        """As ever, with the buckets [r b g m] of the keys."""
        if buckets is None:
            raise ValueError("a store of buckets needs those of the keys")
        with torch.no_grad():
            numbers = buckets.permute(1, 2, 0, 3).flatten(1, 2)[..., None]
            numbers = numbers.to(torch.uint8 if self.bits <= 8 else torch.int16)
            self.numbers.write(numbers, places(self.lengths, k.shape[2], new))
        super().append(k, v, new)

    def of_round(self, numbers: Tensor) -> Tensor:
        """Buckets [r b g n] int32 from numbers [b g*r n 1]."""
        by_round = numbers[..., 0].unflatten(1, (-1, self.rounds)).permute(2, 0, 1, 3)
        return (by_round.int() & 2**self.bits - 1).contiguous()

    def found(self, asked: Tensor, low: Lengths, high: Lengths, cap: int) -> Tensor:
        """[b h m] int64: the slots below `low` among the last `cap` below `high` in the buckets `asked` [r b h], each
        once; -1 for none."""
        return bucket_keys(self.numbers.held[..., 0], asked, low, high, cap)

    def _growing(self) -> list[Growing]:
        return [*super()._growing(), self.numbers]
