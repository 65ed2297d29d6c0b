"""Attention over small integers of keys, values and queries in one Triton kernel: the forward pass.

    s_ij = scale (x_i y_j (a_i . c_j) + q_i . m_n),   n the block of j;   p = softmax_j s,   o_i = sum_j p_ij (z_j e_j)

c and e are codes of keys and values, y and z their scales, m the means that keys lost before they were rounded. a_i
are the codes of the query and x_i its scale, and the product is one of integers; or a_i is the query as it came and
x_i is 1. Keys and values that are not given as codes come as they are. Softmax and sums are in fp32, the running
softmax of Dao et al., "FlashAttention", section 3.1; weights are rounded to the dtype of q to meet the values.

Axes   b batch, h query heads, g key/value heads, i queries, j keys, d key width, e value width, n blocks of means.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from .score import Score

__all__ = ["Means", "Side", "attend_codes", "launch"]

LOG2E = math.log2(math.e)


class Side(NamedTuple):
    """Queries, keys or values: `x` [b . n w] int8 with `scale` [b . n 1] of one code, or as they are with None."""

    x: Tensor
    scale: Tensor | None = None


class Means(NamedTuple):
    """means [b g n d]; block [j] int: which one a key lost. `each` consecutive keys, from the first on, share one, or
    `each` is 0 where that is not so."""

    means: Tensor
    block: Tensor
    each: int


@dataclass(frozen=True)
class Tile:
    """Rows of queries and columns of keys that a program holds, and how it is run."""

    rows: int
    columns: int
    warps: int = 8
    stages: int = 2


def attend_codes(
    q: Tensor, asked: Side, keys: Side, values: Side, means: Means | None, score: Score, *, causal: bool,
    tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """Attention of q [b h i d], whose products with the keys are taken of `asked`, in the dtype of q -> [b h i e].

    Of `score`, scale, softcap and sink logits are read. Queries are the last i positions. No gradient.
    """
    (b, h, i, _), e = q.shape, values.x.shape[-1]
    o = q.new_empty(b, i, h, e).transpose(1, 2)  # heads side by side: what an output projection reads
    if o.numel():
        grid, arguments, options = launch(q, o, (asked, keys, values), means, score, causal, tile)
        with torch.cuda.device_of(q):
            _attend[grid](**arguments, **options)
    return o


def launch(
    q: Tensor, o: Tensor, sides: tuple[Side, Side, Side], means: Means | None, score: Score, causal: bool,
    tile: Tile | None = None,
) -> tuple[tuple[int, int], dict[str, object], dict[str, int]]:  # fmt: skip
    """Grid, arguments and options of the kernel's call."""
    asked, keys, values = (Side(_rows(x), None if s is None else s.float().contiguous()) for x, s in sides)
    (b, h, i, d), (g, j), e = q.shape, keys.x.shape[1:3], values.x.shape[-1]
    narrow = 32 if asked.x.dtype == torch.int8 else 16  # least depth of a product
    wide = max(narrow, triton.next_power_of_2(d)), max(16, triton.next_power_of_2(e))
    tile = tile or _tile(q.dtype, max(wide))
    q, nothing = _rows(q), o
    arguments: dict[str, object] = {
        "Q": q, "A": asked.x, "X": nothing if asked.scale is None else asked.scale,
        "C": keys.x, "Y": nothing if keys.scale is None else keys.scale,
        "E": values.x, "Z": nothing if values.scale is None else values.scale,
        "M": nothing if means is None else means.means.float().contiguous(),
        "N": nothing if means is None else means.block.int().contiguous(),
        "S": nothing if score.sinks is None else score.sinks.float().contiguous(), "O": o,
        **_strides("q", q), **_strides("a", asked.x), **_strides("c", keys.x), **_strides("e", values.x),
        **_strides("o", o),
        "h": h, "g": g, "i": i, "j": j, "blocks": 0 if means is None else means.means.shape[2],
        "scale": float(score.factor(d)), "cap": float(score.softcap or 0.0),
        "D": d, "W": e, "DP": wide[0], "WP": wide[1], "ROWS": tile.rows, "COLUMNS": tile.columns,
        "CAUSAL": causal, "INTEGERS": asked.scale is not None, "CODED_KEYS": keys.scale is not None,
        "CODED_VALUES": values.scale is not None, "MEANS": means is not None,
        "ALIGNED": means is not None and means.each > 0 and means.each % tile.columns == 0,
        "CAP": score.softcap is not None, "SINKS": score.sinks is not None,
        "LOG2E": LOG2E, "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    return (triton.cdiv(i, tile.rows), b * h), arguments, {"num_warps": tile.warps, "num_stages": tile.stages}


def _rows(x: Tensor) -> Tensor:
    """Numbers of a row side by side; rows may lie anywhere."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(name: str, x: Tensor) -> dict[str, object]:
    return {f"{name}{axis}": x.stride(n) for n, axis in enumerate("bht")}


def _tile(dtype: torch.dtype, width: int) -> Tile:
    """Sizes whose registers and shared memory fit an SM of any GPU since 2020."""
    if dtype == torch.float32 or width > 128:
        return Tile(64, 32, warps=4)
    return Tile(128, 64, warps=8, stages=3) if width > 64 else Tile(128, 64, warps=4, stages=3)


@triton.jit
def _with_means(
    s, q, M, N, columns, there, wide, start, j, D: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Scores with keys, and with the means of their blocks, which were subtracted from them."""
    if ALIGNED:
        mean = tl.load(M + tl.load(N + start) * D + wide, mask=wide < D, other=0)
        s += tl.sum(q.to(tl.float32) * mean[None, :], 1)[:, None]
    else:
        own = tl.load(N + columns, mask=there, other=-1)
        for n in range(tl.load(N + start), tl.load(N + tl.minimum(start + COLUMNS, j) - 1) + 1):
            mean = tl.load(M + n * D + wide, mask=wide < D, other=0)
            beside = tl.sum(q.to(tl.float32) * mean[None, :], 1)
            s += tl.where((own == n)[None, :], beside[:, None], 0.0)
    return s


@triton.jit
def _attend(
    Q, A, X, C, Y, E, Z, M, N, S, O,  # noqa: E741
    qb, qh, qt, ab, ah, at, cb, ch, ct, eb, eh, et, ob, oh, ot,
    h, g, i, j, blocks, scale, cap,
    D: tl.constexpr, W: tl.constexpr, DP: tl.constexpr, WP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, INTEGERS: tl.constexpr, CODED_KEYS: tl.constexpr, CODED_VALUES: tl.constexpr,
    MEANS: tl.constexpr, ALIGNED: tl.constexpr, CAP: tl.constexpr, SINKS: tl.constexpr, LOG2E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the queries of one head, over all keys that it may read: first those that no query has to leave
    out, then the rest."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # under causality the last ones take longest
    head = (tl.program_id(1) % h).to(tl.int64)
    batch = (tl.program_id(1) // h).to(tl.int64)
    group = head // (h // g)
    rows, wide, deep = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, DP), tl.arange(0, WP)
    live = (rows[:, None] < i) & (wide < D)[None, :]
    a = tl.load(A + batch * ab + head * ah + rows[:, None].to(tl.int64) * at + wide[None, :], mask=live, other=0)
    if MEANS:
        q = tl.load(Q + batch * qb + head * qh + rows[:, None].to(tl.int64) * qt + wide[None, :], mask=live, other=0)
    if INTEGERS:
        x = tl.load(X + (batch * h + head) * i + rows, mask=rows < i, other=0)
    C += batch * cb + group * ch
    E += batch * eb + group * eh
    Y += (batch * g + group) * j
    Z += (batch * g + group) * j
    M += (batch * g + group) * blocks * D
    top = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    o = tl.zeros((ROWS, WP), tl.float32)
    first = tile * ROWS + j - i  # position of the first query
    stop, whole = j, j // COLUMNS * COLUMNS
    if CAUSAL:
        stop = tl.minimum(j, first + ROWS)
        whole = tl.minimum(first + 1, j) // COLUMNS * COLUMNS
    for masked in tl.static_range(2):
        for start in tl.range(0 if masked == 0 else whole, whole if masked == 0 else stop, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            there = columns < j
            c = tl.load(C + columns[None, :].to(tl.int64) * ct + wide[:, None],
                        mask=there[None, :] & (wide < D)[:, None], other=0)  # fmt: skip
            if INTEGERS:
                s = tl.dot(a, c).to(tl.float32) * x[:, None]
            else:
                s = tl.dot(a, c.to(a.dtype), input_precision=PRECISION)
            if CODED_KEYS:
                s = s * tl.load(Y + columns, mask=there, other=0)[None, :]
            if MEANS:
                s = _with_means(s, q, M, N, columns, there, wide, start, j, D, COLUMNS, ALIGNED)
            s = s * scale
            if CAP:
                s = cap * (2 * tl.sigmoid(2 * s / cap) - 1)  # tanh
            s = s * LOG2E
            if masked == 1:
                seen = there[None, :]
                if CAUSAL:
                    seen = seen & (columns[None, :] <= rows[:, None] + (j - i))
                s = tl.where(seen, s, -1e30)
            higher = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - higher[:, None])
            if masked == 1:
                p = tl.where(seen, p, 0.0)
            shrink = tl.exp2(top - higher)
            total = total * shrink + tl.sum(p, 1)
            v = tl.load(E + columns[:, None].to(tl.int64) * et + deep[None, :],
                        mask=there[:, None] & (deep < W)[None, :], other=0)  # fmt: skip
            if CODED_VALUES:
                z = tl.load(Z + columns, mask=there, other=0)
                v = (v.to(tl.float32) * z[:, None]).to(O.dtype.element_ty)
            o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision=PRECISION)
            top = higher
    if SINKS:
        sink = tl.load(S + head) * LOG2E
        higher = tl.maximum(top, sink)
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.exp2(sink - higher)
        o = o * shrink[:, None]
    o = o / tl.where(total > 0, total, 1.0)[:, None]  # no key at all: zeros
    at_o = O + batch * ob + head * oh + rows[:, None].to(tl.int64) * ot + deep[None, :]
    tl.store(at_o, o.to(O.dtype.element_ty), mask=(rows[:, None] < i) & (deep < W)[None, :])
