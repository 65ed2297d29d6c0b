"""Keys and values in small integers, as a cache keeps them: append tokens, read them back, count the bytes."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .codes import decode, encode, pack, unpack


@dataclass(kw_only=True)
class Stored:
    """Tokens [b g . d] of one layer in codes of `bits` in `scheme`; no gradient.

    Before they are rounded, keys lose the mean of the blocks of `smooth` positions before their own, which is stored
    once per block: what is stored does not depend on how tokens were cut into calls, beyond rounding of the sums.
    A token takes d or d / 2 bytes and a scale of 4.
    """

    bits: int
    scheme: str
    smooth: int
    parts: dict[str, Tensor] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def __len__(self) -> int:
        """Tokens stored."""
        return self.parts["keys"].shape[2] if self.parts else 0

    @property
    def nbytes(self) -> int:
        """Bytes of everything kept: codes, scales, means, the running sum."""
        return sum(part.nbytes for part in self.parts.values())

    def append(self, k: Tensor, v: Tensor) -> None:
        """Store keys k [b g m d] and values v [b g m e], the next m positions."""
        with torch.no_grad():
            self.dtype = k.dtype
            k = k.to(torch.promote_types(k.dtype, torch.float32))
            if self.smooth:
                k = k - self._means(k)
            for name, x in (("keys", k), ("values", v)):
                codes, scale = encode(x, self.scheme, self.bits)
                self._extend(name, pack(codes, self.bits))
                self._extend(name + "_scale", scale)

    def read(self) -> tuple[Tensor, Tensor]:
        """All keys [b g j d] and values [b g j e] in at least fp32: what the codes stand for."""
        if not self.parts:
            raise ValueError("nothing is stored yet: append keys and values first")
        parts = self.parts
        k, v = (
            decode(unpack(parts[name], self.bits), parts[name + "_scale"], self.scheme, self.bits)
            for name in ("keys", "values")
        )
        if self.smooth:
            k = k + parts["means"][:, :, torch.arange(len(self), device=k.device) // self.smooth]
        return k, v

    def _means(self, k: Tensor) -> Tensor:
        """[b g m d]: the mean for each of the next keys; adds the means of blocks that begin among them."""
        first, m = len(self), k.shape[2]
        before = self.parts.get("sum", k.new_zeros(*k.shape[:2], 1, k.shape[3]))
        sums = torch.cat([before, before + k.cumsum(2)], 2)  # [b g m + 1 d]: of all keys before each
        blocks = torch.arange(-(-first // self.smooth), -(-(first + m) // self.smooth), device=k.device)
        starts = blocks * self.smooth
        self._extend("means", sums[:, :, starts - first] / starts.clamp(min=1).to(k.dtype)[:, None])
        self.parts["sum"] = sums[:, :, -1:].clone()
        at = torch.arange(first, first + m, device=k.device)
        return self.parts["means"][:, :, at // self.smooth]

    def _extend(self, name: str, x: Tensor) -> None:
        self.parts[name] = torch.cat([self.parts[name], x], 2) if name in self.parts else x
