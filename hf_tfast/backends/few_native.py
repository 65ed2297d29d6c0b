"""Softmax attention between many rows and few in C, forward and backward, each one pass over memory.

See few_steps.c, which the machine's own compiler makes on first use (native.py). few.py asks it on CPUs with AVX2 or
more, for fp32 and bf16, up to 1024 few, without a softcap or a bias that needs a gradient; torch's own operations
serve all else, and everything where there is no compiler, which is said once in the log, or where HF_TFAST_NATIVE=0
asks for it.
"""

import ctypes
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import native
from .native import Rows, as_rows, room_like

__all__ = ["keys", "keys_backward", "means", "means_backward", "queries", "queries_backward", "serves"]

DTYPES = (torch.float32, torch.bfloat16)
WIDEST = 1024  # few, at most: a few rows of scores should fit the second-level cache
CHUNK, CHUNKS = 512, 16  # many rows that are summed up together, at least, and how many such parts there are at most
LOG_2 = math.log(2)
NAMES = ("means", "means_backward", "keys", "keys_backward", "queries", "queries_backward")
MANY = ("x", "y", "dx", "dy")
FEW = ("few", "value", "bias", "lse", "rest", "dfew", "dvalue", "top", "total")
SIZES = ("heads", "units", "rows", "n", "d", "e", "chunk")


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, Rows) for name in MANY),
        *((name, ctypes.c_void_p) for name in FEW),
        *((name, ctypes.c_long) for name in SIZES),
        ("bf16", ctypes.c_int),
        ("threads", ctypes.c_int),
    ]


def serves(many: Sequence[Tensor], few: Sequence[Tensor | None], softcap: float | None) -> bool:
    """Is this call one for the C, and is there one? `many` [b h i ..], `few` [n m ..] in at least fp32."""
    tensors = [x for x in (*many, *few) if x is not None]
    if not native.wanted(*tensors) or softcap is not None:
        return False
    if len({x.dtype for x in many}) > 1 or many[0].dtype not in DTYPES:
        return False
    if any(x is not None and x.dtype != torch.float32 for x in few):
        return False
    sized = all(x.numel() for x in tensors) and all(x.shape[1] <= WIDEST for x in few[:1] if x is not None)
    return sized and _library() is not None


@cache
def _library() -> dict[str, Any] | None:
    """The functions by name; None where there is no C, said once."""
    found = native.on_vectors("few_steps", [f"tfast_few_{n}" for n in NAMES], _Call, "attention to a few keys")
    return None if found is None else dict(zip(NAMES, found, strict=True))


def means(x: Tensor, segments: int) -> Tensor:
    """x [b h n d] -> [b h segments d] in fp32."""
    found = x.new_empty(*x.shape[:2], segments, x.shape[-1], dtype=torch.float32)
    _run("means", {"x": x, "y": x}, {"few": found[0], "dfew": found})
    return found


def means_backward(dx: Tensor, grad: Tensor) -> None:
    """Add to dx [b h n d], whose rows lie whole, what comes from the gradient of its means."""
    _run("means_backward", {"x": dx, "y": dx, "dx": dx}, {"few": grad.flatten(0, 1)})


def keys(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """q [b h i d] over the few k [b*h n d] (scaled), v [b*h n e] with bias [b*h 1 n] -> [b h i e], heads side by
    side."""
    (b, h, i, _), e = q.shape, v.shape[-1]
    o = q.new_empty(b, i, h, e).transpose(1, 2)
    _run("keys", {"x": q, "y": o}, {"few": k, "value": v, "bias": bias})
    return o


def keys_backward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, given that of the output."""
    (q,), parts = as_rows(q), _parts(q)
    dq, dk, dv = room_like(q), k.new_empty(parts, *k.shape), v.new_empty(parts, *v.shape)
    few = {"few": k, "value": v, "bias": bias, "dfew": dk, "dvalue": dv}
    _run("keys_backward", {"x": q, "y": grad, "dx": dq}, few)
    return dq, dk.sum(0), dv.sum(0)


def queries(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The few q [b*g n d] (scaled) over k [b g j d], v [b g j e] -> o [b*g n e], log of their sums of weights
    [b*g n]."""
    parts = _parts(k)
    o, (top, total) = q.new_empty(parts, *q.shape[:2], v.shape[-1]), q.new_empty(2, parts, *q.shape[:2]).unbind()
    _run("queries", {"x": k, "y": v}, {"few": q, "value": o[0], "dvalue": o, "top": top, "total": total})
    highest = top.amax(0)
    share = (top - highest).exp2_()
    mass = (share * total).sum(0)
    return o.mul_((share / mass)[..., None]).sum(0), mass.log2().add_(highest).mul_(LOG_2)


def queries_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, rest: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, given that of the output; rest [b*g n] is what every gradient of a score has in
    common: that of lse, less grad . o."""
    k, v = as_rows(k, v)
    dk, dv, dq = room_like(k), room_like(v), q.new_empty(_parts(k), *q.shape)
    few = {"few": q, "value": grad, "lse": lse, "rest": rest, "dfew": dq}
    _run("queries_backward", {"x": k, "y": v, "dx": dk, "dy": dv}, few)
    return dq.sum(0), dk, dv


def _chunk(many: Tensor) -> int:
    """Rows of a chunk: by the shape alone, so that numbers do not depend on the threads."""
    return max(CHUNK, -(-many.shape[2] // CHUNKS))


def _parts(many: Tensor) -> int:
    return -(-many.shape[2] // _chunk(many))


def _run(name: str, many: dict[str, Tensor], few: Mapping[str, Tensor | None]) -> None:
    functions = _library()
    if functions is None:
        raise RuntimeError("attention to a few keys was given to the C, but there is none: ask `serves` first")
    x, y = as_rows(many["x"], many["y"])
    held = {at: None if t is None else t.contiguous() for at, t in few.items()}
    n, e = held["few"].shape[1], y.shape[-1]  # type: ignore[union-attr]
    sizes = x.shape[1], x.shape[0] * x.shape[1], x.shape[2], n, x.shape[-1], e, _chunk(x)
    work = x.shape[0] * (n if name.startswith("means") else x.shape[1] * _parts(x))
    call = _Call(
        bf16=x.dtype == torch.bfloat16,
        threads=min(torch.get_num_threads(), work),
        **dict(zip(SIZES, sizes, strict=True)),
    )
    for at, t in {**many, "x": x, "y": y}.items():
        setattr(call, at, Rows.of(t))
    for at, room in held.items():
        setattr(call, at, None if room is None else room.data_ptr())
    if functions[name](ctypes.byref(call)):
        raise MemoryError("no memory for the scores of a few rows")
