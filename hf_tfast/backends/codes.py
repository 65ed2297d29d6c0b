"""Code maps: numbers stored as small integers with one scale per token, and matmuls of such integers.

    x ~ scale * level[code],   scale = max |x| of the token,   level in [-1, 1] and in ascending order

Schemes, b bits, n = 2^(b - 1) - 1, codes -n..n unless said otherwise:
    linear    level[c] = c / n: evenly spaced, the only one whose integers multiply as they stand
    log       level[c] = sign(c) 2^(|c| - n): powers of two and zero
    sine      level[c] = sin(pi/2 c/n): closer together towards the ends
    dynamic   codes -n-1..n; decimal exponents 10^(e - b + 2), e = 0..b-2, each with the middles of 2^e equal parts of
              [0.1, 1] and both signs, then 0 and 1: Dettmers et al., "8-bit Optimizers via Block-wise Quantization",
              section 1.3 and figure 2, https://arxiv.org/abs/2110.02861, the map that bitsandbytes stores

A number rounds to the nearest level, so it is off by at most half the step between the two levels around it.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

SCHEMES = ("linear", "log", "sine", "dynamic")
BITS = (8, 4)


@cache
def levels(scheme: str, bits: int) -> Tensor:
    """[codes] float64, ascending: the number in [-1, 1] that each code stands for, from the lowest code on."""
    if scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}; expected one of {', '.join(SCHEMES)}")
    if bits not in BITS:
        raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, got {bits!r}")
    n = 2 ** (bits - 1) - 1
    code = torch.arange(-n, n + 1, dtype=torch.float64)
    if scheme == "linear":
        return code / n
    if scheme == "sine":
        return torch.sin(code * (torch.pi / 2 / n))
    if scheme == "log":
        return code.sign() * torch.exp2(code.abs() - n)
    above = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    for exponent in range(bits - 1):
        edges = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float64)
        above.append((edges[1:] + edges[:-1]) / 2 * 10.0 ** (exponent - bits + 2))
    return torch.cat([*above, *(-part for part in above[1:])]).sort().values


@cache
def _tables(scheme: str, bits: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Levels, and the borders between them, on the device."""
    table = levels(scheme, bits)
    return table.to(device, dtype), ((table[1:] + table[:-1]) / 2).to(device, dtype)


def encode(x: Tensor, scheme: str, bits: int) -> tuple[Tensor, Tensor]:
    """x [.. d] -> codes [.. d] int8 and scales [.. 1] in at least fp32: the nearest level of every number.

    No gradient. A token of zeros has scale 1. NaN and infinities have no code, and are not looked for: a check
    would wait for the device.
    """
    with torch.no_grad():
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = x.abs().amax(-1, keepdim=True)
        scale = scale.where(scale > 0, 1.0)
        if scheme == "linear":
            n = 2 ** (bits - 1) - 1
            return (x * (n / scale)).round_().clamp_(-n, n).to(torch.int8), scale
        borders = _tables(scheme, bits, x.dtype, x.device)[1]
        code = torch.bucketize((x / scale).contiguous(), borders, out_int32=True)
        return code.sub_((borders.shape[0] + 1) // 2).to(torch.int8), scale


def decode(codes: Tensor, scale: Tensor, scheme: str, bits: int) -> Tensor:
    """codes [.. d] int8 and scales [.. 1] -> [.. d] in the dtype of the scales."""
    if scheme == "linear":
        return codes.to(scale.dtype) * (scale / (2 ** (bits - 1) - 1))
    table = _tables(scheme, bits, scale.dtype, scale.device)[0]
    return table[codes.to(torch.int32) + table.shape[0] // 2] * scale


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [.. d] int8 as they are stored: as they stand at 8 bits, two in a byte [.. d / 2] uint8 at 4 bits."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        raise ValueError(f"4-bit codes are stored in pairs: the width must be even, got {codes.shape[-1]}")
    nibbles = (codes + 8).to(torch.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack(stored: Tensor, bits: int) -> Tensor:
    """The codes [.. d] int8 that `pack` stored."""
    if bits == 8:
        return stored
    return torch.stack([stored & 15, stored >> 4], -1).flatten(-2).to(torch.int8) - 8


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a [.. m d] int8 times b [.. n d] int8, transposed -> [.. m n] int32, exact.

    `torch._int_mm` (VNNI on CPUs that have it, int8 tensor cores on CUDA) where its shapes allow; elsewhere CUDA
    multiplies the same integers in fp32, where sums below 2^24 are exact too.
    """
    rows, columns, d = a.shape[-2], b.shape[-2], a.shape[-1]
    if a.device.type != "cpu" and (rows <= 16 or columns % 8 or d % 8 or not hasattr(torch, "_int_mm")):
        if d * 128 * 128 >= 2**24:
            raise ValueError(f"integer products of width {d} do not fit fp32; this device takes them up to width 1023")
        return (a.float() @ b.float().mT).to(torch.int32)
    out = torch.empty(*a.shape[:-2], rows, columns, dtype=torch.int32, device=a.device)
    for n in range(out[..., 0, 0].numel()):
        at = torch.unravel_index(torch.tensor(n), out.shape[:-2]) if out.ndim > 2 else ()
        torch._int_mm(a[at], b[at].mT, out=out[at])
    return out


@dataclass(frozen=True)
class Smoothed:
    """Keys without what earlier blocks have in common, so that their codes spend fewer levels on an offset.

    means   [b g n d] for every block of `block` positions, the mean of all keys in earlier blocks (0 for the first).
    of      [j] int64: the block of every key, counted from the first one present.
    """

    means: Tensor
    of: Tensor

    def per_key(self) -> Tensor:
        """[b g j d]"""
        return self.means[:, :, self.of]


def earlier_means(k: Tensor, at: Tensor, block: int) -> Smoothed:
    """The means that keys k [b g j d] at positions `at` [j] (ascending) are smoothed with; no gradient.

    A key's mean depends on keys of earlier blocks alone: never on later ones, nor on how many queries are asked.
    """
    with torch.no_grad():
        k = k.to(torch.promote_types(k.dtype, torch.float32))
        blocks, of = torch.unique_consecutive(torch.div(at, block, rounding_mode="floor"), return_inverse=True)
        firsts = torch.searchsorted(of, torch.arange(blocks.shape[0], device=k.device))
        before = torch.cat([torch.zeros_like(k[:, :, :1]), k.cumsum(2)], 2)[:, :, firsts]
        return Smoothed(before / firsts.clamp(min=1).to(k.dtype)[:, None], of)
