"""Bands and listed blocks in C: scores, softmax and output of a few rows at a time while they lie in the cache.

See band_steps.c, which the machine's own compiler makes on first use (native.py). It serves bands without holes, first
keys and listed blocks of keys on a CPU with AVX2 or more, forward and backward, in fp32 and bf16 (fp16 comes as fp32),
with sink logits; tiles.py serves all else, and everything where there is no compiler, which is said once in the log,
or where HF_TFAST_NATIVE=0 asks for it.
"""

import ctypes
import logging
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import native
from .score import Score
from .tiles import Call, Layout

__all__ = ["SWITCH", "add_backward", "as_rows", "forward", "serves"]

SWITCH = "HF_TFAST_NATIVE"
WIDEST = 4096  # keys of a band, at most: a few rows of scores should fit the second-level cache
ROWS = 24  # of a block
CHUNK = (192, 768)  # queries that share packed keys: a quarter of all, between these
LISTED = (512, 16384)  # blocks in a list, and keys in them, at most
PACKED = 8  # keys to a query, at most, where each chunk packs every key
PIECES, LEAST = 16, 512  # then: chunks in all, and queries of one, so that packing stays a small part
DTYPES = (torch.float32, torch.bfloat16)
logger = logging.getLogger(__name__)


class _Rows(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), *((name, ctypes.c_long) for name in ("b", "h", "row"))]


TENSORS = ("q", "k", "v", "o", "grad", "dq", "dk", "dv")
SIZES = [
    "batch",
    "heads",
    "groups",
    "queries",
    "keys",
    "d",
    "e",
    "before",
    "after",
    "first",
    "offset",
    "chunk",
    "rows",
    "list",
    "most",
    "block",
]


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, _Rows) for name in TENSORS),
        *((name, ctypes.c_void_p) for name in ("sinks", "dsinks", "dfirst", "lists")),
        *((name, ctypes.c_long) for name in SIZES),
        ("scale", ctypes.c_float),
        ("bf16", ctypes.c_int),
        ("threads", ctypes.c_int),
        ("banded", ctypes.c_int),
        ("causal", ctypes.c_int),
    ]


def serves(layout: Layout, score: Score, q: Tensor, k: Tensor, v: Tensor, start: int) -> bool:
    """Is this call one for the C, and is there one?"""
    plain = all(type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" for x in (q, k, v))
    if not plain or q.dtype not in DTYPES or torch.compiler.is_compiling() or start:
        return False
    known = layout.causal or layout.open_sinks or not layout.sinks
    known = known and (layout.solid if layout.lists is None else _serves_lists(layout, q.shape[2], k.shape[2]))
    simple = score.softcap is None and not score.dropout
    sized = 0 < layout.before + layout.after + 1 <= WIDEST and min(*q.shape, *v.shape) > 0
    return known and simple and sized and os.environ.get(SWITCH, "1") != "0" and _library() is not None


def _serves_lists(layout: Layout, i: int, j: int) -> bool:
    """Are the lists short, and the queries worth that every key is packed?"""
    lists = layout.lists
    if lists is None or not (layout.solid or layout.near is None):
        return False
    blocks, keys = LISTED
    most = lists.shape[-1]
    return most <= blocks and max(most, 1) * layout.block <= keys and j <= PACKED * i


@cache
def _library() -> tuple[Any, Any] | None:
    """Forward and backward; None where there is no C, said once."""
    capability = torch.backends.cpu.get_cpu_capability()
    try:
        if not capability.startswith(("AVX", "AMX")):
            raise native.CannotCompile(f"this CPU has no wide vectors ({capability})")
        library = native.load("band_steps")
    except native.CannotCompile as error:
        logger.warning("attention in a window runs on torch's own operations, which is slower: %s", error)
        return None
    both = library.tfast_band_forward, library.tfast_band_backward
    for function in both:
        function.argtypes, function.restype = [ctypes.POINTER(_Call)], ctypes.c_int
    return both


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, o: Tensor) -> None:
    """Write o [b h i e], but for the queries that read everything."""
    _run(0, call, {"q": q, "k": k, "v": v, "o": o}, sinks, _chunk(call))


