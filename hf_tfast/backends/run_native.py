"""Attention over runs of sorted keys in C: a few queries of a bucket at a time while their scores lie in the cache.

See run_steps.c, which the machine's own compiler makes on first use (native.py). It serves CPUs with AVX2 or more,
fp32 and bf16, with sink logits, without softcap or dropout; lists.py serves all else, and everything where there is no
compiler, which is said once in the log, or where HF_TFAST_NATIVE=0 asks for it. A run holds at most 4096 keys.
Backward, the keys of a bucket are one thread's, so that a round without buckets, a window, is one thread per key head.
"""

import ctypes
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from . import native
from .native import Rows, as_rows
from .runs import Runs
from .score import Score

__all__ = ["attend_runs", "serves"]

DTYPES = (torch.float32, torch.bfloat16)
WIDEST = 4096  # keys of a run, at most: a few rows of scores should fit the second-level cache
LANES, SPAN = 16, 128  # keys of a vector, at most; and how many keys a tile may hold beside the longest run
PIECES = 16  # of the queries of a key head, at most, that threads take
LOG2_E = math.log2(math.e)
TENSORS = ("q", "k", "v", "o", "grad", "dq", "dk", "dv")
RUNS = ("order", "rank", "queries", "start", "low", "high")
SIZES = ("groups", "units", "share", "i", "keys", "d", "e", "rounds", "pieces", "widest")


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, Rows) for name in TENSORS),
        *((name, ctypes.c_void_p) for name in (*RUNS, "top", "total")),
        *((name, ctypes.c_long) for name in SIZES),
        ("scale", ctypes.c_float),
        ("bf16", ctypes.c_int),
        ("threads", ctypes.c_int),
    ]


def serves(q: Tensor, k: Tensor, v: Tensor, score: Score, reach: int) -> bool:
    """Is this call one for the C, and is there one? `reach`: keys of a run, at most."""
    if not native.wanted(q, k, v) or not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        return False
    simple = score.softcap is None and not score.dropout
    sized = min(reach, k.shape[2]) <= WIDEST and min(*q.shape, *v.shape) > 0
    return simple and sized and _library() is not None


@cache
def _library() -> list[Any] | None:
    """Forward and backward; None where there is no C, said once."""
    return native.on_vectors(
        "run_steps", ("tfast_runs_forward", "tfast_runs_backward"), _Call, "attention within buckets"
    )


@dataclass(frozen=True)
class _Work:
    runs: Runs
    factor: float


def attend_runs(q: Tensor, k: Tensor, v: Tensor, runs: Runs, score: Score) -> Tensor:
    """Attention of q [b h i d] over k [b g j d], v [b g j e], each query over its runs -> [b h i e]; a key that is in
    several of them counts once. A query without keys reads zeros. Differentiable once, in q, k, v and score.sinks.
    ValueError for runs that are not int32."""
    if wrong := {name: x.dtype for name in RUNS if (x := getattr(runs, name)).dtype != torch.int32}:
        raise ValueError(f"expected runs in int32, got {wrong}")
    with torch.autocast(q.device.type, enabled=False):
        return _Runs.apply(q, k, v, score.sinks, _Work(runs, score.factor(q.shape[-1])))


class _Runs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, work: _Work) -> Tensor:
        q, k, v = as_rows(q, k, v)
        b, h, i, _ = q.shape
        top = q.new_full((b, h, i), float("-inf"), dtype=torch.float32)
        total = q.new_zeros(b, h, i, dtype=torch.float32)
        if sinks is not None:
            logits = (sinks.detach().float() * LOG2_E)[:, None]
            top.copy_(logits.expand_as(top))
            total.copy_((logits - logits + 1).masked_fill(logits == float("-inf"), 0).expand_as(total))
        o = _by_position(v, h, i)
        _run(0, work, {"q": q, "k": k, "v": v, "o": o}, top, total)
        some = total != 0  # what is not finite has to stay so
        o.div_(total.where(some, 1.0)[..., None])
        mass = top.add_(total.log2_()).masked_fill_(~some, float("inf"))
        ctx.save_for_backward(q, k, v, sinks, o, mass)  # type: ignore[arg-type]
        ctx.work = work  # type: ignore[attr-defined]
        return o.to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, o, mass = ctx.saved_tensors  # type: ignore[attr-defined]
        (grad,), (h, i), (g, j) = as_rows(grad), q.shape[1:3], k.shape[1:3]
        delta, mass = (o * grad).sum(-1).contiguous(), mass.contiguous()
        dq, dk, dv = _by_position(q, h, i), _by_position(k, g, j), _by_position(v, g, j)
        tensors = {"q": q, "k": k, "v": v, "grad": grad, "dq": dq, "dk": dk, "dv": dv}
        _run(1, ctx.work, tensors, mass, delta)  # type: ignore[attr-defined]
        dsinks = None
        if sinks is not None:
            share = (sinks.detach().float() * LOG2_E)[:, None].sub(mass).exp2_().mul_(delta)
            dsinks = share.sum((0, 2)).neg_().to(sinks.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks, None


def _by_position(like: Tensor, heads: int, rows: int) -> Tensor:
    """Zeros in fp32 [b heads rows width of like], heads side by side as projections make and take them."""
    return like.new_zeros(like.shape[0], rows, heads, like.shape[-1], dtype=torch.float32).transpose(1, 2)


def _run(which: int, work: _Work, tensors: dict[str, Tensor], top: Tensor, total: Tensor) -> None:
    functions = _library()
    if functions is None:
        raise RuntimeError("runs were given to the C, but there is none: ask `serves` first")
    q, k, runs = tensors["q"], tensors["k"], work.runs
    (b, _, i, d), (g, j), share = q.shape, k.shape[1:3], q.shape[1] // k.shape[1]
    longest = int((runs.high - runs.low).amax())
    widest = -(-longest // LANES) * LANES + LANES + SPAN
    pieces = max(1, min(PIECES, share * i // SPAN))
    sizes = g, b * g, share, i, j, d, tensors["v"].shape[-1], len(runs.order), pieces, widest
    call = _Call(
        scale=work.factor,
        bf16=q.dtype == torch.bfloat16,
        threads=min(torch.get_num_threads(), b * g * pieces),
        **dict(zip(SIZES, sizes, strict=True)),
    )
    for name, x in tensors.items():
        setattr(call, name, Rows.of(x))
    held = {name: getattr(runs, name).contiguous() for name in RUNS} | {"top": top, "total": total}
    for name, x in held.items():
        setattr(call, name, x.data_ptr())
    if functions[which](ctypes.byref(call)):
        raise MemoryError("no memory for the scores of a few rows")
