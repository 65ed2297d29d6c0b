"""Rows of [b h n d] where they lie in memory, so that heads side by side, as projections make them, need no copies.

Layout  by head: [b h n d] contiguous. By position: a transposed view of [b n h d], which linear layers give and take.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Flat:
    """Rows of x [b h n d]: row r of [(b h n) d] is rows[place[r]], rows[r] where place is None."""

    rows: Tensor
    place: Tensor | None

    @staticmethod
    def of(x: Tensor, spare: bool = False) -> "Flat":
        """A view of x, or a copy where its rows are not whole. `spare`: row number b h n may be asked for, too; it is
        any row."""
        (b, h, n, d), strides = x.shape, x.stride()
        if d == 0 or strides[3] != 1 or any(s % d for s in strides[:3]) or not x.numel():
            x = x.contiguous()
        elif not x.is_contiguous():
            steps = strides[0] // d, strides[1] // d, strides[2] // d
            place = _places((b, h, n), steps, x.device, 0 if spare else None)
            last = sum((size - 1) * step for size, step in zip((b, h, n), steps, strict=True))
            return Flat(x.as_strided((last + 1, d), (d, 1)), place)
        if not spare:
            return Flat(x.reshape(-1, d), None)
        place = torch.arange(b * h * n + 1, device=x.device)
        place[-1:] = 0
        return Flat(x.reshape(-1, d), place)

    def at(self, index: Tensor) -> Tensor:
        """Where these rows are."""
        return index if self.place is None else self.place.take(index)


@dataclass(frozen=True)
class Sums:
    """Zeros [b h n d] to add rows to, as a Flat with a last row for nobody; `by_position`: see Layout."""

    flat: Flat
    shape: tuple[int, int, int, int]
    by_position: bool

    @staticmethod
    def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device, by_position: bool) -> "Sums":
        b, h, n, d = shape
        place = _places((b, h, n), (h * n, 1, h), device, b * h * n) if by_position else None
        return Sums(Flat(torch.zeros(b * h * n + 1, d, dtype=dtype, device=device), place), (b, h, n, d), by_position)

    def view(self) -> Tensor:
        """[b h n d], without the row of nobody."""
        b, h, n, d = self.shape
        rows = self.flat.rows[:-1]
        return rows.view(b, n, h, d).transpose(1, 2) if self.by_position else rows.view(self.shape)


def by_position(x: Tensor) -> bool:
    """Does x [b h n d] lie in memory with its heads side by side?"""
    return x.stride(2) > x.stride(1)


def _places(
    shape: tuple[int, int, int], strides: tuple[int, int, int], device: torch.device, spare: int | None
) -> Tensor:
    """[b h n] row numbers, flattened, and one more if `spare` is given."""
    count = shape[0] * shape[1] * shape[2]
    place = torch.empty(count + (spare is not None), dtype=torch.int64, device=device)
    first, second, third = (torch.arange(n, device=device) * s for n, s in zip(shape, strides, strict=True))
    torch.add(first[:, None, None] + second[:, None], third, out=place[:count].view(shape))
    if spare is not None:
        place[-1] = spare
    return place