def add_backward(
    call: Call,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    grad: Tensor,
    grads: tuple[Tensor, Tensor, Tensor, Tensor | None],
) -> None:
    """Write dq, but for the queries that read everything; add to dk, dv and dsinks, all three fp32."""
    (q, k, v, sinks), (dq, dk, dv, dsinks) = inputs, grads
    lay, queries = call.layout, call.i - call.opened
    chunk = max(_chunk(call), lay.before + lay.after)  # then every other chunk has keys of its own
    chunk = chunk if lay.lists is None else max(queries, 1)
    chunks, first = -(-queries // chunk), min(lay.sinks, call.j) if lay.lists is None else 0
    apart = dk.new_zeros(chunks, call.b, call.g, first, call.d + v.shape[-1]) if first else None
    logits = None if dsinks is None else dk.new_zeros(chunks, call.b, call.h)
    (grad,) = as_rows(grad)
    tensors = {"q": q, "k": k, "v": v, "grad": grad, "dq": dq, "dk": dk, "dv": dv}
    _run(1, call, tensors, sinks, chunk, logits, apart)
    if apart is not None:
        more = apart.sum(0)
        dk[:, :, :first] += more[..., : call.d]
        dv[:, :, :first] += more[..., call.d :]
    if dsinks is not None and logits is not None:
        dsinks += logits.sum((0, 1))


def _run(
    which: int,
    call: Call,
    tensors: dict[str, Tensor],
    sinks: Tensor | None,
    chunk: int,
    dsinks: Tensor | None = None,
    apart: Tensor | None = None,
) -> None:
    done = call.opened
    if done >= call.i:
        return
    lay = call.layout
    logits = None if sinks is None else sinks.detach().float().contiguous()
    lists = None if lay.lists is None else _lists(lay.lists, call)
    after = 0 if lay.causal else lay.after
    rows = (0, 0, 1) if lists is None else (lists[0].numel() if len(lists) > 1 else 0, lists.shape[-1], lay.block)
    sizes = (
        call.b, call.h, call.g, call.i - done, call.j, call.d, tensors["v"].shape[-1], lay.before, after,
        min(lay.sinks, call.j), call.offset + done, chunk, ROWS, *rows,
    )  # fmt: skip
    given = _Call(
        scale=call.score.factor(call.d),
        bf16=tensors["q"].dtype == torch.bfloat16,
        threads=min(torch.get_num_threads(), call.b * call.g * -(-(call.i - done) // chunk)),
        banded=lay.near is not None,
        causal=lay.causal,
        **dict(zip(SIZES, sizes, strict=True)),
    )
    for name, x in tensors.items():
        x = x[:, :, done:] if name in ("q", "o", "grad", "dq") else x
        setattr(given, name, _Rows(x.data_ptr(), *x.stride()[:3]))
    for name, room in (("sinks", logits), ("dsinks", dsinks), ("dfirst", apart), ("lists", lists)):
        setattr(given, name, None if room is None else room.data_ptr())
    functions = _library()
    if functions is None:
        raise RuntimeError("a band was given to the C, but there is none: ask `serves` first")
    if functions[which](ctypes.byref(given)):
        raise MemoryError("no memory for the packed keys of a chunk")


def _lists(lists: Tensor, call: Call) -> Tensor:
    """As the C reads them: [h or 1, blocks of queries, at least 1] int64, side by side."""
    if (covered := lists.shape[1] * call.layout.block) < call.j:
        raise ValueError(f"the lists cover {covered} positions, but there are {call.j}")
    if len(lists) not in (1, call.h):
        raise ValueError(f"lists of blocks are for 1 or for all {call.h} heads, got lists of {len(lists)}")
    if not lists.shape[-1]:
        lists = lists.new_full((1, lists.shape[1], 1), -1)
    return lists.to(call.device, torch.int64).contiguous()


def _chunk(call: Call) -> int:
    """Queries of a chunk: by the shape alone, so that numbers do not depend on the threads."""
    least, most = CHUNK
    if call.layout.lists is not None:
        pieces = max(PIECES // (call.b * call.g), 1)
        return max(-(-call.i // pieces), LEAST)
    return min(max(call.i // 4 // ROWS * ROWS, least), most)


def as_rows(*tensors: Tensor) -> list[Tensor]:
    """With the numbers of a row side by side, as C reads them; tensors made like these are so, too."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
