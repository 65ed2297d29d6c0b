"""Keys and values in small integers, as a cache keeps them: append tokens, attend to the codes, count the bytes.

    scores    q . k^_j = scale_j (q . level[code_j]) + q . m_n,   n the block of j
    outputs   sum_j p_j v^_j = sum_j (p_j scale_j) level[code_j]

so a step turns codes into numbers a chunk at a time, where they stay in the processor's cache, and never scales them.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .codes import decode, encode, levels, pack, unpack
from .growing import Change, Growing, Lengths, longer, longest, places

CHUNK = 2**18  # numbers decoded at a time
RECENT = 32  # slots whose keys are remembered as they came, so that `take_back` restores the sum of keys


class Side:
    """The keys or the values: codes and scales, or with `bits` None the numbers themselves."""

    def __init__(self, bits: int | None, scheme: str) -> None:
        self.bits, self.scheme = bits, scheme
        self.codes, self.scale = Growing(), Growing()

    def write(self, x: Tensor, at: int | Tensor) -> None:
        if self.bits is None:
            self.codes.write(x, at)
            return
        codes, scale = encode(x, self.scheme, self.bits)
        self.codes.write(pack(codes, self.bits), at)
        self.scale.write(scale.to(x.dtype), at)  # exact: it is the size of one of the numbers

    def numbers(self, pick: Callable[[Growing], Tensor]) -> Tensor:
        """What the codes that `pick` takes stand for, in at least fp32."""
        codes = pick(self.codes)
        if self.bits is None:
            return codes.to(torch.promote_types(codes.dtype, torch.float32))
        scale = pick(self.scale)
        scale = scale.to(torch.promote_types(scale.dtype, torch.float32))
        return decode(unpack(codes, self.bits), scale, self.scheme, self.bits)

    def chunks(self, n: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """(slots, x [b*g c w], scales [b*g 1 c] or None) of the first n slots: numbers are x times scales."""
        codes = self.codes.first(n)
        size = max(64, CHUNK // max(1, codes[:, :, 0].numel()))
        table = None
        if self.bits is not None and self.scheme != "linear":
            table = levels(self.scheme, self.bits).to(codes.device, dtype)
        for start in range(0, n, size):
            at = slice(start, min(start + size, n))
            part, scale = codes[:, :, at].flatten(0, 1), None
            if self.bits is not None:
                part, scale = unpack(part, self.bits), self.scale.first(n)[:, :, at].flatten(0, 1).to(dtype).mT
                scale = scale / (2 ** (self.bits - 1) - 1) if table is None else scale
            yield at, part.to(dtype) if table is None else table[part.to(torch.int32) + table.shape[0] // 2], scale

    def growing(self) -> list[Growing]:
        return [self.codes, self.scale]


class Stored:
    """Tokens [b g . d] of one layer in codes of `bits` in `scheme`, each row from its own first token on; no gradient.

    keys, values   False keeps that side as it came.
    smooth         before keys are rounded they lose the mean of all keys before their block of `smooth` positions,
                   which is stored once per block: what is stored does not depend on how tokens were cut into calls,
                   beyond rounding of the sums.
    A token takes d (8 bits) or d / 2 bytes (4 bits), and its scale: 4 for smoothed keys, else as much as a number.
    """

    def __init__(
        self, *, bits: int, scheme: str = "linear", smooth: int = 0, keys: bool = True, values: bool = True
    ) -> None:
        self.smooth = smooth if keys else 0
        self.keys, self.values = Side(bits if keys else None, scheme), Side(bits if values else None, scheme)
        self.means = Growing(step=1)
        self.sum: Tensor | None = None  # [b g 1 d] of all keys
        self.recent: Tensor | None = None  # [b g <= RECENT d] keys of the last slots, 0 where there is no token
        self.lengths: Lengths = 0
        self.recording = False

    def __len__(self) -> int:
        """Tokens of the longest row."""
        return longest(self.lengths)

    @property
    def heads(self) -> int:
        """g"""
        return self.keys.codes.held.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of everything kept: codes, scales, means, the sum, recent keys, and the room for more."""
        notes = [x for x in (self.sum, self.recent, self.lengths) if isinstance(x, Tensor)]
        return sum(x.nbytes for x in notes) + sum(growing.nbytes for growing in self._growing())

    def append(self, k: Tensor, v: Tensor, new: Tensor | None = None) -> None:
        """Store keys k [b g m d] and values v [b g m e], the next m slots, of which those in `new` [b m] hold tokens;
        None: all."""
        with torch.no_grad():
            at, slots = places(self.lengths, k.shape[2], new), k.shape[2]
            if self.smooth:
                k = k.to(torch.promote_types(k.dtype, torch.float32)) - self._means(k, at, new)
            self.keys.write(k, at)
            self.values.write(v, at)
            self.lengths = longer(self.lengths, slots, new)

    def most_back(self) -> None:
        """Any number of slots can be taken back."""

    def settle(self) -> None:
        """Nothing is kept longer than needed."""

    def take_back(self, slots: int, lengths: Lengths) -> None:
        """Forget the last `slots` slots, so that the rows hold `lengths` tokens."""
        with torch.no_grad():
            self.lengths = lengths
            if not slots or self.recent is None or self.sum is None:
                return
            kept = self.recent.shape[2] - slots
            if kept >= 0:
                self.sum = self.sum - self.recent[:, :, kept:].to(self.sum.dtype).sum(2, keepdim=True)
            else:  # from the codes of the last block, to their rounding
                self.sum = self._sum_from_codes()
            self.recent = self.recent[:, :, : max(kept, 0)]

    def read(self) -> tuple[Tensor, Tensor]:
        """All keys [b g j d] and values [b g j e] in at least fp32: what the codes stand for. Where a row has fewer
        tokens than others, it ends in numbers without meaning."""
        n = len(self)
        k, v = (side.numbers(lambda growing: growing.first(n)) for side in (self.keys, self.values))
        return (k + self._per_key(self.means.first(self._blocks(n)), n) if self.smooth else k), v

    def scores(self, q: Tensor, beside: Tensor, n: int) -> Tensor:
        """[b g m n]: q [b g m d] . (keys - means) + beside [b g m d] . means for the first n slots, at least fp32."""
        (b, g, m, _), flat = q.shape, q.flatten(0, 1)
        s = q.new_empty(b * g, m, n)
        for at, x, scale in self.keys.chunks(n, q.dtype):
            part = torch.bmm(flat, x.mT)
            s[:, :, at] = part if scale is None else part.mul_(scale)
        s = s.view(b, g, m, n)
        if self.smooth:
            means = beside @ self.means.first(self._blocks(n)).to(q.dtype).mT
            s += means.repeat_interleave(self.smooth, -1)[..., :n]
        return s

    def outputs(self, weights: Tensor, after: Callable[[Tensor], Tensor] | None = None, block: int = 128) -> Tensor:
        """[b g m e]: weights [b g m n] times the first n values; `after`, if given, rounds the sum every `block`."""
        b, g, m, n = weights.shape
        flat = weights.flatten(0, 1)
        if after is None:
            o = weights.new_zeros(b * g, m, 1)
            for at, x, scale in self.values.chunks(n, weights.dtype):
                o = o + torch.bmm(flat[:, :, at] if scale is None else flat[:, :, at] * scale, x)
            return o.view(b, g, m, -1)
        v = self.values.numbers(lambda growing: growing.first(n)).to(weights.dtype)
        total = weights.new_zeros(b, g, m, v.shape[-1])
        for first in range(0, n, block):
            at = slice(first, first + block)
            total = after(total + weights[..., at] @ v[:, :, at])
        return total

    def rows(self, change: Change) -> None:
        """Do `change` to the batch."""
        for growing in self._growing():
            growing.rows(change)
        self.sum, self.recent = (None if x is None else change(x) for x in (self.sum, self.recent))
        self.lengths = change(self.lengths) if isinstance(self.lengths, Tensor) else self.lengths

    def _growing(self) -> list[Growing]:
        return [*self.keys.growing(), *self.values.growing(), self.means]

    def _blocks(self, n: int) -> int:
        return -(-n // self.smooth)

    def _per_key(self, means: Tensor, n: int) -> Tensor:
        """[b g blocks d] -> [b g n d]"""
        return means.repeat_interleave(self.smooth, 2)[:, :, :n]

    def _means(self, k: Tensor, at: int | Tensor, new: Tensor | None) -> Tensor:
        """[b g m d]: the mean for each of the next keys; writes the means of blocks that begin among them."""
        m, given = k.shape[2], k if new is None else k.masked_fill(~new[:, None, :, None], 0)
        wide = given.to(torch.promote_types(k.dtype, torch.float32))
        before = torch.zeros_like(wide[:, :, :1]) if self.sum is None else self.sum
        sums = torch.cat([before, before + wide.cumsum(2)], 2)  # [b g m + 1 d]: of all keys before each
        self.sum = sums[:, :, -1:].clone()
        last = given[:, :, -RECENT:]
        self.recent = (last if self.recent is None else torch.cat([self.recent, last], 2)[:, :, -RECENT:]).clone()
        if isinstance(at, int):
            first = self._blocks(at)
            starts = torch.arange(first, self._blocks(at + m), device=k.device) * self.smooth
            if len(starts):
                self.means.write(sums[:, :, starts - at] / starts.clamp(min=1).to(sums.dtype)[:, None], first)
            of = torch.arange(at, at + m, device=k.device) // self.smooth
            return self.means.held[:, :, of]
        begins = torch.where((at >= 0) & (at % self.smooth == 0), at // self.smooth, -1)
        self.means.write(sums[:, :, :-1] / at.clamp(min=1).to(sums.dtype)[:, None, :, None], begins)
        return self.means.at(at.clamp(min=0) // self.smooth)

    def _sum_from_codes(self) -> Tensor:
        """[b g 1 d]: the sum of all keys, from the mean of the blocks before the last and the codes in it."""
        held = self.keys.codes.held
        lengths = torch.as_tensor(self.lengths, device=held.device).expand(len(held))[:, None]
        start = (lengths - 1).clamp(min=0) // self.smooth * self.smooth
        at = start + torch.arange(min(self.smooth, held.shape[2]), device=held.device)
        there = at < lengths
        keys = self.keys.numbers(lambda growing: growing.at(at.where(there, start)))
        mean = self.means.at(start // self.smooth)
        inside = ((keys + mean) * there[:, None, :, None]).sum(2, keepdim=True)
        return inside + mean * start[:, None, :, None]
