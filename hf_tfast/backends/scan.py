"""Attention whose weights factor through features, summed over a prefix: linear time, chunk by chunk, own backward.

For R features w_r, with q' = q sqrt(scale) and k' = k sqrt(scale),

    A_ij = 1/R sum_r exp(w_r . q'_i - |q'_i|^2 / 2) exp(w_r . k'_j - |k'_j|^2 / 2)
    o_i = sum_j A_ij v_j / sum_j A_ij

Each side is features p between 0 and 1, the largest of a row 1, times the exponential of one number per row, its
level: A_ij = 1/R (p_i . p_j) exp(level_i + level_j). Key levels are held against their running prefix maximum: nothing
overflows, and no query's rounding depends on a later key. Queries are the last i positions: keys before the first of
them (without causality all keys) are summed into one state [R e+1]; the rest is walked in chunks, each reading the
state of what came before it and itself.

Training keeps one state per chunk, never one per position, and makes the features anew in the backward pass. bf16 has
logits, levels and sums in fp32 and multiplies features in bf16; fp16 is computed in fp32.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .triton_kernels import kernel

__all__ = ["State", "absorb", "feature_attention", "read"]

CHUNK = 128  # positions that meet each other directly
BULK = 512  # positions that only meet a state, handled at a time


class State(NamedTuple):
    """All that later queries need of the keys so far; its size does not depend on their number.

    sums   [b h R e+1]: features^T [v, 1] relative to `level`, in at least fp32.
    level  [b h 1]: the largest key level so far.
    """

    sums: Tensor
    level: Tensor


def feature_attention(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, scale: float, *, causal: bool = False, fused: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention of q [b h i d] over k [b g j d], v [b g j e] by the features w [h R d], queries last.

    Returns o [b h i e] in the dtype of v and log(sum_j A_ij) [b h i] in at least fp32, by which parts can be merged.
    `fused` makes features by a kernel in Triton. Differentiable once, in q, k and v. Where every weight underflows, o
    is zeros and the logarithm very low.
    """
    with torch.autocast(q.device.type, enabled=False):
        train = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        if causal and q.device.type != "cpu":
            from .scan_wide import WideScan

            return WideScan.apply(q, k, v, w, scale, train, fused)
        return _Scan.apply(q, k, v, w, scale, causal, train, fused)


def absorb(state: State | None, k: Tensor, v: Tensor, w: Tensor, scale: float) -> State:
    """`state` (None is the empty one) with keys k [b g j d] and values v [b g j e] added; without gradient."""
    with torch.no_grad(), torch.autocast(k.device.type, enabled=False):
        to = _Features(w, k, scale)
        sums, level = to.nothing(v) if state is None else (state.sums.flatten(0, 1), state.level.flatten(0, 1))
        for at in _spans(0, k.shape[2], bulk(len(sums), k.device)):
            sums, level = _add(sums, level, to.keys(k, at), to.values(v, at))
    return State(sums.unflatten(0, (k.shape[0], -1)), level.unflatten(0, (k.shape[0], -1)))


