"""Softmax attention inside a band, with the logarithm of its sum of weights, so that more can be merged to it.

A chunk of queries with the run of keys that its band reaches is one batched matmul, in at least fp32 and with the
queries of a group as rows, so that keys are not repeated. Forward keeps one number per query, backward recomputes the
chunk (Dao et al., "FlashAttention", section 3.1): time and memory are linear in the number of queries.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

__all__ = ["band_attention", "merge"]

CHUNK = 128


def band_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, before: int, after: int) -> tuple[Tensor, Tensor]:
    """Query n of the last i reads keys n - before to n + after: q [b h i d], k [b g j d], v [b g j e].

    Returns o [b h i e] and the logarithm of the sum of its weights [b h i], both in at least fp32. before, after >= 0.
    Differentiable once, in q, k and v.
    """
    with torch.autocast(q.device.type, enabled=False):
        b, g = k.shape[:2]
        grouped = q.reshape(b * g, q.shape[1] // g, *q.shape[2:])
        o, lse = _Band.apply(grouped, k.flatten(0, 1), v.flatten(0, 1), scale, before, after)
        return o.view(*q.shape[:3], -1), lse.view(q.shape[:3])


def merge(parts: list[tuple[Tensor, Tensor]], sinks: Tensor | None = None) -> Tensor:
    """Softmax attention over disjoint sets of keys from its parts (o [b h i e], lse [b h i]) and sink logits [h]."""
    sums = [lse for _, lse in parts]
    if sinks is not None:
        sums.append(sinks.to(sums[0].dtype)[:, None].expand_as(sums[0]))
    shares = torch.stack(sums).softmax(0)
    return sum(
        (o * share[..., None] for (o, _), share in zip(parts, shares, strict=False)), torch.zeros_like(parts[0][0])
    )


class _Tile:
    """A chunk of queries: q [n u i d] with n = b g, u = h / g; k [n j d]."""

    def __init__(self, q: Tensor, k: Tensor, first: int, scale: float, before: int, after: int) -> None:
        wide = torch.promote_types(q.dtype, torch.float32)
        offset = k.shape[1] - q.shape[2]
        self.at = slice(first, min(first + CHUNK, q.shape[2]))
        self.reach = slice(max(offset + self.at.start - before, 0), min(offset + self.at.stop + after, k.shape[1]))
        self.rows = q[:, :, self.at].to(wide).flatten(1, 2) * scale
        self.keys = k[:, self.reach].to(wide)
        i = torch.arange(self.at.start, self.at.stop, device=q.device)[:, None] + offset
        j = torch.arange(self.reach.start, self.reach.stop, device=q.device)
        self.hidden = (j < i - before) | (j > i + after)
        self.shape = (q.shape[0], q.shape[1], *self.hidden.shape)

    def scores(self) -> Tensor:
        """[n u c w], -inf outside the band."""
        return torch.bmm(self.rows, self.keys.mT).view(self.shape).masked_fill_(self.hidden, float("-inf"))

    def split(self, x: Tensor) -> Tensor:
        """[n u*c ..] -> [n u c ..]"""
        return x.view(*self.shape[:3], -1)


class _Band(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, scale: float, before: int, after: int
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        o = q.new_empty(*q.shape[:3], v.shape[-1], dtype=wide)
        lse = q.new_empty(q.shape[:3], dtype=wide)
        for first in range(0, q.shape[2], CHUNK):
            tile = _Tile(q, k, first, scale, before, after)
            scores = tile.scores()
            lse[:, :, tile.at] = total = scores.logsumexp(-1)
            p = scores.sub_(total[..., None]).exp_().flatten(1, 2)
            o[:, :, tile.at] = tile.split(torch.bmm(p, v[:, tile.reach].to(wide)))
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.band = scale, before, after  # type: ignore[attr-defined]
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors  # type: ignore[attr-defined]
        scale = ctx.band[0]  # type: ignore[attr-defined]
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk, dv = (torch.zeros_like(x, dtype=o.dtype, memory_format=torch.contiguous_format) for x in (k, v))
        rest = dlse - (grad * o).sum(-1)
        with torch.autocast(q.device.type, enabled=False):
            for first in range(0, q.shape[2], CHUNK):
                tile = _Tile(q, k, first, *ctx.band)  # type: ignore[attr-defined]
                up = grad[:, :, tile.at].flatten(1, 2)
                p = tile.scores().sub_(lse[:, :, tile.at, None]).exp_().flatten(1, 2)
                dv[:, tile.reach] += torch.bmm(p.mT, up)
                ds = torch.bmm(up, v[:, tile.reach].to(o.dtype).mT)
                ds = ds.add_(rest[:, :, tile.at].flatten(1, 2)[..., None]).mul_(p)
                dq[:, :, tile.at] = tile.split(torch.bmm(ds, tile.keys).mul_(scale))
                dk[:, tile.reach] += torch.bmm(ds.mT, tile.rows)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None
