"""Angular hashing: the corner of a randomly turned cross-polytope that a vector is nearest to.

    bucket(x) = argmax over 2n numbers of [x R, -x R],  R [d n] with orthonormal columns (several such sets if n > d)

Two vectors share a bucket the more likely the smaller their angle, and far more selectively than by as many signs of
projections (Andoni et al., "Practical and Optimal LSH for Angular Distance", section 3).
"""

import torch
from torch import Tensor

from .lists import entries
from .one_query import few_buckets
from .scratch import Scratch, borrowed

FEW = 64  # vectors of a head that are hashed one by one
MOST_BITS = 8  # of one cross-polytope: beyond, its 2^(bits - 1) directions would cost more than attention saves


def parts(bits: int) -> list[int]:
    """Bits of the cross-polytopes whose corners together make one bucket number."""
    return [min(MOST_BITS, bits - done) for done in range(0, bits, MOST_BITS)]


def directions(bits: int) -> int:
    """Columns of R for one bucket number of `bits` bits."""
    return sum(2 ** (part - 1) for part in parts(bits))


def buckets(x: Tensor, turns: Tensor, bits: int, rounds: int) -> Tensor:
    """x [b g n d], turns [g d r*directions(bits)] -> [r b g n] int32, numbers below 2^bits. Of x and R alone.

    The number of a direction rides in the lowest bits of the mantissa of its projection's size, so that one maximum
    finds both: projections that differ by less than 2^-16 of themselves (fp32) may change places.
    """
    (b, g, n), width = x.shape[:3], directions(bits)
    if n <= FEW and bits and (few := few_buckets(x, turns, bits, rounds)) is not None:
        return few
    found = torch.zeros(rounds, b, g, n, dtype=torch.int32, device=x.device)
    step = max(1, entries(x.device) // max(1, b * g * turns.shape[-1]))
    with borrowed(x) as scratch:
        for first in range(0, n if bits else 0, step):
            rows = x[:, :, first : first + step].to(turns.dtype)
            y = scratch("y", (b, g, rows.shape[2], turns.shape[-1]), turns.dtype)
            torch.matmul(rows, turns, out=y)
            number, at = torch.zeros(*rows.shape[:3], rounds, dtype=torch.int32, device=x.device), 0
            for part in parts(bits):
                size = 2 ** (part - 1)
                number = number * 2**part + _corner(y.unflatten(-1, (rounds, width))[..., at : at + size], scratch)
                at += size
            found[..., first : first + step] = number.movedim(-1, 0)
    return found


def _corner(y: Tensor, scratch: Scratch) -> Tensor:
    """[.. n] -> [..] int32: which of [y, -y] is largest, n a power of 2."""
    n, kind = y.shape[-1], torch.int64 if y.dtype == torch.float64 else torch.int32
    rider = scratch("rider", tuple(y.shape), kind).copy_(torch.arange(n, dtype=kind, device=y.device))
    size = torch.abs(y, out=scratch("size", tuple(y.shape), y.dtype))
    ridden = size.view(kind).bitwise_and_(-n).bitwise_or_(rider)
    number = ridden.view(y.dtype).amax(-1, keepdim=True).view(kind).bitwise_and_(n - 1).long()
    return (number + n * (y.gather(-1, number) < 0))[..., 0].int()
