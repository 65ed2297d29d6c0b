"""Random draws without state: pure functions of a seed and of positions, equal on every rank, device and length.

A generator's stream depends on how much was drawn before, so recomputing a block in backward, another batch layout or
another rank would draw something else. A hash of (seed, head, position) does not. The integer finaliser is the
two-round multiply-xorshift form of Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", section 5,
cut to 32 bits, with the multipliers that Wellons found by search ("Prospecting for Hash Functions", 2018).
"""

import torch
from torch import Tensor

_ODD = (0x7FEB352D, 0x846CA68B - (1 << 32), 0x9E3779B1 - (1 << 32))  # as signed 32-bit integers


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int32: torch shifts the sign bit in."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """A bijection of int32 under which neighbouring inputs give unrelated outputs; any shape, same device."""
    x = x.to(torch.int32)
    x = (x ^ _shift(x, 16)) * _ODD[0]
    x = (x ^ _shift(x, 15)) * _ODD[1]
    return x ^ _shift(x, 16)


def draw(seed: int, *index: Tensor) -> Tensor:
    """Uniform int32 for every combination of broadcastable integer `index` tensors, a function of them and `seed`."""
    folded = ((seed & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000  # any Python integer, as int32
    x = torch.full((), folded, dtype=torch.int32, device=index[0].device if index else None)
    for n in index:
        x = mix(x * _ODD[2] ^ n.to(torch.int32))
    return x


def uniform(seed: int, *index: Tensor) -> Tensor:
    """Uniform float64 in [0, 1) for every combination of `index`."""
    return (draw(seed, *index).double() + 2.0**31) * 2.0**-32


def keep(dropout: float, seed: int, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """True with probability 1 - dropout, for broadcastable index tensors: a pure function of (seed, b, h, i, j).

    Only two integer rounds touch the full [.. i j] grid; rows and columns are hashed before they meet.
    """
    return kept_of(draw(seed, b, h, i), draw(seed + 1, j), threshold(dropout))


def threshold(dropout: float) -> int:
    """The least hash, as int32, that `keep` keeps."""
    return min(round(dropout * 2**32) - 2**31, 2**31 - 1)  # a bound beyond int32 would keep everything


def kept_of(row: Tensor, column: Tensor, least: int | Tensor) -> Tensor:
    """`keep`, from draws of rows and columns."""
    x = row ^ column
    x = (x ^ _shift(x, 15)) * _ODD[1]
    x = x ^ _shift(x, 16)
    return x >= least
