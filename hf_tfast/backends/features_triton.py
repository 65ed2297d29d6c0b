"""Random features in one Triton kernel: products, their largest, exponentials and levels, without storing logits.

    logit_r = x . w_r (base 2),   p_r = 2^(logit_r - max),   level = ln 2 max - half |x|^2

Products are in fp32, on tensor cores as three of shortened factors (tf32x3). Features are rounded to `dtype` once.

Axes   n batch x query heads, m positions, d width, R features.
"""

import math

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

__all__ = ["MOST", "features", "launch"]

MOST = 512  # features: a program holds all logits of its rows
DEPTH = 32  # of x and w at a time


def features(x: Tensor, w: Tensor, half: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [n m d] and w [n d R] in fp32 -> p [n m R] in `dtype`, level [n m] in fp32. No gradient."""
    p, level = x.new_empty(*x.shape[:2], w.shape[2], dtype=dtype), x.new_empty(x.shape[:2])
    if level.numel():
        grid, arguments, options = launch(x, w, half, p, level)
        with torch.cuda.device_of(x):
            _features[grid](**arguments, **options)
    return p, level


def launch(
    x: Tensor, w: Tensor, half: float, p: Tensor, level: Tensor
) -> tuple[tuple[int, int], dict[str, object], dict[str, int]]:
    """Grid, arguments and options of the kernel's call."""
    (n, m, d), r = x.shape, w.shape[2]
    wide = max(16, triton.next_power_of_2(r))
    if wide > MOST:
        raise ValueError(f"the kernel makes up to {MOST} features, got {r}")
    rows = 64 if wide <= 256 else 32
    x, w = x.contiguous(), w.contiguous()
    arguments: dict[str, object] = {
        "X": x, "W": w, "P": p, "LEVEL": level, "m": m, "d": d, "half": float(half), "R": r, "RP": wide,
        "ROWS": rows, "DEPTH": DEPTH, "LN2": math.log(2.0),
    }  # fmt: skip
    return (triton.cdiv(m, rows), n), arguments, {"num_warps": 8, "num_stages": 2}


@triton.jit
def _features(
    X, W, P, LEVEL, m, d, half,
    R: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, LN2: tl.constexpr,
):  # fmt: skip
    """A tile of the positions of one head."""
    head = tl.program_id(1).to(tl.int64)
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, RP)
    X += head * m * d
    W += head * d * R
    logits = tl.zeros((ROWS, RP), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    for start in range(0, d, DEPTH):
        deep = start + tl.arange(0, DEPTH)
        x = tl.load(X + rows[:, None] * d + deep[None, :], mask=(rows < m)[:, None] & (deep < d)[None, :], other=0.0)
        w = tl.load(W + deep[:, None] * R + columns[None, :], mask=(deep < d)[:, None] & (columns < R)[None, :],
                    other=0.0)  # fmt: skip
        logits = tl.dot(x, w, logits, input_precision="tf32x3")
        square += tl.sum(x * x, 1)
    logits = tl.where((columns < R)[None, :], logits, -1e30)
    top = tl.max(logits, 1)
    p = tl.exp2(logits - top[:, None])
    at = P + (head * m + rows[:, None]) * R + columns[None, :]
    tl.store(at, p.to(P.dtype.element_ty), mask=(rows < m)[:, None] & (columns < R)[None, :])
    tl.store(LEVEL + head * m + rows, top * LN2 - half * square, mask=rows < m)