def read(state: State, q: Tensor, w: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What `feature_attention` returns for q [b h i d] over all keys in `state`; without gradient."""
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        to = _Features(w, q, scale)
        rows = to.queries(q, slice(0, q.shape[2]))
        o, lse, _ = to.divide(rows.p @ state.sums.flatten(0, 1).to(to.dtype), rows.level + state.level.flatten(0, 1))
    return o.view(*q.shape[:3], -1).to(q.dtype), lse.view(q.shape[:3])


class _Rows(NamedTuple):
    """A tile of queries or keys, n = b h."""

    x: Tensor  # [n c d], in at least fp32
    p: Tensor  # [n c R]
    level: Tensor  # [n c]


class _Features:
    """From tiles of q, k and v to rows of features."""

    def __init__(self, w: Tensor, like: Tensor, scale: float, fused: bool = False) -> None:
        b, self.fused = like.shape[0], fused
        self.wide = torch.promote_types(like.dtype, torch.float32)
        self.dtype = torch.bfloat16 if like.dtype == torch.bfloat16 else self.wide  # of the large products
        self.heads, self.half = w.shape[0], abs(scale) / 2
        w = (w.to(self.wide) * abs(scale) ** 0.5).mT  # [h d R]
        self.wk = w.repeat(b, 1, 1)
        self.wq = -self.wk if scale < 0 else self.wk
        self.wk2, self.wq2 = (x * math.log2(math.e) for x in (self.wk, self.wq))  # exp2 takes a third of exp's time
        # Only what has underflowed in every feature is below this; a gradient divided by it still fits.
        self.least = torch.finfo(self.wide).tiny ** 0.8

    def _tile(self, x: Tensor, at: slice) -> Tensor:
        """[b g j ..] -> [n c ..]: the heads of a group see the same keys, repeated for this tile only."""
        x = x[:, :, at]
        b, g = x.shape[:2]
        return x.unsqueeze(2).expand(-1, -1, self.heads // g, -1, -1).reshape(b * self.heads, *x.shape[2:])

    def _rows(self, x: Tensor, at: slice, w: Tensor) -> _Rows:
        x = self._tile(x, at).to(self.wide)
        if self.fused:
            return _Rows(x, *kernel("features_triton").features(x, w, self.half, self.dtype))
        logits = torch.bmm(x, w)
        top = logits.amax(-1, keepdim=True)
        level = top[..., 0] * math.log(2.0) - self.half * x.square().sum(-1)
        return _Rows(x, logits.sub_(top).exp2_().to(self.dtype), level)

    def queries(self, q: Tensor, at: slice) -> _Rows:
        return self._rows(q, at, self.wq2)

    def keys(self, k: Tensor, at: slice) -> _Rows:
        return self._rows(k, at, self.wk2)

    def values(self, v: Tensor, at: slice) -> Tensor:
        """[v, 1] as [n c e+1]: the last column sums weights."""
        return torch.nn.functional.pad(self._tile(v, at).to(self.dtype), (0, 1), value=1.0)

    def nothing(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Sums and level of no keys."""
        n, r = self.wk.shape[0], self.wk.shape[2]
        sums = torch.zeros(n, r, v.shape[-1] + 1, dtype=self.wide, device=v.device)
        return sums, sums.new_full((n, 1), torch.finfo(self.wide).min)  # not -inf: differences stay numbers

    def divide(self, num: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """sum_j A_ij [v, 1] -> o, log of the sum of weights, and the denominator."""
        num = num.to(self.wide)
        den = num[..., -1] + self.least
        return num[..., :-1] / den[..., None], den.log() + level - math.log(self.wk.shape[2]), den

    def input_gradient(self, rows: _Rows, dlogits: Tensor, total: Tensor, w: Tensor) -> Tensor:
        """Gradient of x through the logits x w and through the level's -|x|^2 scale / 2 (of gradient `total`)."""
        return torch.baddbmm(rows.x * (-2 * self.half * total)[..., None], dlogits.to(self.wide), w.mT)


class _Met:
    """How key levels are held inside a chunk: query c sees the largest level of the keys up to c, `top` [n c]."""

    def __init__(self, before: Tensor, level: Tensor) -> None:
        self.top = torch.maximum(level.cummax(1).values, before)
        self.past = (before - self.top).exp()[..., None]  # [n c 1]: weight of the state before the chunk
        self.pairs = (level[:, None] - self.top[..., None]).exp().tril_()  # [n c c]: nought above the diagonal

    def weigh(self, products: Tensor) -> Tensor:
        """Products of every query of the chunk with every key of it -> those with keys up to itself, held to `top`."""
        return products.mul_(self.pairs.to(products.dtype)).tril_()


def _add(sums: Tensor, level: Tensor, keys: _Rows, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and level with a tile of keys added."""
    top = torch.maximum(level, keys.level.amax(1, keepdim=True))
    weighed = values * (keys.level - top).exp()[..., None].to(values.dtype)
    return torch.bmm(keys.p.mT, weighed).to(sums.dtype).add_(sums * (level - top).exp()[..., None]), top


def bulk(n: int, device: torch.device) -> int:
    """Positions of n heads that only meet a state, handled at a time: on a CPU in its cache, elsewhere in few, large
    operations."""
    return BULK if device.type == "cpu" else max(BULK, 2**18 // n)


def _spans(first: int, last: int, size: int) -> list[slice]:
    return [slice(at, min(at + size, last)) for at in range(first, last, size)]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, w: Tensor, scale: float, causal: bool, *how: bool
    ) -> tuple[Tensor, Tensor]:
        (train, fused), i = how, q.shape[2]
        to = _Features(w, q, scale, fused)
        shared = k.shape[2] - i if causal else k.shape[2]  # keys that every query reads
        sums, level = to.nothing(v)
        most = bulk(len(sums), q.device)
        for at in _spans(0, shared, most):
            sums, level = _add(sums, level, to.keys(k, at), to.values(v, at))
        b, h = q.shape[:2]
        o = v.new_empty(b, i, h, v.shape[-1]).transpose(1, 2)  # heads side by side: what an output projection reads
        lse, den = sums.new_empty(len(sums), i), sums.new_empty(len(sums), i)
        states = [sums.to(to.dtype), level]
        for at in _spans(0, i, CHUNK if causal else most):
            rows = to.queries(q, at)
            num, top = torch.bmm(rows.p, sums.to(to.dtype)), level
            if causal:
                own = slice(shared + at.start, shared + at.stop)
                keys, values = to.keys(k, own), to.values(v, own)
                met = _Met(level, keys.level)
                num = torch.bmm(met.weigh(torch.bmm(rows.p, keys.p.mT)), values) + num * met.past
                top = met.top
                sums, level = _add(sums, level, keys, values)
                if train:
                    states += [sums.to(to.dtype), level]
            part, lse[:, at], den[:, at] = to.divide(num, rows.level + top)
            o[:, :, at] = part.view(b, h, *part.shape[1:])
        if train:
            ctx.save_for_backward(q, k, v, w, o, den, *states)
            ctx.scale, ctx.causal, ctx.fused = scale, causal, fused  # type: ignore[attr-defined]
        return o, lse.view(b, h, i)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, w, o, den, *states = ctx.saved_tensors  # type: ignore[attr-defined]
        causal: bool = ctx.causal  # type: ignore[attr-defined]
        with torch.autocast(q.device.type, enabled=False):
            to = _Features(w, q, ctx.scale, ctx.fused)  # type: ignore[attr-defined]
            back = _Back(to, q, k, v, do, dlse, o, den)
            shared = k.shape[2] - q.shape[2] if causal else k.shape[2]
            sums, level = states[-2:]
            total = torch.zeros_like(sums, dtype=to.wide)  # of p_i^T [do, .]_i over the queries after a chunk
            most = bulk(len(sums), q.device)
            for at in reversed(_spans(0, q.shape[2], CHUNK if causal else most)):
                if causal:
                    n = 2 * (at.start // CHUNK)
                    total, level = back.chunk(at, shared, states[n], states[n + 1], total, level)
                else:
                    total = back.read(at, sums, total)
            for at in _spans(0, shared, most):
                back.shared(at, total, level)
        return back.dq, back.dk, back.dv, *(None,) * 5


class _Back:
    """The backward pass tile by tile. With g_i = [do_i, dlse_i - do_i . o_i] / den_i and u_j = [v_j, 1],

    dA_ij = g_i . u_j,   dp_i = sum_j dA_ij p_j,   dp_j = sum_i dA_ij p_i,   du_j = sum_i A_ij g_i,   dlogits = p dp.
    """

    def __init__(
        self, to: _Features, q: Tensor, k: Tensor, v: Tensor, do: Tensor, dlse: Tensor, o: Tensor, den: Tensor
    ) -> None:
        self.to, self.q, self.k, self.v = to, q, k, v
        do, o = do.flatten(0, 1).to(to.wide), o.flatten(0, 1)  # views where there is one row
        along = (do * o).sum(-1)
        rest = dlse.flatten(0, 1) - along
        self.g = torch.cat([do, rest[..., None]], -1).div_(den[..., None]).to(to.dtype)
        self.row = along + rest * (1 - to.least / den)  # sum of a query's dlogits
        self.dq, self.dk, self.dv = (torch.empty_like(x) for x in (q, k, v))

    def read(self, at: slice, sums: Tensor, total: Tensor) -> Tensor:
        """Queries that only read one state."""
        rows, g = self.to.queries(self.q, at), self.g[:, at]
        self._query(at, rows, torch.bmm(g, sums.mT))
        return total + torch.bmm(rows.p.mT, g)

    def shared(self, at: slice, total: Tensor, level: Tensor) -> None:
        """Keys that all queries read."""
        keys, u = self.to.keys(self.k, at), self.to.values(self.v, at)
        held = (keys.level - level).exp()[..., None].to(u.dtype)
        total = total.to(u.dtype)
        self._key(at, keys, u, torch.bmm(u * held, total.mT), torch.bmm(keys.p, total) * held)

    def chunk(
        self, at: slice, shared: int, sums: Tensor, before: Tensor, total: Tensor, level: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys of one chunk; `total` and `level` as at its end -> as at its start."""
        own = slice(shared + at.start, shared + at.stop)
        rows, g = self.to.queries(self.q, at), self.g[:, at]
        keys, u = self.to.keys(self.k, own), self.to.values(self.v, own)
        met = _Met(before, keys.level)
        past = met.past.to(g.dtype)
        pairs, dpairs = met.weigh(torch.bmm(rows.p, keys.p.mT)), met.weigh(torch.bmm(g, u.mT))
        held = (keys.level - level).exp()[..., None].to(u.dtype)
        later = total.to(u.dtype)
        self._query(at, rows, torch.bmm(g * past, sums.mT).add_(torch.bmm(dpairs, keys.p)))
        dp = torch.bmm(u * held, later.mT).add_(torch.bmm(dpairs.mT, rows.p))
        self._key(own, keys, u, dp, torch.bmm(pairs.mT, g).add_(torch.bmm(keys.p, later) * held))
        return total * (before - level).exp()[..., None] + torch.bmm(rows.p.mT, g * past), before

    def _query(self, at: slice, rows: _Rows, dp: Tensor) -> None:
        dx = self.to.input_gradient(rows, dp.mul_(rows.p), self.row[:, at], self.to.wq)
        self.dq[:, :, at] = dx.view(*self.q.shape[:2], *dx.shape[1:])

    def _key(self, at: slice, keys: _Rows, u: Tensor, dp: Tensor, du: Tensor) -> None:
        du = du.to(self.to.wide)
        dx = self.to.input_gradient(keys, dp.mul_(keys.p), (u * du).sum(-1), self.to.wk)
        for total, x in ((self.dk, dx), (self.dv, du[..., :-1])):
            total[:, :, at] = x.reshape(*total.shape[:2], -1, *x.shape[1:]).sum(2)
